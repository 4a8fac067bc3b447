"""The training loop."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from zoo.data.plan import Plan
from zoo.data.sources import Source, View, train_batches
from zoo.features import Batch
from zoo.students.student import MESA, Student
from zoo.teachers.teacher import Teacher
from zoo.train.config import Distill
from zoo.train.damp import damped
from zoo.train.distill.losses import SPATIAL_LOSSES, angle
from zoo.train.distill.plan_step import Turn, grids_of, take_turn
from zoo.train.distill.sizes import sizes_of
from zoo.train.distill.step import distill_step
from zoo.train.distill.teachers import Ahead, Look, tensor_cores
from zoo.train.distill.weighting import Weighting
from zoo.train.interrupt import Interrupt, Interrupted
from zoo.train.optim import build_optimizer, learning_rate
from zoo.train.progress import Watch
from zoo.train.run import Run


@dataclass
class Trainee:
    """Everything that training changes, and that a checkpoint therefore holds."""

    student: Student
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    weighting: Weighting
    step: int = 0
    unread: list[Tensor] = field(default_factory=list)
    """Losses of the steps since the last log line; on the device, so that no step waits."""

    @classmethod
    def of(cls, student: Student, config: Distill, spreads: Mapping[str, float]) -> "Trainee":
        """Put optimizer, average and weights beside a student that is to be trained."""
        ema = ModelEmaV3(student, decay=config.optim.ema) if config.optim.ema else None
        names = [
            f"{label}/{part}"
            for label, head in student.heads.items()
            for part in ("summary", "spatial")
            if getattr(head, part) is not None
        ]
        names += [f"{MESA}/spatial"] if config.losses.mesa else []
        specs = dict(zip(config.labels, config.teachers, strict=True))
        device = next(student.parameters()).device
        weighting = Weighting(names, specs, config.losses, spreads, device=device)
        optimizer = build_optimizer(student, config.optim)
        if weighting.learned is not None:
            optimizer.add_param_group(dict(params=[weighting.learned], weight_decay=0.0))
        return cls(student, optimizer, ema, weighting)

    def state(self) -> dict[str, Any]:
        return dict(
            step=self.step,
            student=self.student.state_dict(),
            optimizer=self.optimizer.state_dict(),
            ema=self.ema.module.state_dict() if self.ema else None,
            weighting=self.weighting.state_dict(),
            loss_ema=self.weighting.running,
            unread=list(self.unread),
        )

    def load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.weighting.load_state_dict(state.get("weighting", {}))
        device = next(self.student.parameters()).device
        running = state["loss_ema"]
        self.weighting.running = None if running is None else running.to(device)
        self.unread = [row.to(device) for row in state["unread"]]

    @property
    def best(self) -> Student:
        """The student that is evaluated and exported: the averaged one, if there is one."""
        return self.average or self.student

    @property
    def average(self) -> Student | None:
        return cast(Student, self.ema.module) if self.ema else None


def train(
    trainee: Trainee,
    teachers: Mapping[str, Teacher],
    balances: Mapping[str, nn.Module],
    source: Source,
    config: Distill,
    run: Run,
    *,
    autocast: Callable,
    evaluate: Callable[[Student, int], None],
    spreads: Mapping[str, float] | None = None,
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
    objective = objective_of(config, balances, spreads or {})
    skipped, every, start = set[str](), config.every, trainee.step
    watch = Watch(title, total=config.steps, start=trainee.step, images=config.batch)
    note = partial(note_skipped, seen=skipped, run=run, watch=watch)
    coming = announced(loader, start, device, note, partial(looks_of, plan, config, teachers))
    if config.overlap:
        coming = Ahead(device, autocast).over(coming)
    with (
        Interrupt() as interrupt,
        watch,
        tensor_cores() if device.type == "cuda" else nullcontext(),
    ):
        for batch, looks in coming:
            torch.manual_seed(plan.step_seed(trainee.step))
            turn = take_turn(plan, trainee.step, config, teachers)
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


def looks_of(
    plan: Plan, config: Distill, teachers: Mapping[str, Teacher], step: int
) -> Mapping[str, Look]:
    """Give the teachers that `step` asks, each as it looks then."""
    return take_turn(plan, step, config, teachers).teachers(teachers)


def announced(
    loader: Iterable[dict[str, Any]],
    start: int,
    device: torch.device,
    note: Callable[[list[str]], None],
    looks: Callable[[int], Mapping[str, Look]],
) -> Iterator[tuple[Batch, Mapping[str, Look]]]:
    """Give the batches from step `start` on, on `device`, with those who look at them.

    Args:
        note: Gets the names of unreadable files.
    """
    for step, part in enumerate(loader, start):
        note(part["skipped"])
        batch = Batch(part["images"], part["keys"], positions=part["positions"]).to(device)
        yield batch, looks(step)


def objective_of(
    config: Distill, balances: Mapping[str, nn.Module], spreads: Mapping[str, float]
) -> Callable[[Batch, Trainee, Mapping[str, Look], Turn], dict[str, Tensor]]:
    """Give the function that holds a trainee against its teachers, as the config says."""
    settings = config.losses
    summaries = {}
    if settings.summary == "angle":
        found = {key.removesuffix("/summary"): value for key, value in spreads.items()}
        summaries = {
            label: partial(angle, dispersion=found[label])
            for label in config.labels
            if label in found
        }
    spaces = {**balances, MESA: nn.Identity()}

    def objective(
        batch: Batch, trainee: Trainee, teachers: Mapping[str, Look], turn: Turn
    ) -> dict[str, Tensor]:
        average = trainee.average if settings.mesa else None
        return distill_step(
            batch,
            turn.student(trainee.student, mesa=bool(settings.mesa)),
            {**teachers, **turn.average(average)},
            spaces,
            SPATIAL_LOSSES[settings.spatial],
            summary_losses=summaries,
            align=turn.align(),
            each_image=settings.teacher_drop > 0,
        )

    return objective


def differentiate(
    objective: Callable[[], dict[str, Tensor]],
    trainee: Trainee,
    turn: Turn,
    config: Distill,
    autocast: Callable,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Give the weighted sum and the losses of a step, and leave the gradients behind."""
    with damped(trainee.student, config.optim.damp):
        with autocast():
            losses = objective()
        total = trainee.weighting(torch.stack(list(losses.values())), turn.asked)
        total.backward()
    return total, losses


