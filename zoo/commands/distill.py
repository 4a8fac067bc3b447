"""A run from its config to its report: where teachers, student, training and evaluation meet."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

import zoo
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
    _read_normalizers,
    fit_normalizers,
)
from zoo.train.distill.config import Distill
from zoo.train.distill.phi_s import fold_inverse
from zoo.train.distill.plan_step import view_of
from zoo.train.distill.setup import Setting, check_same_teachers, new_student, prepare
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
        setting = prepare(config)
    else:
        Run.refuse_existing(config.out)
        setting = prepare(config)
        run = Run.create(config)
    check_same_teachers(run, setting)
    optimize_run_teachers(run, setting)
    normalizers, baseline_losses = fit_normalizers(run, setting)
    cache = open_run_cache(run, setting, normalizers)
    if cache:
        # a student must learn on the scale that the cache was made with
        spaces = {f"{config.normalise}/{key}": value for key, value in cache.spaces().items()}
        normalizers = {
            **normalizers,
            config.normalise: _read_normalizers(spaces, config.normalise, setting),
        }
        fill_run_cache(cache, setting, normalizers[config.normalise])
    untrained = new_student(setting)
    describe(run, setting, untrained)

    arms = {"untrained": untrained}
    for kind in (config.normalise, *config.compare):
        main = kind == config.normalise
        arm = (
            setting
            if main
            else replace(setting, config=replace(config, normalise=kind, compare=()))
        )
        folder, name = (run, "student") if main else (run.arm(kind), kind)
        stored = cache and (cache, normalizers[config.normalise])
        arms[name] = train_arm(
            folder, arm, normalizers[kind], baseline_losses[kind], stored, title=f"distil {kind}"
        )

    run.keep(lambda row: row.get("kind") == "train" or row["step"] < config.steps)
    for name, student in arms.items():
        normalizer = normalizers[name if name in config.compare else config.normalise]
        log_evaluation(run, setting, student, normalizer, name, config.steps)
    for label, teacher in setting.teachers.items():
        if values := dict(probe(teacher, setting)):
            run.log("eval", config.steps, dict(arm=f"teacher:{label}", **values))
    finish(run, setting, folded(arms["student"], normalizers[config.normalise]))
    describe(run, setting, untrained, seconds=time.perf_counter() - began)
    return run


def train_arm(
    run: Run,
    setting: Setting,
    normalizers: Normalizers,
    baseline_losses: BaselineLosses,
    stored: tuple[Cache, Normalizers] | None = None,
    *,
    title: str,
) -> Student:
    """Train one student, from its newest checkpoint if it has one, and give the best form of it.

    Args:
        stored: A cache to learn from, and the balances that it was made with.
    """
    config = setting.config
    teachers: Mapping[str, Teacher] = setting.teachers
    targets: Mapping[str, nn.Module] = normalizers
    if stored:
        teachers, targets = from_cache(*stored, normalizers, config.normalise)
    student = new_student(setting)
    trainee = TrainState.of(student, config, baseline_losses)
    state = run.load()
    if state:
        trainee.load(state)
    run.keep(lambda row: row["step"] <= trainee.step)
    if config.compile:
        # static shapes for each size: one graph a size, not one that suits them all
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 2 * len(config.sizes))
        student.answer = torch.compile(student.answer, dynamic=False if config.sizes else None)
    if trainee.step < config.steps:
        train(
            trainee,
            teachers,
            targets,
            setting.train,
            config,
            run,
            autocast=setting.autocast,
            evaluate=lambda s, step: log_evaluation(run, setting, s, normalizers, "student", step),
            baseline_losses=baseline_losses,
            title=title,
        )
    return trainee.best


def folded(student: Student, normalizers: Normalizers) -> Student:
    """Return the student with heads that answer in the teachers' own spaces."""
    folds = {
        name: partial(fold_inverse, normalizer=normalizer)
        for name, normalizer in normalizers.items()
    }
    return student.with_folded_heads(folds)


def log_evaluation(
    run: Run, setting: Setting, student: Student, normalizers: Normalizers, arm: str, step: int
) -> None:
    """Compare a student with its teachers on held-out images, probe it, and log the numbers."""
    training = student.training
    student.eval()
    shown = folded(student, normalizers)
    with setting.autocast():
        values = dict(fidelity(shown, setting.teachers, held_out(setting)))
    values |= dict(probe(shown.features, setting))
    student.train(training)
    run.log("eval", step, dict(arm=arm, **values))


def held_out(setting: Setting) -> Iterator[Batch]:
    """Return the held-out images that teachers and students are compared on."""
    config = setting.config
    size = view_of(config, setting.teachers).size
    for batch in eval_batches(setting.val, size, config.batch, limit=config.eval_images):
        yield batch.to(setting.device)


def probe(features: Callable[[Batch], Features], setting: Setting) -> Iterator[tuple[str, float]]:
    """Yield kNN and linear-probe accuracy of a model's summaries, where there are labels."""
    if setting.labelled is None:
        return
    size = view_of(setting.config, setting.teachers).size
    with setting.autocast():
        bank, queries = (
            extract(
                features,
                (
                    batch.to(setting.device)
                    for batch in eval_batches(source, size, 64, limit=setting.config.probe_images)
                ),
            )
            for source in setting.labelled
        )
    assert bank.labels is not None and queries.labels is not None
    sets = (bank.summaries, bank.labels, queries.summaries, queries.labels)
    yield from knn(*sets)
    yield from linear_probe(*sets)


def finish(run: Run, setting: Setting, student: Student) -> None:
    """Write the export, and the feature maps that the report shows."""
    student = student.eval().without_spectral()
    count = min(MAPS, len(setting.val))
    chosen = Plan(len(setting.val), count, setting.config.seed).indices(0)
    few = Subset(setting.val, tuple(sorted(chosen.tolist())))
    size = view_of(setting.config, setting.teachers).size
    batch = next(eval_batches(few, size, MAPS)).to(setting.device)
    with setting.autocast():
        maps = collect_maps(student, setting.teachers, batch)
    save_maps(maps, run.path / "maps.npz")
    licenses = {n: t.license for n, t in setting.teachers.items()}
    values = export_student(student, run.path / "export", batch, about=dict(licenses=licenses))
    run.log("export", setting.config.steps, values)


def describe(run: Run, setting: Setting, student: Student, *, seconds: float | None = None) -> None:
    """Write `about.json`: the command, the machine, the sizes of the models."""
    skipped = run.path / "skipped.json"
    run.write_json(
        "about.json",
        dict(
            command=" ".join(["zoo", *sys.argv[1:]]),
            version=zoo.__version__,
            commit=commit(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=seconds,
            machine=machine(setting.device),
            torch=torch.__version__,
            timm=timm.__version__,
            teachers={n: about_teacher(t) for n, t in setting.teachers.items()},
            student=dict(
                name=setting.config.student,
                params=sum(p.numel() for p in student.backbone.parameters()),
                head_params=sum(p.numel() for p in student.heads.parameters()),
            ),
            images=dict(train=len(setting.train), val=len(setting.val)),
            skipped=json.loads(skipped.read_text()) if skipped.is_file() else [],
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
