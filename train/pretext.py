"""Train the pretext teachers on a run's own images, once; their weights are cached."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.data.loader import train_batches
from zoo.data.plan import Plan, mix
from zoo.data.sources import Source
from zoo.data.views import View
from zoo.features import Batch
from zoo.files import cache_dir, save_whole
from zoo.teachers.pretext import MEAN, SIZE, STD, Gradients, PatchTransformer, build_network
from zoo.train.config import Optim
from zoo.train.optim import learning_rate
from zoo.train.progress import Progress

VERSION = 1
"""Part of the cache's key: raise it when what follows changes."""
STEPS, BATCH = 250, 64
OPTIM = Optim(lr=2e-3, weight_decay=0.02)
MASKED = 0.6
"""Share of the patches that the autoencoder has to fill in."""
BINS = 8
"""Orientations of the gradients that the dense teacher predicts."""


def pretext_weights(name: str, source: Source, *, seed: int, device: torch.device) -> Path:
    """Return the file of a pretext teacher trained on `source`; train it if there is none.

    Raises:
        ValueError: the name is unknown, or the classifier has no classes to learn.
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
    path = cache_dir() / "pretext" / f"{name}-{digest.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        network = _train(name, source, seed, device)
        save_whole(network.state_dict(), path, save_file)
    return path


def _train(name: str, source: Source, seed: int, device: torch.device) -> nn.Module:
    torch.manual_seed(mix(seed, 4))
    network = build_network(name)
    task = TASKS[name](network, len(source.classes)).to(device)
    plan = Plan(len(source), BATCH, mix(seed, 5))
    loader = train_batches(source, View(size=SIZE), plan, steps=STEPS, start=0, workers=0)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for step, part in enumerate(loader):
            torch.manual_seed(plan.step_seed(step))
            yield Batch(part["images"]).to(device).at((SIZE, SIZE)), part["labels"].to(device)

    return fit_network(task, batches(), steps=STEPS, title=f"teacher {name}")


def fit_network(
    task: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int,
    title: str,
    optim: Optim = OPTIM,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> nn.Module:
    """Train `task.network` on `steps` batches and measure the scale that is then replaced.

    Args:
        task: One of `TASKS`; gives its loss for normalised images and labels.
        batches: Images in [0, 1] at the network's size, with labels, on its device.
    """
    device = next(task.parameters()).device
    optimizer = torch.optim.AdamW(task.parameters(), optim.lr, weight_decay=optim.weight_decay)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
    kept: list[Tensor] = []
    with Progress(title, total=steps) as watch:
        for step, (images, labels) in enumerate(batches):
            watch.images = len(images)
            images = (images - mean) / std
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, optim)
            with autocast():
                loss = task(images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step >= steps - 8:
                kept.append(images)
            if (step + 1) % 100 == 0:
                watch.report(step + 1, {"loss": loss.item()})
    network = task.network.eval()
    with torch.no_grad():
        network.scale.measure(network.raw(torch.cat(kept)))
    return network


class _Classify(nn.Module):
    """Name the class of the pooled map."""

    def __init__(self, network: nn.Module, classes: int):
        super().__init__()
        self.network = network
        self.head = nn.Linear(network.scale.gain.numel(), classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        pooled = self.network.raw(images).mean(dim=(1, 2))
        return F.cross_entropy(self.head(pooled), labels, label_smoothing=0.1)


class _FillIn(nn.Module):
    """Predict the pixels of masked patches, each patch on its own scale (MAE, 2111.06377, 4.1)."""

    def __init__(self, network: PatchTransformer, classes: int):
        super().__init__()
        self.network = network
        self.head = nn.Linear(network.scale.gain.numel(), 3 * network.patch**2)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        patches = F.unfold(images, self.network.patch, stride=self.network.patch).transpose(1, 2)
        middle, spread = patches.mean(-1, keepdim=True), patches.std(-1, keepdim=True)
        patches = (patches - middle) / (spread + 0.1)
        mask = torch.rand(patches.shape[:2], device=images.device) < MASKED
        guess = self.head(self.network.raw(images, mask).flatten(1, 2))
        error = (guess - patches).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()


class _Orient(nn.Module):
    """Predict, for each cell of the map, its colour and how much it is edged which way."""

    def __init__(self, network: Gradients, classes: int):
        super().__init__()
        self.network = network
        self.head = nn.Linear(network.scale.gain.numel(), BINS + 3)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        guess = self.head(self.network.raw(images))
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
