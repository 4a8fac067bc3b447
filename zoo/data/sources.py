"""Where images come from: folders, webdataset's tar shards, tables, `.npz` files."""

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from zoo.data import remote
from zoo.data.arrow import ArrowSource, parts_in, tables_in
from zoo.data.images import IMAGE_SUFFIXES, printable
from zoo.data.index import NUMBER, ShardIndex, index_of
from zoo.data.npz import NpzSource
from zoo.data.plan import mix
from zoo.data.remote import is_remote
from zoo.data.shards import is_shard, shards_in
from zoo.data.walk import image_files
from zoo.files import near, read_json

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
CLASSES = "classes.json"
"""A file beside shards: the names of the classes that their `.cls` files count."""

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
        """Find every image below `root`, as `image_files` does."""
        files = image_files(root)
        tops = {printable(f.split("/")[0]) if "/" in f else "" for f in files}
        classes = () if "" in tops or len(tops) < 2 else tuple(sorted(tops))
        return cls(root, tuple(files), classes)

    def __len__(self) -> int:
        return len(self.files)

    def key(self, index: int) -> str:
        return printable(self.files[index])

    def label(self, index: int) -> int | None:
        if not self.classes:
            return None
        return bisect_left(self.classes, printable(self.files[index].split("/")[0]))

    def read(self, index: int) -> bytes:
        return (self.root / self.files[index]).read_bytes()


@dataclass(frozen=True, eq=False)
class TarSource:
    """Shards in webdataset's format. Only the format is theirs: the plan decides the order.

    Images are read from their offsets, in any order.
    """

    index: ShardIndex
    numbers: np.ndarray
    """The numbers that the `.cls` files hold, each once and sorted; empty without labels."""
    classes: tuple[str, ...] = ()

    @classmethod
    def scan(
        cls,
        shards: Sequence[Path],
        names: Sequence[str] | None = None,
        lost: dict[str, str] | None = None,
    ) -> "TarSource":
        """Find the images of `shards` and their `.cls` labels: in their folder's index, or in them.

        Args:
            names: As in `index_of`.
            lost: Takes missing and damaged shards, which then are left out, with the reason.

        Raises:
            ValueError: a shard is missing or no whole tar file, a label is no number, or `CLASSES`
                lacks it.
        """
        known = set(lost or ())
        index = index_of(shards, names, lost)
        for shard, reason in (lost or {}).items():
            if shard not in known:
                _log.warning("A shard is left out: %s", reason)
        return cls.of(index)

    @classmethod
    def of(cls, index: ShardIndex) -> "TarSource":
        """Return the images of an index, with their classes.

        Raises:
            ValueError: `CLASSES` lacks a label.
        """
        column = index.rows[:, NUMBER]
        without = np.flatnonzero(column < 0)
        if 0 < len(without) < len(index):
            _log.warning(
                "%d of %d images have no .cls (%s first), so the classes of the others are not "
                "used.", len(without), len(index), index.entry(int(without[0])),
            )  # fmt: skip
        numbers = np.unique(column[:0] if len(without) else column)
        return cls(index, numbers, class_names(numbers, index.folder))

    def __len__(self) -> int:
        return len(self.index)

    def key(self, index: int) -> str:
        entry = self.index.entry(index)
        return f"{printable(entry.shard.name)}/{printable(entry.name)}"

    def label(self, index: int) -> int | None:
        if not self.classes:
            return None
        return int(np.searchsorted(self.numbers, self.index.rows[index, NUMBER]))

    def read(self, index: int) -> bytes:
        return self.index.entry(index).read()


@dataclass(frozen=True, eq=False)
class RemoteSource:
    """Shards behind a URL, which their index describes; each image is a request of its own."""

    url: str
    indexed: TarSource
    """What the index, fetched to here, knows of them; its shards are elsewhere."""

    @classmethod
    def open(
        cls, url: str, names: Sequence[str] = (), lost: dict[str, str] | None = None
    ) -> "RemoteSource | None":
        """Open the shards at `url`, those alone whose name begins with one of `names` if any.

        Returns `None` if there are no such.

        Args:
            lost: Takes shards that are missing or have another size, which then are left out.

        Raises:
            ValueError: there is no index, or a shard is missing or has another size.
        """
        index = ShardIndex.load(remote.fetch(url, (CLASSES,)))
        listed = [shard for shard in index.shards if is_shard(shard, names)]
        if not listed:
            return None
        known = dict(zip(index.shards, index.stamps[:, 0].tolist(), strict=True))
        wrong = {
            f"{url}/{shard}": f"{url}/{shard} " + ("is missing" if size is None else
            f"has {size:,} bytes, {known[shard]:,} when it was indexed")
            for shard, size in zip(listed, remote.sizes(url, listed), strict=True)
            if size != known[shard]
        }  # fmt: skip
        if wrong and (lost is None or len(wrong) == len(listed)):
            raise ValueError(f"{len(wrong)} of {len(listed)} shards: {next(iter(wrong.values()))}.")
        for reason in wrong.values():
            _log.warning("A shard is left out: %s", reason)
        if lost is not None:
            lost |= wrong
        left = [shard for shard in listed if f"{url}/{shard}" not in wrong]
        return cls(url, TarSource.of(index.part(left)))

    @property
    def classes(self) -> Sequence[str]:
        return self.indexed.classes

    def __len__(self) -> int:
        return len(self.indexed)

    def key(self, index: int) -> str:
        return self.indexed.key(index)

    def label(self, index: int) -> int | None:
        return self.indexed.label(index)

    def read(self, index: int) -> bytes:
        entry = self.indexed.index.entry(index)
        return remote.read(self.url, entry.shard.name, entry.offset, entry.size)


