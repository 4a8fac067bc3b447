"""Three teachers with three objectives, trained in the experiment itself."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from zoo.data.plan import mix
from zoo.experiments.imposed import Imposed, WithScale
from zoo.experiments.on_pictures import OnPictures
from zoo.experiments.pictures import Collection, RandomCrop, read_collection, side_for
from zoo.features import at_grid
from zoo.teachers.pretext import MEAN, STD, PretextTeacher
from zoo.train.config import Every, Optim, Precision
from zoo.train.device import device_of
from zoo.train.distill.phi_s import Moments
from zoo.train.pretext import TASKS, Pretext, normalised, train_pretext

OPTIM = Optim(lr=1e-3, weight_decay=0.05, clip=0.0, ema=0.0)
CALIBRATION = 16
"""Batches from which the teachers' statistics are taken."""
MEASURED = 8
"""Last steps whose images say what scale a teacher's features have of their own."""


class Taught(NamedTuple):
    """Pictures, and the teachers that were trained on them."""

    device: torch.device
    collection: Collection
    crop: RandomCrop
    teachers: dict[str, PretextTeacher]


def read_and_teach(
    config: OnPictures,
    networks: Mapping[str, tuple[str, nn.Module]],
    scales: Mapping[str, dict[str, Any]],
    *,
    batch: int,
) -> Taught:
    """Read the pictures and train the teachers.

    Args:
        networks: Label -> pretext task, network.
        scales: Label -> keywords of `Imposed`.

    Raises:
        ValueError: the device is not there, or the data has no images or no classes.
    """
    device = device_of(config.device)
    flip = 0.5 if config.data else 0.0  # the default data has digits, which are not mirrored
    crop = RandomCrop(size=config.size, flip=flip)
    collection = read_collection(config.data, side_for(config.size), device, config.limit)
    print(f"{len(collection.train)} pictures to train on, {len(collection.held)} held out")
    teachers = {
        label: train_teacher(
            task,
            network,
            collection,
            crop,
            steps=config.teacher_steps,
            batch=batch,
            seed=config.teacher_seed,
            precision=config.precision,
            out=config.out / "training" / f"teacher-{label}",
            scale=scales[label],
        )
        for label, (task, network) in networks.items()
    }
    return Taught(device, collection, crop, teachers)


def train_teacher(
    kind: str,
    network: nn.Module,
    collection: Collection,
    crop: RandomCrop,
    *,
    steps: int,
    batch: int,
    seed: int,
    precision: Precision,
    out: Path,
    scale: dict[str, Any],
) -> PretextTeacher:
    """Train `network` to the pretext task `kind`, impose a scale on its map, and freeze it.

    Args:
        kind: One of `zoo.train.pretext.TASKS`: classifier, autoencoder or gradients.
        crop: Crops of the network's image size.
        out: Folder of the training's log.
        scale: Keywords of `Imposed`.
    """
    device = collection.train.images.device
    seed = mix(seed, sum(kind.encode()))
    torch.manual_seed(seed)
    task = TASKS[kind](network, collection.classes).to(device)
    config = Pretext(
        teacher=kind,
        steps=steps,
        batch=batch,
        seed=seed,
        precision=precision,
        optim=OPTIM,
        every=Every(log=100, checkpoint=steps),
        out=out,
    )
    feed = collection.feed(crop, batch=batch, seed=seed)
    trained: Any = train_pretext(task, feed, config)
    shutil.rmtree(out / "checkpoints")
    imposed = Imposed(trained.dim, **scale).to(device)
    last = [normalised(b) for b in feed.batches(max(0, steps - MEASURED), steps)]
    with torch.no_grad():
        imposed.measure(trained(torch.cat(last)).spatial)
    return PretextTeacher(
        f"pretext:{kind}",
        WithScale(trained, imposed),
        size=(crop.size, crop.size),
        mean=MEAN,
        std=STD,
        license="yours",
        device=device,
    )


@torch.no_grad()
def measure_teachers(
    teachers: dict[str, PretextTeacher],
    collection: Collection,
    crop: RandomCrop,
    *,
    batch: int,
    grid: tuple[int, int] | None = None,
) -> dict[str, Moments]:
    """Measure mean and covariance of every teacher's map over training crops, in float32.

    Args:
        grid: Of a student, with which finer maps are compared after averaging; by default none.
    """
    device = collection.train.images.device
    moments = {
        name: Moments(teacher.spatial_dim, device)
        for name, teacher in teachers.items()
        if teacher.spatial_dim
    }
    for images in collection.feed(crop, batch=batch, seed=mix(0, 13)).batches(0, CALIBRATION):
        for name in moments:
            spatial = teachers[name](images).spatial
            assert spatial is not None
            rows, cols = map(min, spatial.shape[1:3], grid or spatial.shape[1:3])
            moments[name].update(at_grid(spatial, (rows, cols)))
    return moments


def describe_teachers(
    teachers: dict[str, PretextTeacher], moments: dict[str, Moments]
) -> dict[str, dict]:
    """Return statistics of each teacher's features, by label: the imposed and the network's own."""
    found = {}
    for name, teacher in teachers.items():
        covariance = moments[name].covariance()
        eigenvalues = torch.linalg.eigvalsh(covariance).clamp_min(0)
        spread = covariance.diagonal().sqrt()
        found[name] = dict(
            parameters=sum(p.numel() for p in teacher.network.parameters()),
            size=teacher.size[0],
            grid=list(teacher.grid or ()),
            width=teacher.spatial_dim,
            summary_width=teacher.summary_dim,
            std=covariance.diagonal().mean().sqrt().item(),
            channel_std=[spread.min().item(), spread.max().item()],
            channel_mean=[moments[name].mean.min().item(), moments[name].mean.max().item()],
            # participation ratio: the number of directions among which the variance is shared
            effective_rank=(eigenvalues.sum() ** 2 / eigenvalues.square().sum()).item(),
        )
    return found
