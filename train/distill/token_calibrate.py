"""One pass over tokens before step 0: the statistics of teachers' hidden states, as of their maps.

What `zoo.train.distill.calibrate` does for images: moments of what the losses compare (here the
states of the tokens that count), a transform of each teacher and layer (`phi_s.fit`), written into
the run's folder, from which a resumed run reads it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from zoo.features import Features
from zoo.files import save_tensors
from zoo.language.tokens import Tokens
from zoo.teachers.from_language import LanguageTeacher
from zoo.train.distill.calibrate import FILE, Statistics, written_normalizers
from zoo.train.distill.phi_s import Normalizer, check_rows, fit
from zoo.train.distill.step import full_precision
from zoo.train.mesh import by_first
from zoo.train.progress import Progress
from zoo.train.run import Run

TokenNormalizers = Mapping[str, Sequence[Normalizer]]
"""Of each teacher, by label: a transform for each of its layers that are compared."""


def check_calibration(kind: str, rows: int, widths: Mapping[str, int]) -> None:
    """Refuse to whiten hidden states with fewer tokens than their channels need.

    Args:
        rows: Tokens of the calibration.
        widths: Of the teachers, by label.

    Raises:
        ValueError: as `zoo.train.distill.phi_s.check_rows`.
    """
    for label, width in widths.items():
        check_rows(kind, rows, width, f"{label} (--calibration x --batch x --length)")


def token_normalizers(
    run: Run,
    kind: str,
    teachers: Mapping[str, LanguageTeacher],
    batches: Iterable[Tokens],
    *,
    steps: int,
    context: Callable[[], AbstractContextManager],
    device: torch.device,
) -> TokenNormalizers:
    """Return the transforms of teachers' hidden states, from the run's folder or by the pass.

    Every rank measures its slices of the batches; rank 0 fits, writes, and tells the others.

    Args:
        teachers: Those whose states are compared, at their `at`.
        batches: This rank's slices of `steps` batches.
        context: In which the teachers run: autocast.

    Raises:
        ValueError: a teacher gives a value that is not finite, or the folder's file is damaged.
    """
    path = run.path / FILE
    if by_first(lambda: not path.is_file()):
        found = measured(teachers, batches, steps=steps, context=context)
        by_first(lambda: save_tensors(_fitted(kind, found), path))
    tensors = by_first(partial(written_normalizers, path))
    return {
        label: [
            _read(kind, tensors, f"{kind}/{label}/{number}/").to(device)
            for number in range(len(teacher.at))
        ]
        for label, teacher in teachers.items()
    }


@torch.no_grad()
def measured(
    teachers: Mapping[str, LanguageTeacher],
    batches: Iterable[Tokens],
    *,
    steps: int,
    context: Callable[[], AbstractContextManager],
) -> Statistics:
    """Return the moments of the states of the tokens that count; on rank 0 those of all ranks.

    Raises:
        ValueError: a teacher gives a value that is not finite.
    """
    found = Statistics()
    parts = list(batches)
    with Progress("calibrate", total=steps, samples=1, unit="batch") as progress:
        for number, batch in enumerate(parts, 1):
            counted = batch.counted.flatten()
            for label, teacher in teachers.items():
                with context():
                    states = teacher(batch).hidden
                for layer, state in enumerate(states):
                    rows = full_precision(state.flatten(0, 1)[counted])
                    # a map of one row: the tokens
                    found.add(_name(label, layer), 0, Features(None, rows[None, None]), keep=0)
            step = number * steps // len(parts)
            if number in (1, len(parts)):
                found.refuse_nan(step or 1)
                progress.report(step, {})
    return found.over_ranks()


def _name(label: str, layer: int) -> str:
    return f"{label}/{layer}"


def _fitted(kind: str, found: Statistics) -> dict[str, Tensor]:
    tensors = {}
    for (name, _), moments in found.moments.items():
        state = fit(kind, moments).state_dict()
        tensors |= {f"{kind}/{name}/{k}": v.cpu().contiguous() for k, v in state.items()}
    return tensors


def _read(kind: str, tensors: Mapping[str, Tensor], prefix: str) -> Normalizer:
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    normalizer = Normalizer(kind, len(state["mean"]))
    normalizer.load_state_dict(state)
    return normalizer
