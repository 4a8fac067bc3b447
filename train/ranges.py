"""Which numbers the fields of a config take: each says so beside its type, one check reads it.

clip: Annotated[float, at_least(0, "off")] = 1.0

optim.clip is -1; it is 0 (off) or more.
"""

import math
from functools import cache
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

MOST_PIXELS = 8192
"""Longest side of an image that a model looks at: a ViT has 262,144 tokens there."""
LARGEST_BATCH = 2**20
"""Samples a step. The memory that they need is estimated as well, where a run is set up."""
MOST_WORKERS = 512
"""Processes; each of them holds an interpreter."""


LARGEST = 2**63
"""Larger integers have no place in 64 bits."""


class Range(NamedTuple):
    """The numbers from `low` to `high`, without the ends that are `open`."""

    words: str
    """What stands behind "it is" in a message."""
    low: float
    high: float = math.inf
    open: tuple[float, ...] = ()

    def holds(self, value: Any) -> bool:
        """Tell whether `value` is a finite number in the range; other things than numbers pass."""
        if not isinstance(value, int | float):
            return True
        ends = self.low <= value <= self.high and value not in self.open
        return ends and abs(value) < LARGEST  # which infinity is not, and NaN has no place at all


def at_least(low: float, means: str = "") -> Range:
    """Return the range from `low` on; `means` says what the lowest number does."""
    return Range(f"{low:,}{f' ({means})' * bool(means)} or more", low)


def above(low: float) -> Range:
    """Return the numbers larger than `low`."""
    return Range(f"a number above {low:,}", low, open=(low,))


def between(low: float, high: float, means: str = "") -> Range:
    """Return the range from `low` to `high`, both included."""
    return Range(f"{low:,}{f' ({means})' * bool(means)} to {high:,}", low, high)


def below(low: float, high: float, means: str = "") -> Range:
    """Return the range from `low` to `high`, which is left out."""
    words = f"{low:,}{f' ({means})' * bool(means)} or more and below {high:,}"
    return Range(words, low, high, open=(high,))


SHARE = Range("a share above 0 and at most 1", 0, 1, open=(0,))
FRACTION = Range("a share from 0 to 1", 0, 1)
PROPER_SHARE = Range("a share between 0 and 1", 0, 1, open=(0, 1))
CHANCE = Range("a chance from 0 to 1", 0, 1)
POSITIVE = above(0)
NOT_NEGATIVE = at_least(0)
COUNT = at_least(1)
PIXELS = Range(f"a side of 1 to {MOST_PIXELS:,} pixels", 1, MOST_PIXELS)
BATCH = between(1, LARGEST_BATCH)
WORKERS = between(0, MOST_WORKERS)
SEED = Range("0 or more and below 2^63", 0, LARGEST, open=(LARGEST,))


@cache
def ranges_of(kind: type[Any]) -> dict[str, Range]:
    """Return field -> range, for those fields of a config that have one."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        name: mark
        for name, hint in hints.items()
        if get_origin(hint) is Annotated
        for mark in get_args(hint)[1:]
        if isinstance(mark, Range)
    }


def check_ranges(config: Any, within: str = "") -> None:
    """Refuse a config whose numbers are out of their ranges; NaN and infinity are in none.

    Args:
        within: Names of the fields around it, each with a dot behind: `"optim."`.

    Raises:
        ValueError: the first field that is wrong, what it is and what it may be.
    """
    for name, allowed in ranges_of(type(config)).items():
        value = getattr(config, name)
        several = isinstance(value, tuple)
        if not all(map(allowed.holds, value if several else (value,))):
            what = "each is" if several else "it is"
            shown = f"{value:g}" if isinstance(value, float) else value
            raise ValueError(f"{within}{name} is {shown}; {what} {allowed.words}.")
