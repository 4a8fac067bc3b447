"""A run from its config to its report: where teachers, student, training and evaluation meet."""

import contextlib
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zoo
from zoo.checkpoint import save_whole
from zoo.data.plan import Plan
from zoo.data.sources import Source, Subset, eval_batches, open_splits
from zoo.eval.extract import extract
from zoo.eval.fidelity import fidelity
from zoo.eval.knn import knn
from zoo.eval.linear import linear_probe
from zoo.eval.report.maps import collect_maps, save_maps
from zoo.features import Batch, Features
from zoo.run_speed import fill_run_cache, open_run_cache, quicken_teachers
from zoo.students.export import export_student
from zoo.students.student import Student, build_student, read_options
from zoo.teachers.cache import Cache
from zoo.teachers.teacher import (
    FOLDER,
    Teacher,
    TeacherName,
    check_losses,
    fingerprint,
    open_teacher,
    unknown_name,
)
from zoo.train.config import Distill
from zoo.train.distill.caching import from_cache
from zoo.train.distill.calibrate import calibrate
from zoo.train.distill.phi_s import Balance, fit, fold_inverse
from zoo.train.distill.plan_step import check_turns, grids_of
from zoo.train.distill.sizes import follow
from zoo.train.loop import Trainee, train, view_of
from zoo.train.run import Run, commit

Balances = Mapping[str, Balance]
"""The transform of each teacher's map, by label; teachers without a map have none."""

Spreads = Mapping[str, float]
"""What a constant guess would lose, by the name of the loss: `label/summary`, `label/spatial`."""

LEAST_SPREAD = 1e-10
"""Radians squared, or variance on the scale of the balance."""

MAPS = 6
"""Images whose feature maps are kept for the report."""


@dataclass(frozen=True)
class Setting:
    """What a run works with, opened and checked."""

    config: Distill
    device: torch.device
    train: Source
    val: Source
    labelled: tuple[Source, Source] | None
    teachers: Mapping[str, Teacher]

    def autocast(self) -> contextlib.AbstractContextManager:
        return autocast(self.config, self.device)


def device_of(config: Distill) -> torch.device:
    """Resolve `auto`, and refuse a device that is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here; use --device cpu, or auto.")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def autocast(config: Distill, device: torch.device) -> contextlib.AbstractContextManager:
    """Give the context in which models run: bf16 on CUDA unless the config says otherwise."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def check_names(config: Distill) -> None:
    """Refuse unknown models before anything is read or built."""
    if not config.teachers:
        raise ValueError("There is no teacher; name at least one, e.g. --teachers timm:resnet18.")
    if not timm.is_model(config.student.partition(".")[0]):
        raise unknown_name(config.student, timm.list_models(), "registered model")
    for spec in config.teachers:
        name = TeacherName.parse(spec.name)
        if name.kind not in ("timm", "zoo") or name.name.startswith(FOLDER):
            continue
        if not timm.is_model(name.name.partition(".")[0]):
            known = zoo.list_models() if name.kind == "zoo" else timm.list_models()
            raise unknown_name(name.name, known, f"{name.kind} model")
    if config.sizes or config.losses.shift:
        grids_of(config)  # refuses what the student cannot take
    if config.spectral or config.student_options:  # built without memory: will it do?
        build_student(
            config.student, {}, size=config.size, **backbone_options(config), device="meta"
        )


def open_data(config: Distill) -> tuple[Source, Source, tuple[Source, Source] | None]:
    """Open training images, held-out images, and labelled ones for the probes."""
    data, labelled = Path(config.data), config.labelled and Path(config.labelled)
    if config.data == "embedded":
        from zoo.data.embedded import embedded_data

        folder = embedded_data()
        data, labelled = folder / "images", labelled or folder / "digits"
    train, val = open_splits(data, config.held_out)
    if labelled:
        probe = open_splits(Path(labelled), config.held_out)
        if not probe[0].classes:
            raise ValueError(f"{labelled} has no classes: one sub-folder a class, or .cls files.")
    else:
        probe = (train, val)
    if not probe[0].classes or list(probe[0].classes) != list(probe[1].classes):
        return train, val, None
    return train, val, probe


