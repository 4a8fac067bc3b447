"""The cells of the experiment: a tower and a seed, trained and measured; a tower's speed."""

import inspect
import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.data.plan import Plan, mix
from zoo.eval.language.recall import copying, phonebook, phonebooks
from zoo.eval.language.subject import TextSubject
from zoo.eval.registry import Scores
from zoo.eval.settings import CopyingSettings, PhonebookSettings
from zoo.experiments.bookkeeping import step_ms
from zoo.experiments.corpus import Corpus, standard_library
from zoo.experiments.mixers.config import MixersExperiment
from zoo.experiments.mixers.text import MixedFeed, RecallTask
from zoo.experiments.mixers.towers import build, count, quickened
from zoo.experiments.short_runs import CellRun, ShortTraining, short_training
from zoo.language.any_length import any_length
from zoo.language.tokenizers import ByteTokenizer
from zoo.train.config import Every
from zoo.train.device import autocast, device_of, tensor_cores
from zoo.train.distill.token_task import evaluate_text
from zoo.train.loop import train
from zoo.train.run import Run
from zoo.train.state import TrainState

SHOTS = 2
"""Names that are asked and answered before the one that is measured."""
ASKED = 0
"""Seed of all that is measured."""
NAME = re.compile(r"^([A-Z][a-z]{5}):", re.MULTILINE)
MEASURED = 32
"""Rows that are read at a time while a tower is measured."""
PREFIX = 16
"""Tokens that are read before a context is made as long as it should be."""


@dataclass(frozen=True)
class Cell:
    """What is trained and measured, or of which the speed is."""

    tower: str
    seed: int = 0
    context: int = 0
    """Tokens before those that are generated and timed; 0 for a training."""

    @property
    def key(self) -> str:
        """Name it among all cells."""
        what = f"context-{self.context}" if self.context else f"seed-{self.seed}"
        return f"{self.tower}-{what}"


def trainings(config: MixersExperiment) -> Iterator[Cell]:
    """Yield what is trained: all towers of a seed, then the next seed."""
    for seed in range(config.seeds):
        yield from (Cell(tower, seed) for tower in config.towers)


def speeds(config: MixersExperiment) -> Iterator[Cell]:
    """Yield the contexts behind which each tower generates."""
    for context in config.sizes.contexts:
        yield from (Cell(tower, context=context) for tower in config.towers)


