"""Filling a feature cache, and letting a run learn from it."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn

from zoo.data.feed import plan_of
from zoo.data.loader import eval_batches
from zoo.data.mixture import weights_of
from zoo.data.sources import Source, Subset, spread
from zoo.data.views import View, Views, collate
from zoo.features import Batch, Features
from zoo.files import read_json, written_whole
from zoo.teachers.cache import Cache, CachedTeacher, CacheManifest, Stored
from zoo.teachers.teacher import Teacher
from zoo.train.distill.calibrate import Normalizers, read_normalizers
from zoo.train.distill.config import Distill
from zoo.train.distill.phi_s import Normalizer
from zoo.train.distill.setup import Setup
from zoo.train.distill.teachers import first_batch, teacher_precision
from zoo.train.progress import Progress
from zoo.train.run import Run

SHARD_BYTES = 256 * 2**20
PROBE_BYTES = 64 * 2**20
REPORTS = 20
"""Lines about the progress of a filling."""


def holds(
    config: Distill,
    source: Source,
    view: View,
    teachers: Mapping[str, Teacher],
    fingerprints: Mapping[str, str],
    precision: str,
) -> CacheManifest:
    """Say what the cache of a run holds."""
    names = hashlib.sha256()
    for index in range(len(source)):
        names.update(source.key(index).encode() + b"\0")
    names.update(weights_of(source))
    about = {
        label: dict(
            name=teacher.name, fingerprint=fingerprints[label], precision=precision,
            size=list(teacher.size), grid=teacher.grid and list(teacher.grid),
            summary_dim=teacher.summary_dim, spatial_dim=teacher.spatial_dim,
        )
        for label, teacher in teachers.items()
    }  # fmt: skip
    stored: Stored = config.cache_dtype
    found = CacheManifest(
        images=len(source), data=names.hexdigest()[:16], seed=config.seed, views=config.view_epochs,
        view=view.described(), normalise=config.normalise, stored=stored, shard=1,
        teachers=about,
    )  # fmt: skip
    shard = max(1, SHARD_BYTES // max(1, found.image_bytes))
    return dataclasses.replace(found, shard=min(shard, found.num_positions))


@dataclass(frozen=True)
class BreakEven:
    """What a cache costs and what it saves; seconds are of one epoch."""

    bytes: int
    image_bytes: int
    free: int
    live: float
    """Of the teachers."""
    write: float
    read: float
    bandwidth: float
    """Bytes a second that the disk writes; reading is taken to be as fast."""
    views: int

    @property
    def epochs(self) -> float:
        """Epochs, over all runs, after which the cache has paid; infinite if never.

        epochs · live = views · (live + write) + epochs · read
        """
        saved = self.live - self.read
        return self.views * (self.live + self.write) / saved if saved > 0 else math.inf

    def describe(self) -> list[str]:
        pays = "never pays"
        if self.epochs < math.inf:
            pays = f"pays from epoch {math.ceil(self.epochs)} on"
        return [
            f"cache: {self.bytes / 1e9:,.2f} GB ({self.image_bytes / 1e6:,.2f} MB an image, "
            f"{self.views} epoch(s) of views); {self.free / 1e9:,.1f} GB are free",
            f"teachers live {self.live:,.1f} s an epoch, read back {self.read:,.1f} s at "
            f"{self.bandwidth / 1e9:,.2f} GB/s, written once {self.write:,.1f} s an epoch: "
            f"it {pays}",
        ]


def break_even(held: CacheManifest, path: Path, live: float) -> BreakEven:
    """Weigh a cache before it is made; writes and removes a small file to time the disk.

    Args:
        live: Seconds of the teachers for one image.
    """
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    bandwidth = _disk_speed(place)
    moved = held.images * held.image_bytes / bandwidth
    return BreakEven(
        held.num_positions * held.image_bytes, held.image_bytes, shutil.disk_usage(place).free,
        live * held.images, moved, moved, bandwidth, held.views,
    )  # fmt: skip


def _disk_speed(place: Path) -> float:
    block = os.urandom(PROBE_BYTES)
    with tempfile.TemporaryFile(dir=place) as file:
        began = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return PROBE_BYTES / (time.perf_counter() - began)


def check_room(cache: Cache) -> None:
    """Refuse to fill a cache that the disk cannot hold.

    Raises:
        ValueError: the shards that are missing need more than is free.
    """
    held = cache.manifest
    needed = sum(len(cache.positions_of(n)) for n in cache.missing()) * held.image_bytes
    free = shutil.disk_usage(cache.path).free
    if needed > free:
        raise ValueError(
            f"The feature cache {cache.path} needs {needed / 1e9:,.1f} GB more and "
            f"{free / 1e9:,.1f} GB are free. Give --cache a larger disk, fewer --view-epochs, or "
            "leave it out."
        )


@torch.no_grad()
def fill(cache: Cache, setup: Setup, batches: Callable[[range], Iterable[Batch]]) -> None:
    """Write the shards that are missing; what is there stays, so a stopped filling goes on.

    Args:
        batches: Returns the images at positions of the cache, in order.

    Raises:
        ValueError: the disk is too small.
    """
    missing = cache.missing()
    if not missing:
        return
    check_room(cache)
    normalizers = _stored_normalizers(cache, setup)
    total, done = sum(len(cache.positions_of(number)) for number in missing), 0
    with Progress("store features", total=total) as progress:
        for number in missing:
            found: dict[str, list[Features]] = {label: [] for label in setup.teachers}
            for batch in batches(cache.positions_of(number)):
                for label, teacher in setup.teachers.items():
                    with setup.autocast():
                        features = teacher(batch)
                    found[label].append(_stored(features, normalizers.get(label)))
                before, done = done, done + len(batch.images)
                if done * REPORTS // total > before * REPORTS // total:
                    progress.report(done, {})
            cache.write(number, {label: _joined(parts) for label, parts in found.items()})


def stream(setup: Setup, positions: range) -> Iterator[Batch]:
    """Yield the training views at positions of a run's stream."""
    from torch.utils.data import DataLoader

    config = setup.config
    plan = plan_of(setup.train, config.batch, config.seed, config.view_epochs)
    places = np.array(positions, dtype=np.int64)
    items = list(zip(places.tolist(), plan.indices_at(places).tolist(), strict=True))
    blocks = [items[i : i + plan.batch] for i in range(0, len(items), plan.batch)]
    views = Views(setup.train, setup.view, plan)
    loader = DataLoader(views, batch_sampler=blocks, num_workers=setup.workers, collate_fn=collate)
    for part in loader:
        yield Batch(part["images"], part["keys"]).to(setup.device)


