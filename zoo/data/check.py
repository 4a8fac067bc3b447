"""Find what is wrong with shards and images, before a run does."""

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from zoo.data.images import IMAGE_SUFFIXES, EncodedImage
from zoo.data.index import INDEX, ShardIndex
from zoo.data.shards import Entry, folders_of_shards, is_file, members, shards_in
from zoo.data.sources import Source, class_names, open_source
from zoo.data.unreadable import UNREADABLE

IMAGE_BYTES = 2**29
"""Most bytes of an image file: the largest that Pillow decodes has as many uncompressed."""
BLOCK = 500
"""Images of a source without shards that are checked at a time."""


class Problem(NamedTuple):
    """Something wrong, and where."""

    place: str
    reason: str


@dataclass
class Found:
    """What was seen in a shard, or in some of the images."""

    images: int = 0
    """Images that can be read."""
    problems: list[Problem] = field(default_factory=list)

    def note(self, place: object, reason: object) -> None:
        text = " ".join(str(reason).split()).removeprefix(f"{place} ")
        self.problems.append(Problem(str(place), text))


def units(path: Path) -> list[Callable[[], Found]]:
    """Split the check of `path` into functions, which may run side by side.

    Raises:
        ValueError: as `open_source`, for what holds no shards.
    """
    if path.is_file() and path.suffix == ".tar":
        return [partial(check_shard, path)]
    if folders := folders_of_shards(path):
        shards = [shard for folder in folders for shard in shards_in(folder)]
        return [partial(check_folder, f) for f in folders] + [
            partial(check_shard, s) for s in shards
        ]
    source = open_source(path)
    blocks = range(0, len(source), BLOCK)
    return [partial(check_images, source, range(b, min(b + BLOCK, len(source)))) for b in blocks]


def check_folder(folder: Path) -> Found:
    """Hold the index of a folder, if it has one, against the shards beside it."""
    found = Found()
    if not (folder / INDEX).is_file():
        return found
    try:
        index, shards = ShardIndex.load(folder), shards_in(folder)
    except ValueError as error:
        found.note(folder / INDEX, error)
        return found
    for name in index.changed(shards):
        found.note(folder / name, f"changed, or came, after {INDEX} was made")
    for name in sorted(set(index.shards) - {shard.name for shard in shards}):
        found.note(folder / name, f"is missing, and {INDEX} lists it")
    return found


def check_shard(shard: Path) -> Found:
    """Read a shard to its end, decode its images, and look for names of their classes."""
    found = Found()
    names: set[str] = set()
    keys: dict[str, bool] = {}
    numbers: set[int] = set()
    last = None
    try:
        for member in members(shard):
            entry = Entry(shard, member.name, member.offset_data, member.size)
            for reason in _wrong_header(member):
                found.note(entry, reason)
            if not is_file(member):
                continue
            if member.name in names:
                found.note(entry, "comes twice in the shard")
            elif entry.key in keys and entry.key != last:
                found.note(entry, f"stands apart from the other files of its sample, {entry.key}")
            names.add(member.name)
            last = entry.key
            keys[last] = _check_content(entry, found, numbers, keys.get(last, False))
        class_names(np.array(sorted(numbers), np.int64), shard.parent)
    except (ValueError, OSError) as error:
        found.note(shard, error)
    return found


def _wrong_header(member: tarfile.TarInfo) -> Iterator[str]:
    """Yield what is wrong with a member, from its header alone."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        yield "leads out of the folder in which the shard is unpacked"
    if not is_file(member) and not member.isdir():
        kind = "a link" if member.issym() or member.islnk() else "no plain file"
        yield f"is {kind}, which is not read"


def _check_content(entry: Entry, found: Found, numbers: set[int], pictured: bool) -> bool:
    """Read a label or decode an image; return whether its sample has a picture now.

    Args:
        pictured: It had one before: what follows is a map of the picture, not RGB.
    """
    if entry.extension == "cls":
        try:
            numbers.add(entry.label())
        except ValueError as error:
            found.note(entry, error)
    if f".{entry.extension}" not in IMAGE_SUFFIXES:
        return pictured
    if entry.size > IMAGE_BYTES:
        found.note(entry, f"declares {entry.size:,} bytes; an image has {IMAGE_BYTES:,} at most")
    else:
        _decode(entry, entry.read, found, as_stored=pictured)
    return True


def check_images(source: Source, indices: Sequence[int]) -> Found:
    """Decode some images of a source."""
    found = Found()
    for index in indices:
        _decode(source.key(index), lambda index=index: source.read(index), found)
    return found


def _decode(
    place: object, read: Callable[[], bytes], found: Found, *, as_stored: bool = False
) -> None:
    try:
        image = EncodedImage(read(), name="It")
        if as_stored:
            image.raw()
        else:
            image.rgb()
            found.images += 1
    except UNREADABLE as error:
        found.note(place, error)