def update(
    trainee: Trainee, total: Tensor, losses: Mapping[str, Tensor], config: Distill, turn: Turn
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


def check_finite(trainee: Trainee, plan: Plan, source: Source, run: Run) -> None:
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


def write_log(trainee: Trainee, config: Distill, run: Run, watch: Watch) -> None:
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


def note_skipped(names: list[str], seen: set[str], run: Run, watch: Watch) -> None:
    """Count and name the unreadable files, each once."""
    new = [name for name in names if name not in seen]
    if not new:
        return
    seen.update(new)
    run.write_json("skipped.json", sorted(seen))
    for name in new:
        watch.say(f"skipped an unreadable image ({len(seen)} so far): {name}")


def view_of(config: Distill, teachers: Mapping[str, Teacher]) -> View:
    """Decode once, for whoever looks closest; the others resize that on the device."""
    looks = [size for teacher in teachers.values() for size in sizes_of(teacher)]
    sizes = [config.size, *config.sizes, *(max(size) for size in looks)]
    if config.losses.shift:  # the canvas is larger than what each sees of it
        least = min(grid[0] for grid in grids_of(config).values())
        sizes = [size + math.ceil(size * Fraction(config.losses.shift, least)) for size in sizes]
    return View(size=max(sizes), scale=config.augment.scale, flip=config.augment.flip)
