"""Features of teachers on disk: shards of a training stream's views, read instead of the teachers.

What a view is follows from its place in the stream (`zoo.data.plan`): the image, the crop, the
mirror. So a cache stores no images and no crops, only features in the order in which a run asks for
them, and replays the augmentations as MobileCLIP's reinforced data sets do (2311.17049, section 4).
Maps are stored on the scale on which students learn them (PHI-S, 2410.01680), where all channels
have one variance and 8 bits with one scale a token lose 1e-4 of it.

    cache.json                what it holds; another run is compared with this
    spaces.safetensors        the transform of each teacher's map, and its inverse
    shard_00000.safetensors   the features of `shard` consecutive places of the stream
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.features import Batch, Features
from zoo.files import save_whole, written_whole
from zoo.teachers.name import TeacherName

Stored = Literal["int8", "bf16"]
TEACHER_FIELDS = ("name", "fingerprint", "precision", "size", "grid", "summary_dim", "spatial_dim")


@dataclass(frozen=True, kw_only=True)
class CacheManifest:
    """What a cache holds: all that its features depend on."""

    images: int
    """Of the training data."""
    data: str
    """Hash of their names."""
    seed: int
    views: int
    """Epochs of views."""
    view: dict[str, Any]
    """Size, scale, ratio and mirroring of the crops."""
    normalise: str
    stored: Stored
    shard: int
    """Places in a shard."""
    teachers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For each label `TEACHER_FIELDS`."""

    @property
    def places(self) -> int:
        return self.images * self.views

    @property
    def shards(self) -> int:
        return -(-self.places // self.shard)

    @property
    def image_bytes(self) -> int:
        """Bytes of one view's features."""
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
        """Say in what two differ; how features are stored and cut into shards does not count."""
        mine, theirs = self.as_json(), other.as_json()
        for told in (mine, theirs):
            del told["stored"], told["shard"]
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
    """A folder of features, being filled or full."""

    def __init__(self, path: Path, holds: CacheManifest):
        self.path, self.manifest = path, holds

    @classmethod
    def open(cls, path: Path) -> "Cache":
        """Open a cache.

        Raises:
            ValueError: there is none at `path`.
        """
        try:
            return cls(path, CacheManifest(**json.loads((path / "cache.json").read_text())))
        except (OSError, json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"There is no feature cache in {path}; `zoo distill --cache {path} --views 1` "
                "makes one."
            ) from error

    @classmethod
    def prepare(cls, path: Path, holds: CacheManifest, spaces: Mapping[str, Tensor]) -> "Cache":
        """Open the cache of what `holds` says, or make it, empty.

        Raises:
            ValueError: the cache at `path` is stale, or something else is there.
        """
        if (path / "cache.json").is_file():
            cache = cls.open(path)
            differing = cache.manifest.differences(holds)
            if differing:
                raise ValueError(
                    f"The feature cache {path} is stale: {'; '.join(differing)}. "
                    "Give another --cache folder, or remove this one."
                )
            return cache
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"{path} holds something that is no feature cache; give --cache "
                             "another folder.")  # fmt: skip
        path.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.cpu().contiguous() for key, value in spaces.items()}
        save_whole(tensors, path / "spaces.safetensors", save_file)
        with written_whole(path / "cache.json") as temporary:
            temporary.write_text(json.dumps(holds.as_json(), indent=1) + "\n")
        return cls(path, holds)

    def spaces(self) -> dict[str, Tensor]:
        """Read the transforms: `label/mean`, `label/weight` and `label/inverse_weight`."""
        return load_file(self.path / "spaces.safetensors")

    def shard_path(self, number: int) -> Path:
        return self.path / f"shard_{number:05d}.safetensors"

    def places_of(self, number: int) -> range:
        """Return the places in the stream that a shard holds."""
        first = number * self.manifest.shard
        return range(first, min(first + self.manifest.shard, self.manifest.places))

    def missing(self) -> list[int]:
        """List the shards that are not there yet."""
        return [n for n in range(self.manifest.shards) if not self.shard_path(n).is_file()]

    def write(self, number: int, features: Mapping[str, Features]) -> None:
        """Write a shard, whole or not at all.

        Args:
            features: Of all its places, by label, in order; maps on the stored scale.

        Raises:
            OSError: the disk is full or not writable.
        """
        tensors = {}
        for label, seen in features.items():
            for part, value in _encode(seen, self.manifest.stored).items():
                tensors[f"{label}/{part}"] = value.cpu().contiguous()
        save_whole(tensors, self.shard_path(number), save_file)

    def read(self, label: str, positions: Sequence[int]) -> Features:
        """Read the features of positions in the stream; on the CPU, as stored values.

        Raises:
            ValueError: a shard is missing or damaged.
        """
        parts: list[dict[str, Tensor]] = []
        for number, rows in _runs(
            [p % self.manifest.places for p in positions], self.manifest.shard
        ):
            file, keys = self._shard(number)
            names = [key for key in keys if key.startswith(f"{label}/")]
            parts.append({n.rpartition("/")[2]: file.get_slice(n)[rows] for n in names})
        return _decode({part: torch.cat([p[part] for p in parts]) for part in parts[0]})

    def _shard(self, number: int) -> tuple[Any, list[str]]:
        path = self.shard_path(number)
        try:
            return _opened(str(path))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"The shard {path} of the feature cache cannot be read ({error}). Remove it, and "
                "the next run fills it again."
            ) from error


