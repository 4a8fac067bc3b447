"""The one reader of tar shards: where each file of a shard begins, and what is in its labels."""

import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from zoo.data.images import printable

HEADER_BYTES = 2**20
"""Most bytes of one extended header; a name and some numbers take a few hundred."""
LABEL_BYTES = 18
"""Most bytes of a `.cls` file: a number of so many digits fits 64 bits."""
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of a compressed file -> by what."""


class Entry(NamedTuple):
    """A file inside a shard."""

    shard: Path
    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """The sample it belongs to: the name up to the first dot of its last part."""
        folder, _, name = self.name.rpartition("/")
        stem = name.partition(".")[0]
        return f"{folder}/{stem}" if folder else stem

    @property
    def extension(self) -> str:
        """What follows that dot, in lower case."""
        return self.name.rpartition("/")[2].partition(".")[2].lower()

    def read(self) -> bytes:
        """Return the bytes of the file.

        Raises:
            OSError: the shard cannot be read.
        """
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def label(self) -> int:
        """Read a `.cls` file.

        Raises:
            ValueError: it holds no number of a class.
        """
        text = (
            self.read() if self.size <= LABEL_BYTES else f"more than {LABEL_BYTES} bytes".encode()
        )
        if not text.strip().isdigit():
            raise ValueError(
                f"{self.shard}/{printable(self.name)} holds {text.decode(errors='replace')!r}; a "
                ".cls file holds the number of a class, counted from 0."
            )
        return int(text)

    def __str__(self) -> str:
        return f"{self.shard}/{printable(self.name)}"


class _Headers(io.BufferedReader):
    """A shard as tarfile reads it: no header may claim to be longer than `HEADER_BYTES`."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= HEADER_BYTES:
            raise ValueError(f"a header declares {size} bytes; at most {HEADER_BYTES:,} are read")
        return super().read(size)


def shards_in(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """List the shards in a folder, those alone whose name begins with one of `names` if any."""
    return [s for s in sorted(folder.glob("*.tar")) if is_shard(s.name, names) and s.is_file()]


def is_shard(name: str, names: Sequence[str]) -> bool:
    """Return whether a file is not hidden, and its name begins with one of `names` if any."""
    return bool(re.match(rf"(?!\.)({'|'.join(names)})\b" if names else r"(?!\.)", name))


def folders_of_shards(path: Path) -> list[Path]:
    """List `path` and its sub-folders, as far as shards are in them."""
    inside = sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
    return [folder for folder in (path, *inside) if shards_in(folder)]


def entries(shard: Path) -> Iterator[Entry]:
    """Yield the files of a shard in their order.

    Raises:
        ValueError: as `members`.
        OSError: it cannot be read.
    """
    for member in members(shard):
        if is_file(member):
            yield Entry(shard, member.name, member.offset_data, member.size)


def is_file(member: tarfile.TarInfo) -> bool:
    """Return whether a member is a file that stands in the shard as it is, and so is read."""
    return member.isreg() and not member.issparse()


def members(shard: Path) -> Iterator[tarfile.TarInfo]:
    """Yield everything that has a header in a shard, links and folders too.

    Raises:
        ValueError: it is no tar file, is compressed, was cut, or goes on behind its end.
        OSError: it cannot be read.
    """
    with _Headers(io.FileIO(shard)) as file:
        start = file.read(8)
        for magic, name in PACKED.items():
            if start.startswith(magic):
                raise ValueError(
                    f"{shard} is compressed by {name}; images are read from their places in a "
                    f"shard, so unpack it once ({name} -d) and give the .tar itself."
                )
        file.seek(0)
        length, count = shard.stat().st_size, 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # pyright: ignore  # they would fill the memory
                    if not 0 <= member.size <= length - member.offset_data:
                        raise ValueError(
                            f"{printable(member.name)} declares {member.size} bytes, more than "
                            "there are"
                        )
                    count += is_file(member)
                    yield member
        except Exception as error:  # tarfile raises whatever it stumbles over
            raise ValueError(f"{shard} is not a readable tar file: {error}.") from error
        file.seek(min(tar.offset, length))
        _check_end(shard, file, count)


def _check_end(shard: Path, file: io.BufferedReader, count: int) -> None:
    """tarfile stops at whatever is no header; only zeros are the end of a shard."""
    rest = file.read(HEADER_BYTES)
    if len(rest) < 512:
        raise ValueError(
            f"{shard} ends without tar's end mark, after {count} files: it was cut, or is still "
            "being written. Copy it again."
        )
    if rest.count(0) != len(rest):
        what = "is damaged" if any(rest[:512]) else "goes on behind tar's end mark (two in one?)"
        raise ValueError(
            f"{shard} {what}, after {count} files that could be found; what follows would be "
            "lost. Copy it again, or unpack it and pack it into one."
        )
