"""Three teachers with three objectives, trained in the experiment itself."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from zoo.data.plan import mix
from zoo.experiments.pictures import Collection, RandomCrop, Stream
from zoo.features import Batch
from zoo.teachers.pretext import MEAN, STD, PretextTeacher
from zoo.train.config import Optim
from zoo.train.distill.phi_s import Moments
from zoo.train.pretext import TASKS, fit_network

OPTIM = Optim(lr=1e-3, weight_decay=0.05)
CALIBRATION = 16
"""Batches from which the teachers' statistics are taken."""


def train_teacher(
    kind: str,
    network: nn.Module,
    collection: Collection,
    crop: RandomCrop,
    *,
    steps: int,
    batch: int,
    seed: int,
    autocast: Callable[[], AbstractContextManager],
) -> PretextTeacher:
    """Train `network` to the pretext task `kind` and freeze it.

    Args:
        kind: One of `zoo.train.pretext.TASKS`: classifier, autoencoder or gradients.
        crop: Crops of the network's image size.
    """
    device = collection.train.images.device
    seed = mix(seed, sum(kind.encode()))
    torch.manual_seed(seed)
    task = TASKS[kind](network, collection.classes).to(device)
    stream = Stream(collection.train, crop, batch=batch, steps=steps, seed=seed)
    fit_network(
        task, iter(stream), steps=steps, title=f"teacher {kind}", optim=OPTIM, autocast=autocast
    )
    return PretextTeacher(
        f"pretext:{kind}", network, size=(crop.size, crop.size), mean=MEAN, std=STD,
        license="yours", device=device,
    )  # fmt: skip


@torch.no_grad()
def measure_teachers(
    teachers: dict[str, PretextTeacher], collection: Collection, crop: RandomCrop, *, batch: int
) -> dict[str, Moments]:
    """Measure mean and covariance of every teacher's map over training crops, in float32."""
    device = collection.train.images.device
    moments = {
        name: Moments(teacher.spatial_dim, device)
        for name, teacher in teachers.items()
        if teacher.spatial_dim
    }
    stream = Stream(collection.train, crop, batch=batch, steps=CALIBRATION, seed=mix(0, 13))
    for images, _ in stream:
        for name in moments:
            moments[name].update(teachers[name](Batch(images)).spatial)
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
