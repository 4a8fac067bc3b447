"""What `zoo eval` measures: a vision model by images, a language model by text, or one of both."""

from pathlib import Path

from zoo.eval.benchmarks import BENCHMARKS, WORDS, Kind, kind_of
from zoo.eval.language.subject import TextSubject, open_text_subject
from zoo.eval.multimodal.subject import (
    ImageTextSubject,
    is_image_text,
    open_image_text_subject,
)
from zoo.eval.registry import Subject
from zoo.eval.subject import EvalRequest, is_run_folder, open_subject
from zoo.language.open import split_name

Measured = Subject | TextSubject | ImageTextSubject


def refuse_other_kind(target: str | None, request: EvalRequest) -> None:
    """Refuse to measure a language model by images, and a model of both by less.

    Raises:
        ValueError: that is asked for; or models of several kinds are.
    """
    wanted: Kind = kind_of(request.on)
    found: Kind | None = None
    if target is not None and is_image_text(target):
        found = "multimodal"
    elif target is not None and (target.startswith("lm:") or split_name(target)[0]):
        found = "language"
    if found is not None and wanted != found:
        known = ", ".join(n for n, b in BENCHMARKS.items() if b.model == found)
        a = WORDS[found].replace("models", "model", 1)
        raise ValueError(f"{target} is a {a}; measure it with --on {known}.")


def open_measured(target: str | None, request: EvalRequest) -> Measured:
    """Open what is measured: a model of the kind that the benchmarks are of.

    Raises:
        ValueError: as `open_subject`, `open_text_subject` and `open_image_text_subject`.
    """
    kind = kind_of(request.on)
    if kind != "vision":
        opened = open_text_subject if kind == "language" else open_image_text_subject
        return opened(
            target, tokenizer=request.tokenizer, device=request.place,
            precision=request.precision, batch=request.batch, seed=request.seed,
        )  # fmt: skip
    is_run = target is not None and is_run_folder(Path(target))
    subject = open_subject(str(Path(target or "") / "export") if is_run else target, request)
    subject.name = str(target or subject.name)
    return subject
