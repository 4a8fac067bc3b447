"""A detector from its config to its predictions: where data, training and evaluation meet."""

import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from zoo.eval.detect.benchmark import measure
from zoo.eval.detect.coco import CocoSplit, open_coco
from zoo.eval.detect.config import DRAWN, Detect
from zoo.eval.detect.detector import save_detector
from zoo.eval.detect.shapes import write_shapes
from zoo.eval.detect.spec import Detector
from zoo.eval.detect.training import (
    DetectFeed,
    DetectTask,
    start,
    train_detector,
    training_mode,
)
from zoo.eval.examples import Example
from zoo.eval.registry import Found, Parts, Picture
from zoo.train.device import autocast
from zoo.train.loop import take_step, update
from zoo.train.mesh import by_first, first_goes_first, is_first, with_slices
from zoo.train.prefetch import numbered
from zoo.train.run import Run
from zoo.train.state import TrainState
from zoo.train.step import Ranks


def detect(config: Detect, *, resume: bool = False) -> dict[str, float]:
    """Train, save, predict, measure and draw; return the numbers.

    Raises:
        ValueError: something that the config names is wrong, a run cannot be resumed, or a loss
            stopped being finite. Nothing has been written unless training had begun.
        Interrupted: a signal came; the run can be resumed.
    """
    config = with_slices(config)
    run = Run.reopen(config.out, config) if resume else Run.create(config)
    with run.discarded(unless=lambda: resume, on=(ValueError, OSError)):
        with first_goes_first():  # draws the shapes
            train, val = open_splits(config, config.out / "data")
        state = start(config, train.classes, run)
    evaluate = partial(log_evaluation, run, val)
    detector = train_detector(state, config, train, run, evaluate=evaluate)
    return by_first(partial(finish, run, config, detector, train, val))


def finish(
    run: Run, config: Detect, detector: Detector, train: CocoSplit, val: CocoSplit
) -> dict[str, float]:
    """Write a trained detector, measure and draw it; return the numbers."""
    save_detector(detector, config.out / "detector")
    predictions, pictures = config.out / "predictions.json", config.out / "pictures"
    device = next(detector.parameters()).device
    unreadable = {*train.unreadable, *run.skipped()}
    found = measure(
        detector, val, device, pictures=config.pictures, out=predictions, unreadable=unreadable
    )
    numbers = numbers_of(found, pictures)
    if unreadable:
        numbers["unreadable"] = float(len(unreadable))
    run.write_json("results.json", numbers)
    print_numbers(numbers, str(config.out))
    return numbers


def open_splits(config: Detect, place: Path) -> tuple[CocoSplit, CocoSplit]:
    """Open and check both parts; the second has the first one's classes, by name.

    Args:
        place: Where shapes are drawn, if they are the data.

    Raises:
        ValueError: something is wrong with one of them, or they do not go together.
    """
    folder = Path(config.data)
    if config.data == DRAWN and not folder.exists():
        folder = place
        if is_first():
            write_shapes(folder)
    agnostic = config.class_agnostic
    train, val = (open_coco(folder, part, class_agnostic=agnostic) for part in ("train", "val"))
    for split in (train, val):
        split.require_objects()
        if config.has_masks:
            split.require_masks()
    return train, val.with_classes(train.classes)


def log_evaluation(run: Run, split: CocoSplit, detector: Detector, step: int) -> float:
    """Measure a detector on the way, and log the numbers; return the AP of its boxes.

    Rank 0 does, and the others wait.
    """
    device = next(detector.parameters()).device
    found = by_first(lambda: numbers_of(measure(detector, split, device), run.path))
    run.log("eval", step, found)
    return found["detect/box/AP"]


def numbers_of(found: Iterable[Found], pictures: Path) -> dict[str, float]:
    """Return the numbers; write the pictures into a folder."""
    numbers = {}
    for name, value in found:
        if isinstance(value, Example):  # a run's page has one model
            continue
        if isinstance(value, Picture):
            pictures.mkdir(exist_ok=True)
            Image.fromarray(value.pixels).save(pictures / f"{name.rpartition('/')[2]}.png")
        else:
            numbers[name] = value.value if isinstance(value, Parts) else value
    return numbers


def print_plan(config: Detect) -> None:
    """Print what a run would be: data, detector, memory, speed of a step; nothing is written."""
    Run.refuse_existing(config.out)
    with tempfile.TemporaryDirectory() as place:
        train, val = open_splits(config, Path(place))
        state = start(config, train.classes)
        seconds = step_seconds(state, config, train)
    spec, device = state.model.spec, state.device.type
    parts = (state.model.backbone, state.model)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    table = Table(show_header=False, title=f"{config.detector} over {config.backbone}")
    weights = spec.source.weights or "random"
    table.add_row("backbone", f"{counts[0] / 1e6:,.2f} M parameters, weights {weights}")
    table.add_row("maps", f"strides {', '.join(map(str, spec.source.strides))}")
    table.add_row("detector", f"{counts[1] / 1e6:,.2f} M parameters, canvas {spec.size} px")
    for name, split in (("train", train), ("val", val)):
        objects = sum(len(split.objects(image)) for image in split.images)
        table.add_row(name, f"{len(split)} images, {objects} objects, {len(split.classes)} classes")
    table.add_row("speed", f"{seconds:.2g} s a step of {config.batch} on {device}")
    table.add_row("run", f"{config.steps} steps, about {seconds * config.steps / 60:.2g} min")
    Console().print(table)
    Console().print("Nothing was written.")


def step_seconds(state: TrainState, config: Detect, split: CocoSplit) -> float:
    """Time the second of two steps of the loop: no estimate of a detector's speed is better."""
    feed = DetectFeed.of(replace(config, workers=0), split.first(2 * config.batch), state)
    training_mode(state.model, config)
    precision = partial(autocast, config.precision, state.device)
    began = 0.0
    for step in range(2):
        began = time.perf_counter()
        parts = ((part, None) for part in numbered(feed, step, step + 1))
        losses = take_step(
            Ranks(DetectTask(), state), state, parts, feed.counts(step), config, precision
        )
        losses["loss"].item()
        update(state, losses, config)
    return time.perf_counter() - began


def print_numbers(numbers: dict[str, float], title: str) -> None:
    """Print a table of measures."""
    table = Table("measure", "value", title=title)
    for name, value in numbers.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)
