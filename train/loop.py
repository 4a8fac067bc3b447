"""The training loop: one for every task."""

import math
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.train.config import Training
from zoo.train.damp import damped
from zoo.train.device import autocast, tensor_cores
from zoo.train.garbage import garbage_frozen
from zoo.train.interrupt import Interrupt, Interrupted
from zoo.train.mesh import any_rank, from_first, gather, is_first, sum_over_ranks, world
from zoo.train.optim import learning_rate
from zoo.train.prefetch import Slice, numbered, prefetch, side_stream
from zoo.train.profiling import StepProfile
from zoo.train.progress import Progress
from zoo.train.run import Run
from zoo.train.shard import clip_gradients
from zoo.train.skew import Stragglers
from zoo.train.slices import SliceBuffers, SliceSeeds
from zoo.train.state import TrainState
from zoo.train.step import Ranks
from zoo.train.task import Feed, Task
from zoo.train.turns import short_turns
from zoo.train.waiting import DataClock

Evaluate = Callable[[Any, int], float | None]
"""Gets the model (averaged, if it is) and the step, and returns the measure of the best checkpoint.
Every rank calls it; where weights are cut, rank 0 alone gets a model."""


def train(
    task: Task,
    state: TrainState,
    feed: Feed,
    config: Training,
    run: Run,
    *,
    evaluate: Evaluate | None = None,
    title: str = "train",
    ahead: bool = False,
) -> None:
    """Train until `config.steps`; log, evaluate and save on the way.

    Args:
        evaluate: Called every `config.every.evaluate` steps but the last; with `config.keep_best`
            at the last too.
        ahead: Compute the task's targets a slice early, on a CUDA stream of their own.

    Raises:
        Interrupted: a signal came; the state is saved.
        ValueError: a loss is not finite; the batch's keys stand in `nan_batch.json`.
    """
    device, first, steps = state.device, state.step, config.steps
    reserves = device.type == "cuda" and saves_on_the_way(config, first)
    precision = partial(autocast, config.precision, device)
    beside = side_stream(device, wanted=ahead)
    data = DataClock(device, getattr(feed, "workers", None), beside)
    numbers = data.timed(numbered(feed, first, steps))
    coming = prefetch(numbers, task.targets, precision, stream=beside)
    buffers = SliceBuffers(state.model) if config.num_slices > 1 else None
    wrapped = Ranks(task, state)
    progress = Progress(title, total=steps, start=first, samples=config.samples, unit=config.unit)
    skipped, stragglers = SkipList(run, progress), Stragglers(progress)
    profile = StepProfile(run.path, first, steps, device) if config.profile and is_first() else None
    frozen, turns = garbage_frozen(device.type == "cuda"), short_turns(device.type == "cuda")
    with Interrupt() as interrupt, progress, tensor_cores(device), run.settled(), frozen, turns:
        while state.step < steps:
            parts = islice(coming, len(feed.slices))
            counts = feed.counts(state.step)
            losses = take_step(wrapped, state, parts, counts, config, precision, buffers)
            run.hold()
            update(state, losses, config)
            if reserves and state.step == first + 1:  # the optimizer's state is there
                run.prepare(state.state())
            if profile and (line := profile.step(state.step)):
                progress.print(line)
            stops = any_rank(interrupt.signal is not None or run.lost())
            due = Due.after(state.step, config, stops)
            if due.saves or due.logs or world() == 1:
                skipped.add(chain.from_iterable(gather(list(feed.skipped()))))
            if due.saves or due.logs:
                check_finite(state, feed, run)
            if due.logs:
                late = stragglers.report(wrapped.clock.read()) if wrapped.clock else {}
                write_log(state, config, run, progress, late, data)
            with progress.paused():
                evaluate_and_save(state, due, config, run, evaluate)
            if stops and state.step < steps:
                signum = interrupt.signal or signal.SIGTERM  # another rank's
                raise Interrupted(signum, f"Stopped after step {state.step}, which is saved.")


