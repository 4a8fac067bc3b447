"""Masks by SAM's decoder from a student's features, compared with those from SAM's own encoder."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from zoo.eval.registry import Found, Picture, Scores, Subject
from zoo.eval.settings import SamMasksSettings
from zoo.eval.zeroshot import head_for, teacher_of
from zoo.features import Batch
from zoo.teachers.name import TeacherName
from zoo.teachers.open import open_teacher
from zoo.teachers.sam import MaskDecoder
from zoo.train.mesh import gathered_on_first, union


def masks(subject: Subject, data: Path, settings: SamMasksSettings) -> Iterator[Found]:
    """Yield the mean IoU of masks from the same points, in per cent: 100 for SAM's own features.

    AM-RADIO (2312.06709) also replaces SAM's encoder by its student, and compares with COCO's
    masks; here SAM's own masks are the truth, so no labels are needed. Both networks get the same
    square crops. Two empty masks have an IoU of 1.

    Raises:
        ValueError: the teacher is not a SAM, the student has no head for its map, or there are no
            images.
    """
    settings = used(subject, (), settings)
    label = settings.head
    images = subject.open(data, "whole")
    teacher = open_teacher(settings.teacher, device=subject.device)
    decoder = MaskDecoder(TeacherName.parse(settings.teacher), subject.device)
    points = grid_points(settings.points).to(subject.device)
    seen: list[_Image] = []
    for batch in images:
        theirs = teacher(batch).spatial
        with torch.no_grad(), subject.autocast():
            ours = subject.student(batch)[label].spatial
        if ours is None or theirs is None:
            raise ValueError(f"The head {label!r} of {subject.name} returns no map for a decoder.")
        prompts = points.expand(len(batch.images), -1, -1)
        pair = [decoder(spatial, prompts) > 0 for spatial in (ours, theirs)]
        for i, iou in enumerate(agreement(pair[0], pair[1]).cpu().numpy()):
            shows = len(seen) < settings.pictures
            drawn = _drawn(batch, i, pair[0][i], pair[1][i]) if shows else None
            seen.append(_Image(batch.number, str(batch.keys[i]) if batch.keys else "", iou, drawn))
    union(subject.unreadable)
    if (everything := gathered_on_first(seen)) is not None:
        yield from _values(sorted(everything, key=lambda image: image.batch), settings, data)


def used(subject: Subject, data: Sequence[Path], settings: SamMasksSettings) -> SamMasksSettings:
    """Return the settings with the teacher and the head that are used.

    Without a teacher, it is the only one of the student's run that is a model of transformers.

    Raises:
        ValueError: there is no such teacher or head.
    """
    teacher = settings.teacher or teacher_of(subject, ("hf",))
    label = head_for(subject, teacher, settings.head, "masks")
    return replace(settings, teacher=teacher, head=label)


class _Image(NamedTuple):
    batch: int
    key: str
    iou: np.ndarray
    picture: Picture | None


def _values(seen: Sequence[_Image], settings: SamMasksSettings, data: Path) -> Iterator[Found]:
    if not seen:
        raise ValueError(f"There are no images in {data}.")
    keys = [image.key or str(number) for number, image in enumerate(seen)]
    iou = np.stack([image.iou for image in seen]).astype(np.float64)
    yield "masks/miou", Scores(keys, iou.mean(axis=1))
    yield "masks/iou_over_half", Scores(keys, (iou > 0.5).mean(axis=1))
    for number, image in enumerate(seen[: settings.pictures]):
        if image.picture is not None:
            yield f"masks/{number:03d}", image.picture


def grid_points(count: int) -> Float[Tensor, "1 p 2"]:
    """Return the centres of `count` x `count` equal cells, (column, row) as shares of the image."""
    middles = (torch.arange(count) + 0.5) / count
    rows, cols = torch.meshgrid(middles, middles, indexing="ij")
    return torch.stack([cols, rows], dim=-1).flatten(0, 1)[None]


def agreement(
    ours: Bool[Tensor, "B p y x"], theirs: Bool[Tensor, "B p y x"]
) -> Float[Tensor, "B p"]:
    """Return the intersection over union of each pair of masks; 1 for two empty ones."""
    both, either = ((op).sum(dim=(-2, -1)).float() for op in (ours & theirs, ours | theirs))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def _drawn(batch: Batch, index: int, ours: Tensor, theirs: Tensor) -> Picture:
    """Draw the masks of the point in the middle over the image: the student's left, SAM's right."""
    middle = len(ours) // 2 + int(len(ours) ** 0.5) // 2
    size = (batch.images.shape[-2], batch.images.shape[-1])
    image = (batch.at(size)[index] * 255).byte().permute(1, 2, 0).cpu().numpy()
    sides = []
    for mask in (ours, theirs):
        part = mask[min(middle, len(mask) - 1)][None, None].float()
        large = torch.nn.functional.interpolate(part, size)[0, 0].bool().cpu().numpy()
        tinted = (0.5 * image + 0.5 * np.array([255, 40, 40])).astype(np.uint8)
        sides.append(np.where(large[..., None], tinted, image))
    return Picture(
        np.concatenate(sides, axis=1), "masks from one point: the student's left, SAM's right"
    )
