"""Teachers' features on disk: shards of a training stream's views, read in place of the teachers.

The position of a view in the stream determines its image, its crop and its mirroring
(`zoo.data.plan`). So a cache stores no images and no crops, only features in the order in which a
run reads them, and repeats the augmentations as MobileCLIP's reinforced data sets do (2311.17049,
section 4). Maps are stored on the scale on which the first student learns them (PHI-S, 2410.01680),
where all channels have the same variance and 8 bits with one scale a token lose 1e-4 of it.

    cache.json                the manifest, with which another run's is compared
    spaces.safetensors        the transform of each teacher's map, and its inverse
    shard_00000.safetensors   the features of `shard` consecutive positions in the stream
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Float, Int8
from safetensors import safe_open
from torch import Tensor

from zoo.features import Batch, Features
from zoo.files import (
    checked,
    checked_fields,
    load_tensors,
    read_json,
    save_tensors,
    written_whole,
)
from zoo.teachers.name import TeacherName

Stored = Literal["int8", "bf16"]


class StoredTeacher(TypedDict):
    """What a manifest says of a teacher."""

    name: str
    fingerprint: str
    precision: str
    size: list[int]
    grid: list[int] | None
    summary_dim: int | None
    spatial_dim: int | None


@dataclass(frozen=True, kw_only=True)
class CacheManifest:
    """Everything that a cache's features depend on. The fields are the keys of `cache.json`."""

    images: int
    """Number of images in the training data."""
    data: str
    """Hash of the images' names."""
    seed: int
    views: int
    """Epochs of views that are stored."""
    view: dict[str, Any]
    """Size, scale, ratio and mirroring of the crops."""
    normalise: str
    """Kind of the transform that brought the maps to their stored scale."""
    stored: Stored
    shard: int
    """Positions in a shard; the last shard may have fewer."""
    teachers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """A `StoredTeacher` of each, by label."""

    @property
    def num_positions(self) -> int:
        """Number of stored views: positions in the stream before it repeats."""
        return self.images * self.views

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.num_positions // self.shard)

    @property
    def image_bytes(self) -> int:
        """Bytes of one view's features, of all teachers together."""
        total = 0
        for teacher in self.teachers.values():
            rows, cols = teacher["grid"] or (0, 0)
            width = teacher["spatial_dim"] or 0
            each = width + 4 if self.stored == "int8" else 2 * width
            total += rows * cols * each + 2 * (teacher["summary_dim"] or 0)
        return total

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def differences(self, other: "CacheManifest") -> list[str]:
        """List the fields in which two manifests differ, one sentence each.

        How features are stored and cut into shards does not count.
        """
        mine, theirs = self.as_json(), other.as_json()
        for fields in (mine, theirs):
            del fields["stored"], fields["shard"]
        found = _differing("teachers", mine.pop("teachers"), theirs.pop("teachers"))
        return found + _differing("", mine, theirs)


