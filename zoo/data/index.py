"""Where each image of a folder's shards lies: two arrays, in one file beside the shards.

Reading the headers of a million images takes ten seconds and more; mapping the file takes a tenth
of one, and all ranks and workers of a machine share its memory.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from zoo.data.images import IMAGE_SUFFIXES
from zoo.data.shards import Entry, entries, is_shard
from zoo.files import load_tensors, save_tensors

INDEX = "index.safetensors"
"""Name of the file."""
SHARD, OFFSET, SIZE, NUMBER, BEGIN, END = range(6)
"""Columns of the rows: number of the shard; offset and bytes of the image in it; the number in its
`.cls` file, or -1; where its name begins and ends among the names."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The images of shards in one folder, in the shards' order."""

    folder: Path
    shards: tuple[str, ...]
    """Names of the shards."""
    stamps: np.ndarray
    """[shards, 2] int64: bytes of each shard, and the time of its last change in nanoseconds."""
    rows: np.ndarray
    """[images, 6] int64: see `SHARD` to `END`."""
    names: np.ndarray
    """The names of all images, one after another, as uint8."""
    mapped: tuple[str, ...] | None = None
    """The shards whose rows these are, if the arrays are the map of a file."""

    @classmethod
    def scan(cls, shards: Iterable[Path], lost: dict[str, str] | None = None) -> "ShardIndex":
        """Read the headers of shards, which lie in one folder.

        Args:
            lost: Takes the paths of damaged shards, which then are left out, and what is wrong.

        Raises:
            ValueError: a shard is no whole tar file, or a label is no number.
            OSError: it cannot be read.
        """
        seen: list[Path] = []
        stamps, parts, names = [], [np.empty((0, 6), np.int64)], bytearray()
        for shard in shards:
            try:
                now = stamp(shard)  # first: a change while it is read shows
                images = images_in(shard)
            except (ValueError, OSError) as error:
                if lost is None:
                    raise
                lost[str(shard)] = str(error)
                continue
            rows = []
            for entry, label in images:
                begin = len(names)
                names += os.fsencode(entry.name)
                rows.append((len(seen), entry.offset, entry.size, label, begin, len(names)))
            seen.append(shard)
            stamps.append(now)
            parts.append(np.array(rows, np.int64).reshape(-1, 6))
        if not seen:
            raise ValueError(f"No shard can be read: {'; '.join((lost or {}).values())}")
        return cls(
            seen[0].parent,
            tuple(shard.name for shard in seen),
            np.array(stamps, np.int64),
            np.concatenate(parts),
            np.frombuffer(names, np.uint8),
        )

    def save(self) -> Path:
        """Write the file, whole or not at all."""
        import torch

        shards = np.frombuffer(bytearray(os.fsencode("/".join(self.shards))), np.uint8)
        arrays = dict(shards=shards, stamps=self.stamps, rows=self.rows, names=self.names)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        save_tensors(tensors, self.folder / INDEX)
        return self.folder / INDEX

    @classmethod
    def load(cls, folder: Path) -> "ShardIndex":
        """Map the file of a folder; what is not used of it takes no memory of its own.

        Raises:
            ValueError: it is damaged.
        """
        path = folder / INDEX
        arrays = {name: tensor.numpy() for name, tensor in load_tensors(path).items()}
        try:
            shards, stamps, rows, names = (arrays[n] for n in ("shards", "stamps", "rows", "names"))
            known = tuple(os.fsdecode(shards.tobytes()).split("/"))
            whole = stamps.shape == (len(known), 2) and rows.ndim == 2 and rows.shape[1] == 6
            kinds = {stamps.dtype.str, rows.dtype.str} == {"<i8"} and names.dtype == np.uint8
            if not whole or not kinds or not _in_order(rows[:, SHARD], len(known)):
                raise ValueError(f"{path} is no index of shards.")
        except KeyError as error:
            raise ValueError(f"{path} is no index of shards: it has no {error}.") from None
        return cls(folder, known, stamps, rows, names, mapped=known)

    def part(self, shards: Sequence[str]) -> "ShardIndex":
        """Return the rows of some of its shards, in its own order."""
        numbers = sorted(map(self.shards.index, shards))
        column = self.rows[:, SHARD]
        if numbers == list(range(numbers[0], numbers[-1] + 1)):  # remains a part of the map
            rows = self.rows[slice(*np.searchsorted(column, (numbers[0], numbers[-1] + 1)))]
        else:
            rows = self.rows[np.isin(column, numbers)]
        return replace(self, rows=rows, mapped=self.mapped and tuple(shards))

    def changed(self, shards: Sequence[Path]) -> list[str]:
        """Name those of `shards` that are not as they were when the index was made."""
        known = dict(zip(self.shards, map(tuple, self.stamps.tolist()), strict=True))
        return [shard.name for shard in shards if known.get(shard.name) != stamp(shard)]

    def __reduce__(self):
        if self.mapped is None:
            return ShardIndex, tuple(getattr(self, field.name) for field in fields(self))
        return _mapped_again, (self.folder, self.mapped)

    def __len__(self) -> int:
        return len(self.rows)

    def entry(self, index: int) -> Entry:
        """Return where an image lies."""
        shard, offset, size, _, begin, end = self.rows[index].tolist()
        name = os.fsdecode(self.names[begin:end].tobytes())
        return Entry(self.folder / self.shards[shard], name, offset, size)


