"""The cells of the comparison: two parents, ways to cut them to half the FLOPs, and teachers."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Cut = Literal["width", "depth", "both", "random", "torch_pruning"]
"""`random` keeps the sizes of `both` and draws the units; Torch-Pruning cuts widths alone."""
Teachers = Literal["parent", "others"]
"""The parent alone, or with the other networks, every map on the scale of PHI-S."""

LITE0, LITE2 = (f"tf_efficientnet_lite{number}" for number in (0, 2))
VIT = "vit_tiny_patch16_224"


class ParentSpec(NamedTuple):
    """A network to cut."""

    architecture: str
    others: tuple[str, ...]
    """Teachers beside the parent, of ImageNet: their weights are those of the package index."""
    form: str
    """Of `zoo prune`: timm has no constructor for EfficientNets of any width."""
    words: dict[str, str]
    """What `zoo prune --to` is told beside the budget, for each way to cut."""


NO_WIDTHS = "stream=1.0,ffn=1.0"
PARENTS = {
    "lite2": ParentSpec(
        LITE2, (LITE0,), "zoo", dict(width="layers=1.0", depth=NO_WIDTHS, both="layers=0.75")
    ),
    "vit": ParentSpec(
        VIT, (LITE0, LITE2), "library",
        dict(width="layers=1.0", depth=f"{NO_WIDTHS},heads=1.0", both="layers=0.75"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One child, and what it learns from."""

    parent: str
    cut: Cut
    teachers: Teachers

    @property
    def child(self) -> str:
        """Name the child as it was cut."""
        return f"{self.parent}-{self.cut}"

    @property
    def name(self) -> str:
        return f"{self.child}-{self.teachers}"


ORDER: tuple[tuple[Cut, Teachers], ...] = (
    ("both", "parent"), ("both", "others"), ("random", "parent"),
    ("torch_pruning", "parent"), ("width", "parent"), ("depth", "parent"),
    ("torch_pruning", "others"), ("width", "others"), ("depth", "others"),
)  # fmt: skip
"""What says most comes first."""


def all_cells(parents: list[str]) -> list[Cell]:
    """List every cell."""
    return [Cell(parent, *how) for how in ORDER for parent in parents]