class Bench:
    """Where towers are trained and measured: the text and the device."""

    def __init__(self, config: MixersExperiment):
        self.config, self.scale = config, config.sizes
        self.device = device_of(config.device)
        self.compiled = config.compile == "yes" or (
            config.compile == "auto" and self.device.type == "cuda"
        )

    @cached_property
    def corpus(self) -> Corpus:
        """The standard library's files."""
        return standard_library(self.scale.length)

    def books(self, samples: int) -> PhonebookSettings:
        """Return what is asked of phone books: so many of each size."""
        books = self.scale.books
        return PhonebookSettings(entries=books, samples=samples, shots=min(SHOTS, min(books) - 1))

    @cached_property
    def held_out(self) -> set[str]:
        """The names in the books that are measured, which nothing learns."""
        found = set[str]()
        for samples in (self.scale.samples, self.watched):
            for cell in phonebooks(ASKED, self.books(samples)).values():
                found |= {name for one in cell for name in NAME.findall(one.text)}
        return found

    @property
    def watched(self) -> int:
        """Samples of each size on the way."""
        return max(1, self.scale.samples // 8)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train and measure a cell, or time it; return its row.

        Raises:
            Interrupted: a signal came; the training is saved, and a later call goes on with it.
        """
        began = time.perf_counter()
        found = self.speed(cell) if cell.context else self.trained(cell)
        return dict(asdict(cell), key=cell.key, seconds=time.perf_counter() - began, **found)

    def trained(self, cell: Cell) -> dict[str, Any]:
        """Train a tower; return its bits a byte on the way and what it recalls at the end."""
        config, scale, steps = self.config, self.scale, self.config.steps
        torch.manual_seed(mix(cell.seed, 30))
        model = build(cell.tower, scale, positions=2 * scale.length).to(self.device)
        model = quickened(model, compiled=self.compiled)
        training = self.training(cell)
        run = CellRun.begin(training)
        state = TrainState.of(model.train(), training.optim)
        state.resume(run)
        marks = {math.ceil(steps * i / scale.watched) for i in range(1, scale.watched)}

        def evaluate(model: Any, step: int) -> None:
            if step in marks:
                run.log("eval", step, self.on_the_way(model))

        train(RecallTask(config.weight), state, self.feed(cell), training, run,
              evaluate=evaluate, title=cell.key)  # fmt: skip
        recalled, last = self.recalled(model, scale.samples), self.bits(model)
        ends = [last, *(recalled[f"{task}/inside/token"] for task in ("phonebook", "copying"))]
        curve = [*_curve(run), [steps, *ends]]
        size = scale.batch * scale.length
        return dict(
            parameters=count(model), curve=[[step * size, *rest] for step, *rest in curve],
            recalled=recalled, train_seconds=step_ms(run) * steps / 1e3,
        )  # fmt: skip

    def training(self, cell: Cell) -> ShortTraining:
        """Return how a cell is trained: saved at each quarter."""
        config, scale, steps = self.config, self.scale, self.config.steps
        training = short_training(
            steps=steps, batch=scale.batch, length=scale.length, rate=config.rate or scale.rate,
            seed=cell.seed, precision=config.precision,
        )  # fmt: skip
        every = Every(log=max(1, steps // 16), checkpoint=max(1, steps // 4), evaluate=1)
        return replace(training, every=every, out=folder(config, cell.key))

    def feed(self, cell: Cell) -> MixedFeed:
        """Return what a seed learns, the same for all towers."""
        config, scale = self.config, self.scale
        plan = Plan(len(self.corpus.train), scale.batch, mix(cell.seed, 32))
        return MixedFeed(
            self.corpus.train, plan, self.device, config.tasks, scale.drilled,
            round(config.growing * config.steps), self.held_out, cell.seed,
        )  # fmt: skip

    def on_the_way(self, model: Any) -> dict[str, float]:
        """Return bits a byte, and what of the answers is right, on an eighth of the samples."""
        training = model.training
        recalled = self.recalled(model.eval(), self.watched)
        bits = self.bits(model)
        model.train(training)
        return dict(
            bpb=bits, phonebook=recalled["phonebook/inside/token"],
            copying=recalled["copying/inside/token"],
        )  # fmt: skip

    def bits(self, model: Any) -> float:
        """Return bits a byte on the held-out rows."""
        rows = min(self.scale.held, len(self.corpus.held))
        with self.measuring(), autocast(self.config.precision, self.device):
            found = dict(
                evaluate_text(
                    model.eval(), {}, self.corpus.held, self.device, rows=rows, batch=MEASURED
                )
            )
        return found["bpb"]

    def recalled(self, model: Any, samples: int) -> dict[str, float]:
        """Return what share of the answers is right, in per cent, by the benchmarks' names.

        Beside them `TASK/inside/exact` and so on: the means of the sizes that were learnt, and of
        those `beyond`. The samples are the same for all towers and seeds.
        """
        scale = self.scale
        bf16 = self.config.precision != "float32" and self.device.type == "cuda"
        subject = TextSubject(
            name="tower", model=model.eval(), tokenizer=ByteTokenizer(), device=self.device,
            precision="amp" if bf16 else "float32", batch=MEASURED, seed=ASKED,
        )  # fmt: skip
        strings = CopyingSettings(lengths=scale.strings, samples=samples)
        with self.measuring():
            found = [
                *phonebook(subject, None, self.books(samples)), *copying(subject, None, strings)
            ]  # fmt: skip
        values = {name: part.value for name, part in found if isinstance(part, Scores)}
        sizes = dict(phonebook=scale.books, copying=scale.strings)
        for (task, measured), most in zip(sizes.items(), scale.drilled, strict=True):
            parts = dict(
                inside=[n for n in measured if n <= most],
                beyond=[n for n in measured if n > most],
            )
            for part, kind in product(parts, ("exact", "token")):
                if of := [values[f"{task}/{n}/{kind}"] for n in parts[part]]:
                    values[f"{task}/{part}/{kind}"] = sum(of) / len(of)
        return values

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within this context nothing is compiled: each length would be, again."""
        with torch.compiler.set_stance("force_eager"), tensor_cores(self.device):
            yield

    @torch.no_grad()
    def speed(self, cell: Cell) -> dict[str, Any]:
        """Time single steps of generation behind a context, by transformers' own cached pass.

        The state is that of a short text; attention's keys and values are repeated until there are
        `context` of them, which costs what as many read ones cost.
        """
        scale, context = self.scale, cell.context
        positions = context + PREFIX + 2 * scale.generated
        model = build(cell.tower, scale, positions=positions).to(self.device).eval()
        if self.config.precision != "float32" and self.device.type == "cuda":
            model = model.to(torch.bfloat16)
        ids = torch.arange(PREFIX, device=self.device).repeat(scale.texts, 1)
        word = "cache_params" if _takes(model, "cache_params") else "past_key_values"
        cache = getattr(model(input_ids=ids, use_cache=True), word)
        lengthen(cache, context)
        options: dict[str, Any] = {word: cache, "use_cache": True}
        token = ids[:, :1]
        times = []
        for step in range(2 * scale.generated):  # the first half warms up
            if _takes(model, "position_ids"):
                options["position_ids"] = torch.full_like(token, context + step)
            self._wait()
            began = time.perf_counter()
            with any_length():
                token = model(input_ids=token, **options).logits[:, -1:].argmax(-1)
            self._wait()
            times.append(time.perf_counter() - began)
        took = sorted(times[scale.generated :])[scale.generated // 2]
        return dict(parameters=count(model), tokens_a_second=scale.texts / took,
                    cache_bytes=cache_bytes(cache))  # fmt: skip

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def folder(config: MixersExperiment, key: str) -> Path:
    """Return where a training is saved until its row is there."""
    return config.out / "cells" / key


def _curve(run: Run) -> list[list[float]]:
    """Return what was measured on the way: the step, bits a byte, phone books and copying."""
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "eval"]
    return [[row[name] for name in ("step", "bpb", "phonebook", "copying")] for row in rows]


def _takes(model: Any, word: str) -> bool:
    return word in inspect.signature(model.forward).parameters


def lengthen(cache: Any, context: int) -> None:
    """Repeat attention's keys and values along the text until there are `context` of them."""
    for layer in cache.layers:
        held = vars(layer).get("tensors", vars(layer))
        for name in ("keys", "values"):
            found = held.get(name)
            if isinstance(found, Tensor) and found.ndim == 4:
                times = -(-context // found.shape[2])
                held[name] = found.repeat(1, 1, times, 1)[:, :, :context].contiguous()
    if hasattr(cache, "length"):
        cache.length = context


def cache_bytes(cache: Any) -> int:
    """Return the bytes of all that a cache holds."""
    found: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            for one in value.values():
                add(one)
        elif isinstance(value, list | tuple):
            for one in value:
                add(one)

    for layer in cache.layers:
        add(vars(layer))
    return sum(found.values())