def open_teachers(config: Distill, train: Source, device: torch.device) -> dict[str, Teacher]:
    """Build the teachers by label; a pretext teacher is trained on `train` first."""
    teachers = {}
    for label, spec in zip(config.labels, config.teachers, strict=True):
        name = TeacherName.parse(spec.name)
        text = spec.name
        if name.kind == "pretext" and name.weights is None:
            from zoo.train.pretext import pretext_weights

            text = (
                f"{spec.name}/{pretext_weights(name.name, train, seed=config.seed, device=device)}"
            )
        opened = partial(open_teacher, device=device, mosaic=spec.mosaic)
        if spec.follow:
            teachers[label] = follow(text, opened, grids_of(config), config.size)
        else:
            teachers[label] = opened(text)
    return teachers


def widths(config: Distill, teachers: Mapping[str, Teacher]) -> dict[str, tuple]:
    """Give the summary and spatial width that each head must have; `None` for no head."""
    found = {}
    for (label, teacher), spec in zip(teachers.items(), config.teachers, strict=True):
        check_losses(spec.name, teacher, summary=float(spec.summary), spatial=float(spec.spatial))
        summary = teacher.summary_dim if spec.summary else None
        found[label] = (summary, teacher.spatial_dim if spec.spatial else None)
    return found


def backbone_options(config: Distill) -> dict[str, Any]:
    """Give what `build_student` needs to know of the backbone beside its name and size."""
    return dict(
        options=read_options(config.student_options),
        dynamic=bool(config.sizes),
        spectral_norms=config.spectral,
    )


def new_student(setting: Setting) -> Student:
    """Build the student of a run, the same one at each call."""
    config = setting.config
    torch.manual_seed(config.seed)
    return build_student(
        config.student,
        widths(config, setting.teachers),
        size=config.size,
        **dataclasses.asdict(config.heads),
        pretrained=config.pretrained,
        drop_path_rate=config.optim.drop_path,
        **backbone_options(config),
    ).to(setting.device)


def prepare(config: Distill) -> Setting:
    """Check and open everything that a run needs, before it writes anything."""
    check_names(config)
    device = device_of(config)
    train, val, labelled = open_data(config)
    teachers = open_teachers(config, train, device)
    widths(config, teachers)  # refuses a loss that a teacher has nothing for
    check_turns(config, teachers)
    return Setting(config, device, train, val, labelled, teachers)


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
    quicken_teachers(run, setting)
    balances, spreads = fit_balances(run, setting)
    cache = open_run_cache(run, setting, balances)
    if cache:
        # a student must learn on the scale that the cache was made with
        spaces = {f"{config.normalise}/{key}": value for key, value in cache.spaces().items()}
        balances = {**balances, config.normalise: _read_balances(spaces, config.normalise, setting)}
        fill_run_cache(cache, setting, balances[config.normalise])
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
        stored = cache and (cache, balances[config.normalise])
        arms[name] = train_arm(
            folder, arm, balances[kind], spreads[kind], stored, title=f"distil {kind}"
        )

    run.keep(lambda row: row.get("kind") == "train" or row["step"] < config.steps)
    for name, student in arms.items():
        balance = balances[name if name in config.compare else config.normalise]
        log_evaluation(run, setting, student, balance, name, config.steps)
    for label, teacher in setting.teachers.items():
        if values := dict(probe(teacher, setting)):
            run.log("eval", config.steps, dict(arm=f"teacher:{label}", **values))
    finish(run, setting, folded(arms["student"], balances[config.normalise]))
    describe(run, setting, untrained, seconds=time.perf_counter() - began)
    return run


def check_same_teachers(run: Run, setting: Setting) -> None:
    """Remember the teachers' weights in a new run; refuse others in a resumed one."""
    now = {label: fingerprint(teacher) for label, teacher in setting.teachers.items()}
    path = run.path / "teachers.json"
    if path.is_file():
        before = json.loads(path.read_text())
        changed = [label for label in now if before.get(label) != now[label]]
        if changed:
            raise ValueError(
                f"The run in {run.path} was started with other weights of {', '.join(changed)}; "
                "bring those back, or start a new run with another --out."
            )
    run.write_json("teachers.json", now)


