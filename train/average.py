"""The average of a model's weights over the last part of a run."""

from typing import Literal

import torch
from timm.utils import ModelEmaV3
from torch import nn

from zoo.layers import spectral
from zoo.train.shard import is_sharded, local

AGE = 1 / 20
"""Mean age of the averaged weights, as a share of the steps so far."""


class Average(ModelEmaV3):
    """A moving average whose memory grows with the run.

    After step t the average takes a share a_t of the weights:

        w̄_t = (1 − a_t) w̄_{t−1} + a_t w_t
        a_t = max(1 − decay, k / (k + t − 1)),    k = 1/AGE − 1

    a_1 = 1, so nothing is left of the weights before the first step. Step s counts with about
    s^(k−1): the power profile of Karras et al. (2312.02696, 3.1), which is the same share of a run
    of any length. At every moment the mean age is AGE of the steps so far, and steps of the first
    half count 2^−k, 2e-6 in all. With k = 9 this is the warm-up (1 + n) / (10 + n) of TensorFlow's
    moving average. A decay, such as papers state, bounds the memory to 1 / (1 − decay) steps.

    Buffers are averaged too. The mean of unit vectors is shorter, and with shorter singular vectors
    a spectral reparametrisation has larger weights: so these take a step of power iteration on the
    averaged weight.

    Args:
        decay: `auto` for no bound.
    """

    def __init__(self, model: nn.Module, decay: float | Literal["auto"] = "auto"):
        super().__init__(model, decay=1.0 if decay == "auto" else decay)

    def get_decay(self, step: int | None = None) -> float:
        """Return 1 − a_t for the step t, counted from 1."""
        assert step is not None
        return min(self.decay, (step - 1) / (step - 1 + 1 / AGE - 1))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        super().update(model, step)
        spectral.follow(self.module)

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move all values towards the model's; each rank the share it has, if they are cut."""
        if not is_sharded(model):
            super().apply_update_(model, decay)
            return
        values = self.module.state_dict().values(), model.state_dict().values()
        for mine, theirs in zip(*(map(local, side) for side in values), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, 1 - decay)
            else:
                mine.copy_(theirs)

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a checkpoint, also from one whose singular vectors were averaged."""
        self.module.load_state_dict(state)
        if not spectral.has_unit_vectors(self.module):
            spectral.follow(self.module, steps=spectral.START_STEPS)
