"""The control of an experiment's students: the same backbone, which learns labels alone."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo.features import Batch
from zoo.students.student import Student
from zoo.train.state import TrainState
from zoo.train.task import Loss, Task


def with_classifier(student: Student, classes: int) -> Student:
    """Give a student a linear classifier on its summary, in place."""
    summary, _ = student.eval().features(Batch(torch.zeros(1, 3, *student.size)))
    assert summary is not None
    student.classifier = nn.Linear(summary.shape[-1], classes)
    return student


class LabelsTask(Task):
    """Learn the labels alone."""

    def losses(self, state: TrainState, batch: Batch, targets: None, step: int) -> dict[str, Loss]:
        assert batch.labels is not None  # what an experiment calls labelled has labels
        logits = state.model.classifier(state.model.features(batch).summary)
        mean = F.cross_entropy(logits.float(), batch.labels, label_smoothing=0.1)
        return {"labels": Loss.of_mean(mean, len(batch.images))}