def saves_on_the_way(config: Training, first: int) -> bool:
    """Tell whether a checkpoint comes before the last one, which may take its time."""
    return (first // config.every.checkpoint + 1) * config.every.checkpoint < config.steps


def take_step(
    wrapped: Ranks,
    state: TrainState,
    parts: Iterable[tuple[Slice, Any]],
    counts: Mapping[str, int],
    config: Training,
    precision: Callable,
    buffers: SliceBuffers | None = None,
) -> dict[str, Tensor]:
    """Run forward and backward over this rank's slices of a step, and leave the gradients behind.

    Returns:
        `loss`, the weighted sum, and every loss over the whole batch; NaN for one left out.
    """
    step, sums, seen = state.step, dict[str, Tensor](), dict[str, Tensor]()
    here = config.num_slices * config.ranks_a_slice // world()
    parts = iter(parts)
    state.pauses = False
    if wrapped.clock:
        wrapped.clock.begin()
    first = next(parts)  # before the seed: what loads a batch may draw too
    seeds = SliceSeeds(config.seed, step, state.device)
    with damped(state.model, config.optim.damp):
        if buffers:
            seeds.keep()
            buffers.begin_step()
        for number, (part, targets) in enumerate(chain([first], parts), 1):
            if buffers:
                seeds.begin(part.index)
            with wrapped.accumulating(last=number == here):
                with precision():
                    total, losses, shares = wrapped.step(part.batch, targets, step, counts)
                if wrapped.clock:  # from here on a rank may wait for the others
                    wrapped.clock.end(counts=not state.pauses)
                wrapped.backward(total)
            if buffers:
                buffers.end_slice()
            add(sums, {"loss": total.detach()})
            add(sums, {name: share.detach().sum() for name, share in shares.items()})
            add(seen, {n: torch.full_like(sums[n], loss.count) for n, loss in losses.items()})
        wrapped.add_copies()
        if buffers:
            buffers.end_step(config.num_slices * config.ranks_a_slice)
    total, *rest = over_ranks([*sums.values(), *seen.values()])
    both = zip(seen, rest[: len(seen)], rest[len(seen) :], strict=True)
    means = {name: torch.where(count > 0, value, torch.nan) for name, value, count in both}
    wrapped.task.observe(means, step)
    return {"loss": total, **means}


def over_ranks(sums: Sequence[Tensor]) -> Sequence[Tensor]:
    """Add numbers of the ranks up, in one small collective."""
    return sums if world() == 1 else sum_over_ranks(torch.stack(list(sums))).unbind()


def add(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Add what a slice has to the sums of a step."""
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


def update(state: TrainState, losses: Mapping[str, Tensor], config: Training) -> None:
    """Take one step of the optimizer, with the gradients that are there."""
    rate = learning_rate(state.step, config.steps, config.optim)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)
    norm = clip_gradients(state.parameters(), config.optim.clip or math.inf)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    if state.ema:
        state.ema.update(state.model, state.step)
    total, *rest = losses.values()
    state.names = tuple(losses)
    state.unread.append(torch.stack([total, norm, *rest]).detach())


class Due(NamedTuple):
    """What is done after a step."""

    last: bool
    """No further step is taken: by the plan, or for a signal."""
    saves: bool
    logs: bool
    evaluates: bool

    @classmethod
    def after(cls, step: int, config: Training, stops: bool) -> "Due":
        ends, every = step == config.steps, config.every
        return cls(
            last=ends or stops,
            saves=ends or stops or step % every.checkpoint == 0,
            logs=ends or step % every.log == 0,
            evaluates=config.keep_best if ends else step % every.evaluate == 0,
        )


def evaluate_and_save(
    state: TrainState, due: Due, config: Training, run: Run, evaluate: Evaluate | None
) -> None:
    """Evaluate and save where it is due; also save what is the best so far, if that is kept."""
    saves = due.saves
    if evaluate and due.evaluates:
        measure = from_first(evaluate(state.averaged, state.step))
        saves |= config.keep_best and state.improves(measure)
    if saves:
        run.save(state.state(), wait=due.last, kept=config.keep)
        if config.optim.damp:
            run.hold()  # the weights change before the forward pass


def check_finite(state: TrainState, feed: Feed, run: Run) -> None:
    """Stop at the first step since the last check whose loss is not finite.

    The feed says which samples that step had, so nothing is kept for this on the way.
    """
    if not state.unread:
        return
    finite = torch.stack(state.unread)[:, 0].isfinite().tolist()
    if all(finite):
        return
    step = state.step - len(finite) + finite.index(False)
    run.write_json("nan_batch.json", dict(step=step, keys=feed.keys(step)))
    run.wait()  # for the good one that is being written
    before = run.checkpoints()
    kept = f"The last good checkpoint is {before[-1].name}." if before else "None was saved yet."
    raise ValueError(
        f"The loss of step {step} is not finite; its samples are listed in "
        f"{run.path / 'nan_batch.json'}. {kept} Try a lower learning rate or --precision float32, "
        "or look at those samples."
    )


def write_log(
    state: TrainState,
    config: Training,
    run: Run,
    progress: Progress,
    late: Mapping[str, object],
    data: DataClock,
) -> None:
    """Write the means since the last log line; the one place where a step waits for the device.

    Args:
        late: What is known of stragglers.
        data: Tells how long steps waited for data.
    """
    rows = torch.stack(state.unread)
    mean = rows.nanmean(dim=0).tolist()
    state.unread.clear()
    names = ("loss", "grad_norm", *state.names[1:])
    # a loss that was left out of every step since the last line has no value
    values = {n: v for n, v in zip(names, mean, strict=True) if not math.isnan(v)}
    rate = learning_rate(state.step - 1, config.steps, config.optim)
    run.log("train", state.step, dict(values, lr=rate))
    shown = {name: value for name, value in values.items() if name != "grad_norm"}
    speed = progress.report(state.step, shown, data.read())
    if advice := data.advice(progress.waited):
        progress.print(advice)
    late = dict(late, waited=round(progress.waited, 3))
    run.log_speed(state.step, *speed, unit=config.unit, late=late)


class SkipList:
    """The unreadable samples of a run: each is named once, and listed in `skipped.json`."""

    def __init__(self, run: Run, progress: Progress):
        self.run, self.progress = run, progress
        self.names: set[str] = set(run.skipped())

    def add(self, names: Iterable[str]) -> None:
        new = [name for name in dict.fromkeys(names) if name not in self.names]
        if not new:
            return
        self.names.update(new)
        self.run.write_json("skipped.json", sorted(self.names))
        for name in new:
            self.progress.print(f"skipped an unreadable sample ({len(self.names)} so far): {name}")
