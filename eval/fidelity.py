"""How well the student's heads reproduce each teacher, in the teacher's own feature space."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.features import Batch, Features, at_grid, match_grid
from zoo.train.mesh import gathered, world

RESERVED = ("min", "geomean")
IMAGES = 16
"""Images whose maps are compared at once: a fine grid of a wide teacher has gigabytes a batch."""


def fidelity(
    student: Callable[[Batch], Mapping[str, Features]],
    teachers: Mapping[str, Callable[[Batch], Features]],
    batches: Iterable[Batch],
) -> Iterator[tuple[str, float]]:
    """Compare a student's heads with its teachers on held-out images, and yield named numbers.

    For each teacher with a spatial map, over all tokens of all images on the smaller of both grids:

        fidelity/<name> = tr Σ / (C · MSE)    (FeatSharp's measure; Σ is the teacher's covariance)
        mse/<name>, cosine/<name>/spatial     (mean over tokens)
        fidelity_own_grid/<name>              (the same on the teacher's own grid)

    then cosine/<name>/summary (mean over images) where both sides have a summary, and the
    minimum and the geometric mean of both fidelities. Predicting the teacher's mean on these images
    would have fidelity 1; higher is better; a perfect copy has infinity.

    The smaller grid is that of the loss, and depends on the student: a coarse one is asked for
    averages, which are easier. Students of several strides compare on the teacher's own grid, to
    which a coarser map is interpolated (bilinear) and a finer one averaged.

    On several ranks each compares its share of the batches, and every one yields the numbers of
    all: sums are added up in the order of the batches, so one process has the same to the bit.

    Args:
        student: Returns features in the teachers' original space: fold the normalisers into the
            heads first.

    Raises:
        ValueError: there is no batch, the student has no head for a teacher or a head of another
            width, or a teacher is called `min` or `geomean`.
    """
    for name in RESERVED:
        if name in teachers:
            raise ValueError(f"A teacher cannot be called {name!r}: fidelity/{name} is a summary.")
    found: dict[str, list[float]] = {"fidelity": [], "fidelity_own_grid": []}
    for name, tally in _tally(student, teachers, batches).items():
        for what, value in tally.measures():
            yield what.format(name), value
            if (measure := what.partition("/")[0]) in found:
                found[measure].append(value)
    for measure, values in found.items():
        if values:
            yield f"{measure}/min", math.nan if any(map(math.isnan, values)) else min(values)
            yield f"{measure}/geomean", _geometric_mean(values)


def _geometric_mean(values: list[float]) -> float:
    if 0 in values:
        return 0.0
    return math.exp(sum(map(math.log, values)) / len(values))


@torch.inference_mode()
def _tally(
    student: Callable[[Batch], Mapping[str, Features]],
    teachers: Mapping[str, Callable[[Batch], Features]],
    batches: Iterable[Batch],
) -> dict[str, "_Tally"]:
    tallies = {name: _Tally() for name in teachers}
    found: list[tuple[int, str, _Part]] = []
    device = torch.device("cpu")
    for batch in batches:
        ours, device = student(batch), batch.images.device
        for name, teacher in teachers.items():
            if name not in ours:
                raise ValueError(
                    f"The student has no head for {name!r}; it has {', '.join(map(repr, ours))}."
                )
            part = _compared(ours[name], teacher(batch), name)
            found.append((batch.number, name, part))
    if world() > 1:
        found = [(number, name, part.to(torch.device("cpu"))) for number, name, part in found]
        found = sorted(gathered(found), key=lambda one: one[0])
    for _, name, part in found:
        tallies[name].add(part.to(device))
    if not found:
        raise ValueError("There are no held-out images to compare on: there was no batch.")
    return tallies


class _Sums(NamedTuple):
    """What a few images' tokens add to `_Tokens`."""

    num_tokens: int
    channels: int
    error: Tensor
    cosine: Tensor
    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, guess: Float[Tensor, "B H W C"], truth: Float[Tensor, "B H W C"]) -> "_Sums":
        guess, truth = guess.flatten(0, 2), truth.flatten(0, 2)
        error = (guess - truth).square().sum(dtype=torch.float64)
        cosine, truth = _sum_cosine(guess, truth), truth.double()
        mean = truth.mean(dim=0)
        count, channels = truth.shape
        return cls(count, channels, error, cosine, mean, (truth - mean).square().sum())

    def to(self, device: torch.device) -> "_Sums":
        moved = {name: getattr(self, name).to(device) for name in self._fields[2:]}
        return self._replace(**moved)


