"""Position biases that a small MLP computes from log-spaced offsets (Swin v2, 2111.09883, 3.3)."""

import math

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


class WindowPositionBias(nn.Module):
    """A bias in (0, 16) for each head and each pair of cells of a window.

    `prefix` tokens in front of the window's cells (FasterViT's carriers) get bias 0. After
    `set_window` the offsets are still measured in units of the window that was trained.
    """

    offsets: Tensor
    pairs: Tensor
    fused: Tensor | None

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
        """Keep the bias instead of computing it in each forward; it is not saved."""
        with torch.no_grad():
            self.fused = self._bias()

    def _bias(self) -> Float[Tensor, "heads N N"]:
        table = 16 * torch.sigmoid(self.mlp(self.offsets))
        # Pairs last and next to each other: fused attention kernels read no other bias.
        return table.t().contiguous()[:, self.pairs]

    def forward(self, prefix: int = 0) -> Float[Tensor, "heads N N"]:
        bias = self._bias() if self.fused is None else self.fused
        return F.pad(bias, (prefix, 0, prefix, 0)) if prefix else bias
