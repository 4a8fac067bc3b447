"""A run from its config to its report: where teachers, student, training and evaluation meet."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import timm
import torch
from torch import nn

import zoo
from zoo.data.feed import ImageFeed
from zoo.data.loader import eval_batches
from zoo.data.plan import Plan
from zoo.data.sources import Subset
from zoo.eval.extract import extract
from zoo.eval.fidelity import fidelity
from zoo.eval.knn import knn
from zoo.eval.linear import linear_probe
from zoo.eval.report.maps import collect_maps, save_maps
from zoo.features import Batch, Features
from zoo.students.export import export_student
from zoo.students.student import Student
from zoo.teachers.cache import Cache
from zoo.teachers.teacher import Teacher
from zoo.train.device import machine
from zoo.train.distill.caching import fill_run_cache, from_cache, open_run_cache
from zoo.train.distill.calibrate import (
    BaselineLosses,
    Normalizers,
    fit_normalizers,
    read_normalizers,
)
from zoo.train.distill.config import Distill
from zoo.train.distill.fold import folded
from zoo.train.distill.setup import Setup, check_same_teachers, new_student, prepare
from zoo.train.distill.task import DistillTask
from zoo.train.distill.teachers import optimize_run_teachers
from zoo.train.loop import train
from zoo.train.run import Run, commit
from zoo.train.state import TrainState

MAPS = 6
"""Images whose feature maps are kept for the report."""


def distill(config: Distill, *, resume: bool = False) -> Run:
    """Run a distillation to its report.

    Raises:
        ValueError: something that the config names is wrong, a run cannot be resumed, or a loss
            stopped being finite. Nothing has been written unless training had begun.
        Interrupted: a signal came; the run can be resumed.
    """
    began = time.perf_counter()
    if resume:
        run = Run.reopen(config.out, config)
        setup = prepare(config)
    else:
        Run.refuse_existing(config.out)
        setup = prepare(config)
        run = Run.create(config)
    check_same_teachers(run, setup)
    optimize_run_teachers(run, setup)
    normalizers, baseline_losses = fit_normalizers(run, setup)
    cache = open_run_cache(run, setup, normalizers)
    if cache:
        # a student must learn on the scale that the cache was made with
        spaces = {f"{config.normalise}/{key}": value for key, value in cache.spaces().items()}
        normalizers = {
            **normalizers,
            config.normalise: read_normalizers(spaces, config.normalise, setup),
        }
        fill_run_cache(cache, setup, normalizers[config.normalise])
    untrained = new_student(setup)
    describe(run, setup, untrained)

    arms = {"untrained": untrained}
    for kind in (config.normalise, *config.compare):
        main = kind == config.normalise
        arm = setup if main else replace(setup, config=replace(config, normalise=kind, compare=()))
        folder, name = (run, "student") if main else (run.arm(kind), kind)
        stored = cache and (cache, normalizers[config.normalise])
        arms[name] = train_arm(
            folder, arm, normalizers[kind], baseline_losses[kind], stored, title=f"distil {kind}"
        )

    run.keep(lambda row: row.get("kind") == "train" or row["step"] < config.steps)
    for name, student in arms.items():
        normalizer = normalizers[name if name in config.compare else config.normalise]
        log_evaluation(run, setup, student, normalizer, name, config.steps)
    for label, teacher in setup.teachers.items():
        if values := dict(probe(teacher, setup)):
            run.log("eval", config.steps, dict(arm=f"teacher:{label}", **values))
    finish(run, setup, folded(arms["student"], normalizers[config.normalise]))
    describe(run, setup, untrained, seconds=time.perf_counter() - began)
    return run


def train_arm(
    run: Run,
    setup: Setup,
    normalizers: Normalizers,
    baseline_losses: BaselineLosses,
    stored: tuple[Cache, Normalizers] | None = None,
    *,
    title: str,
) -> Student:
    """Train one student, from its newest checkpoint if it has one; return its best form.

    Args:
        stored: A cache to learn from, and the normalizers that it was made with.
    """
    config = setup.config
    teachers: Mapping[str, Teacher] = setup.teachers
    targets: Mapping[str, nn.Module] = normalizers
    if stored:
        teachers, targets = from_cache(*stored, normalizers, config.normalise)
    student = new_student(setup)
    plan = Plan(len(setup.train), config.batch, config.seed, config.view_epochs)
    feed = ImageFeed(
        setup.train, setup.view, plan, setup.device, config.num_slices, (), config.workers
    )
    task = DistillTask.of(config, student, plan, teachers, targets, baseline_losses)
    state = TrainState.of(student, config.optim, parts=dict(weighting=task.weighting))
    state.resume(run)
    if config.compile:
        # static shapes for each size: one graph a size, not one that suits them all
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 2 * len(config.sizes))
        student.answer = torch.compile(student.answer, dynamic=False if config.sizes else None)
    train(
        task,
        state,
        feed,
        config,
        run,
        evaluate=lambda s, step: log_evaluation(run, setup, s, normalizers, "student", step),
        title=title,
        ahead=config.overlap,
    )
    return state.best


def log_evaluation(
    run: Run, setup: Setup, student: Student, normalizers: Normalizers, arm: str, step: int
) -> None:
    """Compare a student with its teachers on held-out images, probe it, and log the numbers."""
    training = student.training
    student.eval()
    shown = folded(student, normalizers)
    with setup.autocast():
        values = dict(fidelity(shown, setup.teachers, held_out(setup)))
    values |= dict(probe(shown.features, setup))
    student.train(training)
    run.log("eval", step, dict(arm=arm, **values))


def held_out(setup: Setup) -> Iterator[Batch]:
    """Return the held-out images that teachers and students are compared on."""
    config = setup.config
    for batch in eval_batches(setup.val, setup.view.size, config.batch, limit=config.eval_images):
        yield batch.to(setup.device)


def probe(features: Callable[[Batch], Features], setup: Setup) -> Iterator[tuple[str, float]]:
    """Yield kNN and linear-probe accuracy of a model's summaries, where there are labels."""
    if setup.labelled is None:
        return
    size = setup.view.size
    with setup.autocast():
        bank, queries = (
            extract(
                features,
                (
                    batch.to(setup.device)
                    for batch in eval_batches(source, size, 64, limit=setup.config.probe_images)
                ),
            )
            for source in setup.labelled
        )
    assert bank.labels is not None and queries.labels is not None
    sets = (bank.summaries, bank.labels, queries.summaries, queries.labels)
    yield from knn(*sets)
    yield from linear_probe(*sets)