@functools.lru_cache(maxsize=8)
def _opened(path: str) -> tuple[Any, list[str]]:
    file: Any = safe_open(path, "pt").__enter__()
    return file, list(file.keys())


def _runs(places: Sequence[int], shard: int) -> list[tuple[int, slice]]:
    """Group places into slices of shards; a run's batches are consecutive, so there are few."""
    runs: list[tuple[int, slice]] = []
    for place in places:
        number, row = divmod(place, shard)
        if runs and runs[-1][0] == number and runs[-1][1].stop == row:
            runs[-1] = (number, slice(runs[-1][1].start, row + 1))
        else:
            runs.append((number, slice(row, row + 1)))
    return runs


def _encode(seen: Features, stored: Stored) -> dict[str, Tensor]:
    found = {}
    if seen.summary is not None:
        found["summary"] = seen.summary.to(torch.bfloat16)
    if seen.spatial is not None and stored == "bf16":
        found["spatial"] = seen.spatial.to(torch.bfloat16)
    elif seen.spatial is not None:
        found["spatial"], found["scale"] = quantised(seen.spatial)
    return found


def quantised(x: Float[Tensor, "*B C"]) -> tuple[Tensor, Float[Tensor, "*B"]]:
    """Round each token to int8 on a scale of its own: x ≈ q s."""
    scale = (x.abs().amax(-1) / 127).float().clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale[..., None]).round().to(torch.int8), scale


def _decode(parts: Mapping[str, Tensor]) -> Features:
    """Return the values as they were stored: int8 maps with their scales as float32."""
    summary, spatial = parts.get("summary"), parts.get("spatial")
    if spatial is not None and "scale" in parts:
        spatial = spatial.float() * parts["scale"][..., None]
    return Features(None if summary is None else summary.float(), spatial)


class CachedTeacher:
    """A teacher that reads what another one said; see the head of this file.

    Args:
        raw: Give maps in the teacher's own space, not on the stored scale.
    """

    def __init__(self, cache: Cache, label: str, *, raw: bool = False):
        about = cache.manifest.teachers[label]
        self.cache, self.label, self.raw = cache, label, raw
        self.name = f"cache:{cache.path}/{label}"
        self.license: str | None = None
        self.size: tuple[int, int] = tuple(about["size"])
        self.summary_dim: int | None = about["summary_dim"]
        self.spatial_dim: int | None = about["spatial_dim"]
        self.grid: tuple[int, int] | None = tuple(about["grid"]) if about["grid"] else None
        spaces = cache.spaces() if raw else {}
        self._theta = spaces.get(f"{label}/inverse_weight")
        self._mean = spaces.get(f"{label}/mean")

    def __call__(self, batch: Batch) -> Features:
        """Read the features of a training batch.

        Raises:
            ValueError: the batch does not know its positions in the stream.
        """
        if not batch.positions:
            raise ValueError(
                f"{self.name} holds the views of a training run and nothing else; for other "
                "images the teacher itself is needed."
            )
        device = batch.images.device
        summary, spatial = self.cache.read(self.label, batch.positions)
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
        ValueError: there is no cache, it is not full, or it has no such teacher.
    """
    path, label = Path(name.name), ""
    if not (path / "cache.json").is_file():
        path, label = path.parent, path.name
    cache = Cache.open(path)
    labels = list(cache.manifest.teachers)
    if not label and len(labels) == 1:
        label = labels[0]
    if label not in labels:
        raise ValueError(f"The cache {path} holds {', '.join(labels)}; write cache:{path}/LABEL.")
    missing = cache.missing()
    if missing:
        raise ValueError(
            f"The cache {path} lacks {len(missing)} of {cache.manifest.shards} shards; the run "
            "that fills it goes on where it stopped when it is started again."
        )
    return CachedTeacher(cache, label, raw=True)
