"""One step of agglomerative distillation: the method on one screen."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from zoo.features import Batch, Features, match_grid
from zoo.train.distill.losses import by_image, summary_loss

Loss = Callable[[Tensor, Tensor], Tensor]
Align = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def distill_step(
    batch: Batch,
    student: Callable[[Batch], dict[str, Features]],
    teachers: Mapping[str, Callable[[Batch], Features]],
    normalizers: Mapping[str, nn.Module],
    spatial_loss: Loss,
    *,
    summary_losses: Mapping[str, Loss] | None = None,
    align: Mapping[str, Align] | None = None,
    each_image: bool = False,
) -> dict[str, Tensor]:
    """Compare the student with each teacher: `label/summary` and `label/spatial` -> a scalar.

    The student's heads answer in the space that the teacher's balance makes (PHI-S, 2410.01680,
    A.6): there AdamW, weight decay and element-wise losses see every channel on one scale.

    Args:
        teachers: A head whose teacher is missing gets the loss 0, and so a gradient all the same:
            the graph of a step does not depend on who is asked.
        summary_losses: By label; the cosine distance by default.
        align: What brings a student's and a teacher's map to one grid; `match_grid` by default.
        each_image: Give each image's own losses, [B], in place of their means.
    """
    of = by_image if each_image else lambda loss: loss
    ours = student(batch)
    losses = {}
    for name, guess in ours.items():
        if name not in teachers:
            for part, x in (("summary", guess.summary), ("spatial", guess.spatial)):
                if x is not None:
                    nothing = 0 * x.float().flatten(1).sum(1)
                    losses[f"{name}/{part}"] = nothing if each_image else nothing.mean()
            continue
        with torch.no_grad():
            theirs = teachers[name](batch)
        if guess.summary is not None:
            loss = (summary_losses or {}).get(name, summary_loss)
            losses[f"{name}/summary"] = of(loss)(guess.summary.float(), theirs.summary.float())
        if guess.spatial is not None:
            with torch.no_grad():
                target = normalizers[name](theirs.spatial.float())
            pair = (align or {}).get(name, match_grid)(guess.spatial.float(), target)
            losses[f"{name}/spatial"] = of(spatial_loss)(*pair)
    return losses