def class_names(numbers: np.ndarray, folder: Path) -> tuple[str, ...]:
    """Return the names of classes, from `CLASSES` or as the sorted numbers that they have.

    Raises:
        ValueError: there is such a file in `folder`, and it is damaged or too short.
    """
    file = folder / CLASSES
    if not len(numbers) or not file.is_file():
        return tuple(map(str, numbers.tolist()))
    names = read_json(file, list[str])
    if numbers[-1] >= len(names):
        raise ValueError(f"{file} names {len(names)} classes, and a .cls file holds {numbers[-1]}.")
    return tuple(names[number] for number in numbers.tolist())


@dataclass(frozen=True, eq=False)
class Subset:
    """Some samples of a source, with its classes or in another list of classes."""

    source: Source
    chosen: Sequence[int] | np.ndarray
    """Their indices in `source`."""
    names: tuple[str, ...] | None = None
    """Classes in place of the source's, matched by name; a sample whose class it lacks has none."""

    @property
    def classes(self) -> Sequence[str]:
        return self.source.classes if self.names is None else self.names

    @cached_property
    def _renumbered(self) -> dict[int, int]:
        index = {name: label for label, name in enumerate(self.classes)}
        return {old: index[n] for old, n in enumerate(self.source.classes) if n in index}

    def __len__(self) -> int:
        return len(self.chosen)

    def key(self, index: int) -> str:
        return self.source.key(self.chosen[index])

    def label(self, index: int) -> int | None:
        label = self.source.label(self.chosen[index])
        return label if label is None else self._renumbered.get(label)

    def read(self, index: int) -> bytes:
        return self.source.read(self.chosen[index])


def spread(source: Source, limit: int) -> Source:
    """Return at most `limit` samples, evenly spread: files are sorted, often by class."""
    if len(source) <= limit:
        return source
    return Subset(source, tuple(np.linspace(0, len(source) - 1, limit).astype(int).tolist()))


def open_source(path: Path | str, lost: dict[str, str] | None = None) -> Source:
    """Open a folder of images, of shards or of tables, a `.tar` shard, or a table or `.npz`.

    A URL (text with ://) is a folder of shards with their index, which fsspec reads.

    Args:
        lost: Takes the paths of shards that are missing or damaged, which then are left out and
            named in a warning, and what is wrong with each; without, they are refused.

    Raises:
        ValueError: there is nothing at `path`, it has another format, or there is no image in it.
    """
    if is_remote(path):
        return _not_empty(RemoteSource.open(str(path), lost=lost), path)
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"There is no data at {path}; give an image folder or tar shards.{near(path)}"
        )
    if path.is_file() and path.suffix in FILES:
        source = FILES[path.suffix](path)
    elif path.is_dir():
        source = _open_folder(path, lost)
    else:
        known = ", ".join(FILES)
        raise ValueError(f"{path} is neither a folder nor a file that ends in {known}.")
    return _not_empty(source, path)


FILES: dict[str, Callable[[Path], Source | None]] = {
    ".tar": lambda path: TarSource.scan([path]),
    ".npz": NpzSource.scan,
    ".arrow": lambda path: ArrowSource.open([path]),
    ".parquet": lambda path: ArrowSource.open([path]),
}
"""What reads a file alone, by its ending."""


def _open_folder(path: Path, lost: dict[str, str] | None) -> Source:
    if shards := shards_in(path):
        return TarSource.scan(shards, (), lost)
    if parts := parts_in(path):
        raise ValueError(
            f"{path} has the parts {', '.join(parts)}, which are not called train and val; give "
            f"one of them ({path / parts[0]})."
        )
    tables = tables_in(path)
    # a folder of images may hold a table of something else
    found = ArrowSource.open(tables) if tables else None
    return found or FolderSource.scan(path)


def _not_empty(source: Source | None, path: Path | str) -> Source:
    if not source or not len(source):
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(
            f"There is no image in {path}; images end in {known}, shards in .tar, tables with a "
            "column of images in .arrow or .parquet."
        )
    return source


