"""What `zoo eval` measures: a vision model by images, or a language model by text."""

from pathlib import Path

from zoo.eval.benchmarks import BENCHMARKS, measures_language
from zoo.eval.language.subject import TextSubject, open_text_subject
from zoo.eval.registry import Subject
from zoo.eval.subject import EvalRequest, is_run_folder, open_subject
from zoo.language.open import split_name

Measured = Subject | TextSubject


def refuse_language(target: str | None, request: EvalRequest) -> None:
    """Refuse to measure a language model by images.

    Raises:
        ValueError: that is asked for; or language and vision models are both.
    """
    named = target is not None and (target.startswith("lm:") or split_name(target)[0])
    if named and not measures_language(request.on):
        known = ", ".join(n for n, b in BENCHMARKS.items() if b.model == "language")
        raise ValueError(f"{target} is a language model; measure it with --on {known}.")


def open_measured(target: str | None, request: EvalRequest) -> Subject | TextSubject:
    """Open what is measured: a language model if the benchmarks are of these.

    Raises:
        ValueError: as `open_subject` and `open_text_subject`.
    """
    if measures_language(request.on):
        return open_text_subject(
            target, tokenizer=request.tokenizer, device=request.place,
            precision=request.precision, batch=request.batch, seed=request.seed,
        )  # fmt: skip
    is_run = target is not None and is_run_folder(Path(target))
    subject = open_subject(str(Path(target or "") / "export") if is_run else target, request)
    subject.name = str(target or subject.name)
    return subject
