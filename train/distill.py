"""One step of agglomerative distillation: the method on one screen."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from zoo.features import Batch, Features, match_grid
from zoo.train.config import TeacherSpec
from zoo.train.losses import summary_loss


def distill_step(
    batch: Batch,
    student: Callable[[Batch], dict[str, Features]],
    teachers: Mapping[str, Callable[[Batch], Features]],
    balances: Mapping[str, nn.Module],
    spatial_loss: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Compare the student with each teacher: `label/summary` and `label/spatial` -> a scalar.

    The student's heads answer in the space that the teacher's balance makes (PHI-S, 2410.01680,
    A.6): there AdamW, weight decay and element-wise losses see every channel on one scale.
    """
    ours = student(batch)
    losses = {}
    for name, teacher in teachers.items():
        guess = ours[name]
        with torch.no_grad():
            theirs = teacher(batch)
        if guess.summary is not None:
            losses[f"{name}/summary"] = summary_loss(guess.summary.float(), theirs.summary.float())
        if guess.spatial is not None:
            with torch.no_grad():
                target = balances[name](theirs.spatial.float())
            losses[f"{name}/spatial"] = spatial_loss(*match_grid(guess.spatial.float(), target))
    return losses


def loss_weights(specs: Mapping[str, TeacherSpec], losses: Mapping[str, Tensor]) -> Tensor:
    """Give the recipe's weight of each loss, in the order of `losses`."""
    device = next(iter(losses.values())).device
    weights = [getattr(specs[name], part) for name, part in (k.rsplit("/", 1) for k in losses)]
    return torch.tensor(weights, device=device)
