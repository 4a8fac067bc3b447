"""What a step and the calibration hold, against the memory that there is."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zoo.features import Batch
from zoo.students.student import Student
from zoo.teachers.mosaic import Mosaic
from zoo.teachers.teacher import Teacher
from zoo.train.device import autocast, in_precision, memory_of
from zoo.train.distill.config import Distill
from zoo.train.distill.placement import away, teacher_blocks
from zoo.train.distill.sizes import every_size
from zoo.train.shard import of_node, shares

COPIES = 4
"""Of the weights in training: themselves, their gradient, and AdamW's two moments."""
IMAGES = 2
"""Images that are run on shapes: one may be a special case of a kernel."""
COMPILED_KEEPS = 0.5
"""Share of the activations that compiled code keeps; the cheap half it computes again."""
MOST_PER_PIXEL = 2**17
"""Bytes that no network here holds for a pixel of an image in training: ViT-g/14 holds 4e4."""


def check_memory(
    config: Distill, device: torch.device, teachers: Mapping[str, Teacher] | None = None
) -> None:
    """Refuse what cannot fit: a lower bound is held against all the memory of the machine.

    Counted are a slice's images and targets, the summaries of the calibration, and the hidden
    layers of the heads; `check_step` counts what networks hold. Before the teachers are open, their
    shares are left out.

    Raises:
        ValueError: the bound is above the memory; both are said.
    """
    opened = (teachers or {}).values()
    slice_size = max(config.slice_images.values())
    grids = [(t.grid or (0, 0), t.spatial_dim or 0, t.summary_dim or 0) for t in opened]
    targets = sum(4 * (rows * cols * width + summary) for (rows, cols), width, summary in grids)
    side = max((config.size, *config.sizes))
    hidden = config.heads.hidden or max((max(width, n) for _, width, n in grids), default=0)
    heads = 4 * COPIES * len(config.teachers) * config.heads.num_inner * hidden**2
    summaries = 4 * config.batch * config.calibration * sum(n for _, _, n in grids)
    for needed, what, where, way in (
        (
            slice_size * (3 * side**2 + targets),
            f"A slice of {slice_size:,} images" + " and their targets" * bool(targets),
            device,
            "Give a smaller --batch, or more --slices.",
        ),
        (
            heads,
            f"Training {config.heads.num_inner} hidden layers of {hidden:,} in each head",
            device,
            "Give smaller --heads.hidden or --heads.num-inner.",
        ),
        (
            summaries,
            f"The summaries of {config.calibration:,} batches of calibration",
            torch.device("cpu"),
            "Give a smaller --calibration.",
        ),
    ):
        if needed > (there := memory_of(where)):
            raise ValueError(
                f"{what}: at least {needed / 1e9:,.1f} GB, and this {where.type} has "
                f"{there / 1e9:,.1f} GB. {way}"
            )


def may_not_fit(config: Distill, device: torch.device) -> bool:
    """Return whether a step is so large that `check_step` is worth its seconds."""
    side, count = largest_slice(config)
    return count * side**2 * MOST_PER_PIXEL > memory_of(device)


def check_step(
    config: Distill, device: torch.device, teachers: Mapping[str, Teacher], student: Student
) -> None:
    """Refuse a slice whose networks hold more than the memory of the machine.

    Teachers answer one after another before the student trains, so the larger of the two counts.

    Args:
        teachers: In the config's order, on the meta device, as is `student`: nothing is computed.

    Raises:
        ValueError: the estimate is above the memory; both are said.
    """
    side, count = largest_slice(config)
    step = step_bytes(config, device, teachers, student)
    weights, saved, peak = step.weights, step.saved, step.peak
    needed = weights + count * max(saved, peak)
    if needed > (there := memory_of(device)):
        raise ValueError(
            f"A slice of {count:,} images at {side} px takes about {needed / 1e9:,.1f} GB: "
            f"{weights / 1e9:,.1f} GB of weights, gradients and moments, and for each image "
            f"{saved / 1e6:,.1f} MB between the student's layers ({peak / 1e6:,.1f} MB in a "
            f"teacher). This {device.type} has {there / 1e9:,.1f} GB. Give a smaller --batch or "
            "--size, or more --slices."
        )


class StepBytes(NamedTuple):
    """What a step holds, in bytes."""

    weights: float
    """Of teachers, and of the student with gradients, moments and copies in lower precision."""
    saved: float
    """For each image, between the student's layers."""
    peak: float
    """For each image, in the teacher that holds most."""
    images: float
    """For each image, its pixels at every size that a model has."""


def step_bytes(
    config: Distill,
    device: torch.device,
    teachers: Mapping[str, Teacher],
    student: Student,
    *,
    compiled: bool = False,
) -> StepBytes:
    """Estimate what a step holds; arguments as of `check_step`.

    Args:
        compiled: The student is.
    """
    side, _ = largest_slice(config)
    (saved, once), peak = saved_bytes(student, side, config, device), 0.0
    if config.compile or compiled:
        saved *= COMPILED_KEEPS
    for teacher in teachers.values():
        peak = max(peak, *(peak_bytes(one, config, device) for one in every_size(teacher)))
    weights = COPIES * weight_bytes(student) / shares(config.ranks, student) + once
    sizes = {(side, side)}
    for spec, teacher in zip(config.teachers, teachers.values(), strict=True):
        sizes |= {one.size for one in every_size(teacher)}
        if isinstance(teacher, nn.Module):
            blocks = teacher_blocks(teacher) if spec.place == "shard" else []
            weights += weight_bytes(teacher) - away(blocks, of_node())
    largest = max(rows * cols for rows, cols in sizes)
    pixels = 3 * largest + sum(12 * rows * cols for rows, cols in sizes)
    return StepBytes(weights, saved, peak, pixels)


