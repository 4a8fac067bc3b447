"""What a run does to be fast: its teachers in their quickest form, their features from a cache."""

import dataclasses
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from zoo.data.plan import Plan
from zoo.data.sources import train_batches
from zoo.features import Batch
from zoo.teachers.cache import Cache
from zoo.train.distill.caching import break_even, fill, holds
from zoo.train.distill.phi_s import Balance
from zoo.train.distill.teachers import Precision, quicken
from zoo.train.loop import view_of
from zoo.train.run import Run

if TYPE_CHECKING:
    from zoo.commands.distill import Setting

Balances = Mapping[str, Balance]
SAMPLE = 16
"""Images on which the fidelity of 8-bit teachers is measured."""


def quicken_teachers(run: Run, setting: "Setting") -> None:
    """Bring the teachers into the precision and the form that the config asks for."""
    config = setting.config
    told = quicken(
        setting.teachers,
        precision=teacher_precision(setting),
        compiled=config.compile_teachers,
        sample=lambda: first_batch(setting),
    )
    if told:
        run.write_json("eight_bits.json", {n: dataclasses.asdict(t) for n, t in told.items()})
    for label, one in told.items():
        Console(stderr=True, highlight=False).print(f"{label}: {one.told()}")


def teacher_precision(setting: "Setting") -> Precision:
    """Resolve `auto`: bf16 where the run is, on CUDA."""
    config = setting.config
    halved = config.teacher_precision == "auto" and config.precision != "float32"
    return "bf16" if halved and setting.device.type == "cuda" else config.teacher_precision


def first_batch(setting: "Setting") -> Batch:
    """Give the training images of step 0, no more than a precision needs to be measured."""
    config = setting.config
    few = Plan(len(setting.train), min(config.batch, SAMPLE), config.seed)
    view = view_of(config, setting.teachers)
    part = next(train_batches(setting.train, view, few, steps=1))
    return Batch(part["images"], part["keys"]).to(setting.device)


def open_run_cache(run: Run, setting: "Setting", balances: Mapping[str, Balances]) -> Cache | None:
    """Open or make the feature cache that the config asks for.

    Raises:
        ValueError: the one that is there is stale.
    """
    config = setting.config
    if config.cache is None:
        return None
    fingerprints = json.loads((run.path / "teachers.json").read_text())
    view, precision = view_of(config, setting.teachers), teacher_precision(setting)
    held = holds(config, setting.train, view, setting.teachers, fingerprints, precision)
    spaces = {
        f"{label}/{key}": value
        for label, balance in balances[config.normalise].items()
        for key, value in balance.state_dict().items()
    }
    return Cache.prepare(config.cache, held, spaces)


def fill_run_cache(cache: Cache, setting: "Setting", balances: Balances) -> None:
    """Fill what is missing of a cache; what it costs and saves is printed beforehand."""
    config = setting.config
    if not cache.missing():
        return
    live = seconds_an_image(setting)
    for line in break_even(cache.holds, cache.path, live).told():
        Console(stderr=True, highlight=False).print(line)
    fill(
        cache,
        setting.teachers,
        balances,
        setting.train,
        view_of(config, setting.teachers),
        batch=config.batch,
        workers=config.workers,
        device=setting.device,
        autocast=setting.autocast,
    )


@torch.no_grad()
def seconds_an_image(setting: "Setting") -> float:
    """Time the teachers on one batch."""
    batch = first_batch(setting)
    began = 0.0
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        with setting.autocast():
            for teacher in setting.teachers.values():
                teacher(batch)
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - began) / len(batch.images)
