"""A run from its config to its report: where teachers, student, training and evaluation meet."""

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import zoo
from zoo.commands.elastic.sizes import nested, sizes_beside, write_about
from zoo.data.feed import ImageFeed, plan_of
from zoo.data.loader import eval_batches
from zoo.data.plan import Plan
from zoo.data.sources import Source, Subset, spread
from zoo.eval.extract import extract_share
from zoo.eval.fidelity import fidelity
from zoo.eval.knn import knn
from zoo.eval.linear import linear_probe
from zoo.eval.report.maps import collect_maps, save_maps
from zoo.features import Batch, Features
from zoo.students.export import export_student
from zoo.students.lora import add_adapters
from zoo.students.student import Student
from zoo.teachers.cache import Cache
from zoo.teachers.teacher import Teacher
from zoo.train.device import machine
from zoo.train.distill.caching import (
    fill_run_cache,
    from_cache,
    open_run_cache,
    stored_held_out,
)
from zoo.train.distill.calibrate import (
    Calibration,
    Normalizers,
    fit_normalizers,
)
from zoo.train.distill.compiling import in_form, of_state
from zoo.train.distill.config import Distill
from zoo.train.distill.fold import folded, with_probabilities
from zoo.train.distill.placement import gathered, idle, put_away, sharded
from zoo.train.distill.plan_step import shared_counts
from zoo.train.distill.same import check_same_images, check_same_teachers, count_images
from zoo.train.distill.setup import (
    Setup,
    earlier_student,
    new_student,
    prepare,
    with_decoder,
)
from zoo.train.distill.speed import (
    Speed,
    choose,
    keep_compiled,
    uncompiled,
)
from zoo.train.distill.task import DistillTask
from zoo.train.distill.teachers import optimize_run_teachers
from zoo.train.loop import train
from zoo.train.mesh import (
    by_first,
    first_goes_first,
    from_first,
    share,
    slices_of_rank,
    together,
    union,
    with_slices,
)
from zoo.train.run import Run, commit
from zoo.train.state import TrainState

MAPS = 6
"""Images whose feature maps are kept for the report."""


Forms = Mapping[str, Student]
"""One student: the `average` of its weights, where there is one, and `raw`, those of the last step.
"""


@dataclass
class Work:
    """What the phases of a run hand on to each other."""

    run: Run
    setup: Setup
    calibration: dict[str, Calibration] = field(default_factory=dict)
    """Of each normalisation that the run compares."""
    cache: Cache | None = None
    arms: dict[str, Forms] = field(default_factory=dict)
    """The students: `untrained`, `student`, and one for each normalisation beside the run's own."""
    best: dict[str, str] = field(default_factory=dict)
    """The form of each that was closer to the teachers at the end."""
    speed: Speed = field(default_factory=Speed)
    """The form in which the run is computed."""
    began: float = field(default_factory=time.perf_counter)
    drawn: torch.Tensor | None = None
    """Where torch's random numbers stood when the untrained student had been built."""

    @property
    def away(self) -> list[str]:
        """The labels of the teachers that this rank does not run in training."""
        config = self.setup.config
        return idle(config, slices_of_rank(config.num_slices))

    def gathered(self) -> AbstractContextManager[None]:
        """Return the context in which a rank may run all teachers alone; every rank enters it."""
        return gathered(self.setup.teachers, self.away, self.setup.device)

    def of(self, arm: str) -> Normalizers:
        """Return the normalizers that a student learns, or learnt, with."""
        config = self.setup.config
        kind = arm if arm in config.compare else config.normalise
        return self.calibration[kind].normalizers


def distill(config: Distill, *, resume: bool = False) -> Run:
    """Run a distillation to its report.

    Raises:
        ValueError: something that the config names is wrong, a run cannot be resumed, or a loss
            stopped being finite. Nothing has been written unless training had begun.
        Interrupted: a signal came; the run can be resumed.
    """
    config = with_decoder(with_slices(config), resume=resume)
    if resume:
        run = Run.reopen(config.out, config)
        setup = prepare(config)
    else:
        Run.refuse_existing(config.out)
        setup = prepare(config)
        run = Run.create(config)
    work = Work(run, setup)
    with run.discarded(unless=lambda: resume):
        for phase in BEFORE_TRAINING:
            carry_out(phase, work)
    for phase in (train_arms, compare, export):
        carry_out(phase, work)
    return run


def carry_out(phase: Callable[[Work], None], work: Work) -> None:
    """Carry out a phase, on the ranks that it is for."""
    if phase is export:
        with work.gathered(), uncompiled(work.setup.device):
            by_first(partial(phase, work))
    elif phase is compare:
        with work.gathered(), uncompiled(work.setup.device):
            phase(work)
    elif phase is fill_cache and not sharded(work.setup.config):
        with first_goes_first():
            phase(work)
    else:
        phase(work)


def ready_teachers(work: Work) -> None:
    """Hold the teachers against those that a resumed run began with, and make them fast."""
    check_same_images(work.run, work.setup)
    check_same_teachers(work.run, work.setup)
    config, device = work.setup.config, work.setup.device
    nests = sizes_beside(config.student) is not None
    work.speed = choose(config, device, nested=nests)
    keep_compiled()
    optimize_run_teachers(work.run, work.setup, work.speed)


