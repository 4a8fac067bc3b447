"""What the towers learn: rows of files, and rows of phone books and strings to be copied."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from zoo.data.plan import mix
from zoo.eval.language.recall import copying_sample, phonebook_sample
from zoo.experiments.corpus import ByteFeed
from zoo.language.tokens import Tokens

LEAST_BOOK, LEAST_STRING = 3, 4
SHOTS = 2
"""Names that are asked and answered before the last one, as in the benchmark."""


@dataclass
class MixedFeed(ByteFeed):
    """Rows of bytes of which a share are tasks; the first ones of each batch."""

    tasks: float = 0.0
    drilled: tuple[int, int] = (40, 256)
    seed: int = 0

    def batches(self, start: int, steps: int) -> Iterator[Tokens]:
        """Return the batches of the steps `start`..`steps`; no task comes twice."""
        for step, tokens in enumerate(super().batches(start, steps), start):
            ids, number = tokens.ids, self.number_of_tasks(step)
            rng = np.random.default_rng([mix(self.seed, 33), step])
            rows = [task_row(rng, ids.shape[1], self.drilled) for _ in range(number)]
            if rows:
                ids[:number] = torch.from_numpy(np.stack(rows)).to(ids.device).long()
            yield tokens

    def number_of_tasks(self, step: int) -> int:
        """Return how many rows of a batch are tasks; the shares add up over the steps."""
        so_far, before = (int(s * self.plan.batch * self.tasks) for s in (step + 1, step))
        return so_far - before


def task_row(rng: np.random.Generator, length: int, drilled: tuple[int, int]) -> np.ndarray:
    """Return a row of tasks with their answers, one behind the other, [length]; the last is cut.

    Args:
        drilled: Most entries of a phone book, and letters of a string; sizes are spread evenly on
            a logarithmic scale.
    """
    row, size = [], 0
    while size < length:
        if rng.random() < 0.5:
            entries = _spread(rng, LEAST_BOOK, drilled[0])
            sample = phonebook_sample(rng, entries, "", shots=min(SHOTS, entries - 1),
                                      reversed=False)  # fmt: skip
        else:
            sample = copying_sample(rng, _spread(rng, LEAST_STRING, drilled[1]), "", shots=1)
        row.append(f"{sample.text}{sample.answer}\n\n".encode())
        size += len(row[-1])
    return np.frombuffer(b"".join(row)[:length], np.uint8)


def _spread(rng: np.random.Generator, least: int, most: int) -> int:
    return int(np.exp(rng.uniform(np.log(least), np.log(most + 1))))
