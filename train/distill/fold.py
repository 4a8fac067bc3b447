"""Students that answer in the teachers' own spaces: what a normalisation changed is folded back."""

from collections.abc import Callable, Mapping
from functools import partial

from zoo.features import Batch, Features
from zoo.students.student import Student
from zoo.train.distill.config import SummaryLoss
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


def with_probabilities(
    student: Callable[[Batch], Mapping[str, Features]], losses: Mapping[str, SummaryLoss]
) -> Callable[[Batch], dict[str, Features]]:
    """Return a student whose logits are turned into what their teachers answer with.

    Args:
        student: Its heads answer in the teachers' own spaces, or with logits.
        losses: Of each teacher's summary, by label.
    """

    def answer(batch: Batch) -> dict[str, Features]:
        found = dict(student(batch))
        for label, kind in losses.items():
            if label in found and (logits := found[label].summary) is not None:
                if kind == "bce":
                    found[label] = found[label]._replace(summary=logits.sigmoid())
                elif kind == "cross_entropy":
                    found[label] = found[label]._replace(summary=logits.softmax(dim=-1))
        return found

    return answer
