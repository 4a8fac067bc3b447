"""Many small encoded images in one `.npz` file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zoo.data.images import printable
from zoo.files import read_arrays


def _numbered(numbers: Sequence[int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return labels, and the names of the classes that they count: the numbers that occur."""
    known = sorted(set(numbers))
    index = {number: label for label, number in enumerate(known)}
    return tuple(index[number] for number in numbers), tuple(map(str, known))


@dataclass(frozen=True, eq=False)
class NpzSource:
    """Many small encoded images in one file: the bytes of all, their offsets and their labels."""

    file: Path
    data: np.ndarray
    """All encoded images, one after the other, as bytes."""
    offsets: np.ndarray
    """Where each image begins in `data`, and where the last ends: one more than the images."""
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    @classmethod
    def scan(cls, file: Path) -> "NpzSource":
        """Read `data` (bytes), `offsets` and `labels` from a file that `numpy.savez` wrote.

        Raises:
            ValueError: they are not in the file, or do not fit together.
        """
        arrays = read_arrays(file)
        try:
            data, offsets, labels = (arrays[name] for name in ("data", "offsets", "labels"))
        except KeyError as error:
            raise ValueError(
                f"{file} has no data, offsets and labels: {error} is not there."
            ) from error
        whole = all(a.ndim == 1 and a.dtype.kind in "iu" for a in (offsets, labels))
        if not whole or data.ndim != 1 or data.dtype != np.uint8:
            raise ValueError(
                f"{file}: data must be [bytes] uint8, offsets [n + 1] and labels [n] integers."
            )
        if len(offsets) != len(labels) + 1:
            raise ValueError(f"{file} has {len(labels)} labels and {len(offsets)} offsets.")
        ends = offsets.astype(np.int64)
        if ends[0] < 0 or ends[-1] > len(data) or (np.diff(ends) < 0).any():
            raise ValueError(f"{file}: its offsets do not grow from 0 to the {len(data)} bytes.")
        if len(labels) and labels.min() < 0:
            raise ValueError(f"{file} has the label {labels.min()}; labels count from 0.")
        return cls(file, data, ends, *_numbered(labels.tolist()))

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        return f"{printable(self.file.name)}/{index}"

    def label(self, index: int) -> int | None:
        return self.labels[index]

    def read(self, index: int) -> bytes:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()
