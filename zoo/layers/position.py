"""Position biases that a small MLP computes from log-spaced offsets (Swin v2, 2111.09883, 3.3)."""

import math
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


def position_mlp(out: int, hidden: int) -> nn.Sequential:
    """The MLP that turns two coordinates into `out` numbers."""
    return nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, out, bias=False))


def log_offsets(
    rows: int, cols: int, units: tuple[int, int] | None = None
) -> Float[Tensor, "offsets 2"]:
    """Give the signed log2 offsets of every two rows and every two columns of a grid.

    Args:
        units: Rows and columns of the grid whose extent is the unit; the grid's own by default.
    """
    logs = []
    for side, unit in zip((rows, cols), units or (rows, cols), strict=True):
        r = torch.arange(1 - side, side, dtype=torch.float32) / max(unit - 1, 1)
        logs.append(torch.sign(r) * torch.log2(torch.abs(8 * r) + 1) / math.log2(8))
    return torch.stack(torch.meshgrid(*logs, indexing="ij"), dim=-1).flatten(0, 1)


def pair_index(rows: int, cols: int) -> Int[Tensor, "N N"]:
    """Give, for each pair of cells of a grid, the row of `log_offsets` that describes it."""
    cell = torch.arange(rows * cols)
    row, col = cell // cols, cell % cols
    drow = row[:, None] - row[None, :] + rows - 1
    dcol = col[:, None] - col[None, :] + cols - 1
    return drow * (2 * cols - 1) + dcol


Where = TypeVar("Where")
"""What says which places are meant: rows and columns of a grid, or tokens in front of a window."""


class FromPlaces(nn.Module, Generic[Where]):
    """Numbers for places that an MLP computes from their coordinates; one in each block of a stage.

    A subclass says which `places` there are and how to `read` the MLP's table of them.
    """

    mlp: nn.Module
    fused: Tensor | None
    """What the deploy form keeps; it is not saved."""

    def places(self, where: Where) -> Float[Tensor, "places 2"]:
        """Give the coordinates that the MLP takes."""
        raise NotImplementedError

    def read(self, table: Float[Tensor, "*parts places out"], where: Where) -> Tensor:
        """Turn what the MLP says, or the MLPs of several parts, into what the blocks use."""
        raise NotImplementedError

    def kept(self, where: Where) -> Tensor | None:
        """Give what the deploy form keeps for these places, if anything."""
        raise NotImplementedError

    def forward(self, where: Where) -> Tensor:
        kept = self.kept(where)
        return self.read(self.mlp(self.places(where)), where) if kept is None else kept


def _stackable(mlps: Sequence[nn.Module]) -> bool:
    """Whether these are plain position MLPs of one shape: nothing wrapped, quantised or cut."""
    shapes = set()
    for mlp in mlps:
        kinds = [type(part) for part in mlp.children()]
        if type(mlp) is not nn.Sequential or kinds != [nn.Linear, nn.ReLU, nn.Linear]:
            return False
        shapes.add(tuple(tuple(weight.shape) for weight in mlp.parameters()))
    return len(shapes) == 1


def compute_together(parts: Sequence[FromPlaces[Where]], where: Where) -> Sequence[Tensor]:
    """Give `part(where)` for each of a stage's parts, from two matrix products for all of them.

    Each MLP alone is a dozen launches, forward and back, of microseconds' work; a deep stage has
    dozens, which are half of a compiler's graph. Hooks on the parts are not called.
    """
    mlps = [part.mlp for part in parts]
    if any(part.fused is not None for part in parts) or not _stackable(mlps):
        return [part(where) for part in parts]
    weight1, bias1, weight2 = zip(*(mlp.parameters() for mlp in mlps), strict=True)
    hidden = F.relu(F.linear(parts[0].places(where), torch.cat(weight1), torch.cat(bias1)))
    hidden = hidden.unflatten(1, (len(parts), -1)).transpose(0, 1)
    return parts[0].read(hidden @ torch.stack(weight2).mT, where).unbind()


def read_pairs(
    table: Float[Tensor, "*parts offsets heads"], pairs: Int[Tensor, "n n"], prefix: int = 0
) -> Float[Tensor, "*parts heads N N"]:
    """Give the bias in (0, 16) of each pair of tokens; `prefix` tokens in front get 0."""
    # Pairs last and next to each other: fused attention kernels read no other bias.
    bias = (16 * torch.sigmoid(table)).mT.contiguous()[..., pairs]
    return F.pad(bias, (prefix, 0, prefix, 0)) if prefix else bias


class WindowPositionBias(FromPlaces[int]):
    """A bias in (0, 16) for each head and each pair of cells of a window.

    It is called with the number of tokens in front of the window's cells (FasterViT's carriers),
    which get bias 0. After `set_window` the offsets are still measured in units of the window that
    was trained.
    """

    offsets: Tensor
    pairs: Tensor

    def __init__(self, num_heads: int, window: int, *, hidden: int = 512):
        super().__init__()
        self.num_heads, self.trained = num_heads, window
        self.mlp: nn.Module = position_mlp(num_heads, hidden)
        self.set_window(window)

    def set_window(self, window: int) -> None:
        """Compute biases for windows of another side; the parameters stay as they are."""
        self.window = window
        like = next(self.parameters())
        offsets = log_offsets(window, window, (self.trained, self.trained))
        self.register_buffer("offsets", offsets.to(like), False)
        self.register_buffer("pairs", pair_index(window, window).to(like.device), False)
        self.register_buffer("fused", None, False)

    def init_non_persistent_buffers(self) -> None:
        """Compute the tables again, for a model from the meta device (the name is timm's)."""
        self.set_window(self.window)

    def fuse(self) -> None:
        """Keep the bias instead of computing it in each forward."""
        with torch.no_grad():
            self.fused = self(0)

    def places(self, where: int) -> Float[Tensor, "offsets 2"]:
        return self.offsets

    def read(self, table: Float[Tensor, "*parts offsets heads"], where: int) -> Tensor:
        return read_pairs(table, self.pairs, where)

    def kept(self, where: int) -> Float[Tensor, "heads N N"] | None:
        if self.fused is None or not where:
            return self.fused
        return F.pad(self.fused, (where, 0, where, 0))
