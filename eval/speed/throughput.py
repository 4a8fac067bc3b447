"""The benchmark `speed`: the same figures as `zoo bench`, to show beside a model's quality."""

from collections.abc import Iterator

import numpy as np

from zoo.eval.registry import Found, Subject
from zoo.eval.settings import SpeedSettings
from zoo.eval.speed.models import Case, measure
from zoo.students.student import Student


def speed(subject: Subject, data: None, settings: SpeedSettings) -> Iterator[Found]:
    """Yield images per second, GMACs, millions of parameters, and on a GPU the peak GiB of memory.

    Beside the images per second of the median batch stand the 5th and the 95th percentile over the
    batches (`low`, `high`).

    The backbone is rebuilt with random weights, since their values do not change the speed.

    Raises:
        ValueError: the case could not be measured.
    """
    student = subject.student
    case = Case(
        model=case_name(student),
        size=student.size[0],
        batch=settings.batch or subject.batch,
        mode=settings.mode,
        precision=subject.precision,
        channels_last=settings.channels_last,
        device=subject.device.type,
    )
    (row,) = measure([case], rounds=settings.rounds, warmup=3)
    if row.error:
        raise ValueError(f"{case.describe()} could not be measured: {row.error}")
    rates = np.array([case.batch / seconds for seconds in row.seconds])
    yield "speed/img_s", row.images_per_s
    for name, share in (("low", 5), ("high", 95)):  # what the timed batches spread over
        yield f"speed/img_s_{name}", float(np.percentile(rates, share))
    yield "speed/gmacs", row.macs / 1e9
    yield "speed/mparams", row.parameters / 1e6
    if row.peak_bytes:
        yield "speed/peak_gib", row.peak_bytes / 2**30


def case_name(student: Student) -> str:
    """Return the name of a backbone for `zoo bench`, with its options after commas.

    One of them is `num_classes=0`: the classifier is not measured.
    """
    name, kwargs = student.recipe
    kept = {k: v for k, v in kwargs.items() if k != "img_size"}  # the case has the size
    return ",".join([name, *(f"{key}={value!r}" for key, value in kept.items())])
