"""How fast a distillation step is, part by part: what `zoo bench distill` measures.

    engine efficiency = (Σ teachers alone + student alone) / step

Each part is measured alone, in the form in which it is fastest; the student's is forward, backward
and optimizer. The step is the engine's own: batches from the host, resizing, teachers, normalizers,
student, losses, clipping, AdamW, averaged weights. Needs torch and timm only.
"""

import copy
import dataclasses
import gc
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.data.plan import Plan
from zoo.eval.speed.kernels import Kernel, profile
from zoo.eval.speed.models import timed
from zoo.features import Batch, Features
from zoo.students.build import build_student
from zoo.students.student import Student
from zoo.teachers.mosaic import Mosaic
from zoo.teachers.name import TeacherName
from zoo.teachers.open import open_teacher
from zoo.teachers.quantize import QuantReport, quantize_linears
from zoo.teachers.teacher import Frozen, Teacher, draws_on_device
from zoo.train.cost import Estimate, estimate
from zoo.train.device import tensor_cores
from zoo.train.distill.calibrate import Calibration
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.phi_s import Moments, Normalizer, fit
from zoo.train.distill.plan_cost import Cost, matmul_rate, model_costs
from zoo.train.distill.setup import widths
from zoo.train.distill.sizes import frozen
from zoo.train.distill.task import DistillTask
from zoo.train.distill.teachers import compile_teacher
from zoo.train.loop import take_step, update
from zoo.train.prefetch import Slice, prefetch, side_stream
from zoo.train.state import TrainState
from zoo.train.step import Ranks

GIB = 2**30
FITTED = 16
"""Images on which normalizers are fitted; what they do costs the same with any statistics."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step to be measured."""

    name: str
    teachers: tuple[str, ...]
    """As `zoo distill --teachers` takes them."""
    student: str
    size: int
    batch: int
    precision: Literal["bf16", "int8", "fp8"] = "bf16"
    """Of the teachers' products."""
    compiled: bool = True
    """Teachers' blocks and student; without, this is the plain loop."""
    overlap: bool = False
    gate: float = 1000.0
    """Least fidelity of 8-bit teachers; 0 puts every linear layer into 8 bits."""
    channels_last: bool = False
    alone: bool = False
    """Measure the student's backbone without heads as well."""

    @property
    def specs(self) -> tuple[TeacherSpec, ...]:
        return tuple(TeacherSpec.parse(text) for text in self.teachers)

    def config(self, device: str) -> Distill:
        """Say it as a run."""
        return Distill(
            teachers=self.specs,
            student=self.student,
            size=self.size,
            batch=self.batch,
            device="cuda" if device == "cuda" else "cpu",
            overlap=self.overlap,
        )


@dataclass(kw_only=True)
class StepTiming:
    """What came out; times are milliseconds an image."""

    step: Step
    parts: dict[str, float] = field(default_factory=dict)
    """Each teacher's label, then student (with heads), backbone, heads, resize, rest."""
    milliseconds: float = 0.0
    spread: float = 0.0
    """Half the distance between the quartiles, over the median."""
    peak_gib: float | None = None
    efficiency: float = 0.0
    bare_efficiency: float = 0.0
    """With the student's backbone alone, so that heads count as overhead."""
    model: dict[str, float] = field(default_factory=dict)
    """The cost model's milliseconds for the same parts, and `step`."""
    gflops: dict[str, float] = field(default_factory=dict)
    fidelity: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    """To open, compile and measure."""
    kernels: list[Kernel] = field(default_factory=list)
    """The step's most expensive ones; none unless `measure` is told to find them."""
    error: str | None = None

    @property
    def images_per_s(self) -> float:
        return 1e3 / self.milliseconds if self.milliseconds else 0.0

    def as_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return {**fields.pop("step"), "images_per_s": self.images_per_s, **fields}


