"""Train the pretext teachers on a run's own images, once; their weights are cached."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from filelock import FileLock
from jaxtyping import Float
from torch import Tensor, nn

from zoo.data.feed import ImageFeed, plan_of
from zoo.data.mixture import weights_of
from zoo.data.plan import mix
from zoo.data.sources import Source
from zoo.data.views import View
from zoo.features import Batch
from zoo.files import cache_dir, save_tensors
from zoo.teachers.pretext import MEAN, SIZE, STD, build_network
from zoo.train.config import Every, Optim, Training
from zoo.train.loop import train
from zoo.train.run import Run
from zoo.train.state import TrainState
from zoo.train.task import Feed, Loss, Task

VERSION = 2
"""Part of the cache's key: raise it when what follows changes."""
STEPS, BATCH = 250, 64
MASKED = 0.6
"""Share of the patches that the autoencoder has to fill in."""
BINS = 8
"""Orientations of the gradients that the dense teacher predicts."""


@dataclass(frozen=True, kw_only=True)
class Pretext(Training):
    """One pretext teacher."""

    kind: ClassVar[str] = "pretext"

    teacher: str = "classifier"
    """One of `TASKS`."""
    optim: Optim = field(
        default_factory=lambda: Optim(lr=2e-3, weight_decay=0.02, clip=0.0, ema=0.0)
    )
    every: Every = field(default_factory=lambda: Every(log=50, checkpoint=100))


def pretext_weights(name: str, source: Source, *, seed: int, device: torch.device) -> Path:
    """Return the file of a pretext teacher trained on `source`; train it if there is none.

    A training that was stopped goes on; a second process waits for the first.

    Raises:
        ValueError: the name is unknown, or the classifier has no classes to learn.
        Interrupted: a signal came; the state is saved.
    """
    build_network(name)  # refuses an unknown name before any work
    if name == "classifier" and not source.classes:
        raise ValueError(
            "pretext:classifier needs labels: one sub-folder a class, or .cls files in the shards."
        )
    known = f"{VERSION} {name} {seed} {STEPS} {BATCH} {device.type} {len(source)}"
    digest = hashlib.sha256(known.encode())
    for i in range(len(source)):
        digest.update(source.key(i).encode())
    digest.update(weights_of(source))
    path = cache_dir() / "pretext" / f"{name}-{digest.hexdigest()[:16]}.safetensors"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            work = path.with_suffix(".run")
            network = _train(name, source, seed, device, work)
            save_tensors(network.state_dict(), path)
            shutil.rmtree(work)
    return path


def _train(name: str, source: Source, seed: int, device: torch.device, work: Path) -> nn.Module:
    torch.manual_seed(mix(seed, 4))
    model = TASKS[name](build_network(name), len(source.classes)).to(device)
    plan = plan_of(source, BATCH, mix(seed, 5))
    feed = ImageFeed(source, View(size=SIZE), plan, device)
    config = Pretext(
        teacher=name, batch=BATCH, steps=STEPS, seed=plan.seed, out=work, precision="float32"
    )
    return train_pretext(model, feed, config)


def train_pretext(model: nn.Module, feed: Feed, config: Pretext) -> nn.Module:
    """Train `model.network`, and return it in eval mode.

    A run that was stopped in `config.out` goes on.

    Args:
        model: One of `TASKS`; returns its loss for normalised images and labels.
        feed: Batches whose images are at the network's size.
    """
    run = Run.begin(config)
    groups = [dict(params=list(model.parameters()), weight_decay=config.optim.weight_decay)]
    state = TrainState.of(model, config.optim, groups=groups)
    state.resume(run)
    train(PretextTask(), state, feed, config, run, title=f"teacher {config.teacher}")
    network: Any = model.network
    return network.eval()


class PretextTask(Task):
    """One pretext loss, of images and labels."""

    def losses(self, state: TrainState, batch: Batch, targets: None, step: int) -> dict[str, Loss]:
        mean = state.model(normalised(batch), batch.labels)
        return {"pretext": Loss.of_mean(mean, len(batch.images))}


def normalised(batch: Batch) -> Float[Tensor, "B 3 H W"]:
    """Return the images as the pretext networks take them."""
    images = batch.at((batch.images.shape[-2], batch.images.shape[-1]))
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


class _Classify(nn.Module):
    """Name the class of the pooled map."""

    network: Any

    def __init__(self, network: Any, classes: int):
        super().__init__()
        self.network = network
        self.head = nn.Linear(network.dim, classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.network(images).summary)
        return F.cross_entropy(logits, labels, label_smoothing=0.1)


class _FillIn(nn.Module):
    """Predict the pixels of masked patches, each patch on its own scale (MAE, 2111.06377, 4.1)."""

    network: Any

    def __init__(self, network: Any, classes: int):
        super().__init__()
        self.network = network
        self.head = nn.Linear(network.dim, 3 * network.patch**2)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        patches = F.unfold(images, self.network.patch, stride=self.network.patch).transpose(1, 2)
        middle, spread = patches.mean(-1, keepdim=True), patches.std(-1, keepdim=True)
        patches = (patches - middle) / (spread + 0.1)
        mask = torch.rand(patches.shape[:2], device=images.device) < MASKED
        guess = self.head(self.network(images, mask).spatial.flatten(1, 2))
        error = (guess - patches).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()


class _Orient(nn.Module):
    """Predict, for each cell of the map, its colour and how much it is edged which way."""

    network: Any

    def __init__(self, network: Any, classes: int):
        super().__init__()
        self.network = network
        self.head = nn.Linear(network.dim, BINS + 3)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        guess = self.head(self.network(images).spatial)
        return F.smooth_l1_loss(guess, _orientations(images, self.network.stride))


def _orientations(images: Float[Tensor, "B 3 H W"], cell: int) -> Float[Tensor, "B h w D"]:
    """Mean colour and gradient energy in `BINS` directions, over cells of `cell`² pixels."""
    grey = images.mean(dim=1, keepdim=True)
    across = F.pad(grey[..., 2:] - grey[..., :-2], (1, 1))
    down = F.pad(grey[..., 2:, :] - grey[..., :-2, :], (0, 0, 1, 1))
    angles = torch.arange(BINS, device=images.device) * (2 * torch.pi / BINS)
    angles = angles.view(1, BINS, 1, 1)
    energy = F.relu(across * torch.cos(angles) + down * torch.sin(angles))
    return F.avg_pool2d(torch.cat([energy, images], dim=1), cell).permute(0, 2, 3, 1)


TASKS: dict[str, Callable[..., nn.Module]] = {
    "classifier": _Classify,
    "autoencoder": _FillIn,
    "gradients": _Orient,
}
