"""Shards that can only be read from front to back (a pipe, an object store), through webdataset.

The images of a stream are numbered in the order of its list of shards, pass after pass. The plan
shuffles them within blocks of that order, so which image stands at which step follows from the
seed, the step and the list; but there is no way to an image other than past those before it. Every
worker of every rank reads the whole stream and decodes its own images alone, and a resume reads up
to where the run was.
"""

import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.data.check import IMAGE_BYTES
from zoo.data.images import IMAGE_SUFFIXES, printable
from zoo.data.names import STREAM
from zoo.data.plan import Plan, mix, shuffled
from zoo.data.shards import Entry, is_file

HELD_OUT = 512
"""Images at the beginning that are held out; of a stream below twice as many, half of it."""
BLOCK = 256
"""Images that are shuffled among each other. A worker holds two such blocks, encoded."""
ENDLESS = 2**62
"""Images of a stream: it begins again."""
ORDER = 10
"""Salt of `mix` for the order of a block."""


class Sample(NamedTuple):
    """An encoded image, and its name."""

    key: str
    data: bytes


@dataclass(frozen=True)
class StreamPlan(Plan):
    """Samples in the order of a stream, but for a shuffle within each of its blocks."""

    block: int = BLOCK

    def indices_at(self, positions: np.ndarray) -> np.ndarray:
        blocks, within = np.divmod(positions, self.block)
        out = np.empty_like(within)
        for number in np.unique(blocks):
            here = blocks == number
            key = mix(self.seed, ORDER, int(number))
            out[here] = number * self.block + shuffled(within[here], self.block, key)
        return out


@dataclass(frozen=True, eq=False)
class Held:
    """Some images of a stream, in memory."""

    samples: tuple[Sample, ...] = field(repr=False)
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, index: int) -> str:
        return self.samples[index].key

    def label(self, index: int) -> int | None:
        return None

    def read(self, index: int) -> bytes:
        return self.samples[index].data