class _Part(NamedTuple):
    """What a batch adds to a teacher's tally."""

    images: int
    summary: Tensor
    maps: tuple[tuple[_Sums, _Sums], ...]
    """On the smaller grid and on the teacher's own, `IMAGES` at a time."""

    def to(self, device: torch.device) -> "_Part":
        maps = tuple((matched.to(device), own.to(device)) for matched, own in self.maps)
        return _Part(self.images, self.summary.to(device), maps)


def _compared(ours: Features, theirs: Features, name: str) -> _Part:
    images, summary, found = 0, torch.zeros((), dtype=torch.float64), []
    if ours.summary is not None and theirs.summary is not None:
        _same_width(ours.summary, theirs.summary, name, "summary")
        images, summary = len(theirs.summary), _sum_cosine(ours.summary, theirs.summary)
    if ours.spatial is not None and theirs.spatial is not None:
        _same_width(ours.spatial, theirs.spatial, name, "spatial")
        maps = (ours.spatial.split(IMAGES), theirs.spatial.split(IMAGES))
        for guess, truth in zip(*maps, strict=True):
            guess, truth = guess.float(), truth.float()
            own = at_grid(guess, (truth.shape[1], truth.shape[2]))
            found.append((_Sums.of(*match_grid(guess, truth)), _Sums.of(own, truth)))
    return _Part(images, summary, tuple(found))


class _Tally:
    """Sums over one teacher's images, on the teacher's device until the end."""

    def __init__(self):
        self.matched, self.own, self.images = _Tokens(), _Tokens(), 0
        self.summary = torch.zeros((), dtype=torch.float64)

    def add(self, part: _Part) -> None:
        if part.images:
            self.images += part.images
            self.summary = self.summary + part.summary
        for matched, own in part.maps:
            self.matched.add(matched)
            self.own.add(own)

    def measures(self) -> Iterator[tuple[str, float]]:
        """Yield values, each with a name in which `{}` stands for the teacher's."""
        if self.matched.count:
            yield "fidelity/{}", self.matched.fidelity()
            yield "mse/{}", self.matched.mse()
            yield "cosine/{}/spatial", self.matched.cosine.item() / self.matched.count
            yield "fidelity_own_grid/{}", self.own.fidelity()
        if self.images:
            yield "cosine/{}/summary", self.summary.item() / self.images


class _Tokens:
    """Float64 sums over the tokens of one teacher, on one grid."""

    def __init__(self):
        self.count = self.channels = 0
        self.error = self.spread = self.cosine = self.mean = torch.zeros((), dtype=torch.float64)

    def add(self, part: _Sums) -> None:
        self.error, self.cosine = self.error + part.error, self.cosine + part.cosine
        # Chan's merge of (count, mean, squared deviations): raw sums of squares would lose all
        # digits for a teacher whose mean is far from zero.
        n, (self.count, self.channels) = self.count, (self.count + part.num_tokens, part.channels)
        step = part.mean - self.mean
        self.mean = self.mean + step * part.num_tokens / self.count
        self.spread = self.spread + part.spread
        self.spread = self.spread + step.square().sum() * n * part.num_tokens / self.count

    def fidelity(self) -> float:
        error, spread = self.error.item(), self.spread.item()
        return spread / error if error else math.inf

    def mse(self) -> float:
        return self.error.item() / (self.count * self.channels)


def _sum_cosine(ours: Float[Tensor, "n C"], theirs: Float[Tensor, "n C"]) -> Float[Tensor, ""]:
    return F.cosine_similarity(ours.float(), theirs.float(), dim=-1).sum(dtype=torch.float64)


def _same_width(ours: Tensor, theirs: Tensor, name: str, part: str) -> None:
    if ours.shape[-1] != theirs.shape[-1]:
        raise ValueError(
            f"The {part} head for {name!r} has {ours.shape[-1]} channels and the teacher has "
            f"{theirs.shape[-1]}; was the student made for another teacher?"
        )
