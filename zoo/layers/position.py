"""Position biases and embeddings that small MLPs compute from coordinates.

Biases from log-spaced offsets (Swin v2, 2111.09883, 3.3), and FasterViT's embeddings of cells
(2306.06189).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


def position_mlp(out: int, hidden: int) -> nn.Sequential:
    """Make the MLP that turns two coordinates into `out` numbers."""
    return nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, out, bias=False))


def log_offsets(
    rows: int, cols: int, units: tuple[int, int] | None = None
) -> Float[Tensor, "offsets 2"]:
    """Return the signed log2 offsets between any two rows and any two columns of a grid.

    Args:
        units: Rows and columns of the grid whose extent counts as 1; the grid's own by default.
    """
    logs = []
    for side, unit in zip((rows, cols), units or (rows, cols), strict=True):
        r = torch.arange(1 - side, side, dtype=torch.float32) / max(unit - 1, 1)
        logs.append(torch.sign(r) * torch.log2(torch.abs(8 * r) + 1) / math.log2(8))
    return torch.stack(torch.meshgrid(*logs, indexing="ij"), dim=-1).flatten(0, 1)


def pair_index(rows: int, cols: int) -> Int[Tensor, "N N"]:
    """Return, for each pair of cells of a grid, the row of `log_offsets` that describes it."""
    cell = torch.arange(rows * cols)
    row, col = cell // cols, cell % cols
    drow = row[:, None] - row[None, :] + rows - 1
    dcol = col[:, None] - col[None, :] + cols - 1
    return drow * (2 * cols - 1) + dcol


def cell_coords(rows: int, cols: int) -> Float[Tensor, "N 2"]:
    """Return row and column of each cell of a grid, from -1 at the first to about 1 at the last."""
    sides = [(torch.arange(side) - side // 2) / max(side // 2, 1) for side in (rows, cols)]
    return torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 1)


class FromCoords(nn.Module):
    """What an MLP computes from the coordinates of a grid; one in each block of a stage.

    A subclass says which `coords` the MLP takes and how to `read` the table that it returns.
    """

    mlp: nn.Module
    grid: tuple[int, int]
    """Rows and columns that the tables are made for."""
    fused: Tensor | None
    """What the deploy form keeps for `grid`; it is not saved."""

    def coords(self, grid: tuple[int, int]) -> Float[Tensor, "coords 2"]:
        """Return the coordinates that the MLP takes."""
        raise NotImplementedError

    def read(self, table: Float[Tensor, "*parts coords out"], grid: tuple[int, int]) -> Tensor:
        """Turn the MLP's output, or those of several parts, into what the blocks use."""
        raise NotImplementedError

    def fuse(self) -> None:
        """Keep the result for `grid` instead of computing it in each forward."""
        with torch.no_grad():
            self.fused = self()

    def forward(self, grid: tuple[int, int] | None = None) -> Tensor:
        """Return the result for `grid`, by default for the grid that the tables are made for."""
        grid = grid or self.grid
        if self.fused is not None and grid == self.grid:
            return self.fused
        return self.read(self.mlp(self.coords(grid)), grid)


def _stackable(mlps: Sequence[nn.Module]) -> bool:
    """Whether these are plain position MLPs of one shape: nothing wrapped, quantised or pruned."""
    shapes = set()
    for mlp in mlps:
        kinds = [type(part) for part in mlp.children()]
        if type(mlp) is not nn.Sequential or kinds != [nn.Linear, nn.ReLU, nn.Linear]:
            return False
        shapes.add(tuple(tuple(weight.shape) for weight in mlp.parameters()))
    return len(shapes) == 1


def compute_together(
    parts: Sequence[FromCoords], grid: tuple[int, int] | None = None
) -> Sequence[Tensor]:
    """Return `part(grid)` for each of a stage's parts, from two matrix products for all of them.

    Each MLP alone is a dozen launches, forward and back, of microseconds' work. A deep stage has
    dozens of MLPs, which are half of a compiler's graph. Hooks on the parts are not called.
    """
    mlps, first = [part.mlp for part in parts], parts[0]
    if any(part.fused is not None for part in parts) or not _stackable(mlps):
        return [part(grid) for part in parts]
    grid = grid or first.grid
    weight1, bias1, weight2 = zip(*(mlp.parameters() for mlp in mlps), strict=True)
    hidden = F.relu(F.linear(first.coords(grid), torch.cat(weight1), torch.cat(bias1)))
    hidden = hidden.unflatten(1, (len(parts), -1)).transpose(0, 1)
    return first.read(hidden @ torch.stack(weight2).mT, grid).unbind()


def _read_pairs(
    table: Float[Tensor, "*parts offsets heads"], pairs: Int[Tensor, "n n"], prefix: int
) -> Float[Tensor, "*parts heads N N"]:
    """Return the bias in (0, 16) of each pair of tokens; `prefix` tokens in front get 0."""
    # Pairs last and contiguous: fused attention kernels read no other bias. In float32, as a
    # compiled backward pass sums each offset's pairs, one by one, in the dtype of the table.
    bias = (16 * torch.sigmoid(table)).mT.contiguous().float()[..., pairs].to(table.dtype)
    return F.pad(bias, (prefix, 0, prefix, 0)) if prefix else bias