def calibrate(work: Work) -> None:
    """Measure the teachers, or read what was measured; every rank has its share."""
    work.calibration = fit_normalizers(work.run, work.setup)


def fill_cache(work: Work) -> None:
    """Open the feature cache, if the config has one, and write what it lacks."""
    work.cache = open_run_cache(work.run, work.setup, work.of("student"))
    if work.cache:
        fill_run_cache(work.cache, work.setup)
        stored = stored_held_out(work.run, work.setup, work.of("student"))
        work.setup = replace(work.setup, stored=stored)


def begin(work: Work) -> None:
    """Build the student, and say in the run's folder what it is about."""
    put_away(work.setup.teachers, work.away)
    work.arms["untrained"] = dict(raw=new_student(work.setup, work.of("untrained")))
    work.drawn = torch.get_rng_state()
    describe(work)


def another_student(work: Work, normalizers: Normalizers) -> Student:
    """Return the untrained student once more: a copy, where none of its heads is begun otherwise.

    What is drawn next is what would be drawn if it were built again.
    """
    config = work.setup.config
    if config.start or config.spectral or work.drawn is None:  # copies share a parametrisation
        return new_student(work.setup, normalizers)
    torch.set_rng_state(work.drawn)
    return copy.deepcopy(work.arms["untrained"]["raw"])


def train_arms(work: Work) -> None:
    """Train the student, and once more with each normalisation that it is compared with."""
    config = work.setup.config
    work.arms["student"] = train_arm(work, work.run, config, f"distil {config.normalise}")
    for kind in config.compare:
        arm = replace(config, normalise=kind, compare=())
        work.arms[kind] = train_arm(work, work.run.arm(kind), arm, f"distil {kind}")


def train_arm(work: Work, run: Run, config: Distill, title: str) -> Forms:
    """Train one student, from its newest checkpoint if it has one."""
    setup, calibration = work.setup, work.calibration[config.normalise]
    teachers: Mapping[str, Teacher] = setup.teachers
    normalizers = calibration.normalizers
    if work.cache:
        teachers, rescaled = from_cache(work.cache, normalizers, setup)
        calibration = calibration._replace(normalizers=rescaled)
    student = another_student(work, normalizers)
    if config.optim.lora:
        add_adapters(student, config.optim.lora, config.optim.lora_layers)
    by_step = () if config.partition else config.batches
    plan = plan_of(setup.train, config.batch, config.seed, config.view_epochs, by_step)
    feed = ImageFeed(
        setup.train,
        setup.view,
        plan,
        setup.device,
        config.num_slices,
        slices_of_rank(config.num_slices),
        setup.workers,
        cuts=[g.images // g.slices for g in config.groups for _ in range(g.slices)],
        counted=shared_counts(config),
    )
    task = DistillTask.of(config, student, plan, teachers, calibration, setup.grids)
    parts = dict(weighting=task.weighting)
    state = TrainState.of(student, config.optim, parts=parts, ranks=config.ranks)
    state.resume(run)
    if config.compile:
        # static shapes for each size and window: one graph each, not one that suits them all
        graphs = len(config.sizes) * (1 + len(set(config.attention_windows)))
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 2 * graphs)
        student.answer = torch.compile(student.answer, dynamic=False if config.sizes else None)

    def evaluate(_: Any, step: int) -> float:
        with work.gathered(), uncompiled(setup.device):
            return evaluate_forms(run, setup, state.forms, normalizers, "student", step)[1]

    work.speed = of_state(work.speed, state)
    record = work.run if run is work.run else None  # what an arm does is not said again
    with in_form(setup, work.speed, task, state, record):
        train(
            nested(config, student, task),
            state,
            feed,
            config,
            run,
            evaluate=evaluate,
            title=title,
            ahead=work.speed.overlap,
        )
    return state.forms


def compare(work: Work) -> None:
    """Measure every student at the end, and the teachers beside them."""
    run, setup, steps = work.run, work.setup, work.setup.config.steps
    run.keep(lambda row: row.get("kind", "train") == "train" or row["step"] < steps)
    for name, forms in work.arms.items():
        work.best[name], _ = evaluate_forms(run, setup, forms, work.of(name), name, steps)
    for label, teacher in setup.teachers.items():
        if values := dict(probe(teacher, setup)):
            run.log("eval", steps, dict(arm=f"teacher:{label}", **values))


def evaluate_forms(
    run: Run, setup: Setup, forms: Forms, normalizers: Normalizers, arm: str, step: int
) -> tuple[str, float]:
    """Measure a student (`log_evaluation`), on every rank; rank 0 alone where weights are cut."""
    call = partial(log_evaluation, run, setup, forms, normalizers, arm, step)
    return together(call, here=None not in forms.values())


