"""One teacher's pair of heads on a student: the adaptor MLPs (AM-RADIO, 2312.06709, 3.2).

Four kinds. "v1" and "v2" are the MLPs of `zoo.adaptors`. "attn" puts two transformer blocks before
the spatial one (C-RADIOv4, 2601.17237). "ladder" also reads every earlier block of the backbone
(UNIC, 2408.05088).
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.adaptors import ATTN_HEADS, Head, rows_shape, upsampled
from zoo.features import Features

HeadKind = Literal["v1", "v2", "attn", "ladder"]

RUNG = 4
"""A rung's hidden layer is this many times narrower than the top's: 768 below 3072 in UNIC."""


class Ladder(nn.Module):
    """The sum of a small MLP on every earlier block of the backbone and a wide one on the last.

    UNIC (2408.05088), for the features x_l after block l of L, with one activation each:

        y = Σ_l W_l gelu(V_l x_l) + b

    The matrices W_l are side by side in one last layer over all hidden layers, which is the same
    sum. So there is one layer into which the inverse of a normalisation can be folded.

    Args:
        intermediates: Width of each earlier block's features.
        width: Width of the last block's.
        hidden: Hidden width of the last block's MLP.
        out_dim: Width of one vector of the output.
        small: Of the others'; a quarter of `hidden` by default.
        upsample: Cells of the output along each side of a token's: it has `upsample`² vectors.
    """

    def __init__(
        self,
        intermediates: Sequence[int],
        width: int,
        *,
        hidden: int,
        out_dim: int,
        small: int | None = None,
        upsample: int = 1,
    ):
        super().__init__()
        small = small or max(1, hidden // RUNG)
        # The attribute's name is part of the keys of exported heads.
        self.rungs = nn.ModuleList(nn.Linear(earlier, small) for earlier in intermediates)
        self.top = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.last = nn.Linear(len(intermediates) * small + hidden, upsample**2 * out_dim)
        self.rows_shape = rows_shape(upsample)

    def forward(
        self, x: Float[Tensor, "*B C"], intermediates: Sequence[Float[Tensor, "*B _"]]
    ) -> Float[Tensor, "*B D"]:
        hidden = [layer(y) for layer, y in zip(self.rungs, intermediates, strict=True)]
        return self.last(self.act(torch.cat([*hidden, self.top(x)], dim=-1)))

    def replace_last(self, linear: nn.Linear) -> None:
        self.last = linear

    @property
    def joined_shape(self) -> str:
        """What the last layer reads, as a table of named shapes writes it."""
        return " | ".join([*("s" for _ in self.rungs), "r"])


class TeacherHead(nn.Module):
    """A summary and a spatial adaptor; one is absent where the teacher has no such target.

    During training the spatial adaptor predicts in the normalised space; `fold` puts the inverse of
    the normalisation into its last layer.

    Args:
        ours: Summary and spatial width of the student.
        theirs: Summary and spatial width of the teacher; `None` for no such target.
        upsample: Cells of the predicted map along each side of one of the student's cells.
        num_inner: Further hidden layers of the kinds that are MLPs.
        intermediates: Summary and spatial width after each earlier block, for a ladder.
        small: Hidden width of a ladder's MLP on each of these, if not a quarter of `hidden`.
        attn: Further sizes of `zoo.adaptors.Head`, of a cut attention head.

    Raises:
        ValueError: an attention head cannot split the student's width.
    """

    def __init__(
        self,
        ours: tuple[int, int],
        theirs: tuple[int | None, int | None],
        *,
        kind: HeadKind = "v2",
        hidden: int,
        num_inner: int = 1,
        upsample: int = 1,
        intermediates: Sequence[tuple[int, int]] = (),
        small: int | None = None,
        attn: Mapping[str, int] = MappingProxyType({}),
    ):
        super().__init__()
        heads = attn.get("attn_heads", ATTN_HEADS)
        if kind == "attn" and theirs[1] is not None and ours[1] % heads:
            raise ValueError(
                f"An attention head splits the student's channels among {heads} heads, and "
                f"{ours[1]} do not split. Take --heads.kind v2, or a student whose width is a "
                f"multiple of {heads}."
            )
        self.kind, self.upsample, self.widths = kind, upsample, theirs
        self.made: dict[str, Any] = dict(
            kind=kind, hidden=hidden, inner=num_inner, upsample=upsample
        )  # keywords of `build_student`, which an export keeps

        def make(part: int, kind: str, upsample: int) -> Any:
            width, out = ours[part], theirs[part]
            if out is None:
                return None
            sizes: Any = dict(hidden=hidden, out_dim=out, upsample=upsample)
            if kind == "ladder":
                earlier = [widths[part] for widths in intermediates]
                return Ladder(earlier, width, small=small, **sizes)
            more: Any = attn if kind == "attn" else {}
            return Head(num_inner=num_inner, kind=kind, **sizes, **more).build(width)

        self.summary = make(0, "v2" if kind == "attn" else kind, 1)  # one token attends to nothing
        self.spatial = make(1, kind, upsample)

    def forward(self, features: Features, intermediates: Sequence[Features] = ()) -> Features:
        """Predict the teacher's features from the backbone's.

        Args:
            intermediates: Features after each earlier block, for a ladder.
        """
        summary = spatial = None
        if self.summary is not None:
            earlier = ([f.summary for f in intermediates],) if self.kind == "ladder" else ()
            summary = self.summary(features.summary, *earlier)
        if self.spatial is not None:
            spatial = self.predict_map(features, intermediates)
        return Features(summary, spatial)

    def predict_map(
        self, features: Features, intermediates: Sequence[Features] = ()
    ) -> Float[Tensor, "B H W C"]:
        """Predict the teacher's map alone; arguments as for a call."""
        assert features.spatial is not None
        maps = [f.spatial for f in intermediates if f.spatial is not None]
        return self._on_grid(features.spatial, *((maps,) if self.kind == "ladder" else ()))

    def _on_grid(self, x: Tensor, *earlier: Sequence[Tensor]) -> Float[Tensor, "B H W C"]:
        if self.upsample == 1 and self.kind != "attn":
            return self.spatial(x, *earlier)
        rows, cols = x.shape[1:3]
        flat = ([y.flatten(1, 2) for y in maps] for maps in earlier)
        tokens = self.spatial(x.flatten(1, 2), *flat)
        finer = (rows * self.upsample, cols * self.upsample)
        return upsampled(tokens, rows, cols, self.upsample).unflatten(1, finer)

    def fold(self, change: Callable[..., nn.Linear], part: str = "spatial") -> None:
        """Replace the last layer of the spatial adaptor, or of the summary's.

        Args:
            change: Makes the new layer from the old one and the keyword `blocks`: the number of
                vectors that one row of its output holds, u² for a head that up-samples by u.
        """
        adaptor = getattr(self, part)
        if adaptor is not None:
            blocks = self.upsample**2 if part == "spatial" else 1
            adaptor.replace_last(change(adaptor.last, blocks=blocks))


class OwnFeatures(nn.Module):
    """In a head's place: the backbone's own features, for a teacher that is the same network.

    `summary` and `spatial` bring them to the space in which they are compared.
    """

    kind = "own"

    def __init__(self):
        super().__init__()
        self.summary: nn.Module = nn.Identity()
        self.spatial: nn.Module = nn.Identity()

    def forward(self, features: Features, intermediates: Sequence[Features] = ()) -> Features:
        return Features(self.summary(features.summary), self.spatial(features.spatial))

    def fold(self, change: Callable[..., nn.Linear], part: str = "spatial") -> None:
        """Answer in the backbone's own space again, whatever the normalisation was."""
        setattr(self, part, nn.Identity())


def head_hidden(widths: Mapping[str, tuple[int | None, int | None]]) -> int:
    """Choose the hidden width of all heads: the widest teacher's (2312.06709, 3.2)."""
    return max((w for pair in widths.values() for w in pair if w), default=1)
