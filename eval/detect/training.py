"""The loop that trains a detector: a generator of losses, one step at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers.norm_act import FrozenBatchNormAct2d
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from zoo.eval.detect.canvas import Samples, batches, order
from zoo.eval.detect.spec import Detector

PRECISIONS = {"bf16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Training:
    """AdamW with warm-up and a cosine down to 0."""

    steps: int = 1000
    batch: int = 16
    lr: float = 2e-4
    """Of the new parts; the backbone's is this times `backbone_lr`, and `layer_decay`."""
    backbone_lr: float = 1.0
    layer_decay: float = 1.0
    """Factor from each layer of the backbone to the one before it; 1 for none."""
    weight_decay: float = 0.05
    warmup: float = 0.05
    """Share of the steps in which the rate rises."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it alone."""
    norms: Literal["trained", "frozen"] = "trained"
    """`frozen`: batch norms of the backbone keep their statistics, for trained ones and batches
    of a few images."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Of the backbone and the pyramid; bf16 on a GPU, float32 elsewhere, unless told."""
    seed: int = 0
    workers: int = 0
    """Processes that decode; with 0 the images are decoded once and held in memory."""

    def __post_init__(self):
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more.")
        for name in ("lr", "backbone_lr", "layer_decay"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0.")
        if self.layer_decay > 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; give at most 1, which is none.")


class TrainState:
    """A detector, its optimizer, and how far it has come."""

    def __init__(self, detector: Detector, config: Training):
        self.detector, self.config, self.step = detector, config, 0
        on_gpu = next(detector.parameters()).is_cuda
        precision = config.precision
        if precision == "auto":
            precision = "bf16" if on_gpu else "float32"
        detector.precision = PRECISIONS[precision]
        self.optimizer = torch.optim.AdamW(
            parameter_groups(detector, config), lr=config.lr, fused=on_gpu
        )

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on."""
        return dict(
            step=self.step,
            detector=self.detector.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.step = state["step"]
        self.detector.load_state_dict(state["detector"])
        self.optimizer.load_state_dict(state["optimizer"])


def parameter_groups(detector: Detector, config: Training) -> list[dict[str, Any]]:
    """Split the weights by rate (`scale`) and decay; biases and norms are not decayed.

    Raises:
        ValueError: a layer decay is asked for, and the backbone does not name its layers.
    """
    backbone: Any = detector.backbone
    own = {id(p) for p in backbone.parameters()}
    rest = nn.Module()
    for i, (name, p) in enumerate(detector.named_parameters()):
        if id(p) not in own:  # the names decide nothing but what is a bias
            rest.register_parameter(f"{i}_{name.rpartition('.')[2]}", p)
    groups = param_groups_weight_decay(rest, config.weight_decay)
    inner = getattr(backbone, "model", backbone)
    exempt = list(getattr(inner, "no_weight_decay", set)())
    if config.layer_decay < 1:
        if not hasattr(inner, "group_matcher"):
            raise ValueError(
                "This backbone does not name its layers (timm's group_matcher); leave out "
                "layer_decay, or choose another."
            )
        deep = param_groups_layer_decay(
            inner,
            config.weight_decay,
            no_weight_decay_list=exempt,
            layer_decay=config.layer_decay,
        )
    else:
        deep = param_groups_weight_decay(inner, config.weight_decay, no_weight_decay_list=exempt)
    for group in deep:
        group["scale"] = group.pop("lr_scale", 1.0) * config.backbone_lr
        group.pop("param_names", None)
    return [dict(scale=1.0) | group for group in (*groups, *deep) if group["params"]]


def rate(step: int, config: Training) -> float:
    """Rise linearly for the warm-up, then follow half a cosine down to 0."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def train_steps(
    trainee: TrainState, samples: Samples, *, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Train until `config.steps`; yield the losses of each step, on the device, and wait for none.

    Order, mirroring and what the heads draw follow from the seed and the step, so a run that goes
    on from a saved state repeats what an uninterrupted one does.
    """
    config, detector = trainee.config, trainee.detector
    coming = list(order(len(samples), config.batch, range(trainee.step, config.steps), config.seed))
    detector.train()
    if config.norms == "frozen":
        _still(detector.backbone)
    for batch in batches(samples, coming, workers=config.workers):
        torch.manual_seed(config.seed * 1_000_003 + trainee.step)
        losses = detector.losses(batch.to(device))
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        now = rate(trainee.step, config)
        for group in trainee.optimizer.param_groups:
            group["lr"] = now * group["scale"]
        norm = clip_grad_norm_(detector.parameters(), config.clip or math.inf)
        trainee.optimizer.step()
        trainee.optimizer.zero_grad(set_to_none=True)
        trainee.step += 1
        yield {"loss": total.detach(), "grad_norm": norm} | {
            name: value.detach() for name, value in losses.items() if len(losses) > 1
        }


def _still(backbone: nn.Module) -> None:
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | FrozenBatchNormAct2d):
            module.eval()
