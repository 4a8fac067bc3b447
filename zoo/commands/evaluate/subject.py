"""What `zoo eval` measures: a vision model by images, a language model by text, or one of both."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.eval.benchmarks import BENCHMARKS, WORDS, Kind, kind_of
from zoo.eval.detect.benchmark import OWN
from zoo.eval.detect.detector import is_detector, read_spec
from zoo.eval.language.subject import TextSubject, open_text_subject
from zoo.eval.multimodal.subject import (
    ImageTextSubject,
    is_image_text,
    open_image_text_subject,
)
from zoo.eval.registry import Subject
from zoo.eval.subject import EvalRequest, is_run_folder, open_subject
from zoo.language.open import split_name
from zoo.students.export import read_heads
from zoo.students.start import HEADS

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


def refuse_ignored(target: str, size: int | None, words: Sequence[str]) -> None:
    """Refuse options that a target has decided itself: an export its size, a detector all of its.

    `words` are those of the command line: they tell what was given from what is a default.

    Raises:
        ValueError: such an option is there.
    """
    folder = Path(target)
    if trained := is_detector(folder):
        prefix = "--detect."
        given = [w.partition("=")[0] for w in words if w.startswith(prefix)]
        names = [w.removeprefix(prefix).removeprefix("no-").replace("-", "_") for w in given]
        ignored = [w for w, name in zip(given, names, strict=True) if name not in OWN]
        own = read_spec(trained / "config.json").size
        ignored += [f"--size {size}"] if size not in (None, own) else []
        if ignored:
            raise ValueError(
                f"{target} is a trained detector and is measured as it is, at {own} px: leave out "
                f"{', '.join(ignored)}. It takes "
                f"{', '.join(f'{prefix}{name}'.replace('_', '-') for name in OWN)}."
            )
    elif size is not None and (heads := find_heads(folder)):
        own = heads["size"]
        if size != own:
            raise ValueError(
                f"{target} is an export for images of {own} px: leave out --size {size}. "
                "--segment.crop and --depth.crop have sizes of their own."
            )


def find_heads(folder: Path) -> dict[str, Any] | None:
    """Return what an export, or that of a run, says of itself; `None` if there is none."""
    for place in (folder, folder / "export"):
        if (place / HEADS).is_file():
            return read_heads(place)
    return None


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
