"""MaskLLM (2409.17481): learn which N of each M weights stay, the weights themselves frozen."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from zoo.students.prune.nm import Layers, Pattern
from zoo.train.config import Training
from zoo.train.state import TrainState
from zoo.train.task import Feed, Loss, Task

KAPPA, TAU = (1e2, 5e2), (4.0, 0.05)
"""First and last value of the logits' scale and of the temperature (section 4.1); linear."""


class LearnedMask(nn.Module):
    """A parametrization of a weight: each group of M is multiplied by a mask drawn from logits.

    In training a soft mask, Σⱼ softmaxⱼ((κπ + g) / τ) Sⱼ over the C(M, N) masks S, with Gumbel
    noise g (section 3.2); in evaluation the likeliest.
    """

    masks: Tensor

    def __init__(self, weight: Float[Tensor, "D C"], pattern: Pattern):
        super().__init__()
        groups = weight.shape[0] * weight.shape[1] // pattern.group
        self.register_buffer("masks", pattern.masks(weight.device), persistent=False)
        self.logits = nn.Parameter(
            0.01 * torch.randn(groups, len(self.masks), device=weight.device)
        )
        self.kappa, self.tau = KAPPA[0], TAU[0]

    @torch.no_grad()
    def prefer(self, prior: Float[Tensor, "D C"], *, strength: float = 3.0) -> None:
        """Start from a mask: π += σ(π) α (⟨M₀, Mⱼ⟩ − N / 2) (section 3.3).

        Args:
            prior: A mask, or weights whose zeros are its.
            strength: α.
        """
        kept = (prior != 0).float().reshape(-1, self.masks.shape[1])
        agreement = kept @ self.masks.T - self.masks[0].sum() / 2
        self.logits += self.logits.std() * strength * agreement

    def forward(self, weight: Float[Tensor, "D C"]) -> Float[Tensor, "D C"]:
        if self.training:
            noise = -torch.empty_like(self.logits).exponential_().log()
            chosen = ((self.kappa * self.logits + noise) / self.tau).softmax(-1) @ self.masks
        else:
            chosen = self.masks[self.logits.argmax(-1)]
        return weight * chosen.view_as(weight).to(weight.dtype)


def learn_masks(
    layers: Layers, pattern: Pattern, prior: Mapping[str, Tensor] | None = None
) -> dict[str, LearnedMask]:
    """Put a learned mask on each layer's weight, which is frozen.

    Args:
        prior: Thinned weights by name (`prune_nm`), or the weights of a general mask from which
            one for a task is learnt.
    """
    found = {}
    for name, layer in layers.items():
        layer.weight.requires_grad_(False)
        found[name] = LearnedMask(layer.weight, pattern)
        if prior:
            found[name].prefer(prior[name])
        parametrize.register_parametrization(layer, "weight", found[name], unsafe=True)
    return found


def bake(layers: Layers) -> None:
    """Multiply the likeliest masks into the weights, and take the parametrizations away."""
    for layer in layers.values():
        layer.eval()
        parametrize.remove_parametrizations(layer, "weight")


class Lesson(NamedTuple):
    """What masks are learnt by: a task of the loop, and what it trains on."""

    task: Task
    feed: Feed
    model: Any
    """With the masked layers in it; what else of it needs a gradient learns too."""
    parts: Mapping[str, nn.Module]


class MaskTask(Task):
    """Another task's losses through masked weights, less λ Σ ‖W M‖² (section 3.3).

    The regulariser keeps large what is left of the weights: without it the gradients shrink, and
    the mask stays where it began.

    Args:
        inner: What is to be kept: the text, a teacher's next tokens, teachers' features.
        layers: With their learned masks.
        weight_reg: λ.
    """

    def __init__(self, inner: Task, layers: Layers, config: Training, *, weight_reg: float = 1e-5):
        self.inner, self.layers, self.config, self.weight_reg = inner, layers, config, weight_reg
        self.kept: Tensor | None = None

    def targets(self, batch: Any, step: int) -> Any:
        return self.inner.targets(batch, step)

    def losses(self, state: TrainState, batch: Any, targets: Any, step: int) -> dict[str, Loss]:
        done = min(1.0, step / max(1, self.config.steps - 1))
        for layer in self.layers.values():
            inner: Any = layer.parametrizations
            mask = inner.weight[0]
            mask.kappa, mask.tau = (first + done * (last - first) for first, last in (KAPPA, TAU))
        with parametrize.cached():  # one draw for the loss and for what is left of the weights
            losses = self.inner.losses(state, batch, targets, step)
            left = [layer.weight.float().square().sum() for layer in self.layers.values()]
        self.kept = torch.stack(left).sum()
        return losses

    def weigh(self, losses: Mapping[str, Tensor], step: int) -> Tensor:
        assert self.kept is not None  # `losses` ran before
        return self.inner.weigh(losses, step) - self.weight_reg / self.config.num_slices * self.kept

    def observe(self, means: Mapping[str, Tensor], step: int) -> None:
        self.inner.observe(means, step)
