"""The training loop."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from zoo.features import Batch
from zoo.students.student import Student
from zoo.teachers.teacher import Teacher
from zoo.train.config import Distill
from zoo.train.data import Source, View, train_batches
from zoo.train.distill import distill_step, loss_weights
from zoo.train.engine import Ahead, Look, tensor_cores
from zoo.train.interrupt import Interrupt, Interrupted
from zoo.train.losses import SPATIAL_LOSSES, adaloss
from zoo.train.optim import learning_rate
from zoo.train.plan import Plan
from zoo.train.progress import Watch
from zoo.train.run import Run


@dataclass
class Trainee:
    """Everything that training changes, and that a checkpoint therefore holds."""

    student: Student
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    step: int = 0
    loss_ema: Tensor | None = None
    unread: list[Tensor] = field(default_factory=list)
    """Losses of the steps since the last log line; on the device, so that no step waits."""

    def state(self) -> dict[str, Any]:
        return dict(
            step=self.step,
            student=self.student.state_dict(),
            optimizer=self.optimizer.state_dict(),
            ema=self.ema.module.state_dict() if self.ema else None,
            loss_ema=self.loss_ema,
            unread=list(self.unread),
        )

    def load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        device = next(self.student.parameters()).device
        self.loss_ema = None if state["loss_ema"] is None else state["loss_ema"].to(device)
        self.unread = [row.to(device) for row in state["unread"]]

    @property
    def best(self) -> Student:
        """The student that is evaluated and exported: the averaged one, if there is one."""
        return cast(Student, self.ema.module) if self.ema else self.student


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
    title: str = "distil",
) -> None:
    """Train until `config.steps`; log, evaluate and save on the way.

    Raises:
        Interrupted: a signal came; the state is saved.
        ValueError: a loss is not finite; the batch's keys stand in `nan_batch.json`.
    """
    device = next(trainee.student.parameters()).device
    plan = Plan(len(source), config.batch, config.seed, config.views)
    loader = train_batches(
        source,
        view_of(config, teachers),
        plan,
        steps=config.steps,
        start=trainee.step,
        workers=config.workers,
    )
    specs = dict(zip(config.labels, config.teachers, strict=True))
    skipped: set[str] = set()
    every, names, fixed = config.every, None, None
    watch = Watch(title, total=config.steps, start=trainee.step, images=config.batch)
    looks: Mapping[str, Look] = teachers
    coming = to_device(loader, device, lambda names: note_skipped(names, skipped, run, watch))
    if config.overlap:
        looks = Ahead(teachers, device, autocast)
        coming = looks.over(coming)
    with (
        Interrupt() as interrupt,
        watch,
        tensor_cores() if device.type == "cuda" else nullcontext(),
    ):
        for batch in coming:
            torch.manual_seed(plan.step_seed(trainee.step))
            with autocast():
                losses = distill_step(
                    batch,
                    trainee.student,
                    looks,
                    balances,
                    SPATIAL_LOSSES[config.losses.spatial],
                )
            if names is None:
                names, fixed = list(losses), loss_weights(specs, losses)
            update(trainee, torch.stack(list(losses.values())), fixed, config)

            step, signum = trainee.step, interrupt.signal
            ends = step == config.steps
            saves = ends or signum is not None or step % every.checkpoint == 0
            if saves or step % every.log == 0:
                check_finite(trainee, plan, source, run)
            if ends or step % every.log == 0:
                write_log(trainee, names, config, run, watch)
            with watch.paused():
                if step % every.evaluate == 0 and not ends:
                    evaluate(trainee.best, step)
                if saves:
                    run.save(trainee.state())
            if signum is not None and not ends:
                raise Interrupted(signum, f"Stopped after step {step}, which is saved.")


def to_device(
    loader: Iterable[dict[str, Any]], device: torch.device, note: Callable[[list[str]], None]
) -> Iterator[Batch]:
    """Move what was loaded to `device`; `note` gets the names of unreadable files."""
    for part in loader:
        note(part["skipped"])
        yield Batch(part["images"], part["keys"], positions=part["positions"]).to(device)


def update(trainee: Trainee, losses: Tensor, fixed: Tensor, config: Distill) -> None:
    """Take one step of the optimizer down the weighted sum of `losses`."""
    weights = fixed
    if config.losses.weighting == "adaloss":
        adaptive, trainee.loss_ema = adaloss(losses.detach(), trainee.loss_ema)
        weights = fixed * adaptive
    for group in trainee.optimizer.param_groups:
        group["lr"] = learning_rate(trainee.step, config.steps, config.optim)
    total = (weights * losses).sum()
    total.backward()
    norm = clip_grad_norm_(trainee.student.parameters(), config.optim.clip or math.inf)
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    trainee.step += 1
    if trainee.ema:
        trainee.ema.update(trainee.student, trainee.step)
    trainee.unread.append(torch.stack([total, norm, *losses]).detach())


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


def write_log(trainee: Trainee, names: list[str], config: Distill, run: Run, watch: Watch) -> None:
    """Write the means since the last log line; the one place where a step waits for the device."""
    mean = torch.stack(trainee.unread).mean(dim=0).tolist()
    trainee.unread.clear()
    values = dict(zip(["loss", "grad_norm", *names], mean, strict=True))
    rate = learning_rate(trainee.step - 1, config.steps, config.optim)
    run.log("train", trainee.step, dict(values, lr=rate))
    told = {name: values[name] for name in ("loss", *names)}
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
    size = max([config.size, *(max(teacher.size) for teacher in teachers.values())])
    return View(size=size, scale=config.augment.scale, flip=config.augment.flip)
