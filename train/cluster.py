"""The cost model of many GPUs: bytes a step sends, seconds they take, failures. All of it modelled.

W = n g ranks stand on n nodes of g GPUs. B are the bytes of what is trained, in float32. In a step
of one slice a rank sends (rings within a node, one network card for each GPU between nodes):

    ddp    within 2 B (g - 1) / g                between 2 B (n - 1) / (n g)
    fsdp   within 3 B (W - 1) (g - 1) / (W g)    between 3 B (W - 1) / (W g)
    hsdp   within 3 B (g - 1) / g                between 2 B (n - 1) / (n g)

On one node fsdp is hsdp. fsdp gathers the weights before forward and before backward, and scatters
the gradients; hsdp does so within a node, and then adds up its shares of the gradients between
nodes.

Teachers whose F bytes of blocks are cut over a node (place=shard) add F (g - 1) / g within it for
each of their passes, and nothing between nodes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from zoo.files import checked_fields, read_json
from zoo.train.cost import CONSTANTS

BUCKET = 25 * 2**20
"""Bytes that DDP sends at once, its default."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU, and the links of its nodes."""

    tflops: float
    """Of a plain bfloat16 product."""
    memory_gb: float
    within: float
    """GB/s in one direction between the GPUs of a node."""
    between: float
    """GB/s of each GPU to other nodes."""
    of_node: int
    how: str
    """Which of these figures are measured."""
    hop_within: float
    """Seconds that a message takes to the next GPU of a node, however short it is."""
    hop_between: float
    """The same to another node."""


CLUSTER = CONSTANTS["cluster"]
HOPS = {name: CLUSTER[name] for name in ("hop_within", "hop_between")}
GPUS = {name: Gpu(**(HOPS | figures)) for name, figures in CONSTANTS["gpus"].items()}


@dataclass(frozen=True, kw_only=True)
class Links:
    """What `zoo bench links` found; units as in `Gpu`, None where it had nothing to measure."""

    how: str
    within: float | None = None
    hop_within: float | None = None
    between: float | None = None
    hop_between: float | None = None

    def __post_init__(self) -> None:
        for name in ("within", "between", "hop_within", "hop_between"):
            value = getattr(self, name)
            least = 0 if name.startswith("hop_") else 1e-6
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"{name} is {value}")


def with_links(gpu: Gpu, path: Path) -> Gpu:
    """Put measured links in the place of those that are assumed.

    Raises:
        ValueError: the file is not of `zoo bench links`, or its figures are none.
    """
    found = read_json(path)
    names = [field.name for field in fields(Links)]
    links = checked_fields(Links, {k: v for k, v in found.items() if k in names}, str(path))
    given = {name: getattr(links, name) for name in names[1:] if getattr(links, name) is not None}
    if not given:
        raise ValueError(f"{path} has no links; torchrun ... -m zoo bench links --out FILE does.")
    rest = "" if "between" in given else "; between nodes modelled"
    compute, _, _ = gpu.how.partition(";")
    return replace(gpu, **given, how=f"{compute}; links {links.how}{rest}")


