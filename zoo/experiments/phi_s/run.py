"""The runs of the PHI-S experiment: its teachers, its students, what is measured of them."""

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.data.plan import mix
from zoo.eval.fidelity import fidelity
from zoo.experiments.bookkeeping import affordable, append_row, device_name
from zoo.experiments.phi_s.config import (
    ARMS,
    ROTATION,
    PhiSExperiment,
    StudentSet,
    full,
    sets_of,
    tiny,
)
from zoo.experiments.phi_s.networks import SCALES, networks
from zoo.experiments.pictures import Collection, Pictures, RandomCrop
from zoo.experiments.probes import probe
from zoo.experiments.stack import Stack, StackedAnswers
from zoo.experiments.teachers import describe_teachers, measure_teachers, read_and_teach
from zoo.features import Batch, Features, match_grid
from zoo.students.build import build_student, student_grids
from zoo.students.student import Student
from zoo.teachers.pretext import PretextTeacher
from zoo.train.config import Optim
from zoo.train.device import autocast
from zoo.train.distill.fold import folded
from zoo.train.distill.losses import SPATIAL_LOSSES, summary_loss
from zoo.train.distill.phi_s import Normalizer, fit
from zoo.train.interrupt import Interrupt, Interrupted
from zoo.train.progress import Progress
from zoo.train.run import Run

__all__ = ["full", "main", "plan", "run", "tiny"]

OPTIM = Optim(lr=1e-3, min_lr=1e-6, weight_decay=0.02, ema=0.0)
STUDENT = "vit_tiny_patch16_224"
WARM = 8
"""Warm-up steps, which are not timed."""


@dataclass(frozen=True)
class PhiSSetup:
    """What all students of the PHI-S experiment share."""

    config: PhiSExperiment
    device: torch.device
    collection: Collection
    crop: RandomCrop
    teachers: dict[str, PretextTeacher]
    normalizers: dict[str, dict[str, Normalizer]]
    """Arm -> teacher -> transform."""

    def autocast(self) -> AbstractContextManager:
        """Return the context in which models run."""
        return autocast(self.config.precision, self.device)


def widths(teachers: Mapping[str, PretextTeacher]) -> dict[str, tuple[int | None, int | None]]:
    """Return each teacher's summary and spatial width."""
    return {name: (t.summary_dim, t.spatial_dim) for name, t in teachers.items()}


def prepare(config: PhiSExperiment) -> PhiSSetup:
    """Read the pictures, train the teachers, measure their statistics, fit every transform.

    Raises:
        ValueError: the device is not there, or the data has no images or no classes.
    """
    batch = min(config.batch, 256)
    torch.manual_seed(mix(config.teacher_seed, 23))
    taught = read_and_teach(config, networks(config), SCALES, batch=batch)
    measure = partial(
        measure_teachers, taught.teachers, taught.collection, taught.crop, batch=batch
    )
    moments = measure()
    grid = student_grids(STUDENT, config.size, (config.size,))[config.size]
    compared = measure(grid=grid)
    normalizers = {
        arm: {name: fit(ARMS[arm].normalise, m) for name, m in compared.items()}
        for arm in (*config.arms, *ROTATION)
    }
    config.out.mkdir(parents=True, exist_ok=True)
    statistics = describe_teachers(taught.teachers, moments)
    _write_json(config.out / "teachers.json", statistics)
    for name, values in statistics.items():
        low, high = values["channel_mean"]
        print(
            f"teacher {name}: width {values['width']}, grid {values['grid']}, std "
            f"{values['std']:.3g} (imposed), means {low:.3g} to {high:.3g} (imposed), effective "
            f"rank {values['effective_rank']:.1f} (its own)"
        )
    return PhiSSetup(config, *taught, normalizers)


def new_students(setup: PhiSSetup, chosen: StudentSet, seeds: Sequence[int]) -> list[Student]:
    """Build the students of some seeds, seed by seed; all arms of a seed start alike."""
    students = []
    for seed in seeds:
        torch.manual_seed(mix(seed, 21))
        student = build_student(
            STUDENT,
            widths(setup.teachers),
            size=setup.config.size,
            hidden=chosen.hidden,
            options=chosen.options,
        ).to(setup.device)
        students += [copy.deepcopy(student) for _ in chosen.arms]
    return students


