"""One pass before step 0: the teachers' statistics, which fix the space of every target."""

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.features import Batch
from zoo.teachers.teacher import Teacher
from zoo.train.config import Distill
from zoo.train.data import Source, train_batches
from zoo.train.loop import view_of
from zoo.train.phi_s import Moments
from zoo.train.plan import Plan, mix
from zoo.train.progress import Watch


@torch.no_grad()
def calibrate(
    teachers: Mapping[str, Teacher], source: Source, config: Distill, *, device, autocast
) -> dict[str, Moments]:
    """Give the moments of each teacher's spatial tokens over `config.calibration` batches.

    The batches are drawn from the training views, by a plan of their own.

    Raises:
        ValueError: a teacher gives a value that is not finite.
    """
    plan = Plan(len(source), config.batch, mix(config.seed, 3))
    moments: dict[str, Moments] = {}
    finite: dict[str, Tensor] = {}
    steps = config.calibration
    loader = train_batches(
        source, view_of(config, teachers), plan, steps=steps, start=0, workers=config.workers
    )
    with Watch("calibrate", total=steps, images=config.batch) as watch:
        for step, part in enumerate(loader, 1):
            batch = Batch(part["images"], part["keys"]).to(device)
            for name in part["skipped"]:
                watch.say(f"skipped an unreadable image: {name}")
            for name, teacher in teachers.items():
                with autocast():
                    seen = teacher(batch)
                for part_of in (p for p in seen if p is not None):
                    good = part_of.isfinite().all()
                    finite[name] = finite[name] & good if name in finite else good
                if seen.spatial is not None:
                    tokens = seen.spatial.flatten(0, 2).float()
                    moments.setdefault(name, Moments(tokens.shape[-1], device=device)).update(
                        tokens
                    )
            if step == 1 or step == steps:
                _refuse_nan(finite, step)
            if step % config.every.log == 0 or step == steps:
                watch.report(step, {})
    return moments


def _refuse_nan(finite: Mapping[str, Tensor], step: int) -> None:
    broken = [name for name, good in finite.items() if not good]
    if broken:
        raise ValueError(
            f"The teacher {', '.join(broken)} gave NaN or infinite features within {step} batches "
            "of calibration. Check its weights, or run it with --precision float32."
        )
