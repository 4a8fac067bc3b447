"""Write files whole or not at all; find the folder of files that can be made again."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` only if the block succeeds.

    Raises:
        OSError: the disk is full or not writable; an existing `path` is unchanged.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp's own mode is for the owner alone
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_whole(content: Any, path: str | Path, save: Callable | None = None) -> None:
    """Write `content` with `save(content, path)`, whole or not at all.

    Args:
        save: `torch.save` unless given.

    Raises:
        OSError: as `written_whole`; torch's own failure to write is turned into one.
    """
    if save is None:
        from torch import save  # names of folders are asked for without it
    try:
        with written_whole(path) as temporary:
            save(content, temporary)
    except RuntimeError as error:  # torch's zip writer hides ENOSPC in a RuntimeError
        raise OSError(f"could not write {path}: {str(error).splitlines()[0]}") from error


def cache_dir() -> Path:
    """Return the folder `$ZOO_CACHE`, else `backbone-zoo` in the user's cache folder."""
    base = os.environ.get("ZOO_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "backbone-zoo"
