"""Any `nn.Module` as a teacher: `torch:package.module.function[@resolution]`, or `from_module`."""

from collections.abc import Mapping
from importlib import import_module

import torch
from torch import Tensor, nn

from zoo.features import Features
from zoo.teachers.name import TeacherName
from zoo.teachers.teacher import Frozen, reason

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ModuleTeacher(Frozen):
    """A module that returns `Features`, a mapping with their names, or one tensor.

    A tensor is a summary if it is [B D], a map if it is [B C H W].
    """

    def features(self, x) -> Features:
        out = self.network(x)
        if isinstance(out, Features):
            return out
        if isinstance(out, Mapping):
            return Features(out.get("summary"), out.get("spatial"))
        if isinstance(out, Tensor) and out.ndim == 2:
            return Features(out, None)
        if isinstance(out, Tensor) and out.ndim == 4:
            return Features(None, out.permute(0, 2, 3, 1))
        what = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out)
        raise ValueError(
            f"The teacher {self.name} returns {what}; it should return Features(summary, spatial), "
            "a dict with those names, a [B D] summary or a [B C H W] map."
        )


def from_module(
    name: str,
    module: nn.Module,
    *,
    size: int | tuple[int, int] = 224,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    device: torch.device | str = "cpu",
) -> ModuleTeacher:
    """Make a teacher of `module`, which is frozen in place and gets normalised images at `size`.

    Args:
        module: Returns `Features`, a dict with their names, a [B D] summary or a [B C H W] map.
        size: Side of the images, or rows and columns, in pixels.

    Raises:
        ValueError: the module returns something else.
    """
    size = (size, size) if isinstance(size, int) else size
    return ModuleTeacher(name, module, size=size, mean=mean, std=std, device=device)


def open_torch(name: TeacherName, device: torch.device) -> ModuleTeacher:
    """Make a teacher of the module that a function returns; it is called without arguments.

    The module may have the attributes `mean` and `std` (tuples of three floats); the default is
    ImageNet's.

    Raises:
        ValueError: the name does not point at a function that returns a module, or as
            `from_module`.
    """
    path, _, function = name.name.replace(":", ".").rpartition(".")
    try:
        make = getattr(import_module(path), function)
    except Exception as error:  # a module may raise anything when it is imported
        raise ValueError(
            f"torch:{name.name} does not point at a function: {error}. "
            "The form is torch:package.module.function; the package must be importable from here."
        ) from error
    with torch.device("meta" if device.type == "meta" else "cpu"):
        try:
            module = make()
        except Exception as error:
            raise ValueError(
                f"torch:{name.name} could not be called without arguments: {reason(error)}."
            ) from error
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"torch:{name.name} returns a {type(module).__name__}; a teacher is an nn.Module."
        )
    if name.weights and device.type != "meta":
        from zoo.weights import read_state

        module.load_state_dict(read_state(name.weights))
    mean, std = getattr(module, "mean", IMAGENET_MEAN), getattr(module, "std", IMAGENET_STD)
    return from_module(
        f"torch:{name.name}", module, size=name.resolution or 224, mean=mean, std=std, device=device
    )
