"""What `--data` calls its data: several sources with weights, or a stream."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

STREAM = "stream:"
"""What the name of a stream begins with."""
MOST_PLACES = 10_000
"""Most positions of a block of a mixture."""


def is_stream(data: str) -> bool:
    """Return whether it names shards that are read from front to back."""
    return data.startswith(STREAM)


@dataclass(frozen=True)
class Weighted:
    """Sources by what `--data` calls them, and how many positions of a block each has."""

    names: tuple[str, ...]
    shares: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Weighted | None":
        """Read `PATH=WEIGHT,PATH=WEIGHT`; `None` for what names one source.

        Weights are relative: 0.7 and 0.3 are as 7 and 3.

        Raises:
            ValueError: a weight is missing or not above 0, a path comes twice, or the weights have
                no common measure (see `MOST_PLACES`).
        """
        pairs = [part.rpartition("=") for part in text.split(",")]
        weights = [_number(weight) for _, _, weight in pairs]
        # False for a name that is too long, where Path raises
        if len(pairs) < 2 or set(weights) == {None} or os.path.exists(text):  # noqa: PTH110
            return None
        for (name, _, _), weight, part in zip(pairs, weights, text.split(","), strict=True):
            if weight is None or weight <= 0 or not name:
                raise ValueError(
                    f"{part!r} of {text} is no source with a weight above 0; several are given as "
                    "PATH=0.7,PATH=0.3."
                )
        names = tuple(name for name, _, _ in pairs)
        if streams := [name for name in names if is_stream(name)]:
            raise ValueError(f"{streams[0]} is a stream, which has no place in a mixture.")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{text} names {twice[0]} twice; add its weights up.")
        return cls(names, _shares([weight for weight in weights if weight]))


def _number(text: str) -> Fraction | None:
    return Fraction(text) if re.fullmatch(r"\d{1,9}(\.\d{0,9})?|\.\d{1,9}", text) else None


def _shares(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Return the smallest whole numbers that stand to each other as weights do."""
    scale = math.lcm(*(w.denominator for w in weights))
    whole = [int(w * scale) for w in weights]
    whole = [w // math.gcd(*whole) for w in whole]
    if sum(whole) > MOST_PLACES:
        near = [max(1, round(1000 * w / sum(whole))) for w in whole]
        raise ValueError(
            f"The weights stand to each other as {', '.join(map(str, whole))}, whose sum is above "
            f"{MOST_PLACES:,}; {', '.join(map(str, near))} are near."
        )
    return tuple(whole)
