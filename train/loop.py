"""The training loop."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from zoo.data.loader import train_batches
from zoo.data.plan import Plan
from zoo.data.sources import Source
from zoo.features import Batch
from zoo.students.student import Student
from zoo.teachers.teacher import Teacher
from zoo.train.damp import damped
from zoo.train.distill.config import Distill
from zoo.train.distill.plan_step import StepPlan, plan_step, view_of
from zoo.train.distill.task import looks_of, objective_of
from zoo.train.distill.teachers import Model, TeacherPrefetcher, tensor_cores
from zoo.train.interrupt import Interrupt, Interrupted
from zoo.train.optim import learning_rate
from zoo.train.progress import Progress
from zoo.train.run import Run
from zoo.train.state import TrainState


def train(
    trainee: TrainState,
    teachers: Mapping[str, Teacher],
    normalizers: Mapping[str, nn.Module],
    source: Source,
    config: Distill,
    run: Run,
    *,
    autocast: Callable,
    evaluate: Callable[[Student, int], None],
    baseline_losses: Mapping[str, float] | None = None,
    title: str = "distil",
) -> None:
    """Train until `config.steps`; log, evaluate and save on the way.

    Args:
        spreads: What the calibration measured, by the names of the losses.

    Raises:
        Interrupted: a signal came; the state is saved.
        ValueError: a loss is not finite; the batch's keys stand in `nan_batch.json`.
    """
    device = next(trainee.student.parameters()).device
    plan = Plan(len(source), config.batch, config.seed, config.views)
    view, steps = view_of(config, teachers), dict(steps=config.steps, start=trainee.step)
    loader = train_batches(source, view, plan, **steps, workers=config.workers)
    objective = objective_of(config, normalizers, baseline_losses or {})
    skipped, every, start = set[str](), config.every, trainee.step
    watch = Progress(title, total=config.steps, start=trainee.step, images=config.batch)
    note = partial(note_skipped, seen=skipped, run=run, watch=watch)
    coming = device_batches(loader, start, device, note, partial(looks_of, plan, config, teachers))
    if config.overlap:
        coming = TeacherPrefetcher(device, autocast).over(coming)
    with (
        Interrupt() as interrupt,
        watch,
        tensor_cores() if device.type == "cuda" else nullcontext(),
    ):
        for batch, looks in coming:
            torch.manual_seed(plan.step_seed(trainee.step))
            turn = plan_step(plan, trainee.step, config, teachers)
            total, losses = differentiate(
                partial(objective, batch, trainee, looks, turn), trainee, turn, config, autocast
            )
            update(trainee, total, losses, config, turn)

            step, signum = trainee.step, interrupt.signal
            ends = step == config.steps
            saves = ends or signum is not None or step % every.checkpoint == 0
            if saves or step % every.log == 0:
                check_finite(trainee, plan, source, run)
            if ends or step % every.log == 0:
                write_log(trainee, config, run, watch)
            with watch.paused():
                if step % every.evaluate == 0 and not ends:
                    evaluate(trainee.best, step)
                if saves:
                    run.save(trainee.state())
            if signum is not None and not ends:
                raise Interrupted(signum, f"Stopped after step {step}, which is saved.")


def device_batches(
    loader: Iterable[dict[str, Any]],
    start: int,
    device: torch.device,
    note: Callable[[list[str]], None],
    looks: Callable[[int], Mapping[str, Model]],
) -> Iterator[tuple[Batch, Mapping[str, Model]]]:
    """Return the batches from step `start` on, on `device`, with those who look at them.

    Args:
        note: Gets the names of unreadable files.
    """
    for step, part in enumerate(loader, start):
        note(part["skipped"])
        batch = Batch(part["images"], part["keys"], positions=part["positions"]).to(device)
        yield batch, looks(step)


def differentiate(
    objective: Callable[[], dict[str, Tensor]],
    trainee: TrainState,
    turn: StepPlan,
    config: Distill,
    autocast: Callable,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum and the losses of a step, and leave the gradients behind."""
    with damped(trainee.student, config.optim.damp):
        with autocast():
            losses = objective()
        total = trainee.weighting(torch.stack(list(losses.values())), turn.asked)
        total.backward()
    return total, losses


def update(
    trainee: TrainState,
    total: Tensor,
    losses: Mapping[str, Tensor],
    config: Distill,
    turn: StepPlan,
) -> None:
    """Take one step of the optimizer, with the gradients that are there."""
    for group in trainee.optimizer.param_groups:
        group["lr"] = learning_rate(trainee.step, config.steps, config.optim)
    norm = clip_grad_norm_(trainee.student.parameters(), config.optim.clip or math.inf)
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    trainee.step += 1
    if trainee.ema:
        trainee.ema.update(trainee.student, trainee.step)
    row = torch.stack([total, norm, *(loss.mean() for loss in losses.values())]).detach()
    if turn.asked is not None:  # NaN in a log row: not asked, which is no loss of 0
        row[2:] = torch.where(trainee.weighting.counts(turn.asked), row[2:], torch.nan)
    trainee.unread.append(row)


def check_finite(trainee: TrainState, plan: Plan, source: Source, run: Run) -> None:
    """Stop at the first step since the last look whose loss is not finite.

    The plan says which images that step had, so nothing is kept for this on the way.
    """
    if not trainee.unread:
        return
    finite = torch.stack(trainee.unread)[:, 0].isfinite().tolist()
    if all(finite):
        return
    step = trainee.step - len(finite) + finite.index(False)
    keys = [source.key(i) for i in plan.indices(step)]
    run.write_json("nan_batch.json", dict(step=step, keys=keys))
    before = run.checkpoints()
    kept = f"The last good checkpoint is {before[-1].name}." if before else "None was saved yet."
    raise ValueError(
        f"The loss of step {step} is not finite; its images stand in "
        f"{run.path / 'nan_batch.json'}. {kept} Try a lower --optim.lr or --precision float32, "
        "or look at those images."
    )


def write_log(trainee: TrainState, config: Distill, run: Run, watch: Progress) -> None:
    """Write the means since the last log line; the one place where a step waits for the device."""
    rows = torch.stack(trainee.unread)
    sampled = any(spec.rate < 1 for spec in config.teachers)
    mean = (rows.nanmean(dim=0) if sampled else rows.mean(dim=0)).tolist()
    trainee.unread.clear()
    names = ("loss", "grad_norm", *trainee.weighting.names)
    values = dict(zip(names, mean, strict=True))
    if sampled:  # a teacher that was not asked since the last line has nothing to tell
        values = {name: value for name, value in values.items() if not math.isnan(value)}
    rate = learning_rate(trainee.step - 1, config.steps, config.optim)
    run.log("train", trainee.step, dict(values, lr=rate))
    told = {name: value for name, value in values.items() if name != "grad_norm"}
    run.log_speed(trainee.step, *watch.report(trainee.step, told))


def note_skipped(names: list[str], seen: set[str], run: Run, watch: Progress) -> None:
    """Count and name the unreadable files, each once."""
    new = [name for name in names if name not in seen]
    if not new:
        return
    seen.update(new)
    run.write_json("skipped.json", sorted(seen))
    for name in new:
        watch.print(f"skipped an unreadable image ({len(seen)} so far): {name}")
