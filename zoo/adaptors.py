"""Adaptors: small heads that turn a backbone's tokens into one teacher's features.

Each teacher has two, one for its summary token and one for its patches (AM-RADIO, 2312.06709,
section 3.2). Version 1 is linear, layer norm, ReLU, linear; version 2 has pre-norm residual inner
blocks; the attention head of C-RADIOv4 puts two transformer blocks before version 2.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

ATTN_HEADS = 16
ATTN_BLOCKS = 2
ATTN_LAYER_SCALE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Head:
    """The sizes of one head.

    Args:
        hidden: Width of the hidden layers.
        out_dim: Width of an output token.
        num_inner: Hidden layers ("v1") or residual blocks between the first layer and the last.
        kind: "v1", "v2" or "attn".
        pre_norm: Layer norm and GELU before the first linear layer ("v2" and "attn").
        upsample: Output tokens along each side of a patch.
        attn_heads: Heads of each block of "attn"; fewer in a cut one.
        attn_hidden: Hidden width of these blocks' MLPs; four times theirs by default.
    """

    hidden: int
    out_dim: int
    num_inner: int = 0
    kind: str = "v2"
    pre_norm: bool = False
    upsample: int = 1
    attn_heads: int = ATTN_HEADS
    attn_hidden: int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"There is no head of kind {self.kind!r}; there are {', '.join(KINDS)}."
            )

    def build(self, in_dim: int) -> nn.Module:
        """Build the module: [B N in_dim] to [B N out_dim·upsample²]."""
        return KINDS[self.kind](in_dim, replace(self, out_dim=self.out_dim * self.upsample**2))


def rows_shape(upsample: int) -> str:
    """Write what a head's last layer makes of a token, as tables of named shapes do: u² vectors."""
    return "o" if upsample == 1 else f"{upsample**2} o"