class Layout(NamedTuple):
    """Nodes, and the GPUs of each."""

    nodes: int
    local: int

    @classmethod
    def of(cls, gpus: int, of_node: int) -> "Layout":
        """Put GPUs on nodes.

        Raises:
            ValueError: the last node would not be full.
        """
        if gpus > of_node and gpus % of_node:
            near = max(1, round(gpus / of_node)) * of_node
            raise ValueError(f"{gpus} GPUs do not fill nodes of {of_node}; {near} do.")
        return cls(max(1, gpus // of_node), min(gpus, of_node))

    @property
    def ranks(self) -> int:
        return self.nodes * self.local


class Traffic(NamedTuple):
    """What each rank sends in a step."""

    within: float
    """Bytes to GPUs of its node."""
    between: float
    """Bytes to other nodes."""
    gathers: int
    """Collectives with weights; none with ddp."""
    reductions: int
    """Collectives with gradients, of one kind: hsdp has as many of a second one."""
    seconds: float
    """All of it, if nothing else were done meanwhile."""


def traffic(
    method: str, size: float, layout: Layout, gpu: Gpu, *, units: int = 1, slices: int = 1
) -> Traffic:
    """Count what a rank sends in a step.

    Args:
        size: Bytes of the parameters that are trained.
        units: Parts that are gathered at once (fsdp, hsdp).
        slices: Of a rank; ddp sends once for all of them, the others for each.
    """
    n, g = layout
    if layout.ranks == 1:
        return Traffic(0.0, 0.0, 0, 0, 0.0)
    inner, outer, tree = (g - 1) / g, (n - 1) / n, math.log2(n)
    if method == "ddp":
        gathers, reductions = 0, math.ceil(size / BUCKET)
        within, between = 2 * size * inner, 2 * size * outer / g
        hops = reductions * 2 * (g - 1), reductions * 2 * tree
    elif method == "fsdp":  # one ring through all of them
        gathers, reductions = 2 * units * slices, units * slices
        around = 3 * slices * size * (layout.ranks - 1) / layout.ranks
        within, between = (around * inner, around / g) if n > 1 else (around, 0.0)
        hops = 3 * reductions * n * (g - 1), 3 * reductions * n * (n > 1)
    else:
        gathers, reductions = 2 * units * slices, units * slices
        within, between = 3 * slices * size * inner, 2 * slices * size * outer / g
        hops = 3 * reductions * (g - 1), reductions * 2 * tree
    seconds = within / gpu.within / 1e9 + between / gpu.between / 1e9
    seconds += hops[0] * gpu.hop_within + hops[1] * gpu.hop_between
    return Traffic(within, between, gathers, reductions, seconds)


def gathered(blocks: Sequence[int], passes: float, layout: Layout, gpu: Gpu) -> Traffic:
    """Count what a rank sends of frozen weights that are cut over the ranks of its node.

    Args:
        blocks: Bytes of the parts that are gathered at once.
        passes: Forward passes of a rank and a step, on average.
    """
    g = layout.local
    if g == 1 or not blocks:
        return Traffic(0.0, 0.0, 0, 0, 0.0)
    within = passes * sum(blocks) * (g - 1) / g
    hops = passes * len(blocks) * (g - 1)
    seconds = within / gpu.within / 1e9 + hops * gpu.hop_within
    return Traffic(within, 0.0, round(passes * len(blocks)), 0, seconds)


def exposed(sent: Traffic, student: float, *, slices: int = 1) -> float:
    """Return the seconds of a step in which ranks wait for the links.

    Gradients travel while the backward pass goes on, but for the last piece; with ddp that is the
    pass of the last slice. Gathered weights travel a unit ahead.

    Args:
        student: Seconds of its forward and backward passes; a third is forward.
    """
    if not sent.reductions:
        return 0.0
    if not sent.gathers:
        hidden = student * 2 / 3 / slices
        return max(sent.seconds / sent.reductions, sent.seconds - hidden)
    forward, backward = sent.seconds / 3, sent.seconds * 2 / 3
    ends = sent.seconds / sent.reductions
    return max(ends, max(0.0, forward - student / 3) + max(0.0, backward - student * 2 / 3))


def exposed_gathers(sent: Traffic, teacher: float, *, blocks: int) -> float:
    """Return the seconds of a step in which a cut teacher waits for its weights.

    The first block of each pass is waited for; the next one travels while a block runs.

    Args:
        teacher: Seconds of its passes.
        blocks: What it has.
    """
    return max(sent.seconds / blocks, sent.seconds - teacher) if sent.gathers else 0.0


class Failures(NamedTuple):
    """What interruptions cost; times in seconds."""

    between: float
    """Mean time from one to the next."""
    interval: float
    """Between two checkpoints, after Young (1974)."""
    lost: float
    """Share of the time: stalls, work done again, restarts."""


def failures(gpus: int) -> Failures:
    """Expect interruptions, one in so many GPU-hours (2407.21783, 3.3.4: 419 in 54 days of 16,384).

    Young: the interval is sqrt(2 d M), for a stall d and a mean time M between interruptions.
    """
    mean, stall = 3600 * CLUSTER["failure_hours"] / gpus, CLUSTER["stall"]
    interval = math.sqrt(2 * stall * mean)
    return Failures(mean, interval, stall / interval + (interval / 2 + CLUSTER["restart"]) / mean)
