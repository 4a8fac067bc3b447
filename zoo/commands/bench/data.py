"""`zoo bench data`: where the time of an image goes before a model sees it, for each core."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from zoo.commands.parse import parse
from zoo.train.ranges import COUNT, PIXELS, SHARE, check_ranges

if TYPE_CHECKING:
    from zoo.data.sources import Source
    from zoo.data.views import View

ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class DataArgs:
    data: Annotated[str, tyro.conf.Positional]
    """As zoo distill takes it: a folder of images, shards, tables, or embedded/photos."""
    size: Annotated[int, PIXELS] = 224
    """Side of the views."""
    scale: Annotated[tuple[float, float], SHARE] = (0.5, 1.0)
    """Least and largest share of an image that a crop covers."""
    images: Annotated[int, COUNT] = 256

    def __post_init__(self) -> None:
        check_ranges(self)


def main(argv: list[str]) -> None:
    """Measure what a core does for one training image: reading, decoding, cropping, collecting.

    Times are those that one core computes, so a busy machine does not change them much. Both
    decoders of zoo distill are timed in turn, on the same images and crops.

    Example: zoo bench data PHOTOS --size 224
    """
    args = parse(DataArgs, argv, "bench data", main.__doc__ or "")
    import torch
    from rich.console import Console

    from zoo.data.sources import open_source, spread
    from zoo.data.views import View
    from zoo.train.distill.setup import place_of

    torch.set_num_threads(1)  # as in a worker
    place = place_of(args.data)
    source = spread(open_source(Path(place) if "://" not in str(place) else place), args.images)
    views = {name: View(size=args.size, scale=args.scale, decoder=name)
             for name in ("pillow", "torch")}  # fmt: skip
    rows = measure(source, views)
    Console().print(table(rows, args.size, len(source)))


def measure(source: "Source", views: "dict[str, View]") -> dict[str, dict[str, float]]:
    """Return the milliseconds an image of each stage, by decoder; the median of some rounds."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in views}
    for _ in range(ROUNDS):
        for name, view in views.items():
            for stage, ms in _stages(source, view):
                found[name].setdefault(stage, []).append(ms)
    return {
        name: {stage: statistics.median(times) for stage, times in stages.items()}
        for name, stages in found.items()
    }


def _stages(source: "Source", view: "View") -> Iterable[tuple[str, float]]:
    import numpy as np
    import torch

    from zoo.data.images import EncodedImage

    data, ms = _timed(source.read, range(len(source)))
    yield "read", ms
    whole = {"pillow": lambda d: EncodedImage(d).rgb(), "torch": lambda d: EncodedImage(d).pixels()}
    _, decoding = _timed(whole[view.decoder], data)
    yield "decode (whole)", decoding
    draws = np.random.default_rng(0)
    arrays, viewing = _timed(lambda d: view.train(d, draws), data)
    yield "decode, crop, resize", viewing
    _, ms = _timed(lambda a: torch.from_numpy(np.ascontiguousarray(a)), arrays)
    yield "copy", ms
    tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
    _, ms = _timed(torch.stack, [tensors])
    yield "collect", ms / len(tensors)


def _timed(work: Callable[[Any], Any], items: Sequence[Any]) -> tuple[list[Any], float]:
    """Return what comes out, and the milliseconds of computing for an item."""
    began = time.process_time()
    found = [work(item) for item in items]
    return found, 1e3 * (time.process_time() - began) / len(items)


def table(rows: dict[str, dict[str, float]], size: int, count: int) -> Any:
    """Show the stages of both decoders, and what a core does in a second."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(
        title=f"ms an image and core, views of {size} px, {count} images", box=SIMPLE_HEAD
    )
    shown.add_column("")
    for name in rows:
        shown.add_column(name, justify="right")
    stages = list(next(iter(rows.values())))
    for stage in stages:
        shown.add_row(stage, *(f"{row[stage]:.3f}" for row in rows.values()))
    totals = [sum(row[s] for s in stages if s != "decode (whole)") for row in rows.values()]
    shown.add_row("all", *(f"{ms:.3f}" for ms in totals), style="bold")
    shown.add_row("img/s of a core", *(f"{1e3 / max(ms, 1e-9):,.0f}" for ms in totals))
    return shown
