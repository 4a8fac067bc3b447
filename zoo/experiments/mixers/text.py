"""What the towers learn: rows of files, and drills, which are phone books and strings to be copied.

A book is followed by as many of its lines again, drawn at random, as many questions are in MQAR
(2312.04927), and a string is written twice (2402.01032). Of a drill the second half alone is
learnt, since the first is random; the names in it too, which the book foretells after a letter or
two: an answer goes on where they stood. Short books and strings come first, longer ones join them.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from zoo.data.plan import mix
from zoo.eval.language.recall import CONSONANTS, LETTERS, VOWELS
from zoo.experiments.corpus import ByteFeed
from zoo.language.tokens import Tokens, read_tokens
from zoo.train.distill.token_losses import cross_entropy
from zoo.train.distill.token_task import flat
from zoo.train.state import TrainState
from zoo.train.task import Loss, Task

LEAST = (1, 2)
"""Entries of a book, and letters of a string."""
FIRST = (2, 4)
"""The most of both in the first step, if they grow."""
LINE, NEWLINE = len("Kabodu: 123-4567\n"), ord("\n")


class Drill(NamedTuple):
    """Bytes, and which of them are learnt, its second half's."""

    ids: np.ndarray
    learnt: np.ndarray


@dataclass(frozen=True)
class DrilledTokens(Tokens):
    """Rows of which the first are drills."""

    learnt: Bool[Tensor, "B T"] = field(kw_only=True)
    """What is learnt of the drills."""
    drills: int = field(kw_only=True)
    """Rows that are drills."""


@dataclass
class MixedFeed(ByteFeed):
    """Rows of bytes of which a share are drills; the first ones of each batch.

    Args:
        tasks: The share.
        drilled: Most entries of a book, and letters of a string.
        grown: Steps after which books and strings are as long as they get.
        held_out: Names that stand in no book.
        seed: Decides the drills; what a step has is a pure function of it.
    """

    tasks: float = 0.0
    drilled: tuple[int, int] = (40, 256)
    grown: int = 0
    held_out: Collection[str] = ()
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        held = np.array(sorted(self.held_out), "S6")
        self.names = np.flatnonzero(~np.isin(all_names().view("S6").ravel(), held))
        self.drills = lru_cache(4)(self._drills)

    def batches(self, start: int, steps: int) -> Iterator[DrilledTokens]:
        """Return the batches of the steps `start`..`steps`; no drill comes twice."""
        for step, tokens in enumerate(super().batches(start, steps), start):
            ids, made = tokens.ids, self.drills(step)
            learnt, number = torch.zeros_like(ids, dtype=torch.bool), len(made.ids)
            ids[:number] = torch.from_numpy(made.ids).to(ids.device).long()
            learnt[:number] = torch.from_numpy(made.learnt).to(ids.device)
            yield DrilledTokens(ids, tokens.segments, learnt=learnt, drills=number)

    def counts(self, step: int) -> Mapping[str, int]:
        """Return the bytes of files, and of drills, that are learnt in a step."""
        made, length = self.drills(step), self.source.length
        rows = self.plan.batch - len(made.ids)
        return dict(text=max(1, rows * (length - 1)), drills=max(1, int(made.learnt[:, 1:].sum())))

    def number_of_tasks(self, step: int) -> int:
        """Return how many rows of a batch are drills; the shares add up over the steps."""
        so_far, before = (int(s * self.plan.batch * self.tasks) for s in (step + 1, step))
        return so_far - before

    def _drills(self, step: int) -> Drill:
        rng = np.random.default_rng([mix(self.seed, 33), step])
        share = min(1.0, step / self.grown) if self.grown else 1.0
        most = tuple(
            round(first * (last / first) ** share)
            for first, last in zip(FIRST, self.drilled, strict=True)
        )
        length, number = self.source.length, self.number_of_tasks(step)
        rows = [drill_row(rng, length, most, self.names) for _ in range(number)]
        if not rows:
            return Drill(np.empty((0, length), np.uint8), np.empty((0, length), bool))
        return Drill(*(np.stack(columns) for columns in zip(*rows, strict=True)))


