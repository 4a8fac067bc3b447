"""Several students of one shape, trained in one step.

Small students leave a large GPU idle: launching a kernel takes longer than running it. Here each
weight of M students is in one tensor, [M ...], and their images are in one batch, [M·B ...]. Every
linear layer is one batched product, and attention has a larger batch. Nothing is shared: AdamW is
element-wise and the gradient is clipped for each student alone, so each learns what it would learn
by itself. (`torch.vmap` over the unchanged modules would do the same in float32, but autocast has
no effect inside it.)
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from zoo.students.student import Student
from zoo.teachers.teacher import reason
from zoo.train.config import Optim
from zoo.train.optim import build_optimizer, learning_rate

Module = TypeVar("Module", bound=nn.Module)
StackedAnswers = dict[str, Tensor]
"""`label/summary` or `label/spatial` -> the heads' outputs, channels last."""


def _by_student(x: Tensor, count: int) -> Tensor:
    """[M·B ... C] -> [M rows C]."""
    return x.reshape(count, -1, x.shape[-1])


class StackedLinear(nn.Module):
    """M linear layers: weight [M out in], bias [M out]."""

    def __init__(self, one: nn.Linear):
        super().__init__()
        self.weight, self.bias = one.weight, one.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, weight = _by_student(x, len(self.weight)), self.weight.mT
        if self.bias is None:
            out = torch.bmm(rows, weight)
        else:
            out = torch.baddbmm(self.bias[:, None], rows, weight)
        return out.view(*x.shape[:-1], -1)


class StackedPatches(nn.Module):
    """M patch embeddings, convolutions whose stride is their kernel: weight [M out 3 p q]."""

    def __init__(self, one: nn.Conv2d):
        super().__init__()
        self.weight, self.bias, self.kernel = one.weight, one.bias, one.kernel_size
        assert self.bias is not None

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        rows, cols = (n // k for n, k in zip(x.shape[-2:], self.kernel, strict=True))
        patches = x.unflatten(-1, (cols, -1)).unflatten(-3, (rows, -1))  # B 3 rows p cols q
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        weight = self.weight.flatten(2).mT
        out = torch.baddbmm(self.bias[:, None], _by_student(patches, len(weight)), weight)
        return out.view(*patches.shape[:-1], -1).permute(0, 3, 1, 2)


class StackedNorm(nn.Module):
    """M layer norms: weight and bias [M C]."""

    def __init__(self, one: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias, self.eps = one.weight, one.bias, one.eps

    def forward(self, x: Tensor) -> Tensor:
        rows = _by_student(F.layer_norm(x, x.shape[-1:], eps=self.eps), len(self.weight))
        return torch.addcmul(self.bias[:, None], rows, self.weight[:, None]).view(x.shape)


SWAPS: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.Linear, StackedLinear),
    (nn.LayerNorm, StackedNorm),
    (nn.Conv2d, StackedPatches),
)
TOKENS = ("cls_token", "pos_embed", "reg_token")
"""Weights of a timm ViT that belong to no layer; they are repeated for each image of a student."""


def _stacked(module: Module) -> Module:
    """Replace the layers below `module`, in place, by ones that take stacked weights.

    Raises:
        ValueError: a layer has weights but no stacked form.
    """
    for name, child in module.named_children():
        swap = next((new for old, new in SWAPS if isinstance(child, old)), None)
        if swap is None:
            _stacked(child)
        elif isinstance(child, nn.Conv2d) and child.stride != child.kernel_size:
            raise ValueError(
                f"The convolution {name} has a stride of {child.stride} and a kernel of "
                f"{child.kernel_size}; only patch embeddings, where they are equal, can be stacked."
            )
        else:
            setattr(module, name, swap(child))
    own = [name for name, _ in module.named_parameters(recurse=False) if name not in TOKENS]
    if own and not isinstance(module, tuple(new for _, new in SWAPS)):
        raise ValueError(
            f"{type(module).__name__} has the weights {', '.join(own)} and no stacked form; the "
            "students of an experiment must be plain ViTs."
        )
    return module


class _Answer(nn.Module):
    """A student as a module from images to `StackedAnswers`."""

    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> StackedAnswers:
        return {
            f"{name}/{part}": value
            for name, features in self.student.answer(images).items()
            for part, value in zip(("summary", "spatial"), features, strict=True)
            if value is not None
        }