class ModelPool:
    """Teachers that were opened: each is built once, and copied for another precision.

    Args:
        say: Takes a line for those who wait: what is done now.
    """

    def __init__(self, device: torch.device, say: Callable[[str], None] = lambda _: None):
        self.device, self.say = device, say
        self.rate = matmul_rate(device)
        self._plain: dict[str, Teacher] = {}
        self._ready: dict[tuple, tuple[Teacher, QuantReport | None]] = {}
        self._students: dict[tuple, _Model] = {}
        self._costs: dict[tuple, tuple[list[Cost], Cost]] = {}

    def teacher(self, spec: TeacherSpec) -> Teacher:
        """Open a teacher with bfloat16 weights on a GPU; the same one at each call."""
        if spec.name not in self._plain:
            self.say(f"opening {spec.name}")
            with draws_on_device():
                teacher = open_teacher(spec.name, device=self.device)
            for network in frozen(teacher):
                spread_layer_scale(network.network)
                if self.device.type == "cuda":
                    network.to_bf16()
            self._plain[spec.name] = teacher
        return self._plain[spec.name]

    def ready(self, spec: TeacherSpec, step: Step) -> tuple[Teacher, QuantReport | None]:
        """Return a teacher in the step's form."""
        key = (spec.name, step.precision, step.compiled, step.precision != "bf16" and step.gate)
        if key not in self._ready:
            teacher = self.teacher(spec)
            self._ready[key] = self._in_form(teacher, step)
        teacher, report = self._ready[key]
        if spec.mosaic > 1:
            assert isinstance(teacher, Frozen)
            return Mosaic(teacher, spec.mosaic), report
        return teacher, report

    def _in_form(self, teacher: Teacher, step: Step) -> tuple[Teacher, QuantReport | None]:
        report, network = None, next(iter(frozen(teacher)), None)
        if network is None:
            return teacher, None
        if step.precision != "bf16" or step.compiled:
            network = copy.deepcopy(network)  # the plain one stays for other steps
        if step.precision != "bf16":
            batch = pink_noise(FITTED, max(network.size), self.device)
            report = quantize_linears(network, batch, step.precision, gate=step.gate)
        if step.compiled:
            compile_teacher(network)
        return network, report

    def student(self, step: Step, config: Distill, teachers: Mapping[str, Teacher]) -> "_Model":
        """Build a student with its heads, compiled if the step is; the same one at each call."""
        wide = widths(config, teachers)
        key = (step.student, step.size, step.compiled, step.channels_last, step.alone, str(wide))
        if key not in self._students:
            self._students[key] = _Model.build(step, config, wide, self.device)
        return self._students[key]

    def costs(self, step: Step, config: Distill) -> tuple[list[Cost], Cost]:
        """Count the FLOPs of teachers and student."""
        key = (step.teachers, step.student, step.size)
        if key not in self._costs:
            self.say("counting FLOPs")
            self._costs[key] = model_costs(config, self.device)[:2]
        return self._costs[key]

    def drop(self, keep: Callable[[str], bool]) -> None:
        """Free the teachers whose names are not wanted any more."""
        self._plain = {name: t for name, t in self._plain.items() if keep(name)}
        self._ready = {key: t for key, t in self._ready.items() if keep(key[0])}
        free(self.device)


def spread_layer_scale(network: nn.Module) -> None:
    """Set layer scales to one: fresh ones are 1e-5, and nothing that a block does would count."""
    for name, weight in network.named_parameters():
        if name.endswith(("ls1.gamma", "ls2.gamma", "lambda1")):
            weight.data.fill_(1.0)