def largest_slice(config: Distill) -> tuple[int, int]:
    """Return the side and the images of the slice that has the most pixels."""
    return max(config.slice_images.items(), key=lambda pair: pair[0] ** 2 * pair[1])


def weight_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's weights and buffers; what is shared counts once."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


class SavedBytes(NamedTuple):
    """What a student in training holds for the backward pass, in bytes."""

    each: float
    """For each image."""
    once: float
    """For any number of images: weights in a lower precision."""


def saved_bytes(student: Student, side: int, config: Distill, device: torch.device) -> SavedBytes:
    """Count what a student in training holds for the backward pass.

    What autograd keeps grows with the images where it depends on them. Nothing is computed
    (`FakeTensorMode`), but the kernels are those of `device`: plain attention holds its whole
    matrix, fused attention does not.
    """
    student = in_precision(copy.deepcopy(student), config.precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        student = student.to_empty(device=device).train()
        images = torch.zeros(IMAGES, 3, side, side, device=device, requires_grad=True)
        held = _Held(images)
        with held.hooks(), autocast(config.precision, device):
            student(Batch(images), size=(side, side), mesa=bool(config.losses.mesa))
    return held.bytes(weight_addresses(student))


class _Held:
    """Notes what autograd keeps, and whether that depends on the images."""

    def __init__(self, images: Tensor):
        self.images = images
        self._sizes, self._kept = dict[int, int](), list[Tensor]()
        self._grows = dict[int, bool]()
        self._known = dict[Any, bool]()

    def hooks(self) -> AbstractContextManager:
        """Return the context in which tensors are noted."""
        return torch.autograd.graph.saved_tensors_hooks(self._note, lambda x: x)

    def bytes(self, own: set[int]) -> SavedBytes:
        """Return what is held.

        Args:
            own: Addresses of weights, which are there anyway.
        """
        totals = {True: 0, False: 0}
        for at, size in self._sizes.items():
            totals[self._grows[at]] += size * (at not in own)
        return SavedBytes(totals[True] / IMAGES, totals[False])

    def _note(self, x: Tensor) -> Tensor:
        self._kept.append(x)  # an address means one storage as long as that lives
        at = x.untyped_storage()._cdata
        self._sizes[at] = x.untyped_storage().nbytes()
        # what has no step is an output: a mask, or the statistics of a norm
        grows = x.grad_fn is None or self._depends(x.grad_fn)
        self._grows[at] = self._grows.get(at, False) or grows
        return x

    def _depends(self, step: Any) -> bool:
        """Tell whether a step of autograd has the images behind it."""
        waiting = [step]
        while waiting:
            before = [node for node, _ in waiting[-1].next_functions if node is not None]
            if new := [node for node in before if node not in self._known]:
                waiting += new
                continue
            last = waiting.pop()
            ends = getattr(last, "variable", None) is self.images
            self._known[last] = ends or any(self._known[node] for node in before)
        return self._known[step]


def peak_bytes(teacher: Teacher, config: Distill, device: torch.device) -> float:
    """Return what a teacher's largest operation reads and writes, in bytes an image.

    A lower bound of its peak: without gradients nothing else lives long.
    """
    if not isinstance(teacher, nn.Module):
        return 0.0
    with on_shapes(teacher, config, device) as (network, batch):
        largest = _Largest(weight_addresses(network))
        with largest:
            network(batch)
    return largest.bytes / len(batch.images)


@contextmanager
def on_shapes(
    teacher: nn.Module, config: Distill, device: torch.device
) -> Iterator[tuple[nn.Module, Batch]]:
    """Give a copy of a teacher and the fewest images that it takes, of which nothing is computed.

    Within this context both are shapes alone (`FakeTensorMode`); the kernels are those of `device`.

    Args:
        teacher: Of one size, on the meta device.
    """
    images, size = teacher.k**2 if isinstance(teacher, Mosaic) else 1, cast(Teacher, teacher).size
    network = copy.deepcopy(teacher)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        network = network.to_empty(device=device)
        batch = Batch(torch.zeros(images, 3, *size, device=device))
        with autocast(config.precision, device):
            yield network, batch


def weight_addresses(model: nn.Module) -> set[int]:
    """Return the addresses of a model's weights and buffers."""
    return {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}


class _Largest(TorchDispatchMode):
    """Notes the bytes that the largest operation reads and writes, without those of weights."""

    def __init__(self, weights: set[int]):
        super().__init__()
        self.weights, self.bytes = weights, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
        self.bytes = max(self.bytes, sum(n for at, n in storages.items() if at not in self.weights))
        return out
