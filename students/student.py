"""A student: any timm backbone, and one pair of heads for each teacher."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.features import Batch, Features, read_features
from zoo.students.heads import TeacherHead, head_hidden


class Student(nn.Module):
    """Batch -> {teacher: Features}.

    Args:
        heads: One head a teacher, by the teacher's label.
        size: Rows and columns of the images that the backbone gets.
        recipe: Name and keywords with which `timm.create_model` builds the backbone again.
        head: Keywords with which `TeacherHead` builds the heads again.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        heads: Mapping[str, nn.Module],
        *,
        size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        recipe: tuple[str, dict[str, Any]],
        head: dict[str, Any],
    ):
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleDict(heads)
        self.size, self.recipe, self.head = size, recipe, head
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def look(self, batch: Batch) -> Features:
        """Give the backbone's own features."""
        return self._see(batch.at(self.size))

    def _see(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        return read_features(self.backbone, (images - self.mean) / self.std)

    def answer(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Features]:
        """Answer for every teacher; the part that is worth compiling."""
        seen = self._see(images)
        return {name: head(seen) for name, head in self.heads.items()}

    def forward(self, batch: Batch) -> dict[str, Features]:
        return self.answer(batch.at(self.size))

    def with_folded_heads(self, fold: Mapping[str, Callable[[nn.Linear], nn.Linear]]) -> "Student":
        """Give a student whose spatial heads end in the teachers' own spaces.

        The backbone is shared with this one; the heads are copies, so this one trains on.

        Args:
            fold: For each teacher, what to make of the last linear layer of its spatial head.
        """
        folded = copy.copy(self)
        folded._modules = dict(self._modules)
        folded.heads = copy.deepcopy(self.heads)
        for name, change in fold.items():
            folded.heads[name].fold(change)
        return folded


def build_student(
    name: str,
    teachers: Mapping[str, tuple[int | None, int | None]],
    *,
    size: int,
    kind: str = "v2",
    hidden: int | None = None,
    inner: int = 1,
    pretrained: bool = False,
    drop_path_rate: float = 0.0,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Student:
    """Build a registered backbone at `size` with heads for `teachers`.

    Args:
        name: Anything that `timm.create_model` knows.
        teachers: Summary and spatial width of each teacher by label; `None` for no such target.
        kind: Version of the adaptor MLPs, see `zoo.adaptors`.
        hidden: Width of the heads' hidden layers; the widest teacher's by default.
        inner: Further hidden layers.
        options: Further keywords of `timm.create_model`, such as `depths` and `dim`.

    Raises:
        ValueError: the backbone is unknown or cannot take the size.
    """
    with torch.device(device):
        backbone, kwargs = _build_backbone(name, size, pretrained, drop_path_rate, options)
        config = timm.data.resolve_model_data_config(backbone)
        backbone.eval()
        with torch.no_grad():
            seen = read_features(backbone, torch.zeros(1, 3, size, size))
        backbone.train()
        head = dict(kind=kind, hidden=hidden or head_hidden(teachers), inner=inner)
        ours = (seen.summary.shape[-1], seen.spatial.shape[-1])
        heads = {label: TeacherHead(ours, widths, **head) for label, widths in teachers.items()}
        return Student(
            backbone,
            heads,
            size=(size, size),
            mean=config["mean"],
            std=config["std"],
            recipe=(name, kwargs),
            head=head,
        )


def _build_backbone(
    name: str,
    size: int,
    pretrained: bool,
    drop_path_rate: float,
    options: Mapping[str, Any] | None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the backbone, and the keywords that a user needs to build it again."""
    training = dict(drop_path_rate=drop_path_rate) if drop_path_rate else {}
    kwargs: dict[str, Any] = dict(num_classes=0, **(options or {}))
    backbone = timm.create_model(name, pretrained=pretrained, **kwargs, **training)
    if not hasattr(backbone, "forward_intermediates"):
        raise ValueError(f"{name} cannot be a student: timm gives it no forward_intermediates.")
    own = timm.data.resolve_model_data_config(backbone)["input_size"][-1]
    if size != own:
        if hasattr(backbone, "set_input_size"):
            try:
                backbone.set_input_size(img_size=(size, size))
            except (AssertionError, ValueError) as error:
                raise ValueError(f"{name} cannot look at {size} px: {error}") from error
            kwargs["img_size"] = size
        elif backbone.pretrained_cfg.get("fixed_input_size"):
            raise ValueError(f"{name} takes {own} px and no other size; use --size {own}.")
    return backbone, kwargs
