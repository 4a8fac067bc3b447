"""What a recipe would be on many GPUs: models without weights, and the cost model of a cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from zoo.commands.cluster.models import Models
from zoo.commands.cluster.step_time import (
    StepTime,
    form_of,
    seconds_of,
    step_time,
    student_seconds,
)
from zoo.commands.distill.on_gpus import on_gpus
from zoo.train.cluster import (
    GPUS,
    Failures,
    Gpu,
    Layout,
    Traffic,
    exposed,
    exposed_gathers,
    failures,
    gathered,
    traffic,
    with_links,
)
from zoo.train.cost import CONSTANTS, Estimate
from zoo.train.distill.config import Distill
from zoo.train.distill.memory import COMPILED_KEEPS, largest_slice
from zoo.train.distill.placement import away
from zoo.train.distill.plan_cost import forward_flops, passes, sampled
from zoo.train.distill.scaling import changes
from zoo.train.distill.speed import Speed
from zoo.train.distill.stages import Stages, plannable
from zoo.train.shard import Method, method_of, unit_sizes

FLOAT32 = 4


@dataclass(frozen=True)
class Column:
    """A run on one number of GPUs; bytes and seconds are those of a rank and a step."""

    config: Distill
    layout: Layout
    method: Method
    form: Speed
    """Whether models are compiled."""
    compute: Estimate
    """Of an image, on average."""
    time: StepTime
    """Of the rank that takes longest, as those of one group of a partition do."""
    sent: Traffic
    """Of what is trained."""
    gathered: Traffic
    """Of teachers whose blocks are cut (place=shard)."""
    waits: float
    teachers: float
    held: Mapping[str, float]
    """Bytes of what is trained, by kind."""
    activations: float
    failures: Failures

    @property
    def step(self) -> float:
        return self.time.seconds + self.waits

    @property
    def launching_bound(self) -> bool:
        return self.time.launching > self.time.computing

    @property
    def images(self) -> float:
        """Images of a rank, on average over the steps."""
        return self.config.samples / self.layout.ranks

    @property
    def collectives(self) -> int:
        twice = self.method == "hsdp" and self.layout.nodes > 1  # in a node, then between them
        return self.gathered.gathers + self.sent.gathers + self.sent.reductions * (1 + twice)

    @property
    def gpu_hours(self) -> float:
        run = self.config.steps * self.step * (1 + self.failures.lost)
        return self.layout.ranks * run / 3600


def column(config: Distill, models: Models, gpus: int, gpu: Gpu) -> Column:
    """Estimate a run that is already cut for so many GPUs."""
    layout = Layout.of(gpus, gpu.of_node)
    method = method_of(config.ranks, models.module, gpus)
    costs = list(models.teachers.values())
    flops = forward_flops(config, costs, models.student)
    form = form_of(config, models, gpus, gpu, method)
    compute = seconds_of(config, flops, gpu, form)
    time = step_time(config, models, gpus, gpu, form)
    slices = config.num_slices // gpus
    shares = {"ddp": 1, "fsdp": gpus, "hsdp": layout.local}[method]
    units = [FLOAT32 * size for size in unit_sizes(models.module, shares)]
    sent = traffic(method, sum(units), layout, gpu, units=len(units), slices=slices)
    waits = [
        exposed(sent, seconds, slices=slices)
        for seconds in student_seconds(config, compute.student, gpus)
    ]
    gathers = [
        gathered(cost.blocks, slices * sampled(config, spec), layout, gpu)
        for cost, spec in zip(costs, config.teachers, strict=True)
    ]
    images = config.samples / gpus
    behind = [
        exposed_gathers(one, images * seconds, blocks=len(cost.blocks))
        for one, cost, seconds in zip(gathers, costs, compute.teachers.values(), strict=True)
    ]
    copies = dict(weights=1, gradients=1, moments=2, average=bool(config.optim.ema))
    held = {name: count * sum(units) / shares for name, count in copies.items()}
    # a part that is gathered, and the next one
    held["gathered"] = 0.0 if method == "ddp" else 2 * max(units)
    return Column(
        config, layout, method, form, compute, time, sent,
        Traffic(*map(sum, zip(*gathers, strict=True))),
        sum(waits) / len(waits) + sum(behind),
        sum(cost.bytes - away(cost.blocks, layout.local) for cost in costs), held,
        models.saved * largest_slice(config)[1] * (COMPILED_KEEPS if form.blocks else 1),
        failures(gpus),
    )  # fmt: skip


ROWS = (
    ("nodes x GPUs", "", lambda c: f"{c.layout.nodes:,} x {c.layout.local}"),
    ("batch (mean)", "recipe", lambda c: f"{c.config.batch:,} ({c.config.samples:,.0f})"),
    ("steps", "recipe", lambda c: f"{c.config.steps:,}"),
    ("rate", "recipe", lambda c: f"{c.config.optim.lr:.2g}"),
    ("ranks", "", lambda c: c.method),
    (
        "sent within a node, GB", "counted",
        lambda c: f"{(c.sent.within + c.gathered.within) / 1e9:,.2f}",
    ),
    ("  of it teachers' blocks", "counted", lambda c: f"{c.gathered.within / 1e9:,.2f}"),
    ("sent between nodes, GB", "counted", lambda c: f"{c.sent.between / 1e9:,.2f}"),
    ("collectives", "counted", lambda c: f"{c.collectives:,}"),
    (
        "communication, ms", "modelled",
        lambda c: f"{1e3 * (c.sent.seconds + c.gathered.seconds):,.1f}",
    ),
    ("  of it exposed, ms", "modelled", lambda c: f"{1e3 * c.waits:,.1f}"),
    ("computing, ms", "modelled", lambda c: f"{1e3 * c.time.computing:,.0f}"),
    ("launching, ms", "modelled", lambda c: f"{1e3 * c.time.launching:,.0f}"),
    ("step, ms", "modelled", lambda c: f"{1e3 * c.step:,.0f}"),
    ("img/s", "modelled", lambda c: f"{c.config.samples / c.step:,.0f}"),
    ("teachers' weights, GB", "counted", lambda c: f"{c.teachers / 1e9:,.1f}"),
    ("student's weights, GB", "counted", lambda c: f"{c.held['weights'] / 1e9:,.1f}"),
    ("  gradients", "counted", lambda c: f"{c.held['gradients'] / 1e9:,.1f}"),
    ("  moments of AdamW", "counted", lambda c: f"{c.held['moments'] / 1e9:,.1f}"),
    ("  average", "counted", lambda c: f"{c.held['average'] / 1e9:,.1f}"),
    ("  gathered weights", "modelled", lambda c: f"{c.held['gathered'] / 1e9:,.1f}"),
    ("activations, GB", "modelled", lambda c: f"{c.activations / 1e9:,.1f}"),
    ("a failure every, h", "modelled", lambda c: f"{c.failures.between / 3600:,.0f}"),
    ("checkpoint every, min", "modelled", lambda c: f"{c.failures.interval / 60:,.0f}"),
    ("  in steps", "modelled", lambda c: f"{c.failures.interval / c.step:,.0f}"),
    ("lost to failures", "modelled", lambda c: f"{c.failures.lost:.1%}"),
    ("time, h", "modelled", lambda c: f"{c.gpu_hours / c.layout.ranks:,.1f}"),
    ("GPU-hours", "modelled", lambda c: f"{c.gpu_hours:,.0f}"),
)  # fmt: skip
"""What is said of a rank and a step; where it comes from; how it is written."""


def print_cluster_plan(
    stages: Stages,
    words: list[str],
    counts: tuple[int, ...],
    gpu: str,
    links: Path | None = None,
) -> None:
    """Print each stage of a recipe on each number of GPUs.

    Args:
        links: What `zoo bench links` wrote.
    """
    kind = with_links(GPUS[gpu], links) if links else GPUS[gpu]
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    for name, config in plannable(stages).items():
        runs = {count: on_gpus(config, words, count) for count in counts}
        models = Models.of(config)
        columns = [column(run, models, count, kind) for count, run in runs.items()]
        console.print(parts(config, models, columns[0], title=name))
        table = Table(title=f"A rank and a step, on {gpu.upper()}")
        for head in ("", "figure is", *(f"{count:,}" for count in counts)):
            table.add_column(head, justify="left" if head in ("", "figure is") else "right")
        for what, how, text in ROWS:
            table.add_row(what, how, *map(text, columns))
        console.print(table)
        for line in notes(config, columns, gpu, kind):
            console.print(line, highlight=False)


def parts(config: Distill, models: Models, first: Column, *, title: str) -> Table:
    """List the models: what they are, what they launch, and the seconds that a GPU is taken to
    need."""
    table = Table(title=f"Models {title}".strip())
    time = f"ms/image\n(modelled, on {first.layout.ranks:,})"
    for head in ("model", "parameters", "GFLOP/image\n(counted)", "operators\n(counted)", time):
        table.add_column(head, justify="left" if head == "model" else "right")
    *teaching, learning = forward_flops(config, list(models.teachers.values()), models.student)
    operators = models.operators
    rows = [
        (f"teacher {label}", cost.params, work, operators.teachers.get(label),
         first.compute.teachers[label])
        for (label, cost), work in zip(models.teachers.items(), teaching, strict=True)
    ]  # fmt: skip
    rows += [(f"student {config.student}", models.student.params, passes(config) * learning,
              operators.student + operators.average, first.compute.student)]  # fmt: skip
    for name, params, work, count, seconds in rows:
        launched = "not counted" if count is None else f"{count:,}"
        cells = f"{params / 1e6:,.0f} M", f"{work / 1e9:,.0f}", launched, f"{1e3 * seconds:,.2f}"
        table.add_row(name, *cells)
    return table


def forms(columns: Sequence[Column]) -> list[str]:
    """Say on how many GPUs a run is computed in which form."""
    found: dict[str, list[str]] = {}
    for one in columns:
        found.setdefault(one.form.describe(), []).append(f"{one.layout.ranks:,}")
    return [
        f"Form of the steps on {', '.join(counts)} GPU{'s' * (counts != ['1'])}: {form}."
        for form, counts in found.items()
    ]


def notes(config: Distill, columns: list[Column], gpu: str, kind: Gpu) -> list[str]:
    """Say what the figures rest on, and what was changed or does not fit.

    Args:
        gpu: The name of its kind.
    """
    shares, last = CONSTANTS["shares"], columns[-1]
    lines = [
        f"Rates of {gpu.upper()}: {kind.how}. Networks' shares of it: {shares['how']} on "
        f"{shares['machine']}, {shares['date']}. Nothing here was run on several GPUs.",
        *forms(columns),
        "A step takes the longer of computing and launching, which go on beside each other, and "
        "what is exposed. Reading data, the optimizer and DAMP are taken to take no time.",
    ]
    if bound := [f"{one.layout.ranks:,}" for one in columns if one.launching_bound]:
        lines.append(
            f"Launching is the limit on {', '.join(bound)} GPU{'s' * (bound != ['1'])}: larger "
            "slices would hardly take longer (fewer --slices, a larger --batch)."
        )
    if config.losses.mesa and any(one.sent.gathers for one in columns):
        lines.append("What is sent leaves out the gathers of MESA's average.")
    if last.config.batch != config.batch:
        lines.append(
            f"Without --batch it grows with the GPUs ({config.batch // config.num_slices} images "
            "each), the rate with its square root (for AdamW: 2205.10287; an assumption far from "
            "the recipe's own batch), and the steps shrink."
        )
        lines.append(f"On {last.layout.ranks:,}: {' '.join(changes(config, last.config))}")
    for one in columns:
        held = (one.teachers + sum(one.held.values()) + one.activations) / 1e9
        if held > kind.memory_gb:
            lines.append(
                f"On {one.layout.ranks:,} GPUs a rank holds {held:,.0f} GB, and a {gpu.upper()} "
                f"has {kind.memory_gb:g}: it does not fit. Give --ranks fsdp or more slices."
            )
    return lines
