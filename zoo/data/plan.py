"""Which sample is at which position of the stream, and its random numbers: pure functions.

Everything random about a sample follows from (seed, position), where position = step x batch +
index in the global batch. A run that resumes, or that has another number of ranks, computes the
same samples and random numbers again; nothing is stored.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

KIND = 4
"""Salt of `mix` for the kind of a step; 1 and 2 are those of a sample and of a step's network."""


def mix(*numbers: Any) -> Any:
    """Hash integers into 63 bits, the same on every machine (splitmix64, Steele et al. 2014).

    Args:
        numbers: Integers, or arrays of them that broadcast; with an array, so is the result.
    """
    state: Any = np.uint64(0)
    with np.errstate(over="ignore"):
        for number in numbers:
            bits = number if isinstance(number, np.ndarray) else int(number) & (2**64 - 1)
            state = _scramble(state + _GOLDEN + np.asarray(bits).astype(np.uint64)[()])
    hashed = state >> np.uint64(1)
    return hashed.astype(np.int64) if isinstance(hashed, np.ndarray) else int(hashed)


def _scramble(x: Any) -> Any:
    """Scramble the bits of a uint64, or of an array of them."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(indices: np.ndarray, total: int, key: int) -> np.ndarray:
    """Map indices 0..total-1 one-to-one onto 0..total-1, in an order that `key` decides.

    A Feistel network over the next even number of bits, applied again until the result is below
    `total`: any index of any epoch costs the same few operations, where a stored permutation of a
    billion images would need 8 GB on every rank.
    """
    bits = max(1, (int(total - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << bits) - 1)
    shift = np.uint64(bits)
    keys = [np.uint64(mix(key, r)) for r in range(6)]

    def feistel(x):
        left, right = x >> shift, x & low
        with np.errstate(over="ignore"):
            for k in keys:
                left, right = right, left ^ (_scramble(right + k) & low)
        return (left << shift) | right

    x = feistel(indices.astype(np.uint64))
    while (outside := x >= total).any():
        x[outside] = feistel(x[outside])
    return x.astype(np.int64)


@dataclass(frozen=True)
class Plan:
    """The stream of samples of a run: epochs of all samples, each in its own order."""

    samples: int
    """Number of samples in an epoch."""
    batch: int
    """Images in the global batch."""
    seed: int
    views: int = 0
    """Epochs after which the stream repeats, crops included; 0 for never."""
    batches: tuple[int, ...] = ()
    """Images that a step takes, for each of so many kinds of steps: it takes the first ones of its
    global batch and skips the others. By default every step takes all."""

    def __post_init__(self):
        if self.samples < 1 or self.batch < 1:
            raise ValueError(
                f"A plan needs samples and a batch size; got {self.samples} samples and "
                f"batches of {self.batch}."
            )

    def kind(self, step: int, kinds: int) -> int:
        """Draw which of `kinds` kinds a step is of."""
        return mix(self.seed, KIND, step) % kinds

    def count(self, step: int) -> int:
        """Return how many images `step` takes."""
        kinds = len(self.batches)
        return self.batches[self.kind(step, kinds)] if kinds else self.batch

    def positions(self, step: int) -> np.ndarray:
        """Return the positions in the stream of the images of `step`."""
        return step * self.batch + np.arange(self.count(step), dtype=np.int64)

    def indices(self, step: int) -> np.ndarray:
        """Return the indices of the samples of `step`."""
        return self.indices_at(self.positions(step))

    def indices_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the indices of the samples at `positions` of the stream."""
        epochs, within = np.divmod(self.stored(positions), self.samples)
        out = np.empty_like(within)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = shuffled(within[here], self.samples, mix(self.seed, int(epoch)))
        return out

    def stored(self, position: Any) -> Any:
        """Return the first position with the same view as `position` (an integer or an array)."""
        return position % (self.views * self.samples) if self.views else position

    def draws(self, position: int) -> np.random.Generator:
        """Return the source of all random numbers of the sample at `position`."""
        return np.random.Generator(np.random.Philox(key=mix(self.seed, 1, self.stored(position))))