def pink_noise(count: int, size: int, device: torch.device) -> Batch:
    """Make images with the spectrum of photographs (amplitude 1/f), the same at each call."""
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, size, size // 2 + 1, 2, generator=draws)
    rows, cols = torch.fft.fftfreq(size), torch.fft.rfftfreq(size)
    falling = 1 / (rows[:, None].square() + cols.square()).sqrt().clamp_min(1 / size)
    images = torch.fft.irfft2(torch.view_as_complex(noise) * falling, (size, size))
    images = (images / images.std((1, 2, 3), keepdim=True) * 0.22 + 0.45).clamp(0, 1)
    return Batch((images * 255).to(torch.uint8).to(device))


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(
    step: Step,
    pool: ModelPool,
    *,
    rounds: int,
    warmup: int = 3,
    best: Mapping[str, float] | None = None,
    kernels: int = 0,
) -> StepTiming:
    """Measure a step and its parts.

    Args:
        best: Milliseconds of parts in other forms (`best_parts`); of each the fastest counts.
        kernels: Name so many of the step's most expensive kernels.
    """
    began, device = time.perf_counter(), pool.device
    config = step.config(device.type)
    costs, ours = pool.costs(step, config)
    opened = {
        label: pool.ready(spec, step)
        for label, spec in zip(config.labels, config.teachers, strict=True)
    }
    teachers = {label: teacher for label, (teacher, _) in opened.items()}
    reports = {label: report for label, (_, report) in opened.items() if report}
    bench = StepBench(step, config, teachers, pool.student(step, config, teachers), device)
    clock = Clock(device, step.batch, rounds, warmup)
    with tensor_cores(device):
        parts = {}
        for name, took in _parts(bench, clock):
            parts[name] = took
            pool.say(f"{name} alone: {took:.1f} ms")
        free(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = clock.times(bench.step)
        peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
        found = profile(bench.step, device.type)[:kernels] if kernels else []
    timing = StepTiming(step=step, parts=parts, peak_gib=peak, kernels=found)
    timing.milliseconds, timing.spread = statistics.median(times), _spread(times)
    _conclude(timing, config, best or {})
    _model(timing, costs, ours, reports, pool.rate)
    timing.fidelity = {label: dataclasses.asdict(report) for label, report in reports.items()}
    timing.seconds = time.perf_counter() - began
    return timing


def _spread(times: list[float]) -> float:
    if len(times) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def _conclude(timing: StepTiming, config: Distill, best: Mapping[str, float]) -> None:
    keys = part_keys(timing.step)
    fastest = {n: min(ms, best.get(keys.get(n, ""), ms)) for n, ms in timing.parts.items()}
    networks = sum(fastest[label] for label in config.labels)
    bare = fastest.get("backbone", fastest["student"] - fastest["heads"])
    timing.efficiency = (networks + fastest["student"]) / timing.milliseconds
    timing.bare_efficiency = (networks + bare) / timing.milliseconds
    alone = sum(timing.parts[label] for label in config.labels) + timing.parts["student"]
    timing.parts["rest"] = timing.milliseconds - alone - timing.parts["resize"]


def part_keys(step: Step) -> dict[str, str]:
    """Name each part so that it is known again in another step."""
    eight = "" if step.precision == "bf16" else f" {step.precision} {step.gate:g}"
    labels = step.config("cpu").labels
    keys = {n: spec.describe() + eight for n, spec in zip(labels, step.specs, strict=True)}
    own = f"{step.student}@{step.size} for {', '.join(keys)}: "
    return keys | {name: own + name for name in ("student", "backbone", "heads")}


def best_parts(rows: Iterable[StepTiming]) -> dict[str, float]:
    """Return the milliseconds of each part in the form in which it was fastest."""
    found: dict[str, float] = {}
    for row in rows:
        for name, key in part_keys(row.step).items():
            if name in row.parts:
                found[key] = min(row.parts[name], found.get(key, row.parts[name]))
    return found


def _model(
    timing: StepTiming,
    costs: list[Cost],
    ours: Cost,
    reports: Mapping[str, QuantReport],
    rate: float,
) -> None:
    names = {
        c.label: TeacherName.parse(s.name) for c, s in zip(costs, timing.step.specs, strict=True)
    }
    result: Estimate = estimate(
        {cost.label: (names[cost.label].name, cost.flops) for cost in costs},
        (ours.label, ours.flops),
        rate,
        compiled=timing.step.compiled,
        precision=timing.step.precision,
        eight={label: report.share for label, report in reports.items()} if reports else None,
    )
    timing.model = {label: 1e3 * seconds for label, seconds in result.teachers.items()}
    timing.model |= {"student": 1e3 * result.student, "step": 1e3 * result.total}
    timing.gflops = {c.label: c.flops / 1e9 for c in [*costs, ours]}


@dataclass(frozen=True)
class Clock:
    """Time on a device, by image."""

    device: torch.device
    batch: int
    rounds: int
    warmup: int

    def times(self, run: Callable[[], None]) -> list[float]:
        """Return the milliseconds an image of each round."""
        for _ in range(self.warmup):
            run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return [1e3 * s / self.batch for s in timed(run, self.device.type, self.rounds)]

    def median(self, run: Callable[[], None]) -> float:
        return statistics.median(self.times(run))


def _parts(bench: "StepBench", clock: Clock) -> Iterator[tuple[str, float]]:
    """Measure each part alone."""
    for label, teacher in bench.teachers.items():
        batch = Batch(bench.host.to(bench.device).at(teacher.size))
        yield label, clock.median(lambda t=teacher, b=batch: bench.run_teacher(t, b))
    yield "student", clock.median(bench.learn)
    if bench.form.alone:
        yield "backbone", clock.median(bench.learn_bare)
    yield "heads", clock.median(bench.learn_heads)
    yield "resize", clock.median(bench.resize)


@dataclass(frozen=True)
class _Model:
    """A student in training, and its backbone alone."""

    state: TrainState
    bare: Callable[[Tensor], Features]

    @classmethod
    def build(
        cls, step: Step, config: Distill, wide: Mapping[str, tuple], device: torch.device
    ) -> "_Model":
        torch.manual_seed(0)
        student = build_student(
            step.student, wide, size=step.size, **config.heads.options(), device=device
        )
        if step.channels_last:
            student = student.to(memory_format=torch.channels_last)
        state = TrainState.of(student, config.optim)
        bare = student.forward_features
        if step.compiled:
            student.answer = torch.compile(student.answer, dynamic=False)
            bare = torch.compile(student.forward_features, dynamic=False) if step.alone else bare
        return cls(state, bare)


class StepBench:
    """A student, its optimizer and its teachers, ready to be timed."""

    def __init__(
        self,
        step: Step,
        config: Distill,
        teachers: dict[str, Teacher],
        model: _Model,
        device: torch.device,
    ):
        self.form, self.config, self.teachers, self.device = step, config, teachers, device
        self.state, self.bare = model.state, model.bare
        self.student: Student = self.state.model
        side = max([step.size, *(max(t.size) for t in teachers.values())])
        host = pink_noise(step.batch, side, torch.device("cpu"))
        self.host = Batch(host.images.pin_memory()) if device.type == "cuda" else host
        self.normalizers = self._normalizers()
        plan = Plan(step.batch, step.batch, seed=0)
        self.task = DistillTask.of(
            config, self.student, plan, teachers, Calibration(self.normalizers, {}, {}), {}
        )
        self.coming = prefetch(
            self.slices(),
            self.task.targets,
            self.autocast,
            stream=side_stream(device, wanted=step.overlap),
        )
        self.small = Batch(self.host.to(device).at(self.student.size))

    def autocast(self):
        on = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    def slices(self) -> Iterator[Slice]:
        for step in itertools.count():
            yield Slice(step, 0, self.host.to(self.device))

    def run_teacher(self, teacher: Teacher, batch: Batch) -> None:
        with torch.no_grad(), self.autocast():
            teacher(Batch(batch.images))

    def resize(self) -> None:
        batch = self.host.to(self.device)
        for size in {self.student.size, *(t.size for t in self.teachers.values())}:
            batch.at(size)

    def learn(self) -> None:
        """Forward, backward and AdamW of the student with its heads, from a plain loss."""
        with self.autocast():
            answers = self.student(self.small)
        self._descend([t for f in answers.values() for t in f if t is not None])

    def learn_bare(self) -> None:
        with self.autocast():
            features = self.bare(self.small.at(self.student.size))
        self._descend([t for t in features if t is not None])

    def _descend(self, outputs: list[Tensor]) -> None:
        # the gradient of a sum costs nothing beside that of a network
        torch.autograd.backward(outputs, [t.expand_as(o) for o in outputs for t in [o.new_ones(1)]])
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)

    def learn_heads(self) -> None:
        """Forward and backward of the heads alone."""
        if not hasattr(self, "features"):
            with torch.no_grad(), self.autocast():
                found = self.student.features(self.small)
            self.features = Features(*(t.detach().requires_grad_() for t in found if t is not None))
        with self.autocast():
            answers = [head(self.features) for head in self.student.heads.values()]
        outputs = [t for f in answers for t in f if t is not None]
        torch.autograd.backward(outputs, [t.expand_as(o) for o in outputs for t in [o.new_ones(1)]])
        self.student.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Do what a run does between two batches."""
        counts = defaultdict(lambda: len(self.host.images))
        parts = [next(self.coming)]
        losses = take_step(
            Ranks(self.task, self.state), self.state, parts, counts, self.config, self.autocast
        )
        update(self.state, losses, self.config)
        self.state.unread.clear()

    def _normalizers(self) -> dict[str, Normalizer]:
        found = {}
        batch = self.host.to(self.device)  # whole, since another size would be compiled for
        for label, teacher in self.teachers.items():
            if teacher.spatial_dim is None:
                continue
            moments = Moments(teacher.spatial_dim, device=self.device)
            with torch.no_grad(), self.autocast():
                spatial = teacher(batch).spatial
                assert spatial is not None
                moments.update(spatial[:FITTED].float())
            found[label] = fit("phi_s", moments)
        return found
