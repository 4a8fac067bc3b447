"""One step of agglomerative distillation: the method on one screen."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.features import Batch, Features
from zoo.train.distill.losses import by_image, over_seen
from zoo.train.task import Loss

Distance = Callable[[Tensor, Tensor], Tensor]
Align = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Our map and theirs -> both on one grid, and the positions that count of it if not all do."""


class Term(NamedTuple):
    """One loss: what the student answers for a teacher, beside what the teacher answered."""

    name: str
    """`label/summary` or `label/spatial`."""
    teacher: str
    loss: Callable[[Features, Features, Align], Tensor]
    """Normaliser, alignment and distance in one; a mean over the slice, or each image's, [B]."""
    each_image: bool = False
    """Whether the loss gives each image's."""


def distill_step(
    batch: Batch,
    student: Callable[[Batch], dict[str, Features]],
    targets: Mapping[str, Features],
    terms: Sequence[Term],
    align: Callable[[str], Align],
) -> dict[str, Loss]:
    """Compare the student with each teacher, term by term.

    Args:
        targets: By label. A term whose teacher is missing has the loss 0, and so a gradient all
            the same: the graph of a step does not depend on which teachers it has.
        align: For a label, what brings the student's map and the teacher's to one grid.
    """
    ours, images, losses = student(batch), len(batch.images), {}
    for term in terms:
        guess = ours[term.teacher]
        if term.teacher in targets:
            value = term.loss(guess, targets[term.teacher], align(term.teacher))
            each = value.ndim > 0
            losses[term.name] = Loss(value, images) if each else Loss.of_mean(value, images)
        else:
            part = guess.summary if term.name.endswith("/summary") else guess.spatial
            nothing = 0 * full_precision(part).flatten(1).sum(1)
            losses[term.name] = Loss(nothing if term.each_image else nothing.sum(), 0)
    return losses


def summary_term(
    label: str,
    distance: Distance,
    normalizer: nn.Module | None = None,
    *,
    each_image: bool = False,
) -> Term:
    """Compare the summaries of student and teacher.

    Args:
        normalizer: Makes the space in which they are compared; their own by default.
        each_image: Return each image's own loss, in place of their mean.
    """
    distance = by_image(distance) if each_image else distance

    def loss(ours: Features, theirs: Features, align: Align) -> Tensor:
        target = full_precision(theirs.summary)
        if normalizer is not None:
            with torch.no_grad():
                target = normalizer(target)
        return distance(full_precision(ours.summary), target)

    return Term(f"{label}/summary", label, loss, each_image)


def spatial_term(
    label: str, distance: Distance, normalizer: nn.Module, *, each_image: bool = False
) -> Term:
    """Compare the maps of student and teacher, on one grid.

    The student's heads answer in the space that the teacher's normalizer makes (PHI-S, 2410.01680,
    A.6): there AdamW, weight decay and element-wise losses see every channel on one scale.
    """
    whole = by_image(distance) if each_image else distance

    def loss(ours: Features, theirs: Features, align: Align) -> Tensor:
        with torch.no_grad():
            target = normalizer(full_precision(theirs.spatial))
        guess, target, *seen = align(full_precision(ours.spatial), target)
        if not seen:
            return whole(guess, target)
        each = over_seen(distance, guess, target, seen[0])
        return each if each_image else each.mean()

    return Term(f"{label}/spatial", label, loss, each_image)


def full_precision(x: Tensor | None) -> Tensor:
    """Return features in float32, or in what they have if that is more."""
    assert x is not None  # a head is built for what its teacher has
    return x.to(torch.promote_types(x.dtype, torch.float32))
