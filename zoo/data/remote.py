"""Shards behind a URL that fsspec knows (https, s3, gs, ...), read by their index.

`index.safetensors`, which `zoo data pack` and `zoo data index` write, is fetched once into the
user's cache and mapped; an image is one request for its bytes.
"""

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zoo.data.index import INDEX
from zoo.files import cache_dir, written_whole

REQUESTS = 16
"""Shards whose sizes are asked for at a time."""
PAUSES = (0.5, 2.0, 8.0)
"""Seconds before a read is tried again: an image that is given up is replaced by another, and a
network that falters must not decide what a run sees."""


def is_remote(path: Path | str) -> bool:
    """Return whether it is a URL, not a path."""
    return isinstance(path, str) and "://" in path


def fetch(url: str, names: Sequence[str]) -> Path:
    """Fetch the index of a folder, and what `names` says beside it; return where they lie here.

    A changed index has another place, so one that is mapped stays as it is.

    Raises:
        ValueError: there is no index, or fsspec is missing or knows no such URL.
        OSError: the place cannot be reached.
    """
    files, folder = _files(url)
    if not has_index(url):
        raise ValueError(
            f"There is no {INDEX} at {url}, by which shards are read from afar. zoo data index "
            "writes it beside the shards; put it there with them."
        )
    state = f"{url} {files.ukey(f'{folder}/{INDEX}')}"
    here = cache_dir() / "remote" / hashlib.sha256(state.encode()).hexdigest()[:16]
    here.mkdir(parents=True, exist_ok=True)
    for name in (*names, INDEX):  # the index comes last: with it the place is whole
        if not (here / INDEX).is_file() and files.exists(f"{folder}/{name}"):
            with written_whole(here / name) as temporary:
                files.get_file(f"{folder}/{name}", str(temporary))
    return here


def has_index(url: str) -> bool:
    """Return whether there is an index of shards."""
    files, folder = _files(url)
    return files.exists(f"{folder}/{INDEX}")


def sizes(url: str, names: Sequence[str]) -> list[int | None]:
    """Return the bytes of files; `None` for those that are missing."""
    files, folder = _files(url)

    def size(name: str) -> int | None:
        try:
            return files.info(f"{folder}/{name}")["size"]
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(REQUESTS) as threads:
        return list(threads.map(size, names))


def read(url: str, name: str, offset: int, size: int) -> bytes:
    """Read a part of a file.

    Raises:
        OSError: it cannot be read, or is shorter, or the server gives no parts of files.
    """
    files, folder = _files(url)
    for pause in (*PAUSES, None):
        try:
            return _exactly(size, files.cat_file(f"{folder}/{name}", offset, offset + size))
        except Exception as error:  # each of fsspec's places has errors of its own
            if pause is None or isinstance(error, FileNotFoundError):
                raise OSError(f"{url}/{name} cannot be read: {error!r}") from error
            time.sleep(pause)
    raise AssertionError("the last failure is raised")


def _exactly(size: int, data: bytes) -> bytes:
    if len(data) != size:
        raise OSError(f"{len(data)} bytes came for {size}; does the server give parts of files?")
    return data


def _files(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, made anew in a forked worker, and the path in it."""
    if not find_spec("fsspec"):
        raise ValueError(f"{url} is read by fsspec: pip install 'backbone-zoo[remote]'.")
    from fsspec.core import url_to_fs

    try:
        files, folder = url_to_fs(url)
    except ImportError as error:  # the place's own package; fsspec names it
        raise ValueError(f"{url} cannot be read: {error}") from error
    return files, folder.rstrip("/")
