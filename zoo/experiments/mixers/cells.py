"""The cells of the experiment: a tower and a seed, trained and measured; a tower's speed."""

import inspect
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from zoo.data.plan import Plan, mix
from zoo.eval.language.recall import copying, phonebook
from zoo.eval.language.subject import TextSubject
from zoo.eval.registry import Scores
from zoo.eval.settings import CopyingSettings, PhonebookSettings
from zoo.experiments.corpus import Corpus, standard_library
from zoo.experiments.mixers.config import MixersExperiment
from zoo.experiments.mixers.text import SHOTS, MixedFeed
from zoo.experiments.mixers.towers import build, count, quickened
from zoo.experiments.short_runs import short_training, train_short
from zoo.language.tokenizers import ByteTokenizer
from zoo.train.device import autocast, device_of, tensor_cores
from zoo.train.distill.token_config import TokenLosses
from zoo.train.distill.token_task import TokenTask, evaluate_text

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

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train and measure a cell, or time it; return its row."""
        began = time.perf_counter()
        found = self.speed(cell) if cell.context else self.trained(cell)
        return dict(asdict(cell), key=cell.key, seconds=time.perf_counter() - began, **found)

    def trained(self, cell: Cell) -> dict[str, Any]:
        """Train a tower; return its bits a byte on the way and what it recalls at the end."""
        config, scale = self.config, self.scale
        torch.manual_seed(mix(cell.seed, 30))
        model = build(cell.tower, scale).to(self.device)
        model = quickened(model, compiled=self.compiled)
        plan = Plan(len(self.corpus.train), scale.batch, mix(cell.seed, 32))
        feed = MixedFeed(
            self.corpus.train, plan, self.device, config.tasks, scale.drilled, cell.seed
        )
        step_bytes, steps = scale.batch * scale.length, config.steps
        marks = {math.ceil(steps / 2**i) for i in range(1, 5)}
        curve: list[list[float]] = []

        def evaluate(model: Any, step: int) -> None:
            if step in marks:
                curve.append([step * step_bytes, self.bits(model)])

        training = short_training(
            steps=steps, batch=scale.batch, length=scale.length, rate=config.rate or scale.rate,
            seed=cell.seed, precision=config.precision,
        )  # fmt: skip
        task = TokenTask(TokenLosses(kl=0.0, ce=1.0, chunk=step_bytes), {})
        began = time.perf_counter()
        train_short(model, task, feed, training, evaluate=evaluate, title=cell.key)
        took = time.perf_counter() - began
        curve.append([steps * step_bytes, self.bits(model)])
        recalled = self.recalled(model, cell.seed)
        return dict(parameters=count(model), curve=curve, recalled=recalled, train_seconds=took)

    def bits(self, model: Any) -> float:
        """Return bits a byte on the held-out rows."""
        training = model.training
        model.eval()
        rows = min(self.scale.held, len(self.corpus.held))
        with self.measuring(), autocast(self.config.precision, self.device):
            found = dict(
                evaluate_text(model, {}, self.corpus.held, self.device, rows=rows, batch=MEASURED)
            )
        model.train(training)
        return found["bpb"]

    def recalled(self, model: Any, seed: int) -> dict[str, float]:
        """Return what share of the answers is right, in per cent, by the benchmarks' names."""
        scale = self.scale
        bf16 = self.config.precision != "float32" and self.device.type == "cuda"
        subject = TextSubject(
            name="tower", model=model.eval(), tokenizer=ByteTokenizer(), device=self.device,
            precision="amp" if bf16 else "float32", batch=MEASURED, seed=seed,
        )  # fmt: skip
        books = PhonebookSettings(
            entries=scale.books, samples=scale.samples, shots=min(SHOTS, min(scale.books) - 1)
        )
        strings = CopyingSettings(lengths=scale.strings, samples=scale.samples)
        with self.measuring():
            found = [*phonebook(subject, None, books), *copying(subject, None, strings)]
        return {name: part.value for name, part in found if isinstance(part, Scores)}

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
            token = model(input_ids=token, **options).logits[:, -1:].argmax(-1)
            self._wait()
            times.append(time.perf_counter() - began)
        took = sorted(times[scale.generated :])[scale.generated // 2]
        return dict(parameters=count(model), tokens_a_second=scale.texts / took,
                    cache_bytes=cache_bytes(cache))  # fmt: skip

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


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