def log_evaluation(
    run: Run, setup: Setup, forms: Forms, normalizers: Normalizers, arm: str, step: int
) -> tuple[str, float]:
    """Compare a student with its teachers on held-out images, probe it, and log the numbers.

    Each form is compared, and the better one probed; the numbers of the other are those of the arm
    `ARM:other`. Every rank looks at its share of the images; rank 0 probes, and logs.

    Returns:
        The better form, and how close it is to the teachers.
    """
    found = {}
    for form, student in forms.items():
        with evaluated(student), setup.autocast():
            shown = with_probabilities(folded(student, normalizers), setup.config.summary_losses)
            found[form] = dict(fidelity(shown, setup.stored or setup.teachers, held_out(setup)))
    best = from_first(better_form(found))
    with evaluated(forms[best]) as student:
        found[best] |= dict(probe(student.features, setup))
    union(setup.unreadable)
    if setup.unreadable:
        found[best]["unreadable"] = len(setup.unreadable)
    for form in sorted(found, key=lambda form: form != best):
        told = dict(weights=form) if len(forms) > 1 else {}
        name = arm if form == best else f"{arm}:other"
        run.log("eval", step, dict(arm=name, **told, **found[form]))
    return best, closeness(found[best])


@contextmanager
def evaluated(student: Student) -> Iterator[Student]:
    """Put a student into evaluation mode for a while."""
    training = student.training
    yield student.eval()
    student.train(training)


def better_form(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return the form that is closer to the teachers; the first in a tie."""
    return max(found, key=lambda form: closeness(found[form]))


def closeness(found: Mapping[str, float]) -> float:
    """Return the geometric-mean fidelity, or the mean cosine of summaries if there are no maps."""
    cosines = [value for key, value in found.items() if key.endswith("/summary")]
    close = found.get("fidelity/geomean", sum(cosines) / max(1, len(cosines)))
    return -math.inf if math.isnan(close) else close


def held_out(setup: Setup) -> Iterator[Batch]:
    """Return this rank's held-out images that teachers and students are compared on."""
    config, size = setup.config, setup.view.size
    few, batch = spread(setup.val, config.eval_images), config.batch // config.num_slices
    for some in eval_batches(
        few,
        size,
        batch,
        workers=min(setup.workers, -(-len(few) // batch)),
        pin=setup.device.type == "cuda",
        unreadable=setup.unreadable,
        share=share(),
    ):
        yield some.to(setup.device)


def probe(features: Callable[[Batch], Features], setup: Setup) -> Iterator[tuple[str, float]]:
    """Yield kNN and linear-probe accuracy of a model's summaries, where there are labels.

    Every rank extracts its share of the summaries; rank 0 has all of them, and yields.
    """
    if setup.labelled is None:
        return

    def batches(source: Source) -> Iterator[Batch]:
        few = spread(source, setup.config.probe_images)
        size, unreadable = setup.view.size, setup.unreadable
        workers, pin = min(setup.workers, -(-len(few) // 64)), setup.device.type == "cuda"
        for batch in eval_batches(
            few, size, 64, workers=workers, pin=pin, unreadable=unreadable, share=share()
        ):
            yield batch.to(setup.device)

    with setup.autocast():
        bank, queries = (extract_share(features, batches(source)) for source in setup.labelled)
    if bank is None or queries is None:
        return
    assert bank.labels is not None and queries.labels is not None
    sets = (bank.summaries, bank.labels, queries.summaries, queries.labels)
    yield from knn(*sets)
    yield from linear_probe(*sets)


def export(work: Work) -> None:
    """Write the student, and the feature maps that the report shows."""
    run, setup = work.run, work.setup
    chosen = work.arms["student"][work.best["student"]]
    student = folded(chosen, work.of("student")).eval().as_released()
    keep_heads(student, setup.config)
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
    if about := sizes_beside(setup.config.student):
        write_about(run.path / "export", about)
    describe(work, seconds=time.perf_counter() - work.began)


def keep_heads(student: Student, config: Distill) -> None:
    """Give a student on a frozen trunk the heads for other teachers that it had before."""
    earlier = earlier_student(config) if config.optim.freeze == "trunk" else None
    if earlier is None:
        return
    for label, head in earlier.heads.items():
        if label not in student.heads:
            student.heads[label] = head.to(student.mean.device)
            student.tokens |= {label: earlier.tokens[label]} if label in earlier.tokens else {}


def describe(work: Work, *, seconds: float | None = None) -> None:
    """Write `about.json`: the command, the machine, the sizes of the models."""
    setup, student = work.setup, work.arms["untrained"]["raw"]
    work.run.write_json(
        "about.json",
        dict(
            command=command(),
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
                weights=work.best.get("student"),
            ),
            images=count_images(setup),
            skipped=work.run.skipped(),
            speed=(work.run.read_json("about.json") or {}).get("speed"),
        ),
    )


def command() -> str:
    """Return the command that runs, or the call where a program of somebody's own does."""
    own = Path(sys.argv[0]).stem in ("zoo", "__main__")
    return " ".join(["zoo", *sys.argv[1:]]) if own else "zoo.distill(...)"


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


BEFORE_TRAINING = (ready_teachers, calibrate, fill_cache, begin)
"""Phases of a run, in their order; each finds in its folder what an earlier try has left."""
