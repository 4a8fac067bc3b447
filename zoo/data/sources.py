"""Where images come from: folders, webdataset's tar shards, `.npz` files."""

import logging
import os
import re
import tarfile
import zipfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from zoo.data.plan import mix

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"))
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}

_log = logging.getLogger(__name__)


@runtime_checkable
class Source(Protocol):
    """Encoded images with names, and labels where the data has them."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, by label; empty without labels."""
        ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Return the name of an image, which no other image of the source has."""
        ...

    def label(self, index: int) -> int | None:
        """Return the class of an image as an index into `classes`; `None` without labels."""
        ...

    def read(self, index: int) -> bytes:
        """Return the encoded image.

        Raises:
            OSError: its file cannot be read.
        """
        ...


@dataclass(frozen=True)
class FolderSource:
    """Image files below a folder. If all are in sub-folders, the topmost ones are the classes."""

    root: Path
    files: tuple[str, ...]
    classes: tuple[str, ...] = ()

    @classmethod
    def scan(cls, root: Path) -> "FolderSource":
        """Find every image below `root`, sorted by path; symbolic links are followed."""
        files = []
        for folder, _, names in os.walk(root, followlinks=True):
            inside = Path(folder).relative_to(root)
            files += [
                (inside / n).as_posix() for n in names if Path(n).suffix.lower() in IMAGE_SUFFIXES
            ]
        files.sort()
        tops = {f.split("/")[0] if "/" in f else "" for f in files}
        classes = () if "" in tops or len(tops) < 2 else tuple(sorted(tops))
        return cls(root, tuple(files), classes)

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return self.files[index]

    def label(self, index: int) -> int | None:
        if not self.classes:
            return None
        return bisect_left(self.classes, self.files[index].split("/")[0])

    def read(self, index: int) -> bytes:
        return (self.root / self.files[index]).read_bytes()


class _Member(NamedTuple):
    shard: int
    offset: int
    size: int
    key: str
    label: int | None


@dataclass(frozen=True)
class TarSource:
    """Shards in webdataset's format. Only the format is theirs: the plan decides the order.

    The headers are read once; images are then read from their offsets, in any order.
    """

    shards: tuple[Path, ...]
    members: tuple[_Member, ...]
    classes: tuple[str, ...] = ()

    @classmethod
    def scan(cls, shards: Sequence[Path]) -> "TarSource":
        """Index the images of `shards`, and their `.cls` labels.

        Raises:
            ValueError: a shard is no readable tar file.
        """
        members: list[_Member] = []
        for number, shard in enumerate(shards):
            try:
                members += _index_shard(number, shard)
            except (tarfile.TarError, EOFError) as error:
                raise ValueError(f"{shard} is not a readable tar file: {error}") from error
        labels = {m.label for m in members}
        classes = ()
        if labels and None not in labels:
            classes = tuple(str(i) for i in range(max(i for i in labels if i is not None) + 1))
        return cls(tuple(shards), tuple(members), classes)

    def __len__(self) -> int:
        return len(self.members)

    def key(self, index: int) -> str:
        return f"{self.shards[self.members[index].shard].name}/{self.members[index].key}"

    def label(self, index: int) -> int | None:
        return self.members[index].label

    def read(self, index: int) -> bytes:
        shard, offset, size, *_ = self.members[index]
        with self.shards[shard].open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _index_shard(number: int, shard: Path) -> list[_Member]:
    images, labels = [], {}
    with tarfile.open(shard) as tar:
        for entry in tar:
            if not entry.isfile():
                continue
            folder, _, name = entry.name.rpartition("/")
            stem, _, extension = name.partition(".")  # webdataset: the key ends at the first dot
            key = f"{folder}/{stem}" if folder else stem
            if extension == "cls":
                file = tar.extractfile(entry)
                labels[key] = int(file.read()) if file else None
            elif f".{extension.lower()}" in IMAGE_SUFFIXES:
                images.append((key, entry.offset_data, entry.size, f"{key}.{extension}"))
    # a segmentation sample has two images under one key; the first is the picture
    first: dict[str, tuple] = {}
    for image in images:
        first.setdefault(image[0], image)
    return [
        _Member(number, offset, size, name, labels.get(key))
        for key, offset, size, name in first.values()
    ]


@dataclass(frozen=True, eq=False)
class NpzSource:
    """Many small encoded images in one file: the bytes of all, their offsets and their labels."""

    file: Path
    data: np.ndarray
    """All encoded images, one after the other, as bytes."""
    offsets: np.ndarray
    """Where each image begins in `data`, and where the last ends: one more than the images."""
    labels: np.ndarray
    classes: tuple[str, ...]

    @classmethod
    def scan(cls, file: Path) -> "NpzSource":
        """Read `data` (bytes), `offsets` and `labels` from a file that `numpy.savez` wrote.

        Raises:
            ValueError: they are not in the file, or their lengths do not fit.
        """
        try:
            with np.load(file) as parts:
                data, offsets, labels = (parts[k] for k in ("data", "offsets", "labels"))
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} has no data, offsets and labels: {error}") from error
        if len(offsets) != len(labels) + 1:
            raise ValueError(f"{file} has {len(labels)} labels and {len(offsets)} offsets.")
        names = tuple(str(i) for i in range(int(labels.max()) + 1 if len(labels) else 0))
        return cls(file, data, offsets, labels, names)

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        return f"{self.file.name}/{index}"

    def label(self, index: int) -> int | None:
        return int(self.labels[index])

    def read(self, index: int) -> bytes:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()


@dataclass(frozen=True)
class Subset:
    """Some samples of a source."""

    source: Source
    chosen: tuple[int, ...]
    """Their indices in `source`."""

    @property
    def classes(self) -> Sequence[str]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.chosen)

    def key(self, index: int) -> str:
        return self.source.key(self.chosen[index])

    def label(self, index: int) -> int | None:
        return self.source.label(self.chosen[index])

    def read(self, index: int) -> bytes:
        return self.source.read(self.chosen[index])


def spread(source: Source, limit: int) -> Source:
    """Return at most `limit` samples, evenly spread: files are sorted, often by class."""
    if len(source) <= limit:
        return source
    return Subset(source, tuple(np.linspace(0, len(source) - 1, limit).astype(int).tolist()))


def open_source(path: Path) -> Source:
    """Open a folder of images, a `.tar` shard, a folder of shards, or a `.npz` of images.

    Raises:
        ValueError: there is nothing at `path`, it has another format, or there is no image in it.
    """
    if not path.exists():
        raise ValueError(f"There is no data at {path}; give an image folder or tar shards.")
    if path.is_file():
        if path.suffix not in (".tar", ".npz"):
            raise ValueError(f"{path} is neither a folder nor a .tar shard nor a .npz file.")
        source: Source = NpzSource.scan(path) if path.suffix == ".npz" else TarSource.scan([path])
    else:
        shards = sorted(path.glob("*.tar"))
        source = TarSource.scan(shards) if shards else FolderSource.scan(path)
    if not len(source):
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"There is no image in {path}; images end in {known}, shards in .tar.")
    return source


def open_splits(path: Path, held_out: float) -> tuple[Source, Source]:
    """Open the training and the validation part of `path`.

    They are the folders, `.npz` files or shards called train and val, if there are both. Otherwise
    the share `held_out` of the samples is set aside by a hash of their names, so that the choice
    stays the same when files are added.

    Raises:
        ValueError: as `open_source`, or there is but one image.
    """
    parts = {split: _part(path, names) for split, names in SPLITS.items()}
    if parts["train"] and parts["val"]:
        return parts["train"], parts["val"]
    source = open_source(path)
    order = sorted(range(len(source)), key=lambda i: mix(*source.key(i).encode()))
    count = max(1, round(held_out * len(source)))
    if count >= len(source):
        raise ValueError(f"{path} has {len(source)} image; there is none left to hold out.")
    return Subset(source, tuple(sorted(order[count:]))), Subset(
        source, tuple(sorted(order[:count]))
    )


def _part(path: Path, names: Sequence[str]) -> Source | None:
    if not path.is_dir():
        return None
    for name in names:
        if (path / name).is_dir():
            return open_source(path / name)
        if (path / f"{name}.npz").is_file():
            return open_source(path / f"{name}.npz")
    shards = [s for s in sorted(path.glob("*.tar")) if re.match(rf"({'|'.join(names)})\b", s.name)]
    return TarSource.scan(shards) if shards else None
