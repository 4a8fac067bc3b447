"""Students that answer in the teachers' own spaces: what a normalisation changed is folded back."""

from collections.abc import Mapping
from functools import partial

from zoo.students.student import Student
from zoo.train.distill.phi_s import Normalizer, fold_inverse


def folded(student: Student, normalizers: Mapping[str, Normalizer]) -> Student:
    """Return the student with heads that answer in the teachers' own spaces.

    The inverse of each transform goes into the last layer of its head (PHI-S, 2410.01680); the
    backbone is shared with `student`, the heads are copies.

    Args:
        normalizers: The transform of each teacher's map, by label, and of its summary, by
            `summary_key(label)`.
    """
    folds = {
        name: partial(fold_inverse, normalizer=normalizer)
        for name, normalizer in normalizers.items()
    }
    return student.with_folded_heads(folds)
