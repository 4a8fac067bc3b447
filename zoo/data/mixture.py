"""Several sources in one stream, each with its weight.

Positions are dealt out in blocks: a block holds of each source as many positions as its weight
says, in an order of its own, so every stretch of the stream is mixed as the whole is. How many
images of a source stand before a position follows from the block's number, so any step of a run, on
any rank, knows its images without a look at the others. Each source goes through its images in
passes of its own, each image once a pass, whatever the other sources' lengths are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np

from zoo.data.plan import Plan, mix, shuffled
from zoo.data.sources import Source

BLOCK, PASS = 8, 9
"""Salts of `mix` for the order of a block, and of a source's images in a pass."""
MOST_PLACES = 10_000
"""Most positions of a block."""


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
        if len(pairs) < 2 or not any(weights) or Path(text).exists():
            return None
        for (name, _, _), weight, part in zip(pairs, weights, text.split(","), strict=True):
            if weight is None or weight <= 0 or not name:
                raise ValueError(
                    f"{part!r} of {text} is no source with a weight above 0; several are given as "
                    "PATH=0.7,PATH=0.3."
                )
        names = tuple(name for name, _, _ in pairs)
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{text} names {twice[0]} twice; add its weights up.")
        return cls(names, _shares([weight for weight in weights if weight]))


def _number(text: str) -> Fraction | None:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


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


@dataclass(frozen=True, eq=False)
class Mixture:
    """The images of several sources, one source behind another; `plan_of` mixes them.

    It has classes if all sources have the same ones.
    """

    parts: tuple[Source, ...]
    weighted: Weighted

    @cached_property
    def begins(self) -> np.ndarray:
        """Where each source begins, and where the last ends."""
        return np.cumsum([0, *map(len, self.parts)])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Images of each source."""
        return tuple(map(len, self.parts))

    @property
    def classes(self) -> Sequence[str]:
        first, *others = (list(part.classes) for part in self.parts)
        return first if all(other == first for other in others) else ()

    def __len__(self) -> int:
        return int(self.begins[-1])

    def _at(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.begins, index, side="right")) - 1
        return part, index - int(self.begins[part])

    def key(self, index: int) -> str:
        part, inside = self._at(index)
        return f"{self.weighted.names[part]}/{self.parts[part].key(inside)}"

    def label(self, index: int) -> int | None:
        part, inside = self._at(index)
        return self.parts[part].label(inside) if self.classes else None

    def read(self, index: int) -> bytes:
        part, inside = self._at(index)
        return self.parts[part].read(inside)


@dataclass(frozen=True)
class MixedPlan(Plan):
    """A stream of several sources; `samples` is the sum of their lengths."""

    lengths: tuple[int, ...] = ()
    """Samples of each source. Their indices follow one another, as in `Mixture`."""
    shares: tuple[int, ...] = ()
    """Positions that each source has in a block."""

    def indices_at(self, positions: np.ndarray) -> np.ndarray:
        sources, numbers = self.dealt(positions)
        out = np.empty_like(numbers)
        begin = 0
        for source, length in enumerate(self.lengths):
            here = np.flatnonzero(sources == source)
            passes, within = np.divmod(numbers[here], length)
            for number in np.unique(passes):
                now = passes == number
                key = mix(self.seed, PASS, source, int(number))
                out[here[now]] = begin + shuffled(within[now], length, key)
            begin += length
        return out

    def dealt(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return whose each position is, and how many positions before it are that source's."""
        size = sum(self.shares)
        blocks, places = np.divmod(self.stored(positions), size)
        known, row = np.unique(blocks, return_inverse=True)
        hashes = mix(self.seed, BLOCK, known[:, None], np.arange(size)[None])
        owners = np.repeat(np.arange(len(self.shares)), self.shares)
        dealt = owners[np.argsort(hashes, axis=1, kind="stable")]
        sources = dealt[row, places]
        numbers = np.empty_like(sources)
        for source, share in enumerate(self.shares):
            here = sources == source
            before = np.cumsum(dealt == source, axis=1) - 1
            numbers[here] = blocks[here] * share + before[row[here], places[here]]
        return sources, numbers


def weights_of(source: Source) -> bytes:
    """Name the weights of a mixture, which its images' names do not tell; empty for one source."""
    return repr(source.weighted).encode() if isinstance(source, Mixture) else b""


def plan_of(
    source: Source, batch: int, seed: int, views: int = 0, batches: tuple[int, ...] = ()
) -> Plan:
    """Return the plan of a run over a source; see `Plan` for the arguments."""
    if isinstance(source, Mixture):
        shares = source.weighted.shares
        return MixedPlan(len(source), batch, seed, views, batches, source.lengths, shares)
    return Plan(len(source), batch, seed, views, batches)