def open_splits(
    path: Path | str, held_out: float, lost: dict[str, str] | None = None
) -> tuple[Source, Source]:
    """Open the training and the validation part of `path`, each with its own list of classes.

    They are the folders, `.npz` files or shards called train and val, if there are both. Otherwise
    the share `held_out` of the samples is set aside by a hash of their names, so that the choice
    stays the same when files are added.

    Args:
        lost: As in `open_source`.

    Raises:
        ValueError: as `open_source`, or there is but one image.
    """
    parts = open_parts(path, lost)
    if len(parts) == 2:
        return parts["train"], parts["val"]
    (source,) = parts.values()
    order = _by_hash([source.key(i).encode() for i in range(len(source))])
    count = max(1, round(held_out * len(source)))
    if count >= len(source):
        raise ValueError(f"{path} has {len(source)} image; there is none left to hold out.")
    return Subset(source, np.sort(order[count:])), Subset(source, np.sort(order[:count]))


def open_whole(path: Path | str) -> Source:
    """Open the images of `path` that are tested where nothing is trained on the others.

    They are the part called val if there is one, with the classes of both parts if there are two;
    all images of `path` otherwise, none of which is held out.

    Raises:
        ValueError: as `open_source`.
    """
    parts = open_parts(path)
    if len(parts) == 2:
        return in_one_list(parts["train"], parts["val"], path)[1]
    (source,) = parts.values()
    return source


def _by_hash(names: Sequence[bytes]) -> np.ndarray:
    """Return the order of names by their hash; those of one length are hashed at once."""
    lengths = np.array(list(map(len, names)))
    hashes = np.empty(len(names), np.int64)
    for length in np.unique(lengths):
        here = np.flatnonzero(lengths == length)
        table = np.frombuffer(b"".join(names[i] for i in here.tolist()), np.uint8).reshape(
            -1, length
        )
        hashes[here] = mix(*table.T)
    return np.argsort(hashes, kind="stable")


def open_parts(path: Path | str, lost: dict[str, str] | None = None) -> dict[str, Source]:
    """Open the parts of `path` called train and val, or all of it as one part without a name.

    Raises:
        ValueError: as `open_source`.
    """
    parts = {name: part for name, words in SPLITS.items() if (part := _part(path, words, lost))}
    if is_remote(path):
        return parts if len(parts) == 2 else {"": open_source(path, lost)}
    path = Path(path)
    alone = parts and not shards_in(path) and not tables_in(path) and len(_folders(path)) < 2
    return parts if len(parts) == 2 or alone else {"": open_source(path, lost)}


def _part(path: Path | str, names: Sequence[str], lost: dict[str, str] | None) -> Source | None:
    if is_remote(path):
        inside = [f"{path}/{name}" for name in names if remote.has_index(f"{path}/{name}")]
        if inside:
            return RemoteSource.open(inside[0], lost=lost)
        return RemoteSource.open(str(path), names, lost) if remote.has_index(str(path)) else None
    path = Path(path)
    if not path.is_dir():
        return None
    for name in names:
        if (path / name).is_dir():
            return open_source(path / name, lost)
        if (path / f"{name}.npz").is_file():
            return open_source(path / f"{name}.npz")
    if shards := shards_in(path, names):
        return TarSource.scan(shards, names, lost)
    tables = () if shards_in(path) else tables_in(path, names)
    return ArrowSource.open(tables) if tables else None


def _folders(path: Path) -> list[Path]:
    return [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]


def open_labelled(
    path: Path | str, held_out: float, lost: dict[str, str] | None = None
) -> tuple[Source, Source]:
    """Open both parts as `open_splits` does, with their labels in one list of classes.

    Args:
        lost: As in `open_source`.

    Raises:
        ValueError: as `open_splits`.
    """
    return in_one_list(*open_splits(path, held_out, lost), path)


def in_one_list(train: Source, val: Source, path: Path | str) -> tuple[Source, Source]:
    """Let both parts of `path` count their labels in one list of classes, matched by name.

    A warning names the classes that one part lacks. If they have none in common, both parts are
    without classes.
    """
    ours, theirs = set(train.classes), set(val.classes)
    if list(train.classes) == list(val.classes):
        return train, val
    for name, there, lacking in (("val", ours, theirs), ("train", theirs, ours)):
        if lost := sorted(there - lacking, key=_by_number):
            shown = ", ".join(lost[:5]) + ", ..." * (len(lost) > 5)
            _log.warning("%s of %s lacks %d classes: %s", name, path, len(lost), shown)
    if not ours & theirs:
        _log.warning("train and val of %s have no class in common: none is used.", path)
    names = tuple(sorted(ours | theirs, key=_by_number)) if ours & theirs else ()
    return Subset(train, range(len(train)), names), Subset(val, range(len(val)), names)


def _by_number(name: str) -> tuple[bool, int, str]:
    """Sort numbers by their value, before other names."""
    number = name.isascii() and name.isdecimal()
    return not number, int(name) if number else 0, name