@dataclass(frozen=True, eq=False)
class StreamSource:
    """The images of a list of shards by their place in the order of reading; without labels.

    Reading in that order, or a block back, costs nothing; what lies further back costs a new start.
    """

    urls: tuple[str, ...]
    held: int
    """Images at the beginning of each pass that are left out."""
    block: int = BLOCK
    classes: tuple[str, ...] = ()
    _reader: dict[int, "_Reader"] = field(default_factory=dict, repr=False)
    """Of each process: a forked one may not share the pipe of the one before it."""

    def __len__(self) -> int:
        return ENDLESS

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | dict(_reader={})

    def _blocks(self) -> "_Reader":
        here = os.getpid()
        if here not in self._reader:
            self._reader[here] = _Reader(self.urls, self.held, self.block)
        return self._reader[here]

    def key(self, index: int) -> str:
        known = self._blocks().kept.get(index // self.block)
        return known[index % self.block].key if known else f"image {index} of the stream"

    def label(self, index: int) -> int | None:
        return None

    def read(self, index: int) -> bytes:
        return self._blocks().at(index).data


class _Reader:
    """Goes through a stream, and keeps the two blocks that it read last."""

    def __init__(self, urls: Sequence[str], held: int, block: int):
        self.urls, self.held, self.block = urls, held, block
        self.kept: dict[int, list[Sample]] = {}
        self.length: int | None = None
        self._begin(0)

    def _begin(self, position: int) -> None:
        """Start a pass, whose first image is that at `position`."""
        self.began = self.position = position
        self.samples = islice(samples_of(self.urls), self.held, None)

    def at(self, index: int) -> Sample:
        number = index // self.block
        if number not in self.kept:
            self._go_to(number * self.block)
            self.kept[number] = [self._next() for _ in range(self.block)]
            while len(self.kept) > 2:
                del self.kept[next(iter(self.kept))]
        return self.kept[number][index % self.block]

    def _go_to(self, position: int) -> None:
        # where it is known how long a pass is, those in between are not read
        begin = position - position % self.length if self.length else 0
        if position < self.position or begin > self.position:
            self._begin(begin)
        while self.position < position:
            self._next()

    def _next(self) -> Sample:
        sample = next(self.samples, None)
        if sample is None:
            count = self.position - self.began
            if count == 0 or self.length not in (None, count):
                raise ValueError(
                    f"A pass through {_shown(self.urls)} gave {count:,} images, and the one before "
                    f"{self.length or 'none'}; their order is known only while it stays the same."
                )
            self.length = count
            self._begin(self.position)
            return self._next()
        self.position += 1
        return sample


def samples_of(urls: Sequence[str]) -> Iterator[Sample]:
    """Yield the images of shards as they come: of each sample the first.

    Raises:
        ValueError: a shard cannot be read to its end mark, or its command failed.
    """
    count = 0
    for url in urls:
        try:
            last = None
            with _opened(url) as file:
                for entry, data in _images(file, url):
                    if entry.key != last:
                        last, count = entry.key, count + 1
                        yield Sample(f"{_last_part(url)}/{printable(entry.name)}", data)
        except Exception as error:  # each handler has errors of its own
            reason = " ".join(str(error).split()) or repr(error)
            raise ValueError(
                f"{url} broke off after {count:,} images of the stream: {reason}. What follows has "
                "no place without them; when it can be read again, --resume goes on."
            ) from error


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    """Open a URL or a command; what is left before its end is ended, if this process began it."""
    from webdataset import gopen  # pyright: ignore[reportAttributeAccessIssue]

    owner, file = os.getpid(), gopen(url)
    try:
        yield file
    except BaseException:
        with suppress(Exception):
            if (process := getattr(file, "proc", None)) and owner == os.getpid():
                process.kill()
                process.wait()
            getattr(file, "stream", file).close()
        raise
    file.close()  # waits for a command, and raises if it failed


class _Strict(tarfile.TarInfo):
    """A header of a shard that must have its end mark: without, it was cut."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Strict":  # pyright: ignore
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EmptyHeaderError:  # pyright: ignore[reportAttributeAccessIssue]
            raise OSError("it ends without tar's end mark") from None


def _images(opened: Any, url: str) -> Iterator[tuple[Entry, bytes]]:
    with tarfile.open(fileobj=opened, mode="r|*", tarinfo=_Strict) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # pyright: ignore  # they would fill the memory
            entry = Entry(Path(url), member.name, member.offset_data, member.size)
            if not is_file(member) or f".{entry.extension}" not in IMAGE_SUFFIXES:
                continue
            if member.size > IMAGE_BYTES:
                raise OSError(f"{printable(member.name)} declares {member.size:,} bytes")
            content = tar.extractfile(member)
            assert content is not None  # it is a file
            yield entry, content.read()
        rest: Any = tar.fileobj
        while block := rest.read(2**20):
            if block.count(0) != len(block):
                raise OSError("it goes on behind tar's end mark (two in one?)")


def _last_part(url: str) -> str:
    """Return the name of a shard: of a URL the end, of a command its last word that is one."""
    words = [word for word in url.split() if ".tar" in word] or [url]
    return words[-1].rpartition("/")[2]


def _shown(urls: Sequence[str]) -> str:
    return urls[0] if len(urls) == 1 else f"{urls[0]} and {len(urls) - 1} more"


def open_stream(data: str) -> tuple[StreamSource, Held]:
    """Open a stream for training; its first images are held out, and read at once.

    Args:
        data: `stream:` and URLs or commands (`pipe:...`) as webdataset has them, with braces for
            numbers (`{000..099}`) and `::` between several.

    Raises:
        ValueError: it cannot be read, has fewer than two images, or webdataset is missing.
    """
    if not find_spec("webdataset"):
        raise ValueError("Streams are read by webdataset: pip install 'backbone-zoo[train]'.")
    from webdataset.shardlists import expand_urls

    urls = tuple(expand_urls(data.removeprefix(STREAM)))
    if urls == ("",):
        raise ValueError(f"{data} names no shards; give stream:https://HOST/a-{{000..099}}.tar.")
    first = list(islice(samples_of(urls), 2 * HELD_OUT))
    held = min(HELD_OUT, len(first) // 2)
    if not held:
        raise ValueError(f"{data} has {len(first)} images; there is none left to hold out.")
    return StreamSource(urls, held), Held(tuple(first[:held]))