def fit_balances(run: Run, setting: Setting) -> tuple[dict[str, Balances], dict[str, Spreads]]:
    """Give kind -> label -> balance, and kind -> loss -> spread.

    From the run's folder, or by the calibration pass.
    """
    config = setting.config
    kinds = (config.normalise, *config.compare)
    path = run.path / "balances.safetensors"
    if not path.is_file():
        context = dict(device=setting.device, autocast=setting.autocast)
        found = calibrate(setting.teachers, setting.train, config, **context)
        tensors = {}
        for kind in kinds:
            fitted = {name: fit(kind, moments) for name, moments in found.moments.items()}
            for name, balance in fitted.items():
                tensors |= {f"{kind}/{name}/{k}": v for k, v in balance.state_dict().items()}
            spreads = found.spreads(fitted)
            tensors |= {f"spread/{kind}/{name}": value for name, value in spreads.items()}
        # clones: the kinds share what they say of the summaries, and the format refuses that
        tensors = {key: value.cpu().clone().contiguous() for key, value in tensors.items()}
        save_whole(tensors, path, save_file)
    tensors = load_file(path)
    return (
        {kind: _read_balances(tensors, kind, setting) for kind in kinds},
        {kind: _read_spreads(tensors, kind, setting) for kind in kinds},
    )


def _read_spreads(tensors: Mapping[str, Tensor], kind: str, setting: Setting) -> Spreads:
    """Give the spreads of one kind; refuse those that a loss would divide by and that are none."""
    prefix = f"spread/{kind}/"
    found = {k.removeprefix(prefix): v.item() for k, v in tensors.items() if k.startswith(prefix)}
    losses = setting.config.losses
    wanted = losses.weighting == "dispersion" or losses.summary == "angle"
    for name, value in found.items():
        if wanted and value < LEAST_SPREAD:
            raise ValueError(
                f"{name} is all but the same for every image of the calibration (spread "
                f"{value:.1g}), so there is nothing to divide by. Check that teacher's weights, "
                "or leave that loss out."
            )
    return found


def _read_balances(tensors: Mapping[str, Tensor], kind: str, setting: Setting) -> Balances:
    balances = {}
    for name, teacher in setting.teachers.items():
        prefix = f"{kind}/{name}/"
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if state and teacher.spatial_dim:
            balances[name] = Balance(kind, teacher.spatial_dim)
            balances[name].load_state_dict(state)
            balances[name].to(setting.device)
    return balances


def train_arm(
    run: Run,
    setting: Setting,
    balances: Balances,
    spreads: Spreads,
    stored: tuple[Cache, Balances] | None = None,
    *,
    title: str,
) -> Student:
    """Train one student, from its newest checkpoint if it has one, and give the best form of it.

    Args:
        stored: A cache to learn from, and the balances that it was made with.
    """
    config = setting.config
    teachers: Mapping[str, Teacher] = setting.teachers
    targets: Mapping[str, nn.Module] = balances
    if stored:
        teachers, targets = from_cache(*stored, balances, config.normalise)
    student = new_student(setting)
    trainee = Trainee.of(student, config, spreads)
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
            evaluate=lambda s, step: log_evaluation(run, setting, s, balances, "student", step),
            spreads=spreads,
            title=title,
        )
    return trainee.best


def folded(student: Student, balances: Balances) -> Student:
    """Give the student with heads that answer in the teachers' own spaces."""
    folds = {name: partial(fold_inverse, balance=balance) for name, balance in balances.items()}
    return student.with_folded_heads(folds)


def log_evaluation(
    run: Run, setting: Setting, student: Student, balances: Balances, arm: str, step: int
) -> None:
    """Compare a student with its teachers on held-out images, probe it, and log the numbers."""
    training = student.training
    student.eval()
    shown = folded(student, balances)
    with setting.autocast():
        values = dict(fidelity(shown, setting.teachers, held_out(setting)))
    values |= dict(probe(shown.look, setting))
    student.train(training)
    run.log("eval", step, dict(arm=arm, **values))


def held_out(setting: Setting) -> Iterator[Batch]:
    """Give the held-out images that teachers and students are compared on."""
    config = setting.config
    size = view_of(config, setting.teachers).size
    for batch in eval_batches(setting.val, size, config.batch, limit=config.eval_images):
        yield batch.to(setting.device)


def probe(look: Callable[[Batch], Features], setting: Setting) -> Iterator[tuple[str, float]]:
    """Yield kNN and linear-probe accuracy of a model's summaries, where there are labels."""
    if setting.labelled is None:
        return
    size = view_of(setting.config, setting.teachers).size
    with setting.autocast():
        bank, queries = (
            extract(
                look,
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
    """Give the facts about a teacher that the report shows."""
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


def machine(device: torch.device) -> str:
    """Name what the run ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"
