"""What a row of the language table is: a family, its small shapes and its published sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Fields = Mapping[str, Any]
"""Fields of a configuration of transformers, by their names there."""

BYTES = dict(vocab_size=257, bos_token_id=None, eos_token_id=256, pad_token_id=None)
"""Small shapes read bytes (`zoo.language.tokenizers.ByteTokenizer`), so they need no file."""


class Size(NamedTuple):
    """One shape: what it is built of, and what is known of its weights."""

    parameters: int
    """All of them, tied ones once."""
    fields: Fields
    weights: str = ""
    """Repository on the Hub that holds weights in transformers' form; "" where there is none."""
    licence: str = "-"
    """Of the released weights, in whatever form they were released."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A class of transformers, and the shapes that zoo has names for.

    A published size is named with the family's own prefix (`llama3_8b`); the family's own name and
    `NAME_laptop` are one shape, `NAME_tiny` is for tests.
    """

    name: str
    config: str
    """The configuration's class: a name in transformers, or `module:Class` for one of zoo's, whose
    module registers it with transformers' Auto classes."""
    widths: Callable[[int], Fields]
    """All widths that follow from `d_model`, where one builds a shape of one's own."""
    tiny: Size
    laptop: Size
    sizes: Mapping[str, Size] = field(default_factory=dict)
    letters: Mapping[str, str] = field(default_factory=dict)
    """Letters of `pattern` -> kinds of layers; empty where all layers are alike."""
    needs: str = ""
    """Letters that a pattern must have one of each of: the class cannot run without."""
    kinds: str = "layer_types"
    """The configuration's field that lists the kinds of its layers."""
    state_space: tuple[str, str] | None = None
    """The fields that count the heads and the groups of its state-space layers."""

    def rows(self) -> dict[str, Size]:
        """Return all names of the family with their sizes, small ones first."""
        small = {f"{self.name}_tiny": self.tiny, f"{self.name}_laptop": self.laptop}
        return {self.name: self.laptop, **small, **self.sizes}


def attention(dim: int) -> dict[str, int]:
    """Heads of at most 128 channels, two to a key and value."""
    heads = max(4, dim // 128 // 2 * 2)
    return dict(num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=dim // heads)


def gated(dim: int) -> int:
    """Width of an MLP with a gate, which has three matrices: 8/3 of the stream, in steps of 32."""
    return -(-8 * dim // 3 // 32) * 32


def ssm(dim: int) -> tuple[int, int, int]:
    """Heads, channels a head and size of the state of a Mamba-2 layer of twice the stream."""
    channels = 64 if dim >= 128 else 16
    return 2 * dim // channels, channels, min(128, max(16, dim // 4))