def index_of(
    shards: Sequence[Path],
    names: Sequence[str] | None = None,
    lost: dict[str, str] | None = None,
) -> ShardIndex:
    """Return the index of shards of one folder: its file's, or their headers' if there is none.

    A file that does not fit the shards is not used, and a warning says so.

    Args:
        names: The shards are all of the folder that begin with one of these, as `shards_in` found
            them: others that the file lists are missing. `None` for shards that were named.
        lost: As in `ShardIndex.scan`; missing shards too.

    Raises:
        ValueError: as `ShardIndex.scan`, or a shard is missing.
    """
    folder = shards[0].parent
    if not (folder / INDEX).is_file():
        return ShardIndex.scan(shards, lost)
    try:
        index = ShardIndex.load(folder)
    except ValueError as error:
        reason = str(error)
    else:
        missing = [] if names is None else _missing(index, names)
        if lost is not None:
            lost |= {str(folder / n): f"{folder / n} is missing" for n in missing}
        elif missing:
            raise ValueError(
                f"{len(missing)} shards are missing in {folder} ({missing[0]} first), which "
                f"{INDEX} lists. Copy them again; or zoo data index {folder} writes it anew."
            )
        changed = index.changed(shards)
        if not changed:
            return index.part([shard.name for shard in shards])
        reason = (
            f"{len(changed)} of {len(shards)} shards changed or came since ({changed[0]} first)"
        )
    _log.warning(
        "%s is not used, and every header is read instead: %s. zoo data index %s writes it anew.",
        folder / INDEX, reason, folder,
    )  # fmt: skip
    return ShardIndex.scan(shards, lost)


def _missing(index: ShardIndex, names: Sequence[str]) -> list[str]:
    listed = [name for name in index.shards if is_shard(name, names)]
    return [name for name in listed if not (index.folder / name).is_file()]


def images_in(shard: Path) -> list[tuple[Entry, int]]:
    """Return the images of a shard, one a sample, with the number in its `.cls` file or -1.

    Raises:
        ValueError: it is no whole tar file, or a label is no number.
    """
    # a segmentation sample has two images under one key; the first is the picture
    images: dict[str, Entry] = {}
    labels: dict[str, int] = {}
    for entry in entries(shard):
        if entry.extension == "cls":
            labels[entry.key] = entry.label()
        elif f".{entry.extension}" in IMAGE_SUFFIXES:
            images.setdefault(entry.key, entry)
    return [(entry, labels.get(key, -1)) for key, entry in images.items()]


def stamp(shard: Path) -> tuple[int, int]:
    """Return the bytes of a file, and the time of its last change in nanoseconds."""
    about = shard.stat()
    return about.st_size, about.st_mtime_ns


def _mapped_again(folder: Path, shards: Sequence[str]) -> ShardIndex:
    return ShardIndex.load(folder).part(shards)


def _in_order(column: np.ndarray, count: int) -> bool:
    """Return whether a column of numbers of shards never falls, and stays below `count`."""
    if not len(column):
        return True
    return bool((np.diff(column) >= 0).all() and column[0] >= 0 and column[-1] < count)
