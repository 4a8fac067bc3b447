"""Write files whole or not at all, read JSON, arrays and tensors, find the user's cache folder."""

import contextlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, get_type_hints

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


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


@contextlib.contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, which gets its name only if the block succeeds.

    Raises:
        OSError: the disk is full or not writable, or `folder` is there and not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield making
        making.chmod(0o777 & ~_umask())  # mkdtemp's own mode is for the owner alone
        for file in making.iterdir():
            file.chmod(0o666 & ~_umask())
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def try_writing(folder: Path) -> None:
    """Make a file in a folder, or in the nearest one around it that exists, and take it away.

    It is the only test that also knows of read-only disks.

    Raises:
        ValueError: it cannot be made.
    """
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"Cannot write to {folder}: {reason}. Give another --out.") from error


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


JSON_BYTES = 2**24
"""Size that a JSON file may have, unless its reader expects more."""
ANNOTATION_BYTES = 2**31
"""Size that a file of annotations may have; the largest of COCO has 470 million bytes."""


def read_json(path: Path, kind: Any = dict[str, Any], *, most: int = JSON_BYTES) -> Any:
    """Read a JSON file whose content has the type `kind`.

    Args:
        kind: Any type of JSON values, such as `list[str]` or a `TypedDict`; see `checked`.
        most: Bytes that the file may have.

    Raises:
        ValueError: it is larger, is not JSON, or has another type; the file is named.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"{path} has {size:,} bytes; at most {most:,} are read.")
    return parse_json(path.read_bytes(), kind, str(path))


def parse_json(text: str | bytes, kind: Any, what: str) -> Any:
    """Return the value of a JSON text if it has the type `kind`.

    Args:
        what: Where the text stands, to start the message.

    Raises:
        ValueError: it is not JSON, or has another type.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{what} cannot be read: it is nested too deeply for JSON.") from None
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}.") from None
    return checked(value, kind, what)