def _stored(features: Features, normalizer: nn.Module | None) -> Features:
    """Bring features to the scale of the cache, on the CPU."""
    summary, spatial = features
    if spatial is not None:
        assert normalizer is not None
        spatial = normalizer(spatial.float()).cpu()
    return Features(None if summary is None else summary.cpu(), spatial)


def _joined(parts: list[Features]) -> Features:
    summaries = [p.summary for p in parts if p.summary is not None]
    maps = [p.spatial for p in parts if p.spatial is not None]
    return Features(torch.cat(summaries) if summaries else None, torch.cat(maps) if maps else None)


class Rescale(Normalizer):
    """A normalizer of maps that come on a cache's scale, which another student may have chosen."""

    def __init__(self, stored: Normalizer, wanted: Normalizer):
        super().__init__(wanted.kind, wanted.dim)
        self.to(wanted.mean).load_state_dict(wanted.state_dict())
        self.stored, theirs = stored, stored.state_dict()
        self.same = stored.kind == wanted.kind and all(
            value.equal(theirs[key]) for key, value in wanted.state_dict().items()
        )

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        return x if self.same else super().forward(self.stored.inverse(x))


def from_cache(
    cache: Cache, wanted: Normalizers, setup: Setup
) -> tuple[dict[str, CachedTeacher], Normalizers]:
    """Return teachers that read, and what brings their maps to the scale of a student's arm."""
    stored = _stored_normalizers(cache, setup)
    teachers = {label: CachedTeacher(cache, label) for label in cache.manifest.teachers}
    return teachers, {
        key: Rescale(stored[key], normalizer) if key in stored else normalizer
        for key, normalizer in wanted.items()
    }


