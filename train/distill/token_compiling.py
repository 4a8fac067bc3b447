"""Language models whose layers are compiled, where that pays and they answer as before.

Layers that are alike share one code, so a deep model costs no more seconds than a shallow one.
Embeddings, the mask of a row's documents and the head stay as they are.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.compiled_blocks import allow_variants, repeated_blocks
from zoo.data.text import TextFeed
from zoo.language.moe import moe_layers
from zoo.language.tokens import Tokens, read_tokens
from zoo.teachers.from_language import LanguageTeacher
from zoo.train.device import autocast
from zoo.train.distill.token_config import DistillText
from zoo.train.mesh import any_rank, by_first, world

LEAST = 120.0
"""Seconds of plain steps: for fewer `auto` compiles nothing, since that takes up to a minute."""
ALIKE = 0.03
"""Features differ by less of their size: two kernels in 16 bits differ by up to a third of it."""
DROPS = ("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop")


@dataclass(frozen=True)
class Trial:
    """A model, and what its compiled layers are tried on: rows of a step's size."""

    model: Any
    rows: Tokens
    context: Callable[[], AbstractContextManager]
    at: Sequence[float] = field(default=())
    """Layers whose states training reads, as `read_tokens` takes them."""

    @property
    def layers(self) -> list[Any]:
        """The layers that are compiled."""
        return repeated_blocks(self.model.base_model)

    def answer(self) -> list[Tensor]:
        """Return its features and, if it learns, the gradient of a weight of its first layer."""
        first = next(iter(self.layers), self.model.base_model)
        weights = [p for p in first.parameters() if p.requires_grad]
        with torch.set_grad_enabled(bool(weights)), self.context():
            found = read_tokens(self.model, self.rows, at=self.at)
            kept = [x.detach() for x in (found.last, *found.hidden)]
            if not weights:
                return kept
            return [*kept, *torch.autograd.grad(_scalar(found.last), weights[-1])]

    def seconds(self) -> float:
        """Return what one answer takes."""
        _wait(self.rows)
        began = time.perf_counter()
        self.answer()
        _wait(self.rows)
        return time.perf_counter() - began

    def why_not(self) -> str:
        """Compile the layers, or say in a sentence why not and leave them as they are."""
        if moe_layers(self.model):
            return "its experts get another number of tokens in each step"
        if not self.layers:
            return "it has no layers that are alike"
        if any(getattr(self.model.config, name, 0.0) or 0.0 for name in DROPS):
            return "its dropout would draw other numbers"
        wanted = self.answer()
        try:
            for layer in self.layers:
                layer.compile(dynamic=False)
            found = self.answer()
        except Exception as error:  # a compiler may raise anything
            reason = next(iter(str(error).strip().splitlines()), "")[:200]
            reason = f"{type(error).__name__}: {reason}"
        else:
            errors = [_difference(a, b) for a, b in zip(found, wanted, strict=True)]
            if max(errors) < ALIKE:
                return ""
            reason = f"its answers differ by {max(errors):.1%} of their size"
        self.leave()
        return reason

    def leave(self) -> None:
        """Leave the layers as they are written."""
        for layer in self.layers:
            layer._compiled_call_impl = None


def compile_models(
    config: DistillText,
    student: Any,
    teachers: Mapping[str, LanguageTeacher],
    feed: TextFeed,
    step: int = 0,
) -> dict[str, str]:
    """Compile the layers of a run's models as `speed` says, and print what became of each.

    Args:
        student: As it will be trained, on the device on which the feed's rows are.
        step: From which the run goes on.

    Returns:
        `compiled`, or why not, by label; of no model if `speed` says so.

    Raises:
        ValueError: `speed` is compiled, and a model cannot be.
    """
    wanted, steps = config.speed == "compiled", config.steps - step
    device = next(student.parameters()).device
    if config.speed == "plain" or not steps or (not wanted and device.type != "cuda"):
        return {}
    rows, context = next(iter(feed.batches(0, 1))), partial(autocast, config.precision, device)
    models = {"student": student} | {label: one.model for label, one in teachers.items()}
    trials = {}
    for label, model in models.items():
        read = label in config.matched or (label == "student" and config.matched)
        trials[label] = Trial(model, rows, context, config.losses.hidden_at if read else ())
    reason = _why_none(config, trials, steps)
    if reason is None:
        allow_variants()
        found = {label: trial.why_not() for label, trial in trials.items()}
    else:
        found = dict.fromkeys(trials, reason)
    missing = {label: why for label, why in found.items() if why}
    if any_rank(wanted and bool(missing)):
        for trial in trials.values():
            trial.leave()
        label, why = next(iter(missing.items()), ("a model", "another process says why"))
        raise ValueError(f"--speed compiled: {label} is not compiled: {why}; auto leaves it out.")
    answers = {label: why or "compiled" for label, why in found.items()}
    line = ", ".join(f"{label} {answer}" for label, answer in answers.items())
    by_first(lambda: print(f"speed  {line}"))
    return answers


def _why_none(config: DistillText, trials: Mapping[str, Trial], steps: int) -> str | None:
    if config.spreads:
        return f"{config.spreads} spreads it over processes"
    if config.ranks in ("fsdp", "hsdp"):
        return "its weights are cut"
    if any(spec.place == "shard" for spec in config.specs):
        return "a teacher is cut by blocks (place=shard)"
    if config.speed == "compiled":
        return None
    if world() > 1:
        return "auto compiles on one process alone"
    for trial in trials.values():
        trial.answer()  # warms up
    plain = steps * config.num_slices * sum(trial.seconds() for trial in trials.values())
    if plain < LEAST:
        return f"plain, as its steps take {plain:.0f} s in all"
    return None


def _scalar(last: Tensor) -> Tensor:
    """Return a number that depends on each feature by another weight."""
    weights = torch.linspace(-1, 1, last.shape[-1], device=last.device)
    return (last.float() * weights).square().mean()


def _difference(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def _wait(rows: Tokens) -> None:
    if rows.ids.is_cuda:
        torch.cuda.synchronize(rows.ids.device)