def _differing(prefix: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    found = []
    for key in sorted({*mine, *theirs}):
        name = f"{prefix}.{key}" if prefix else key
        ours, other = mine.get(key), theirs.get(key)
        if isinstance(ours, dict) and isinstance(other, dict):
            found += _differing(name, ours, other)
        elif ours != other:
            found.append(f"{name} is {ours} there and {other} here")
    return found


class Cache:
    """A folder of features, full or being filled."""

    def __init__(self, path: Path, manifest: CacheManifest):
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: Path) -> "Cache":
        """Open the cache in the folder `path`.

        Raises:
            ValueError: there is no cache, or its manifest is damaged.
        """
        file = path / "cache.json"
        if not file.is_file():
            raise ValueError(
                f"There is no feature cache in {path}. `zoo distill --cache {path} "
                "--view-epochs 1` makes one."
            )
        manifest = checked_fields(CacheManifest, read_json(file), str(file))
        checked(manifest.teachers, dict[str, StoredTeacher], f"{file}, field teachers,")
        if min(manifest.images, manifest.views, manifest.shard) < 1:
            raise ValueError(f"{file} has images, views or shard below 1; it is damaged.")
        return cls(path, manifest)

    @staticmethod
    def refuse_other(path: Path) -> None:
        """Raise a ValueError if something else than a cache is in the way of one at `path`."""
        if (path / "cache.json").is_file() or not path.exists():
            return
        if not path.is_dir() or any(path.iterdir()):
            raise ValueError(f"{path} is not empty and no feature cache; give another --cache.")

    @classmethod
    def prepare(cls, path: Path, manifest: CacheManifest, spaces: Mapping[str, Tensor]) -> "Cache":
        """Open the cache that `manifest` describes; if there is none, make an empty one.

        Args:
            spaces: The transforms that `spaces()` returns; written only into a new cache.

        Raises:
            ValueError: the cache at `path` is stale, or something else is there.
        """
        if (path / "cache.json").is_file():
            cache = cls.open(path)
            differing = cache.manifest.differences(manifest)
            if differing:
                raise ValueError(
                    f"The feature cache {path} is stale: {'; '.join(differing)}. "
                    "Give another --cache folder, or remove this one."
                )
            return cache
        cls.refuse_other(path)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.cpu().contiguous() for key, value in spaces.items()}
        save_tensors(tensors, path / "spaces.safetensors")
        with written_whole(path / "cache.json") as temporary:
            temporary.write_text(json.dumps(manifest.as_json(), indent=1) + "\n")
        return cls(path, manifest)

    def spaces(self) -> dict[str, Tensor]:
        """Read the transforms: `label/mean`, `label/weight` and `label/inverse_weight`."""
        return load_tensors(self.path / "spaces.safetensors")

    def shard_path(self, number: int) -> Path:
        return self.path / f"shard_{number:05d}.safetensors"

    def positions_of(self, number: int) -> range:
        """Return the positions in the stream whose features are in shard `number`."""
        first = number * self.manifest.shard
        return range(first, min(first + self.manifest.shard, self.manifest.num_positions))

    def missing(self) -> list[int]:
        """List the numbers of the shards that are not written yet."""
        return [n for n in range(self.manifest.shards) if not self.shard_path(n).is_file()]

    def write(self, number: int, features: Mapping[str, Features]) -> None:
        """Write a shard, whole or not at all.

        Args:
            features: The features of all its positions, in order, by label; maps on the stored
                scale.

        Raises:
            OSError: the disk is full or not writable.
        """
        tensors = {}
        for label, one in features.items():
            for part, value in _encode(one, self.manifest.stored).items():
                tensors[f"{label}/{part}"] = value.cpu().contiguous()
        save_tensors(tensors, self.shard_path(number))

    def read(self, label: str, positions: Sequence[int]) -> Features:
        """Read the features at positions in the stream: float32, on the CPU, on the stored scale.

        Args:
            positions: Any number from 0; behind the stored ones they begin again.

        Raises:
            ValueError: a shard is missing or damaged.
        """
        stored = [p % self.manifest.num_positions for p in positions]
        parts: list[dict[str, Tensor]] = []
        for number, rows in _shard_slices(stored, self.manifest.shard):
            path = self.shard_path(number)
            try:
                file, keys = _open_shard(str(path))
                names = [key for key in keys if key.startswith(f"{label}/")]
                parts.append({n.rpartition("/")[2]: file.get_slice(n)[rows] for n in names})
            except Exception as error:  # safetensors has classes of its own
                raise ValueError(
                    f"The shard {path} of the feature cache cannot be read ({error}). Remove it, "
                    "and the next run fills it again."
                ) from error
        return _decode({part: torch.cat([p[part] for p in parts]) for part in parts[0]})


@functools.lru_cache(maxsize=8)
def _open_shard(path: str) -> tuple[Any, list[str]]:
    """Open a shard for slices, after its checksum: positions follow each other, so once a pass."""
    keys = list(load_tensors(path))
    return safe_open(path, "pt").__enter__(), keys


def _shard_slices(positions: Sequence[int], shard: int) -> list[tuple[int, slice]]:
    """Group positions into slices of shards; a batch's are consecutive, so there are few."""
    slices: list[tuple[int, slice]] = []
    for position in positions:
        number, row = divmod(position, shard)
        if slices and slices[-1][0] == number and slices[-1][1].stop == row:
            slices[-1] = (number, slice(slices[-1][1].start, row + 1))
        else:
            slices.append((number, slice(row, row + 1)))
    return slices