class WindowPositionBias(FromCoords):
    """A bias in (0, 16) for each head and each pair of cells of a window.

    After `set_window` the offsets are still measured in units of the window that was trained.

    Args:
        prefix: Tokens in front of the window's cells (FasterViT's carriers), which get bias 0.
    """

    offsets: Tensor
    pairs: Tensor

    def __init__(self, num_heads: int, window: int, *, hidden: int = 512, prefix: int = 0):
        super().__init__()
        self.num_heads, self.trained, self.prefix = num_heads, window, prefix
        self.mlp = position_mlp(num_heads, hidden)
        self.set_window(window)

    @property
    def window(self) -> int:
        """Side of the windows."""
        return self.grid[0]

    def set_window(self, window: int) -> None:
        """Compute biases for windows of another side; the parameters stay as they are."""
        self.grid = window, window
        like = next(self.parameters())
        offsets = log_offsets(window, window, (self.trained, self.trained))
        self.register_buffer("offsets", offsets.to(like), False)
        self.register_buffer("pairs", pair_index(window, window).to(like.device), False)
        self.register_buffer("fused", None, False)

    def init_non_persistent_buffers(self) -> None:
        """Compute the tables again, for a model from the meta device (the name is timm's)."""
        self.set_window(self.window)

    def coords(self, grid: tuple[int, int]) -> Float[Tensor, "offsets 2"]:
        assert grid == self.grid, "windows have the side that was set"
        return self.offsets

    def read(self, table: Float[Tensor, "*parts offsets heads"], grid: tuple[int, int]) -> Tensor:
        return _read_pairs(table, self.pairs, self.prefix)


class GridEmbedding(FromCoords):
    """A vector for each cell of a grid, which an MLP computes from the cell's coordinates.

    The coordinates are stored for the grid of `set_grid` and computed anew for any other.
    """

    cells: Tensor

    def __init__(self, dim: int, rows: int, cols: int, *, hidden: int = 512):
        super().__init__()
        self.mlp = position_mlp(dim, hidden)
        self.set_grid(rows, cols)

    def set_grid(self, rows: int, cols: int) -> None:
        """Make the tables for a grid of `rows` x `cols`."""
        self.grid = rows, cols
        self.register_buffer("cells", cell_coords(rows, cols).to(next(self.parameters())), False)
        self.register_buffer("fused", None, False)

    def init_non_persistent_buffers(self) -> None:
        """Compute the tables again, for a model from the meta device (the name is timm's)."""
        self.set_grid(*self.grid)

    def coords(self, grid: tuple[int, int]) -> Float[Tensor, "N 2"]:
        return self.cells if grid == self.grid else cell_coords(*grid).to(self.cells)

    def read(self, table: Float[Tensor, "*parts N C"], grid: tuple[int, int]) -> Tensor:
        return table


class CarrierBias(FromCoords):
    """The position bias among the carriers of a map: as `WindowPositionBias`, for a grid.

    Args:
        square: Keep a flaw of the published code, whose table is always square: of `n` carriers
            the last ⌊√n⌋² get the biases of a square grid, and those before them get 0.
    """

    offsets: Tensor
    pairs: Tensor

    def __init__(self, num_heads: int, rows: int, cols: int, *, hidden: int = 512, square: bool):
        super().__init__()
        self.square = square
        self.mlp = position_mlp(num_heads, hidden)
        self.set_grid(rows, cols)

    def set_grid(self, rows: int, cols: int) -> None:
        """Make the tables for a grid of `rows` x `cols`."""
        self.grid = rows, cols
        like = next(self.parameters())
        rows, cols = self._table(rows, cols)
        self.register_buffer("offsets", log_offsets(rows, cols).to(like), False)
        self.register_buffer("pairs", pair_index(rows, cols).to(like.device), False)
        self.register_buffer("fused", None, False)

    def init_non_persistent_buffers(self) -> None:
        """Compute the tables again, for a model from the meta device (the name is timm's)."""
        self.set_grid(*self.grid)

    def coords(self, grid: tuple[int, int]) -> Float[Tensor, "offsets 2"]:
        if grid == self.grid:
            return self.offsets
        return log_offsets(*self._table(*grid)).to(self.offsets)

    def read(self, table: Float[Tensor, "*parts offsets heads"], grid: tuple[int, int]) -> Tensor:
        pairs = self.pairs
        if grid != self.grid:
            pairs = pair_index(*self._table(*grid)).to(pairs.device)
        return _read_pairs(table, pairs, math.prod(grid) - len(pairs))

    def _table(self, rows: int, cols: int) -> tuple[int, int]:
        if rows == cols or not self.square:
            return rows, cols
        side = math.isqrt(rows * cols)
        return side, side