class RecallTask(Task):
    """The next byte of the files, and of the drills' second halves.

    Args:
        weight: What the mean over drills' bytes counts beside the mean over those of files.
    """

    def __init__(self, weight: float):
        self.weight = weight

    def losses(
        self, state: TrainState, batch: DrilledTokens, targets: None, step: int
    ) -> dict[str, Loss]:
        ours, following = flat(read_tokens(state.model, batch)), batch.following.flatten()
        text, drills = batch.counted, batch.learnt.roll(-1, dims=1) & batch.counted
        text = text & (torch.arange(len(text), device=text.device) >= batch.drills)[:, None]
        return {
            name: Loss(
                cross_entropy(*ours, following, where.flatten(), chunk=following.numel()),
                following.numel(),
            )
            for name, where in dict(text=text, drills=drills).items()
        }

    def weigh(self, losses: Mapping[str, Tensor], step: int) -> Tensor:
        return losses["text"] + self.weight * losses["drills"]


@cache
def all_names() -> np.ndarray:
    """Return every name of three syllables that the benchmark may draw, as bytes, [n, 6]."""
    syllables = np.array([list(f"{a}{b}".encode()) for a in CONSONANTS for b in VOWELS], np.uint8)
    places = np.unravel_index(np.arange(len(syllables) ** 3), (len(syllables),) * 3)
    names = np.concatenate([syllables[place] for place in places], axis=1)
    names[:, 0] -= ord("a") - ord("A")
    return names


def drill_row(
    rng: np.random.Generator, length: int, most: Sequence[int], names: np.ndarray
) -> Drill:
    """Return a row of drills, one behind the other, [length] each; the last is cut.

    Args:
        most: Entries of the largest phone book, and letters of the longest string; sizes are spread
            evenly on a logarithmic scale.
        names: Indices of those names that may stand in a book.
    """
    parts, size = [], 0
    while size < length:
        if rng.random() < 0.5:
            part = book_drill(rng, _spread(rng, LEAST[0], most[0]), names)
        else:
            part = string_drill(rng, _spread(rng, LEAST[1], most[1]))
        parts.append(part)
        size += len(part.ids)
    return Drill(*(np.concatenate(column)[:length] for column in zip(*parts, strict=True)))


def book_drill(rng: np.random.Generator, entries: int, names: np.ndarray) -> Drill:
    """Return a phone book, and as many of its lines again: a question with its answer each.

    They are drawn with replacement; otherwise the last ones could be told by elimination.
    """
    lines = np.empty((entries, LINE), np.uint8)
    lines[:, :6] = all_names()[names[rng.choice(len(names), entries, replace=False)]]
    lines[:, 6:] = np.frombuffer(b": 123-4567\n", np.uint8)
    digits = [8, 9, 10, 12, 13, 14, 15]
    lines[:, digits] = rng.integers(ord("0"), ord("9") + 1, (entries, len(digits)))
    lines[:, 8] = rng.integers(ord("1"), ord("9") + 1, entries)  # as the benchmark: 100 at least
    return _twice(lines.ravel(), lines[rng.integers(entries, size=entries)].ravel())


def string_drill(rng: np.random.Generator, letters: int) -> Drill:
    """Return random letters, twice."""
    line = np.full(letters + 1, NEWLINE, np.uint8)
    line[:-1] = rng.integers(ord(LETTERS[0]), ord(LETTERS[-1]) + 1, letters)
    return _twice(line, line, between=0)


def _twice(first: np.ndarray, again: np.ndarray, between: int = 1) -> Drill:
    """Put both together, with so many empty lines between them and one behind; learn the second."""
    gap, end = (np.full(n, NEWLINE, np.uint8) for n in (between, 1))
    ids = np.concatenate([first, gap, again, end])
    learnt = np.zeros(len(ids), bool)
    learnt[len(first) + between : -1] = True
    return Drill(ids, learnt)


def _spread(rng: np.random.Generator, least: int, most: int) -> int:
    return min(most, int(np.exp(rng.uniform(np.log(least), np.log(most + 1)))))
