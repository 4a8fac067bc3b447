"""What `zoo plan` and `zoo launch` share: options of their own among those of `zoo distill`."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from zoo.commands.distill_args import is_text, read_args
from zoo.commands.parse import parse
from zoo.train.distill.config import Distill
from zoo.train.distill.scaling import scaled_to, shared_out


def read_words(
    kind: Any, argv: list[str], command: str, about: str, *, flags: Collection[str] = ()
) -> tuple[Any, list[str]]:
    """Read the fields of a dataclass; return it, and the words that are for `zoo distill`.

    Args:
        flags: Options without a value; each other one has a word behind it, or numbers.
    """
    options = {f"--{name.replace('_', '-')}" for name in kind.__dataclass_fields__} | {"--help"}
    own, rest, words = [], [], ["--help" if word == "-h" else word for word in argv]
    while words:
        word = words.pop(0)
        if word.partition("=")[0] not in options:
            rest.append(word)
            continue
        own.append(word)
        if "=" not in word and word not in flags and words:
            own.append(words.pop(0))
            while own[-1].isdigit() and words and words[0].isdigit():
                own.append(words.pop(0))
    return parse(kind, own, command, about), rest


def read_stages(words: list[str], command: str) -> dict[str, Distill]:
    """Read a recipe and its options as `zoo distill` does.

    Raises:
        ValueError: as `zoo distill`; or they are not those of a new run on images.
    """
    for word in words:
        if (option := word.partition("=")[0]) in ("--text", "--resume", "--dry-run"):
            raise ValueError(f"zoo {command} takes a recipe of images; leave out {option}.")
    assert not is_text(words)
    return read_args(words).stages


def on_gpus(config: Distill, words: list[str], gpus: int) -> Distill:
    """Return the run on so many GPUs: with its own --batch, or with one that grows with them.

    What the words say themselves stays.

    Raises:
        ValueError: the GPUs cannot share the batch, or the --slices.
    """
    given = {word.partition("=")[0] for word in words}
    if "--slices" in given and config.slices != "auto" and config.num_slices % gpus:
        near = max(1, round(config.num_slices / gpus)) * gpus
        raise ValueError(
            f"{gpus} GPUs cannot share {config.num_slices} slices; {near} would do, or leave out "
            "--slices."
        )
    if given & {"--batch", "--batches", "--slices"}:
        return shared_out(config, gpus)
    run = scaled_to(config, gpus)
    if "--steps" in given:
        run = replace(run, steps=config.steps)
    if "--every.evaluate" in given:
        run = replace(run, every=config.every)
    if given & {"--optim.lr", "--optim.min-lr"}:
        run = replace(run, optim=config.optim)
    return run
