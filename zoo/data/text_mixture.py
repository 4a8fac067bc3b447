"""Several texts in one stream, each with its weight, by the plan that mixes images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from zoo.data.mixture import MixedPlan
from zoo.data.names import Weighted
from zoo.data.plan import Plan
from zoo.data.text import Rows, TextSource, open_text
from zoo.language.tokenizers import Tokenizer


@dataclass(frozen=True, eq=False)
class TextMixture(Rows):
    """The rows of several texts, one text behind another; `plan_of_rows` mixes them."""

    parts: tuple[TextSource, ...]
    weighted: Weighted
    in_turn: bool = False
    """Rows stand in turn, each text's as often as it weighs: the first so many are a mixture."""

    @cached_property
    def begins(self) -> np.ndarray:
        """Where each text begins, and where the last ends."""
        return np.cumsum([0, *map(len, self.parts)])

    @cached_property
    def order(self) -> np.ndarray:
        """The rows in turn: the j-th of a text is due at (j + 1/2) / its share."""
        due = [
            (np.arange(len(part)) + 0.5) / share
            for part, share in zip(self.parts, self.weighted.shares, strict=True)
        ]
        return np.argsort(np.concatenate(due), kind="stable")

    @property
    def mixed(self) -> bool:
        return self.parts[0].mixed

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each text."""
        return tuple(map(len, self.parts))

    @property
    def row_length(self) -> int:
        return self.parts[0].length

    def __len__(self) -> int:
        return int(self.begins[-1])

    def at(self, index: int) -> tuple[int, int]:
        """Return the text that a row is of, and the row's number there."""
        if self.in_turn:
            index = int(self.order[index])
        part = int(np.searchsorted(self.begins, index, side="right")) - 1
        return part, index - int(self.begins[part])

    def key(self, index: int) -> str:
        part, inside = self.at(index)
        return self.parts[part].key(inside)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        part, inside = self.at(index)
        return self.parts[part].row(inside)

    def split(self, share: float) -> tuple["TextMixture", "TextMixture"]:
        """Keep the last rows of each text apart; those rows stand in turn.

        Raises:
            ValueError: a part of a text would have no row.
        """
        pairs = [part.split(share) for part in self.parts]
        rest, held = (tuple(side) for side in zip(*pairs, strict=True))
        return replace(self, parts=rest), replace(self, parts=held, in_turn=True)

    def packed(self, mixed: bool) -> "TextMixture":
        return replace(self, parts=tuple(part.packed(mixed) for part in self.parts))

    def sample(self, count: int) -> Sequence[int]:
        if self.in_turn:
            return range(min(count, len(self)))
        return self.order[:count].tolist()

    def bytes_in(self, rows: int) -> float:
        owners = [self.at(index)[0] for index in range(min(rows, len(self)))]
        return float(np.mean([self.parts[owner].bytes_a_token for owner in owners]))


def open_texts(
    name: str, tokenizer: Tokenizer, length: int, *, in_turn: bool = False
) -> TextSource | TextMixture:
    """Open a text as `open_text` does, or `PATH=0.7,PATH=0.3` as a mixture of several.

    Raises:
        ValueError: as `open_text`, or a weight is missing or not above 0.
    """
    weighted = Weighted.parse(name)
    if weighted is None:
        return open_text(name, tokenizer, length)
    parts = tuple(open_text(Path(one), tokenizer, length) for one in weighted.names)
    return TextMixture(parts, weighted, in_turn)


def plan_of_rows(source: Rows, batch: int, seed: int) -> Plan:
    """Return the order of a run's rows; of a mixture, each text goes round at its own pace."""
    if isinstance(source, TextMixture):
        lengths: Sequence[int] = source.lengths
        shares = source.weighted.shares
        return MixedPlan(len(source), batch, seed, lengths=tuple(lengths), shares=shares)
    return Plan(len(source), batch, seed)
