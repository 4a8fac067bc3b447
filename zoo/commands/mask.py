"""`zoo mask`: N of each M weights of a language model stay."""

import time
from functools import partial
from typing import Any

import torch

from zoo.commands.distill_text import TextSetup, evaluated, export, prepare
from zoo.data.plan import Plan
from zoo.data.text import TextFeed
from zoo.language.tokens import read_tokens
from zoo.students.prune.nm import Layers, Pattern, load_weights, prune_nm, sparse_layers
from zoo.train.config import to_json
from zoo.train.device import autocast, machine
from zoo.train.distill.mask_config import Mask
from zoo.train.distill.token_task import TokenTask
from zoo.train.loop import train
from zoo.train.masks import MaskTask, bake, learn_masks
from zoo.train.mesh import by_first, first_goes_first, slices_of_rank, with_slices
from zoo.train.run import Run, commit
from zoo.train.state import TrainState


def mask(config: Mask, *, resume: bool = False) -> Run:
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
        setup = prepare(config)
    layers = sparse_layers(setup.student, pattern)
    run = Run.reopen(config.out, config) if resume else Run.create(config)
    began = time.perf_counter()
    with run.discarded(unless=lambda: resume):
        results = dict(dense=evaluated(setup, setup.student))
        if config.method != "learned":
            load_weights(layers, prune_nm(layers, pattern, config.method, shown(setup, config)))
            results[config.method] = evaluated(setup, setup.student)
    if config.method == "learned":
        results |= learned(setup, config, run, layers, pattern, resume=resume)
    check_pattern(layers, pattern)
    by_first(partial(export, run, setup, setup.student))
    about = dict(
        results=results, layers=len(layers), commit=commit(), machine=machine(setup.device),
        seconds=time.perf_counter() - began, config=to_json(config),
    )  # fmt: skip
    run.write_json("about.json", about)
    return run


def learned(
    setup: TextSetup, config: Mask, run: Run, layers: Layers, pattern: Pattern, *, resume: bool
) -> dict[str, dict[str, float]]:
    """Train masks from their prior, and multiply them in; return what was measured on the way."""
    results, prior = {}, None
    setup.student.requires_grad_(False)
    with run.discarded(unless=lambda: resume):
        if config.prior != "none":
            prior = prune_nm(layers, pattern, config.prior, shown(setup, config))
        torch.manual_seed(config.seed)
        masks = learn_masks(layers, pattern, prior)
        results["begins"] = evaluated(setup, setup.student)
        logits = [found.logits for found in masks.values()]
        groups = [dict(params=logits, weight_decay=config.optim.weight_decay)]
        state = TrainState.of(setup.student.train(), config.optim, groups=groups)
        state.resume(run)
    plan = Plan(len(setup.train), config.batch, config.seed)
    slices = slices_of_rank(config.num_slices)
    feed = TextFeed(setup.train, plan, setup.device, config.num_slices, slices)

    def evaluate(model: Any, step: int) -> None:
        run.log("eval", step, evaluated(setup, model))

    inner = TokenTask(config.losses, setup.teachers)
    task = MaskTask(inner, layers, config, weight_reg=config.weight_reg)
    train(task, state, feed, config, run, evaluate=evaluate, title="learn masks")
    bake(layers)
    results["learned"] = evaluated(setup, setup.student)
    run.log("eval", config.steps, results["learned"])
    return results


def shown(setup: TextSetup, config: Mask):
    """Return what shows the model its calibration rows."""

    def run() -> None:
        rows = min(config.calibration, len(setup.train))
        setup.student.eval()
        with autocast(config.precision, setup.device):
            for start in range(0, rows, config.batch):
                tokens = setup.train.rows(range(start, min(start + config.batch, rows)))
                read_tokens(setup.student, tokens.to(setup.device))

    return run


def check_pattern(layers: Layers, pattern: Pattern) -> None:
    """Make sure of what is written: N of each M in every layer."""
    for name, layer in layers.items():
        assert pattern.holds(layer.weight), name