def _stacked_weights(students: Sequence[Student]) -> dict[str, Tensor]:
    rows = [dict(student.named_parameters()) for student in students]
    return {name: torch.stack([row[name].detach() for row in rows]) for name in rows[0]}


class Stack:
    """Students of one shape, each with weights of its own.

    Args:
        students: Plain ViTs on the device of the training; they are copied, not changed.
        steps: Length of the learning rate's schedule.
        compiled: Compile the forward pass (`torch.compile`).

    Raises:
        ValueError: one of their layers cannot be stacked.
    """

    def __init__(
        self, students: Sequence[Student], optim: Optim, *, steps: int, compiled: bool = False
    ):
        self.optim, self.steps, self.done = optim, steps, 0
        self.pattern = students[0]
        self.params = {n: p.requires_grad_() for n, p in _stacked_weights(students).items()}
        self.shell = _Answer(_stacked(copy.deepcopy(students[0])))
        self.optimizer = self._optimizer()
        self._call: Callable[[Tensor], StackedAnswers] = self._forward
        self._failures: tuple[type[Exception], ...] = ()
        if compiled:
            from torch._dynamo.exc import TorchDynamoException

            self._failures = (TorchDynamoException,)
            self._call = torch.compile(self._forward, dynamic=False)

    def _optimizer(self) -> torch.optim.AdamW:
        """Return AdamW over the stacked weights, with the groups that one student would have."""
        names = {id(p): name for name, p in self.pattern.named_parameters()}
        one = build_optimizer(self.pattern, self.optim)
        groups = [
            dict(
                params=[self.params[names[id(p)]] for p in group["params"]],
                weight_decay=group["weight_decay"],
            )
            for group in one.param_groups
        ]
        fused = next(iter(self.params.values())).is_cuda
        return torch.optim.AdamW(groups, lr=self.optim.lr, betas=self.optim.betas, fused=fused)

    def restart(self, students: Sequence[Student], *, steps: int) -> None:
        """Start again with other students, in the same tensors, so that nothing is recompiled."""
        with torch.no_grad():
            for name, value in _stacked_weights(students).items():
                self.params[name].copy_(value)
        self.optimizer = self._optimizer()
        self.steps, self.done = steps, 0

    def __len__(self) -> int:
        return len(next(iter(self.params.values())))

    def _forward(self, images: Tensor) -> StackedAnswers:
        count = len(self)
        each = len(images) // count

        def spread(name: str, value: Tensor) -> Tensor:
            if name.rpartition(".")[2] not in TOKENS:
                return value
            return value.expand(-1, each, -1, -1).flatten(0, 1)

        params = {f"student.{name}": spread(name, value) for name, value in self.params.items()}
        answers = functional_call(self.shell, params, (images,))
        return {name: value.unflatten(0, (count, each)) for name, value in answers.items()}

    def answers(self, images: Tensor) -> StackedAnswers:
        """Return every student's answers, [M B ...].

        Args:
            images: In [0, 1]: [B 3 H W] for all students, or each student's own, [M B 3 H W].
        """
        if images.ndim == 4:
            images = images.expand(len(self), *images.shape)
        try:
            return self._call(images.flatten(0, 1))
        except self._failures as error:
            self._call = self._forward
            print(f"torch.compile failed; the students run without it: {reason(error)}")
            return self._call(images.flatten(0, 1))

    def update(self, losses: Tensor) -> Tensor:
        """Take one step of AdamW for each student, and return the norms of the gradients, [M].

        Args:
            losses: The loss of each student, [M].
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.done, self.steps, self.optim)
        losses.sum().backward()
        gradients = [p.grad for p in self.params.values() if p.grad is not None]
        norms = clip_each(gradients, self.optim.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return norms

    def student(self, index: int) -> Student:
        """Return a copy of one of the students, as an ordinary module."""
        student = copy.deepcopy(self.pattern)
        with torch.no_grad():
            for name, value in student.named_parameters():
                value.copy_(self.params[name][index])
        return student


def clip_each(gradients: Sequence[Tensor], largest: float) -> Tensor:
    """Scale the gradient of each stacked student to a norm of at most `largest`, in place.

    The same arithmetic as `torch.nn.utils.clip_grad_norm_`, for each index of the leading dim.

    Returns:
        The norms before, [M].
    """
    parts = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients]
    norms = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    scale = (largest / (norms + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(scale.view(-1, *[1] * (g.ndim - 1)))
    return norms
