"""`zoo mask`: N of each M weights of a model stay."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.commands.mask.images import ImageModel
from zoo.commands.mask.text import TextModel
from zoo.students.prune.nm import (
    Layers,
    Pattern,
    load_weights,
    prune_nm,
    same_layers,
    sparse_layers,
)
from zoo.train.config import to_json
from zoo.train.device import device_of, machine
from zoo.train.distill.mask_config import ONE_SHOT, Mask, MaskImages
from zoo.train.loop import train
from zoo.train.masks import MaskTask, bake, learn_masks
from zoo.train.mesh import by_first, first_goes_first, with_slices
from zoo.train.run import Run, commit
from zoo.train.state import TrainState

Results = dict[str, dict[str, float]]
Subject = TextModel | ImageModel


def mask(config: Mask | MaskImages, *, resume: bool = False) -> Run:
    """Thin a model, measure it before and after, and write it.

    Raises:
        ValueError: something that the config names is wrong, or a run cannot be resumed. Nothing
            has been written unless training had begun.
        Interrupted: a signal came; the run can be resumed.
    """
    pattern, config = Pattern.parse(config.pattern), with_slices(config)
    if not resume:
        Run.refuse_existing(config.out)
    with first_goes_first():  # tokenises
        subject = TextModel(config) if isinstance(config, Mask) else ImageModel(config)
    layers = sparse_layers(subject.model, pattern)
    print_share(subject.model, layers, pattern)
    earlier = None
    if config.method == "learned" and config.prior not in (*ONE_SHOT, "none"):
        earlier = earlier_masks(subject, config.prior, layers, pattern)
    run = Run.reopen(config.out, config) if resume else Run.create(config)
    began = time.perf_counter()
    with run.discarded(unless=lambda: resume):
        results: Results = dict(dense=subject.measured())
        if config.method != "learned":
            load_weights(layers, prune_nm(layers, pattern, config.method, subject.show))
            results[config.method] = subject.measured()
    if config.method == "learned":
        results |= learned(subject, run, layers, pattern, earlier, resume=resume)
    check_pattern(layers, pattern)
    by_first(partial(subject.export, run))
    about = dict(
        results=results, layers=len(layers), commit=commit(),
        machine=machine(device_of(config.device)),
        seconds=time.perf_counter() - began, config=to_json(config),
    )  # fmt: skip
    run.write_json("about.json", about)
    return run


def earlier_masks(
    subject: Subject, place: str, layers: Layers, pattern: Pattern
) -> dict[str, Tensor]:
    """Return the thinned weights of an earlier run, whose zeros are its masks.

    Raises:
        ValueError: there is no such run, it is of another model, or of another pattern.
    """
    weights = same_layers(subject.opened(place), layers, place)
    dense = [name for name, weight in weights.items() if not pattern.holds(weight)]
    if dense:
        raise ValueError(
            f"{place} is not {pattern}: {len(dense)} of its layers ({', '.join(dense[:3])}) have "
            f"more weights; give a run of zoo mask --pattern {pattern} as --prior."
        )
    return weights


def learned(
    subject: Subject,
    run: Run,
    layers: Layers,
    pattern: Pattern,
    prior: Mapping[str, Tensor] | None,
    *,
    resume: bool,
) -> Results:
    """Train masks from their prior, and multiply them in; return what was measured on the way."""
    config: Any = subject.config
    subject.model.requires_grad_(False)
    with run.discarded(unless=lambda: resume):
        lesson = subject.lesson(run)
        if prior is None and config.prior != "none":
            prior = prune_nm(layers, pattern, config.prior, subject.show)
        torch.manual_seed(config.seed)
        masks = learn_masks(layers, pattern, prior)
        results = dict(begins=subject.measured())
        trained = [p for p in lesson.model.parameters() if p.requires_grad]
        groups = [dict(params=trained, weight_decay=config.optim.weight_decay)]
        state = TrainState.of(lesson.model, config.optim, groups=groups, parts=lesson.parts)
        state.resume(run)

    def soften() -> None:
        """Let the masks draw, and leave the frozen rest (dropout, batch statistics) as it is."""
        lesson.model.eval()
        for found in masks.values():
            found.train()

    def evaluate(model: Any, step: int) -> None:
        run.log("eval", step, subject.measured())
        soften()

    soften()
    task = MaskTask(lesson.task, layers, config, weight_reg=config.weight_reg)
    train(task, state, lesson.feed, config, run, evaluate=evaluate, title="learn masks")
    bake(layers)
    results["learned"] = subject.measured()
    run.log("eval", config.steps, results["learned"])
    return results


def print_share(model: nn.Module, layers: Layers, pattern: Pattern) -> None:
    """Say how much of a model is thinned: what is no linear layer of a block stays dense."""
    thinned = sum(layer.weight.numel() for layer in layers.values())
    total = sum(p.numel() for p in model.parameters())
    print(f"{pattern} in {len(layers)} linear layers: {thinned:,} of {total:,} weights.")


def check_pattern(layers: Layers, pattern: Pattern) -> None:
    """Make sure of what is written: N of each M in every layer."""
    for name, layer in layers.items():
        assert pattern.holds(layer.weight), name
