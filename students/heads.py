"""The adaptor MLPs that turn a student's features into a teacher's (AM-RADIO, 2312.06709, 3.2)."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from zoo.features import Features


class _Residual(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class MlpV1(nn.Module):
    """Linear - LN - ReLU - Linear, with `depth` further (Linear - LN - ReLU) between."""

    def __init__(self, dim: int, out_dim: int, *, hidden: int, depth: int = 0):
        super().__init__()
        parts: list[nn.Module] = [nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.ReLU()]
        for _ in range(depth):
            parts += [nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU()]
        self.body = nn.Sequential(*parts)
        self.last = nn.Linear(hidden, out_dim)

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        return self.last(self.body(x))


class MlpV2(nn.Module):
    """Linear - `depth` x residual (LN - GELU - Linear) - LN - GELU - Linear."""

    def __init__(self, dim: int, out_dim: int, *, hidden: int, depth: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(dim, hidden),
            *(_Residual(hidden) for _ in range(depth)),
            nn.LayerNorm(hidden),
            nn.GELU(),
        )
        self.last = nn.Linear(hidden, out_dim)

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        return self.last(self.body(x))


MLPS = {"v1": MlpV1, "v2": MlpV2}


class TeacherHead(nn.Module):
    """The two adaptors of one teacher; one is absent where the teacher gives nothing to match.

    Both end in a linear layer `last`: the spatial one predicts the normalised space during
    training, and `folded` puts the inverse of the normalisation into it.
    """

    def __init__(
        self,
        summary_in: int,
        spatial_in: int,
        summary_dim: int | None,
        spatial_dim: int | None,
        *,
        mlp: str = "v2",
        hidden: int,
    ):
        super().__init__()
        make = MLPS[mlp]
        self.summary = make(summary_in, summary_dim, hidden=hidden) if summary_dim else None
        self.spatial = make(spatial_in, spatial_dim, hidden=hidden) if spatial_dim else None

    def forward(self, seen: Features) -> Features:
        summary = self.summary(seen.summary) if self.summary is not None else None
        spatial = self.spatial(seen.spatial) if self.spatial is not None else None
        return Features(summary, spatial)


def head_hidden(widths: Mapping[str, tuple[int | None, int | None]]) -> int:
    """Choose the hidden width of all heads: the widest teacher's (2312.06709, 3.2)."""
    return max((w for pair in widths.values() for w in pair if w), default=1)