class MlpV1(nn.Module):
    """Linear, norm, ReLU; the same `num_inner` times at the hidden width; linear."""

    def __init__(self, in_dim: int, sizes: Head):
        super().__init__()
        hidden = sizes.hidden
        self.fc1 = nn.Linear(in_dim, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.act = nn.ReLU()
        steps: list[nn.Module] = []
        for _ in range(sizes.num_inner):
            steps += [nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU()]
        self.inner = nn.Sequential(*steps)
        self.fc2 = nn.Linear(hidden, sizes.out_dim)
        self.rows_shape = rows_shape(sizes.upsample)

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B D"]:
        return self.fc2(self.inner(self.act(self.norm(self.fc1(x)))))

    @property
    def last(self) -> nn.Linear:
        """The layer into which the inverse of a normalisation is folded."""
        return self.fc2

    def replace_last(self, linear: nn.Linear) -> None:
        self.fc2 = linear


def _norm_act(dim: int, *after: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.GELU(), *after)


class MlpV2(nn.Module):
    """Linear; `num_inner` residual blocks; norm, GELU, linear."""

    def __init__(self, in_dim: int, sizes: Head):
        super().__init__()
        hidden = sizes.hidden
        self.pre_norm = _norm_act(in_dim) if sizes.pre_norm else nn.Identity()
        self.fc1 = nn.Linear(in_dim, hidden)
        self.blocks = nn.ModuleList(
            _norm_act(hidden, nn.Linear(hidden, hidden)) for _ in range(sizes.num_inner)
        )
        self.final = _norm_act(hidden, nn.Linear(hidden, sizes.out_dim))
        self.rows_shape = rows_shape(sizes.upsample)

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B D"]:
        x = self.fc1(self.pre_norm(x))
        for block in self.blocks:
            x = x + block(x)
        return self.final(x)

    @property
    def last(self) -> nn.Linear:
        """The layer into which the inverse of a normalisation is folded."""
        return cast(nn.Linear, self.final[-1])

    def replace_last(self, linear: nn.Linear) -> None:
        self.final[-1] = linear


class AttnHead(nn.Module):
    """Two transformer blocks over the patches, then version 2."""

    def __init__(self, in_dim: int, sizes: Head):
        super().__init__()
        if in_dim % sizes.attn_heads:
            raise ValueError(
                f"An attention head splits its channels among {sizes.attn_heads} heads, and "
                f"{in_dim} do not split. Take a head of kind v2, or a width that is a multiple of "
                f"{sizes.attn_heads}."
            )
        self.num_heads, self.head_dim = sizes.attn_heads, in_dim // sizes.attn_heads
        # half a channel more, since timm rounds down
        ratio = 4.0 if sizes.attn_hidden is None else (sizes.attn_hidden + 0.5) / in_dim
        self.attn = nn.Sequential(
            *(
                Block(
                    in_dim, self.num_heads, mlp_ratio=ratio, qkv_bias=True,
                    init_values=ATTN_LAYER_SCALE,
                )
                for _ in range(ATTN_BLOCKS)
            )
        )  # fmt: skip
        self.mlp = MlpV2(in_dim, sizes)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N D"]:
        return self.mlp(self.attn(x))

    @property
    def last(self) -> nn.Linear:
        """The layer into which the inverse of a normalisation is folded."""
        return self.mlp.last

    def replace_last(self, linear: nn.Linear) -> None:
        self.mlp.replace_last(linear)


KINDS: dict[str, type[nn.Module]] = {"v1": MlpV1, "v2": MlpV2, "attn": AttnHead}


def upsampled(
    x: Float[Tensor, "B N D"], rows: int, cols: int, factor: int
) -> Float[Tensor, "B M C"]:
    """Spread each token's channels (row, column, channel) over a block of `factor`² tokens."""
    if factor == 1:
        return x
    batch, _, chs = x.shape
    x = x.view(batch, rows, cols, factor, factor, chs // factor**2).transpose(2, 3)
    return x.reshape(batch, rows * cols * factor**2, chs // factor**2)


class Adaptor(nn.Module):
    """A teacher's two heads; either may be absent.

    Args:
        token: Index of the teacher's prefix token.
        source: What the weight file calls the teacher, if not by its name.
        summary: Arguments of `Head` for the summary token; `None` for no such head.
        feature: Arguments of `Head` for the patches; `None` for no such head.

    Raises:
        ValueError: the summary's head is to upsample or to attend.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        token: int,
        source: str | None = None,
        summary: Mapping[str, Any] | None = None,
        feature: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.token, self.source = token, source
        head = Head(**summary) if summary else None
        feat = Head(**feature) if feature else None
        if head and (head.upsample != 1 or head.kind == "attn"):
            raise ValueError("A summary is one token: its head is v1 or v2, without upsampling.")
        self.upsample = feat.upsample if feat else 1
        self.head_mlp = head.build(in_dim) if head else None
        self.feat_mlp = feat.build(in_dim) if feat else None

    def forward(
        self, prefix: Float[Tensor, "B P C"], patches: Float[Tensor, "B N C"], rows: int, cols: int
    ) -> tuple[Float[Tensor, "B D"] | None, Float[Tensor, "B M E"] | None]:
        """Return the teacher's summary and features, the latter row-major on the finer grid."""
        summary = self.head_mlp(prefix[:, self.token]) if self.head_mlp is not None else None
        if self.feat_mlp is None:
            return summary, None
        return summary, upsampled(self.feat_mlp(patches), rows, cols, self.upsample)


def head_of(keys: Mapping[str, Tensor], upsample: int = 1) -> dict[str, Any] | None:
    """Read the sizes of a head from its weights, whose keys start at the head's own root.

    Args:
        upsample: The one size that the weights' shapes do not show.

    Returns:
        Arguments of `Head`; `None` if there are no weights.

    Raises:
        ValueError: the weights are of none of the kinds.
    """
    if not keys:
        return None
    kind = "attn" if any(key.startswith("attn.") for key in keys) else "v2"
    if kind == "attn":
        keys = {key.removeprefix("mlp."): value for key, value in keys.items()}
    kind = "v1" if "fc2.weight" in keys else kind
    last = keys.get("fc2.weight" if kind == "v1" else "final.2.weight")
    if last is None or "fc1.weight" not in keys:
        raise ValueError(f"These weights are of no known head: {', '.join(list(keys)[:10])}.")
    inner = {match[1] for key in keys if (match := re.match(r"(?:blocks|inner)\.(\d+)\.", key))}
    return dict(
        hidden=keys["fc1.weight"].shape[0],
        out_dim=last.shape[0] // upsample**2,
        # Version 1 numbers linear, norm and activation one by one; the last has no weights.
        num_inner=len(inner) // 2 if kind == "v1" else len(inner),
        kind=kind,
        pre_norm=any(key.startswith("pre_norm.") for key in keys),
        upsample=upsample,
    )