def _encode(features: Features, stored: Stored) -> dict[str, Tensor]:
    parts = {}
    if features.summary is not None:
        parts["summary"] = features.summary.to(torch.bfloat16)
    if features.spatial is not None and stored == "bf16":
        parts["spatial"] = features.spatial.to(torch.bfloat16)
    elif features.spatial is not None:
        parts["spatial"], parts["scale"] = quantize_tokens(features.spatial)
    return parts


def quantize_tokens(x: Float[Tensor, "*B C"]) -> tuple[Int8[Tensor, "*B C"], Float[Tensor, "*B"]]:
    """Round each token to int8 on a scale of its own: x ≈ q s."""
    scale = (x.abs().amax(-1) / 127).float().clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale[..., None]).round().to(torch.int8), scale


def _decode(parts: Mapping[str, Tensor]) -> Features:
    """Return the stored values as float32; int8 maps are multiplied by their scales."""
    summary, spatial = parts.get("summary"), parts.get("spatial")
    if spatial is not None and "scale" in parts:
        spatial = spatial.float() * parts["scale"][..., None]
    return Features(None if summary is None else summary.float(), spatial)


class CachedTeacher:
    """A teacher whose features are read from a cache instead of computed.

    Args:
        raw: Return maps in the teacher's own space, not on the stored scale.
        places: Positions by the names of the images, where batches are not of the stream.
    """

    def __init__(
        self,
        cache: Cache,
        label: str,
        *,
        raw: bool = False,
        places: Mapping[str, int] | None = None,
    ):
        fields = cache.manifest.teachers[label]
        self.cache, self.label, self.raw, self.places = cache, label, raw, places
        self.name = f"cache:{cache.path}/{label}"
        self.license: str | None = None
        self.size: tuple[int, int] = tuple(fields["size"])
        self.summary_dim: int | None = fields["summary_dim"]
        self.spatial_dim: int | None = fields["spatial_dim"]
        self.grid: tuple[int, int] | None = tuple(fields["grid"]) if fields["grid"] else None
        spaces = cache.spaces() if raw else {}
        self._theta = spaces.get(f"{label}/inverse_weight")
        self._mean = spaces.get(f"{label}/mean")

    def __call__(self, batch: Batch) -> Features:
        """Read the features of a training batch, or of the images that `places` names.

        Raises:
            ValueError: the batch has no positions in the stream.
            KeyError: `places` lacks an image.
        """
        positions = batch.positions
        if self.places is not None:
            positions = [self.places[key] for key in batch.keys]
        if not positions:
            raise ValueError(
                f"{self.name} has features of the views of a training run alone; other images "
                "need the teacher itself."
            )
        device = batch.images.device
        summary, spatial = self.cache.read(self.label, positions)
        if spatial is not None:
            spatial = spatial.to(device, non_blocking=True)
            if self.raw and self._theta is not None and self._mean is not None:
                theta, mean = (t.to(device, torch.float32) for t in (self._theta, self._mean))
                spatial = spatial.float()
                spatial = (spatial * theta if theta.ndim == 1 else spatial @ theta.T) + mean
        return Features(None if summary is None else summary.to(device), spatial)


def open_cache(name: TeacherName, device: torch.device) -> CachedTeacher:
    """Open one teacher of a cache: `cache:FOLDER/LABEL`, or `cache:FOLDER` if it has one.

    Raises:
        ValueError: there is no cache, shards are missing, or it has no such teacher.
    """
    path, label = Path(name.name), ""
    if not (path / "cache.json").is_file():
        path, label = path.parent, path.name
    cache = Cache.open(path)
    labels = list(cache.manifest.teachers)
    if not label and len(labels) == 1:
        label = labels[0]
    if label not in labels:
        known = ", ".join(labels)
        raise ValueError(f"The cache {path} has the teachers {known}; write cache:{path}/LABEL.")
    missing = cache.missing()
    if missing:
        raise ValueError(
            f"The cache {path} lacks {len(missing)} of {cache.manifest.shards} shards. Start the "
            "run that fills it again; it continues where it stopped."
        )
    return CachedTeacher(cache, label, raw=True)