def json_items(path: Path, kind: Any = dict[str, Any], *, chunk: int = 2**20) -> Iterator[Any]:
    """Yield the items of a JSON file that is one list, with a part of its text in memory at a time.

    Args:
        kind: Type of an item; see `checked`.
        chunk: Characters that are read at once; for an item that is longer, ever more.

    Raises:
        ValueError: it is no JSON list, or an item has another type; the file, the entry and the
            character are named. The items before that place have been yielded by then.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        encoding = json.detect_encoding(file.read(4))
    number = 0
    # `json.loads` decodes bytes in the same way; an untranslated "\r\n" keeps places right
    with path.open(encoding=encoding, errors="surrogatepass", newline="") as file:
        text = _JsonText(file, chunk)
        try:
            text.take("[", "it is no list")
            while text.peek() != "]" or number:
                yield checked(text.value(), kind, f"{path}, entry {number}")
                if text.peek() == "]":
                    break
                text.take(",", "a comma or ] is missing")
                number += 1
            text.take("]", "")
            text.take("", "there is more behind the list")
        except (_NotJson, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON at entry {number}: {error}.") from None


class _NotJson(Exception):
    def __init__(self, why: object, place: int):
        super().__init__(f"{why} (char {place})")


class _JsonText:
    """The text of a file from `at` on; what stands before it is dropped when more is read."""

    def __init__(self, file: TextIO, chunk: int):
        self.file, self.chunk = file, chunk
        self.text, self.at, self.dropped = "", 0, 0
        self.decode = json.JSONDecoder().raw_decode

    def _more(self) -> bool:
        rest = self.text[self.at :]
        read = self.file.read(max(self.chunk, len(rest)))  # doubling: a long item costs twice
        self.dropped, self.text, self.at = self.dropped + self.at, rest + read, 0
        return bool(read)

    def peek(self) -> str:
        """Return the next character that is no space, or "" at the end."""
        while not (found := re.compile(r"[^ \t\n\r]").search(self.text, self.at)):
            self.at = len(self.text)
            if not self._more():
                return ""
        self.at = found.start()
        return found[0]

    def take(self, mark: str, otherwise: str) -> None:
        if self.peek() != mark:
            raise _NotJson(otherwise, self.dropped + self.at)
        self.at += len(mark)

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except RecursionError:
                raise _NotJson("it is nested too deeply", self.dropped + self.at) from None
            except json.JSONDecodeError as error:
                value, end, wrong = None, -1, _NotJson(error.msg, self.dropped + error.pos)
            except ValueError as error:  # a number of too many digits
                raise _NotJson(error, self.dropped + self.at) from None
            else:
                wrong = None
                # "1" may be the beginning of "1.5": only what follows tells
                if self.text[end : end + 1] in (*" \t\n\r,]",):
                    break
            if not self._more():
                if wrong:
                    raise wrong
                break
        self.at = end
        return value


def checked(value: Any, kind: Any, what: str) -> Any:
    """Return a value as it is if it has the type `kind`; all items of lists and dicts are checked.

    Args:
        what: Where the value stands, to start the message.

    Raises:
        ValueError: it has another type.
    """
    from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

    try:
        return check_type(value, kind, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{what} has another form than it should: {reason}.") from None


def checked_fields(kind: type[T], values: Mapping[str, Any], what: str) -> T:
    """Build a dataclass from a JSON object; every value must have its field's type.

    Args:
        what: Where the object stands, to start the message.

    Raises:
        ValueError: a field is missing, unknown, has another type, or a value that it cannot have.
    """
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{what} has a field {name!r}, which {kind.__name__} lacks.")
        checked(value, hints[name], f"{what}, field {name},")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:  # a field is missing: Python's message names it
        raise ValueError(f"{what} is no {kind.__name__}: {str(error).rstrip('.')}.") from None


def read_arrays(path: Path) -> dict[str, Any]:
    """Read the arrays of a `.npz` file by name, or the one of a `.npy` file under the name "".

    Raises:
        ValueError: the file is damaged, or holds Python objects.
        OSError: it cannot be read.
    """
    import numpy as np

    with path.open("rb") as file:
        try:
            found = np.load(file, allow_pickle=False)
            return {"": found} if isinstance(found, np.ndarray) else dict(found.items())
        except Exception as error:  # numpy and zipfile raise whatever they stumble over
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} holds no readable arrays ({reason}).") from None


CHECKSUM = "crc32"
"""The key of a checksum in the metadata of a safetensors file."""


def save_tensors(tensors: Mapping[str, "Tensor"], path: str | Path) -> None:
    """Write tensors as safetensors, whole or not at all, with the checksum of their bytes.

    Raises:
        OSError: as `save_whole`.
    """
    from safetensors.torch import save_file

    metadata = {"format": "pt", CHECKSUM: checksum(tensors)}
    save_whole(dict(tensors), path, partial(save_file, metadata=metadata))


def load_tensors(path: str | Path) -> dict[str, "Tensor"]:
    """Read the tensors of a safetensors file; hold them against their checksum, if it has one.

    Raises:
        ValueError: there is no such file, it is damaged, or has tensors of a type that torch lacks.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            wanted = (file.metadata() or {}).get(CHECKSUM)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # a class of its own, which safetensors' torch part does not name
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    if wanted is not None and wanted != checksum(tensors):
        raise ValueError(f"{path} is damaged: its tensors do not have the checksum {wanted}.")
    return tensors


def checksum(tensors: Mapping[str, "Tensor"]) -> str:
    """Return the CRC-32 of the names, types, shapes and bytes of tensors: about 1 GB a second."""
    from torch import uint8

    found = 0
    for name, value in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), found)
        raw = value.detach().cpu().contiguous().flatten().view(uint8)
        found = zlib.crc32(raw.numpy().data, found)
    return f"{found:08x}"


def near(place: str | Path, others: Iterable[str] = ()) -> str:
    """Return what an error adds about a place that is not there: one beside it of a similar name.

    Args:
        others: Names that are meant as well, though no file or folder has them.
    """
    path, beside = Path(place), list[str]()
    with contextlib.suppress(OSError):  # of the folder there may be nothing to see
        beside = sorted(found.name for found in path.parent.iterdir() if found.name[0] != ".")
    similar = get_close_matches(path.name, [*beside, *others], n=1)
    if not similar or similar[0] == path.name:
        return ""
    return f" Did you mean {path.parent / similar[0] if similar[0] in beside else similar[0]}?"


def cache_dir() -> Path:
    """Return the folder `$ZOO_CACHE`, else `backbone-zoo` in the user's cache folder."""
    base = os.environ.get("ZOO_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "backbone-zoo"