def _stored_normalizers(cache: Cache, setup: Setup) -> Normalizers:
    kind = cache.manifest.normalise
    tensors = {f"{kind}/{key}": value for key, value in cache.spaces().items()}
    return read_normalizers(tensors, kind, setup)


def open_run_cache(run: Run, setup: Setup, normalizers: Normalizers) -> Cache | None:
    """Open or make the feature cache that the config asks for.

    Args:
        normalizers: Of the config's own kind; they fix the scale of a new cache. One that is there
            keeps its own, whatever grid it was made for.

    Raises:
        ValueError: the one that is there is stale.
    """
    config = setup.config
    if config.cache_folder is None:
        return None
    return Cache.prepare(config.cache_folder, *_described(run, setup, setup.train, normalizers))


def _described(
    run: Run, setup: Setup, source: Source, normalizers: Normalizers
) -> tuple[CacheManifest, dict[str, Tensor]]:
    """Return what a cache of the images of `source` holds, and the transforms beside it."""
    config = setup.config
    fingerprints = run.read_json("teachers.json", dict[str, str])
    precision = teacher_precision(config, setup.device)
    held = holds(config, source, setup.view, setup.teachers, fingerprints, precision)
    return held, {
        f"{label}/{key}": value
        for label, normalizer in normalizers.items()
        if label in setup.teachers  # a cache has summaries as they are
        for key, value in normalizer.state_dict().items()
    }


def fill_run_cache(cache: Cache, setup: Setup) -> None:
    """Fill what is missing of a cache; what it costs and saves is printed beforehand."""
    if not cache.missing():
        return
    live = seconds_an_image(setup)
    for line in break_even(cache.manifest, cache.path, live).describe():
        Console(stderr=True, highlight=False).print(line)
    fill(cache, setup, partial(stream, setup))


def stored_held_out(run: Run, setup: Setup, normalizers: Normalizers) -> dict[str, CachedTeacher]:
    """Return what the teachers answer for the held-out images; a folder in the cache keeps it.

    Raises:
        ValueError: the one that is there is stale.
    """
    config = setup.config
    assert config.cache_folder is not None
    source, view = spread(setup.val, config.eval_images), View(size=setup.view.size)
    held, spaces = _described(run, setup, source, normalizers)
    held = dataclasses.replace(held, seed=0, views=1, view=view.described())
    cache = Cache.prepare(config.cache_folder / f"held_out_{held.data}", held, spaces)
    listed = cache.path / "images.json"
    places = read_json(listed, dict[str, int]) if listed.is_file() else {}

    def batches(part: range) -> Iterator[Batch]:
        at = part.start
        few, lost = Subset(source, tuple(part)), setup.unreadable
        for batch in eval_batches(few, view.size, config.batch, unreadable=lost):
            places.update(zip(batch.keys, range(at, at + len(batch.keys)), strict=True))
            at += len(batch.keys)
            yield batch.to(setup.device)
        with written_whole(listed) as temporary:
            temporary.write_text(json.dumps(places))

    fill(cache, setup, batches)
    return {label: CachedTeacher(cache, label, raw=True, places=places) for label in held.teachers}


@torch.no_grad()
def seconds_an_image(setup: Setup) -> float:
    """Time the teachers on one batch."""
    batch = first_batch(setup)
    began = 0.0
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        with setup.autocast():
            for teacher in setup.teachers.values():
                teacher(batch)
        if setup.device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - began) / len(batch.images)
