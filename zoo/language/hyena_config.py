"""What a StripedHyena 2 is built from: `HyenaConfig`, a configuration of transformers."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

OPERATORS = {"s": "SE", "m": "MR", "l": "LI", "a": "attention"}
"""Letters of a pattern."""
ACTIVATIONS = ("gelu", "identity")


class HyenaConfig(PreTrainedConfig):
    """The numbers of a StripedHyena 2 (2503.01868); the defaults are Evo 2's of 7B.

    Args:
        pattern: A letter for each layer: s (short explicit filters), m (medium ones), l (long
            implicit ones), a (attention).
        head_dim: Channels of a head of attention; `hidden_size / num_attention_heads` if None.
        se_width: Channels inside the operators s; `hidden_size` if None. So are `mr_width` and
            `li_width`.
        se_groups: Filters of an operator s: neighbouring channels share one. So is `mr_groups`.
        li_order: Exponentials that a long filter is the sum of.
        feature_length: Taps of the convolutions before the gates.
        mlp_activations: Of each layer's gate, "gelu" or "identity"; GELU in the first alone if
            None.
        max_position_embeddings: Longest sequence.
        rotary_divisor: Positions are divided by this before they become angles.

    Raises:
        ValueError: a letter is unknown, channels do not split into groups or heads, or a number
            is not positive.
    """

    model_type = "zoo_hyena"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 512
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    pattern: str = "smlasmlsmlasmlsmlasmlsmlasmlsmla"
    num_attention_heads: int = 32
    head_dim: int | None = None
    se_width: int | None = None
    mr_width: int | None = None
    li_width: int | None = None
    se_groups: int = 256
    mr_groups: int = 256
    se_length: int = 7
    mr_length: int = 128
    li_order: int = 16
    feature_length: int = 3
    mlp_activations: list[str] | None = None
    norm_eps: float = 1e-6
    rotary_base: float = 10_000.0
    rotary_divisor: float = 1.0
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from other numbers, and check them all."""
        self._check_pattern()
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} does not split into "
                    f"{self.num_attention_heads} heads; give head_dim, or a number that divides it."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        for name in ("se_width", "mr_width", "li_width"):
            if getattr(self, name) is None:
                setattr(self, name, self.hidden_size)
        self._check_numbers()
        super().__post_init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Layers, one a letter of the pattern."""
        return len(self.pattern)

    def _check_pattern(self) -> None:
        strange = sorted(set(self.pattern) - OPERATORS.keys())
        letters = ", ".join(f"{letter} ({name})" for letter, name in OPERATORS.items())
        if strange or not self.pattern:
            what = f"has {', '.join(map(repr, strange))}" if strange else "has no layer"
            raise ValueError(f"The pattern {self.pattern!r} {what}; its letters are {letters}.")
        if self.mlp_activations is None:
            self.mlp_activations = ["gelu"] + ["identity"] * (len(self.pattern) - 1)
        if len(self.mlp_activations) != len(self.pattern):
            raise ValueError(
                f"mlp_activations has {len(self.mlp_activations)} entries for the "
                f"{len(self.pattern)} layers of the pattern; give one for each."
            )
        if strange := sorted(set(self.mlp_activations) - set(ACTIVATIONS)):
            raise ValueError(
                f"mlp_activations has {', '.join(map(repr, strange))}; each is one of "
                f"{', '.join(ACTIVATIONS)}."
            )

    def _check_numbers(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim",
            "se_width", "mr_width", "li_width", "se_groups", "mr_groups", "se_length", "mr_length",
            "li_order", "feature_length", "max_position_embeddings", "rotary_base",
            "rotary_divisor",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)} must be greater than 0.")
        dim = self.head_dim or 0
        if "a" in self.pattern and dim % 2:
            raise ValueError(
                f"head_dim {dim} is odd, and rotary positions turn channels in pairs; "
                f"take {dim + 1}."
            )
        for letter, kind in (("s", "se"), ("m", "mr")):
            width, groups = getattr(self, f"{kind}_width"), getattr(self, f"{kind}_groups")
            if letter in self.pattern and width % groups:
                near = min(
                    (n for n in range(1, width + 1) if width % n == 0),
                    key=lambda n: abs(n - groups),
                )
                raise ValueError(
                    f"{kind}_width {width} does not split into {groups} groups ({kind}_groups); "
                    f"the nearest number that divides it is {near}."
                )