class Trainer:
    """Trains the students of one set in a stack, several seeds at a time."""

    def __init__(self, setup: PhiSSetup, chosen: StudentSet):
        self.setup, self.chosen = setup, chosen
        self.stack: Stack | None = None
        self.compiled = setup.config.compile == "yes" or (
            setup.config.compile == "auto" and setup.device.type == "cuda"
        )

    def begin(self, seeds: Sequence[int], steps: int) -> Stack:
        """Return the stack with new students of `seeds`, for `steps` steps."""
        students = new_students(self.setup, self.chosen, seeds)
        if self.stack is None or len(self.stack) != len(students):
            self.stack = Stack(students, OPTIM, steps=steps, compiled=self.compiled)
        else:
            self.stack.restart(students, steps=steps)
        return self.stack

    def streams(self, seeds: Sequence[int], steps: int) -> Iterator[Tensor]:
        """Yield the images of each step, [seeds B 3 H W]."""
        collection, crop, batch = self.setup.collection, self.setup.crop, self.chosen.batch
        feeds = [collection.feed(crop, batch=batch, seed=mix(seed, 22)) for seed in seeds]
        for batches in zip(*(feed.batches(0, steps) for feed in feeds), strict=True):
            yield torch.stack([batch.images for batch in batches])

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Features]:
        """Run every teacher once on [seeds B 3 H W]; all arms learn from the same features."""
        with self.setup.autocast():
            batch = Batch(images.flatten(0, 1))
            return {name: teacher(batch) for name, teacher in self.setup.teachers.items()}

    def step(self, stack: Stack, images: Tensor) -> Tensor:
        """Train every student on its seed's images, and return the losses, [seeds · arms].

        Args:
            images: [seeds B 3 H W] in [0, 1].
        """
        theirs = self.features(images)
        count = len(self.chosen.arms)
        with self.setup.autocast():
            shown = images[0] if len(images) == 1 else images.repeat_interleave(count, dim=0)
            answers = stack.answers(shown)
        losses = self.losses(answers, theirs, len(images))
        stack.update(losses)
        return losses.detach()

    def losses(self, answers: StackedAnswers, theirs: Mapping[str, Features], seeds: int) -> Tensor:
        """Return each student's loss in its arm, [seeds · arms].

        It is the loss of `zoo.train.distill.step`, for all students at once.
        """
        arms = self.chosen.arms
        total: list[list[Tensor]] = [[] for _ in range(seeds * len(arms))]
        for name, (summary, spatial) in theirs.items():
            if f"{name}/summary" in answers and summary is not None:
                targets = summary.float().unflatten(0, (seeds, -1)).unbind(0)
                for m, ours in enumerate(answers[f"{name}/summary"].float().unbind(0)):
                    total[m].append(summary_loss(ours, targets[m // len(arms)]))
            maps = answers[f"{name}/spatial"].float().unbind(0)
            with torch.no_grad():
                assert spatial is not None
                # all students have one grid, so the targets are resized to it once
                like = maps[0][:1].expand(len(spatial), -1, -1, -1)
                _, small = match_grid(like, spatial.float())
                normalized = [
                    self.setup.normalizers[arm][name](small).unflatten(0, (seeds, -1))
                    for arm in arms
                ]
            for m, ours in enumerate(maps):
                seed, arm = divmod(m, len(arms))
                loss = SPATIAL_LOSSES[ARMS[arms[arm]].loss]
                total[m].append(loss(ours, normalized[arm][seed]))
        return torch.stack([sum(parts[1:], parts[0]) for parts in total])

    def train(self, seeds: Sequence[int], steps: int, interrupt: Interrupt) -> dict[str, float]:
        """Train the students of `seeds`, and return their speed.

        Returns:
            `step_ms`, and `img_s`: images a second, over all students.

        Raises:
            Interrupted: a signal came.
        """
        stack, arms = self.begin(seeds, steps), self.chosen.arms
        images_a_step = self.chosen.batch * len(stack)
        title = f"{self.chosen.name} seed {seeds[0]}" + f"-{seeds[-1]}" * (len(seeds) > 1)
        began, every = time.perf_counter(), max(1, steps // 8)
        with Progress(title, total=steps, samples=images_a_step) as progress:
            for step, images in enumerate(self.streams(seeds, steps)):
                if step == min(WARM, steps - 1):
                    self.wait()
                    began = time.perf_counter()
                losses = self.step(stack, images)
                if (step + 1) % every == 0:
                    mean = losses.view(len(seeds), len(arms)).mean(0).tolist()
                    progress.report(step + 1, dict(zip(arms, mean, strict=True)))
                if interrupt.signal is not None:
                    raise Interrupted(interrupt.signal, f"Stopped in step {step + 1} of {title}.")
        self.wait()
        seconds = (time.perf_counter() - began) / max(1, steps - min(WARM, steps - 1))
        return dict(step_ms=1e3 * seconds, img_s=images_a_step / seconds)

    def wait(self) -> None:
        """Wait until the device has done all work."""
        if self.setup.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, steps: int = 12) -> dict[str, float]:
        """Measure a step: its milliseconds, `step_ms`, and those of the teachers, `teachers_ms`."""
        seeds = range(min(self.chosen.together, self.chosen.seeds))
        stack = self.begin(seeds, steps)
        stream = self.streams(seeds, steps)
        images = next(stream)
        for _ in range(3):
            self.step(stack, images)  # compiles, chooses kernels
        found = {}
        for name, run in (
            ("step_ms", lambda x: self.step(stack, x)),
            ("teachers_ms", self.features),
        ):
            self.wait()
            began = time.perf_counter()
            for _ in range(steps // 2):
                run(images)
            self.wait()
            found[name] = 1e3 * (time.perf_counter() - began) / (steps // 2)
        return found


def measure(setup: PhiSSetup, student: Student, arm: str, *, linear: bool) -> dict[str, float]:
    """Compare a student with the teachers in their own spaces, and probe its summaries.

    Args:
        linear: Fit the linear probe as well.
    """
    normalizers, config = setup.normalizers[arm], setup.config
    student.eval()
    shown = folded(student, normalizers)
    held = setup.collection.held
    values = dict(fidelity(shown, setup.teachers, held.batches(config.size, 256)))
    values |= channel_errors(shown, setup.teachers, normalizers, held, config.size)
    return values | probe(student.features, setup.collection, config.size, linear=linear)


@torch.no_grad()
def channel_errors(
    student: Student,
    teachers: Mapping[str, PretextTeacher],
    normalizers: Mapping[str, Normalizer],
    held: Pictures,
    size: int,
) -> dict[str, float]:
    """Return the least and the largest variance of the error over a teacher's channels.

    `error/<t>/...` is the variance in the arm's space (2410.01680, table 5), `unexplained/<t>/...`
    its share of the channel's own variance; each has a `low` and a `high`.

    Args:
        student: With heads that answer in the teachers' own spaces.
        size: Side of the images in pixels.
    """
    errors: dict[str, list[Tensor]] = {name: [] for name in normalizers}
    truths: dict[str, list[Tensor]] = {name: [] for name in normalizers}
    for batch in held.batches(size, 256):
        ours = student(batch)
        for name in normalizers:
            predicted, truth = match_grid(ours[name].spatial, teachers[name](batch).spatial)
            errors[name].append((predicted - truth).flatten(0, 2).double())
            truths[name].append(truth.flatten(0, 2).double())
    values = {}
    for name, normalizer in normalizers.items():
        error, truth = torch.cat(errors[name]), torch.cat(truths[name])
        weight = normalizer.weight.to(error)
        inside = (error @ weight.T if weight.ndim == 2 else error * weight).var(0)
        share = error.var(0) / truth.var(0)
        for measure, by_channel in (("error", inside), ("unexplained", share)):
            values[f"{measure}/{name}/low"] = by_channel.min().item()
            values[f"{measure}/{name}/high"] = by_channel.max().item()
    return values


def fit_steps(
    config: PhiSExperiment, trainers: Sequence[Trainer], began: float
) -> tuple[int, dict[str, dict[str, float]]]:
    """Measure a step of each set, and choose how many steps fit into `config.seconds`.

    Args:
        began: When the experiment began, by `time.perf_counter`.

    Returns:
        The number of steps, and the measured times of each set by name (`Trainer.timed`).
    """
    total, timing = 0.0, {}
    for trainer in trainers:
        groups = -(-trainer.chosen.seeds // trainer.chosen.together)
        if trainer.compiled:
            print(f"{trainer.chosen.name}: compiling the students (--compile no leaves it out)")
        found = trainer.timed()
        total += groups * found["step_ms"] / 1e3
        timing[trainer.chosen.name] = found
        print(
            f"{trainer.chosen.name}: {found['step_ms']:.1f} ms a step of {len(trainer.stack or [])}"
            f" students, {found['teachers_ms'] / found['step_ms']:.0%} of it for the teachers"
        )
    # the rest of the time is for the measurements after training
    spent = time.perf_counter() - began
    return affordable(config.steps, total, config.seconds, spent, share=0.85), timing


def run(config: PhiSExperiment) -> dict[str, Any]:
    """Run the experiment, write its result to `config.out` and return it.

    Raises:
        ValueError: `config.out` exists, or as `prepare`.
        Interrupted: a signal came; the finished seeds are kept and reported.
    """
    from zoo.experiments.phi_s.result import report

    Run.refuse_existing(config.out)
    began = time.perf_counter()
    setup = prepare(config)
    trainers = [Trainer(setup, chosen) for chosen in sets_of(config)]
    about: dict[str, Any] = dict(config=asdict(config), teachers_s=time.perf_counter() - began)
    steps, timing = fit_steps(config, trainers, began)
    about |= dict(steps=steps, timing=timing, device=device_name(setup.device))
    rows: list[dict[str, Any]] = [
        dict(set="teachers", arm=name, **probe(teacher, setup.collection, config.size))
        for name, teacher in setup.teachers.items()
    ]
    try:
        with Interrupt() as interrupt:
            for trainer in trainers:
                for new in _run_set(trainer, steps, interrupt):
                    rows += new
                    for row in new:
                        append_row(config.out / "rows.jsonl", row)
    finally:
        about["seconds"] = time.perf_counter() - began
        result = report(rows, about, config.out)
    return result


def main(config: PhiSExperiment) -> bool:
    """Run the experiment, and return whether PHI-S beat the raw arms on every seed."""
    return run(config)["verdict"]["passed"]


def plan(config: PhiSExperiment) -> None:
    """Print what would run and how long it may take."""
    from zoo.experiments.phi_s.plan import print_plan

    print_plan(config)


def _run_set(trainer: Trainer, steps: int, interrupt: Interrupt) -> Iterator[list[dict]]:
    """Yield the rows of each group of seeds as soon as it is trained and measured."""
    chosen = trainer.chosen
    for first in range(0, chosen.seeds, chosen.together):
        seeds = range(first, min(first + chosen.together, chosen.seeds))
        speed = trainer.train(seeds, steps, interrupt)
        assert trainer.stack is not None
        rows = []
        for m in range(len(trainer.stack)):
            seed, arm = divmod(m, len(chosen.arms))
            values = measure(
                trainer.setup,
                trainer.stack.student(m),
                chosen.arms[arm],
                linear=chosen.name == "arms",
            )
            rows.append(
                dict(set=chosen.name, arm=chosen.arms[arm], seed=seeds[seed], **values, **speed)
            )
        best = max(rows, key=lambda row: row["fidelity/min"])
        print(f"{chosen.name} seeds {list(seeds)} done; best minimum fidelity: {best['arm']}")
        yield rows


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")
