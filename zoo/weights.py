"""Read foreign weight files safely, rename their keys, and write files whole or not at all."""

import argparse
import re
import types
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.files import load_tensors
from zoo.safe_pickle import PLAIN, enums, strange_names

SHOWN = 10
"""How many keys a message lists."""

Renames = Sequence[tuple[str, str]]
"""(pattern, replacement) pairs, theirs -> ours; the first that matches a key wins."""


def rename_key(key: str, renames: Renames) -> str:
    """Translate one published key; a key that no pattern matches stays."""
    for pattern, replacement in renames:
        ours, hits = re.subn(pattern, replacement, key)
        if hits:
            return ours
    return key


def rename_keys(
    state: Mapping[str, Tensor], renames: Renames, *, drop: str | None = None
) -> dict[str, Tensor]:
    """Translate a published state dict; keys that match the pattern `drop` are left out."""
    return {
        rename_key(key, renames): value
        for key, value in state.items()
        if not (drop and re.search(drop, key))
    }


def _read_pickle(path: Path) -> Any:
    """Read a torch file with the weights-only reader; zip files are mapped, not copied."""
    strange = strange_names(path)
    try:
        with torch.serialization.safe_globals([*PLAIN, *enums(strange)]):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # a damaged or hostile file may raise anything
        names = f"; it names {', '.join(strange[:SHOWN])}" if strange else ""
        raise ValueError(
            f"{path} was refused: it is damaged, or loading it could run code "
            f"({_reason(error)}{names}). Ask its author for a safetensors file."
        ) from None


def _reason(error: Exception) -> str:
    """Return the reader's complaint, without its advice to load unsafely instead."""
    cause = error.__context__ or error  # torch wraps its unpickler's message in that advice
    message = str(cause).strip() or type(cause).__name__
    return message.partition(". Please use")[0].splitlines()[0]


def unwrapped(content: Any, source: str = "The state dict") -> dict[str, Tensor]:
    """Remove wrapping dicts (an EMA is preferred) and the key prefixes of DDP and compile.

    Args:
        source: What the content is, to start the message.

    Raises:
        ValueError: there is no dict in it whose keys are names.
    """
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(
            f"{source} is a {type(content).__name__}; a dict of tensors is needed, or a dict "
            "with one under `state_dict` or `model`."
        )
    return {re.sub(r"^((module|_orig_mod)\.)+", "", key): value for key, value in content.items()}


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights of a file, and the arguments of the run that made them.

    Nothing in the file is executed. Beside tensors it may hold plain data: an
    `argparse.Namespace`, paths (pure ones come back), numpy numbers (Python ones come back),
    members of enums that are already imported, dtypes, devices. Wrappers (`state_dict`, `model`,
    their EMA forms) and the prefixes `module.` and `_orig_mod.` are taken off.

    Returns:
        The state dict, and the file's `args` as a dict, {} without any. The tensors of a torch file
        are memory-mapped: they cost little until they are used.

    Raises:
        ValueError: the file is damaged, or holds objects other than tensors and plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no weight file {path}.")
    if path.suffix == ".safetensors":
        return load_tensors(path), {}
    content = _read_pickle(path)
    args = content.get("args") if isinstance(content, dict) else None
    if isinstance(args, argparse.Namespace | types.SimpleNamespace):
        args = vars(args)
    return unwrapped(content, str(path)), dict(args) if isinstance(args, Mapping) else {}


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a `.safetensors` or torch file without running code from it.

    Raises:
        ValueError: as for `read_checkpoint`, which says what a file may hold.
    """
    return read_checkpoint(path)[0]


def _listed(kind: str, keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:SHOWN])
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{len(keys)} {kind}: {shown}{more}. " if keys else ""


def check_keys(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    *,
    hint: str,
    optional: str | None = None,
) -> None:
    """Compare a state dict with the model's own, before anything is loaded.

    Args:
        found: The file's state dict.
        wanted: The model's state dict.
        hint: What to do about a difference; it ends the message.
        optional: Pattern of the model's keys that a file may lack.

    Raises:
        ValueError: keys are missing or extra, or shapes differ; at most ten of each are listed.
    """
    missing = [k for k in wanted if k not in found and not (optional and re.search(optional, k))]
    extra = [k for k in found if k not in wanted]
    shapes = [
        f"{k} {tuple(found[k].shape)} for {tuple(wanted[k].shape)}"
        for k in wanted
        if k in found and found[k].shape != wanted[k].shape
    ]
    if missing or extra or shapes:
        raise ValueError(
            "The weights do not fit the model. "
            + _listed("missing", missing)
            + _listed("extra", extra)
            + _listed("of another shape", shapes)
            + hint
        )
