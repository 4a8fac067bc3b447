"""How well the student's heads reproduce each teacher, in the teacher's own feature space."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.features import Batch, Features, match_grid

RESERVED = ("min", "geomean")


def fidelity(
    student: Callable[[Batch], Mapping[str, Features]],
    teachers: Mapping[str, Callable[[Batch], Features]],
    batches: Iterable[Batch],
) -> Iterator[tuple[str, float]]:
    """Compare a student's heads with its teachers on held-out images, and yield named numbers.

    For each teacher with a spatial map, over all tokens of all images on the smaller of both grids:

        fidelity/<name> = tr Σ / (C · MSE)    (FeatSharp's measure; Σ is the teacher's covariance)
        mse/<name>, cosine/<name>/spatial     (mean over tokens)

    then cosine/<name>/summary (mean over images) where both sides have a summary, and the
    minimum and the geometric mean of the fidelities. Predicting the teacher's mean on these images
    would have fidelity 1; higher is better; a perfect copy has infinity.

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
    found = []
    for name, tally in _tally(student, teachers, batches).items():
        for what, value in tally.measures():
            yield what.format(name), value
            if what == "fidelity/{}":
                found.append(value)
    if found:
        yield "fidelity/min", math.nan if any(map(math.isnan, found)) else min(found)
        yield "fidelity/geomean", _geometric_mean(found)


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
    is_empty = True
    for batch in batches:
        is_empty = False
        ours = student(batch)
        for name, teacher in teachers.items():
            if name not in ours:
                raise ValueError(
                    f"The student has no head for {name!r}; it has {', '.join(map(repr, ours))}."
                )
            tallies[name].add(ours[name], teacher(batch), name)
    if is_empty:
        raise ValueError("There are no held-out images to compare on: there was no batch.")
    return tallies


class _Tally:
    """Float64 sums over one teacher's tokens and images, on the teacher's device until the end."""

    def __init__(self):
        self.tokens = self.images = self.channels = 0
        self.error = self.spread = self.spatial = self.summary = self.mean = torch.zeros(
            (), dtype=torch.float64
        )

    def add(self, ours: Features, theirs: Features, name: str) -> None:
        if ours.summary is not None and theirs.summary is not None:
            _same_width(ours.summary, theirs.summary, name, "summary")
            self.images += len(theirs.summary)
            self.summary = self.summary + _sum_cosine(ours.summary, theirs.summary)
        if ours.spatial is not None and theirs.spatial is not None:
            _same_width(ours.spatial, theirs.spatial, name, "spatial")
            guess, truth = match_grid(ours.spatial.float(), theirs.spatial.float())
            self._add_tokens(guess.flatten(0, 2), truth.flatten(0, 2))

    def _add_tokens(self, guess: Float[Tensor, "n C"], truth: Float[Tensor, "n C"]) -> None:
        self.error = self.error + (guess - truth).square().sum(dtype=torch.float64)
        self.spatial = self.spatial + _sum_cosine(guess, truth)
        # Chan's merge of (count, mean, squared deviations): raw sums of squares would lose all
        # digits for a teacher whose mean is far from zero.
        truth = truth.double()
        n, (self.tokens, self.channels) = self.tokens, (self.tokens + len(truth), truth.shape[1])
        mean = truth.mean(dim=0)
        step = mean - self.mean
        self.mean = self.mean + step * len(truth) / self.tokens
        self.spread = self.spread + (truth - mean).square().sum()
        self.spread = self.spread + step.square().sum() * n * len(truth) / self.tokens

    def measures(self) -> Iterator[tuple[str, float]]:
        """Yield values, each with a name in which `{}` stands for the teacher's."""
        if self.tokens:
            error, spread = self.error.item(), self.spread.item()
            yield "fidelity/{}", spread / error if error else math.inf
            yield "mse/{}", error / (self.tokens * self.channels)
            yield "cosine/{}/spatial", self.spatial.item() / self.tokens
        if self.images:
            yield "cosine/{}/summary", self.summary.item() / self.images


def _sum_cosine(ours: Float[Tensor, "n C"], theirs: Float[Tensor, "n C"]) -> Float[Tensor, ""]:
    return F.cosine_similarity(ours.float(), theirs.float(), dim=-1).sum(dtype=torch.float64)


def _same_width(ours: Tensor, theirs: Tensor, name: str, part: str) -> None:
    if ours.shape[-1] != theirs.shape[-1]:
        raise ValueError(
            f"The {part} head for {name!r} has {ours.shape[-1]} channels and the teacher has "
            f"{theirs.shape[-1]}; was the student made for another teacher?"
        )
