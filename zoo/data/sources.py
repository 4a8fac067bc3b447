"""Where images come from (folders, webdataset tar shards), and how one becomes a view."""

import io
import logging
import math
import os
import re
import tarfile
import warnings
import zipfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from zoo.data.plan import Plan, mix
from zoo.features import Batch

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"))
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
UNREADABLE = (
    UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError,
)  # fmt: skip
TRIES = 16

_log = logging.getLogger(__name__)


@runtime_checkable
class Source(Protocol):
    """Encoded images with names, and labels where the data has them."""

    @property
    def classes(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def key(self, index: int) -> str: ...
    def label(self, index: int) -> int | None: ...
    def read(self, index: int) -> bytes: ...


@dataclass(frozen=True)
class FolderSource:
    """Image files below a folder; the sub-folder right below it is the class, if all have one."""

    root: Path
    files: tuple[str, ...]
    classes: tuple[str, ...] = ()

    @classmethod
    def scan(cls, root: Path) -> "FolderSource":
        """Find every image below `root`, in the order of their names."""
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
    """Webdataset shards: the format is kept, the sampling is the plan's.

    The headers are read once; images are then read at random from their offsets.
    """

    shards: tuple[Path, ...]
    members: tuple[_Member, ...]
    classes: tuple[str, ...] = ()

    @classmethod
    def scan(cls, shards: Sequence[Path]) -> "TarSource":
        """Index the images of `shards`, and their `.cls` labels."""
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
    """Many small encoded images in one file: bytes of all, where each begins, and a label each."""

    file: Path
    data: np.ndarray
    offsets: np.ndarray
    """One more than there are images."""
    labels: np.ndarray
    classes: tuple[str, ...]

    @classmethod
    def scan(cls, file: Path) -> "NpzSource":
        """Read `data` (bytes), `offsets` and `labels` of a file that numpy wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            with np.load(file) as parts:
                data, offsets, labels = (parts[k] for k in ("data", "offsets", "labels"))
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} holds no data, offsets and labels: {error}") from error
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


def open_source(path: Path) -> Source:
    """Open a folder of images, a `.tar` shard, a folder of shards, or a `.npz` of images.

    Raises:
        ValueError: there is nothing at `path`, or no image in it.
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

    Folders (or shards) called train and val are taken as such; otherwise `held_out` of the
    samples is set aside by a hash of their names, so that the choice survives new files.
    """
    parts = {split: _part(path, names) for split, names in SPLITS.items()}
    if parts["train"] and parts["val"]:
        return parts["train"], parts["val"]
    source = open_source(path)
    order = sorted(range(len(source)), key=lambda i: mix(*source.key(i).encode()))
    count = max(1, round(held_out * len(source)))
    if count >= len(source):
        raise ValueError(f"{path} holds {len(source)} image; there is none left to hold out.")
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


@dataclass(frozen=True, kw_only=True)
class View:
    """How an image becomes a square: a random crop in training, the centre in evaluation."""

    size: int
    scale: tuple[float, float] = (0.5, 1.0)
    """Share of the image's area that a random crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def train(self, data: bytes, draws: np.random.Generator) -> np.ndarray:
        """Crop, maybe mirror, and resize to [3 size size] bytes."""
        area, aspect, x, y, mirror = draws.random(5)
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        share = self.scale[0] + area * (self.scale[1] - self.scale[0])
        low, high = (math.log(r) for r in self.ratio)
        aspect = math.exp(low + aspect * (high - low))
        w = min(width, math.sqrt(share * width * height * aspect))
        h = min(height, math.sqrt(share * width * height / aspect))
        box = (x * (width - w), y * (height - h), x * (width - w) + w, y * (height - h) + h)
        pixels = self._resize(image, box)
        return pixels[:, :, ::-1] if mirror < self.flip else pixels

    def evaluate(self, data: bytes) -> np.ndarray:
        """Take the largest centred square and resize it to [3 size size] bytes."""
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return self._resize(image, (left, top, left + side, top + side))

    def _resize(self, image: Image.Image, box: tuple[float, ...]) -> np.ndarray:
        width = image.size[0]
        # a JPEG can be decoded at 1/2, 1/4 or 1/8; never below the size that the crop needs
        need = self.size / min(box[2] - box[0], box[3] - box[1])
        image.draft("RGB", tuple(math.ceil(need * side) for side in image.size))
        shrunk = image.size[0] / width
        box = tuple(min(edge * shrunk, image.size[i % 2]) for i, edge in enumerate(box))
        image = image.convert("RGB")
        image = image.resize((self.size,) * 2, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
        return np.asarray(image).transpose(2, 0, 1)


class Views(Dataset):
    """Samples by (position, index); an unreadable one is replaced by its next neighbour.

    The replacement depends on the files alone, so a resumed run makes the same one.
    """

    def __init__(self, source: Source, view: View, plan: Plan | None):
        self.source, self.view, self.plan = source, view, plan

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> dict:
        position, index = item
        skipped = []
        for number in range(min(TRIES, len(self.source))):
            chosen = (index + number) % len(self.source)
            try:
                data = self.source.read(chosen)
                if self.plan is None:
                    pixels = self.view.evaluate(data)
                else:
                    pixels = self.view.train(data, self.plan.draws(position))
            except UNREADABLE:
                skipped.append(self.source.key(chosen))
                continue
            label = self.source.label(chosen)
            return dict(
                image=torch.from_numpy(np.ascontiguousarray(pixels)),
                key=self.source.key(chosen),
                position=position,
                label=-1 if label is None else label,
                skipped=skipped,
            )
        raise ValueError(
            f"{len(skipped)} files in a row are unreadable, from {skipped[0]} on; is this the "
            "right folder?"
        )


class PlanSampler:
    """Batches of (position, index) of the steps `start`..`steps`, in the plan's order."""

    def __init__(self, plan: Plan, start: int, steps: int):
        self.plan, self.start, self.steps = plan, start, steps

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.steps):
            places = self.plan.positions(step).tolist()
            yield list(zip(places, self.plan.indices(step).tolist(), strict=True))


def collate(items: list[dict]) -> dict:
    """Stack samples; names stay lists."""
    return dict(
        images=torch.stack([i["image"] for i in items]),
        labels=torch.tensor([i["label"] for i in items]),
        keys=[i["key"] for i in items],
        positions=[i["position"] for i in items],
        skipped=[name for i in items for name in i["skipped"]],
    )


def train_batches(
    source: Source, view: View, plan: Plan, *, steps: int, start: int = 0, workers: int = 0
) -> Iterator[dict]:
    """Load the batches of steps `start`..`steps` of `plan`; yields dicts of `collate`.

    The plan answers for any step, so a loader that resumes simply begins at a later one.
    """
    from torchdata.stateful_dataloader import StatefulDataLoader

    sampler = PlanSampler(plan, start, steps)
    with warnings.catch_warnings():  # torchdata 0.11 calls what torch 2.15 deprecates
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        loader = StatefulDataLoader(
            Views(source, view, plan),
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if workers else None,
        )
        yield from loader


def eval_batches(
    source: Source,
    size: int,
    batch: int,
    *,
    start: int = 0,
    limit: int | None = None,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[Batch]:
    """Give the samples from `start` to `limit` in order, centre crops, as batches.

    Args:
        pin: Put them where a GPU can fetch them while it computes.
    """
    from torch.utils.data import DataLoader

    count = len(source) if limit is None else min(limit, len(source))
    blocks = [
        [(i, i) for i in range(first, min(first + batch, count))]
        for first in range(start, count, batch)
    ]
    loader = DataLoader(
        Views(source, View(size=size), None),
        batch_sampler=blocks,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
    for part in loader:
        for name in part["skipped"]:
            _log.warning("an unreadable image was replaced in the evaluation: %s", name)
        yield Batch(part["images"], part["keys"], part["labels"])
