"""What a run on text would be, without its weights: models on the meta device, bytes, tokens/s."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from zoo.commands.distill.plan import NODE, size_text
from zoo.commands.distill.text import TextSetup, hidden_match, prepare
from zoo.language.expert_parallel import expert_parameters
from zoo.students.prune.nm import Pattern, sparse_layers
from zoo.train.device import device_of
from zoo.train.distill import placement
from zoo.train.distill.mask_config import Mask
from zoo.train.distill.plan_cost import EFFICIENCY, count_parameters, matmul_rate
from zoo.train.distill.token_config import DistillText
from zoo.train.distill.token_placement import block_bytes
from zoo.train.run import Run


def print_text_plan(config: DistillText, *, student: Any = None) -> None:
    """Print models, bytes and the estimated speed of a distillation of language models.

    Args:
        student: In place of the one that the config names.
    """
    setup = _prepared(config)
    setup.student = student or setup.student
    hidden = hidden_match(setup)
    trained = count_parameters(setup.student) + (count_parameters(hidden) if hidden else 0)
    _print(setup, [f"trained: all {trained / 1e6:,.2f} M parameters of the student"], trained)


def print_mask_plan(config: Mask) -> None:
    """Print what would be thinned, and what a learned mask would cost."""
    pattern = Pattern.parse(config.pattern)
    setup = _prepared(config)
    layers = sparse_layers(setup.student, pattern)
    weights = sum(layer.weight.numel() for layer in layers.values())
    learned = config.method == "learned"
    logits = weights // pattern.group * len(pattern.masks()) if learned else 0
    rows = 0 if config.method == "magnitude" else min(config.calibration, len(setup.train))
    lines = [
        f"thinned: {weights / 1e6:,.2f} M weights of {len(layers)} layers to {pattern}",
        f"trained: {logits / 1e6:,.2f} M logits of masks, the weights frozen"
        if learned
        else f"trained: nothing; {config.method} looks at {rows} rows",
    ]
    _print(setup, lines, logits)


def _prepared(config: DistillText) -> TextSetup:
    Run.refuse_existing(config.out)
    device_of(config.device)  # refuses one that is not there
    return prepare(config, meta=True)


def _print(setup: TextSetup, lines: Sequence[str], trained: int) -> None:
    config, device = setup.config, device_of(setup.config.device)
    table = Table(title="Models")
    for column in ("model", "parameters", "GFLOP/token"):
        table.add_column(column, justify="left" if column == "model" else "right")
    teachers = {f"teacher {label}": t.model for label, t in setup.teachers.items()}
    flops = {}
    for name, model in {**teachers, "student": setup.student}.items():
        flops[name] = token_flops(model)
        row = (f"{count_parameters(model) / 1e6:,.2f} M", f"{flops[name] / 1e9:,.4g}")
        table.add_row(name, *row)
    console = Console()
    console.print(table)
    frozen = sum(count_parameters(model) for model in teachers.values())
    experts = sum(p.numel() for _, p in expert_parameters(setup.student))
    away = experts - experts // config.experts  # on other processes
    held = count_parameters(setup.student) - away + (trained - away) * (3 + bool(config.optim.ema))
    held = 4 * (frozen + held)
    lines = [
        *lines,
        f"text: {len(setup.train):,} rows of {config.length} tokens, {len(setup.val):,} held out",
        f"memory: {size_text(held)} of weights, gradients and the optimizer's state",
    ]
    cut = [setup.teachers[n].model for n, spec in setup.specs.items() if spec.place == "shard"]
    if saved := sum(placement.away(block_bytes(model), NODE) for model in cut):
        lines.append(
            f"place=shard: on {NODE} processes of a node each holds {size_text(held - saved)}"
        )
    if config.spreads:
        lines.append(
            f"each process: {config.length // config.sequence} tokens of a row, "
            f"{(experts - away) / 1e6:,.2f} of {experts / 1e6:,.2f} M weights of the experts"
        )
    if trained:
        work = config.samples * (sum(flops.values()) + 2 * flops["student"])
        speed = EFFICIENCY * matmul_rate(device) / work
        lines += [
            f"work: {work / 1e12:,.2g} TFLOP a step of {config.samples:,} tokens, attention to the "
            f"context left out; about {speed:.2g} steps/s = {speed * config.samples:,.0f} tokens/s "
            f"on this {device.type} (estimated at {EFFICIENCY:.0%} of its matrix product)",
            f"{config.steps} steps: about {config.steps / speed / 3600:.2g} h",
        ]
    for line in [*lines, "Nothing was written."]:
        console.print(line, highlight=False)


def token_flops(model: Any) -> float:
    """Count the FLOPs of a language model's products with its weights, for one token.

    Two for each weight of a matrix; of packed experts, those that a token is given to.
    """
    config, total = model.config, 0.0
    experts = getattr(config, "num_local_experts", 0) or getattr(config, "num_experts", 0)
    given = getattr(config, "num_experts_per_tok", 0) or 0
    table = model.get_input_embeddings().weight
    for weight in model.parameters():
        if weight is table and table is not model.get_output_embeddings().weight:
            continue  # it is looked up
        packed = weight.ndim == 3 and experts and weight.shape[0] == experts
        total += 2 * weight.numel() * (given / experts if packed else 1) * (weight.ndim > 1)
    return total