def finish(run: Run, setup: Setup, student: Student) -> None:
    """Write the export, and the feature maps that the report shows."""
    student = student.eval().without_spectral()
    count = min(MAPS, len(setup.val))
    chosen = Plan(len(setup.val), count, setup.config.seed).indices(0)
    few = Subset(setup.val, tuple(sorted(chosen.tolist())))
    batch = next(eval_batches(few, setup.view.size, MAPS)).to(setup.device)
    with setup.autocast():
        maps = collect_maps(student, setup.teachers, batch)
    save_maps(maps, run.path / "maps.npz")
    licenses = {n: t.license for n, t in setup.teachers.items()}
    values = export_student(student, run.path / "export", batch, about=dict(licenses=licenses))
    run.log("export", setup.config.steps, values)


def describe(run: Run, setup: Setup, student: Student, *, seconds: float | None = None) -> None:
    """Write `about.json`: the command, the machine, the sizes of the models."""
    run.write_json(
        "about.json",
        dict(
            command=" ".join(["zoo", *sys.argv[1:]]),
            version=zoo.__version__,
            commit=commit(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=seconds,
            machine=machine(setup.device),
            torch=torch.__version__,
            timm=timm.__version__,
            teachers={n: about_teacher(t) for n, t in setup.teachers.items()},
            student=dict(
                name=setup.config.student,
                params=sum(p.numel() for p in student.backbone.parameters()),
                head_params=sum(p.numel() for p in student.heads.parameters()),
            ),
            images=dict(train=len(setup.train), val=len(setup.val)),
            skipped=run.read_json("skipped.json") or [],
        ),
    )


def about_teacher(teacher: Teacher) -> dict[str, Any]:
    """Return the facts about a teacher that the report shows."""
    parameters = teacher.parameters() if isinstance(teacher, nn.Module) else ()
    return dict(
        name=teacher.name,
        params=sum(p.numel() for p in parameters),
        summary_dim=teacher.summary_dim,
        spatial_dim=teacher.spatial_dim,
        grid=teacher.grid,
        size=teacher.size,
        license=teacher.license,
    )
