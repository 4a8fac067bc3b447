"""Reading a sub-command's arguments: one way for all of them."""

import re
from collections.abc import Collection
from typing import Any

import tyro


def parse(
    kind: Any,
    argv: list[str],
    command: str,
    about: str,
    *,
    several: Collection[str] = (),
    **kwargs: Any,
) -> Any:
    """Read `argv` as fields of the dataclass `kind`; --help shows `about`.

    Args:
        several: Options that may be given several times.

    Raises:
        ValueError: another option is given twice, of which one would be ignored.
    """
    seen = set()
    for word in argv:
        option = _option(word)
        if option in seen and option not in several:
            raise ValueError(f"{option} is given twice; leave out one of them.")
        if option:
            seen.add(option)
    return tyro.cli(kind, args=argv, prog=f"zoo {command}", description=about, **kwargs)


def _option(word: str) -> str:
    """Return the option that a word gives, without its value and as --help spells it; or ""."""
    name = word.partition("=")[0].replace("_", "-")
    return re.sub(r"(^--|\.)no-", r"\1", name) if re.match(r"--[a-zA-Z]", name) else ""


def value_of(argv: list[str], option: str) -> str | None:
    """Read one option before the others, which depend on it; `None` if it is not given."""
    for place, word in enumerate(argv):
        if word == option and place + 1 < len(argv):
            return argv[place + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def named_as_field(argv: list[str], option: str, field: str) -> list[str]:
    """Call an option by the name of its field; leave it out where it stands alone before --help."""
    asks_help = not {"--help", "-h"}.isdisjoint(argv)
    if asks_help and value_of([*argv, "-"], option) in ("-", "-h", "--help"):
        argv = [word for word in argv if word != option]
    words = (word.partition("=") for word in argv)
    return [(field if name == option else name) + equals + value for name, equals, value in words]


def without(argv: list[str], option: str) -> list[str]:
    """Leave an option of one value out."""
    found, words = [], iter(argv)
    for word in words:
        if word == option:
            next(words, None)
        elif not word.startswith(f"{option}="):
            found.append(word)
    return found


def refuse_other_folder(out: Any, resume: Any) -> None:
    """Refuse an --out that is not the folder of the run that --resume goes on with.

    Raises:
        ValueError: they differ.
    """
    if resume is not None and out != resume:
        raise ValueError(f"--resume {resume} goes on in its own folder; leave out --out {out}.")


def resolve_device(name: str) -> str:
    """Resolve `auto`, and refuse a device that speed cannot be measured on.

    Raises:
        ValueError: it is not here, or torch does not time it.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if has_gpu else "cpu"
    if name == "mps":
        raise ValueError("Speed is measured on cpu and cuda; device mps is not waited for.")
    if name not in ("cpu", "cuda") or (name == "cuda" and not has_gpu):
        raise ValueError(f"There is no device {name!r} here; give cpu{', cuda' * has_gpu}.")
    return name
