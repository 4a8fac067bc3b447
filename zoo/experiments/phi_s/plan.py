"""What the PHI-S experiment would cost, counted on the meta device without memory."""

from functools import partial

import torch

from zoo.experiments.phi_s.config import PhiSExperiment, sets_of
from zoo.experiments.phi_s.networks import networks
from zoo.experiments.tables import print_table
from zoo.flops import total_flops
from zoo.students.build import build_student
from zoo.train.device import device_of
from zoo.train.distill.plan_cost import matmul_rate
from zoo.train.run import Run

H200 = 790e12
"""FLOP/s of a bf16 matrix product on an H200, measured."""
EFFICIENCY = 0.15
"""Share of a plain matrix product's rate that stacked small students are assumed to reach: norms,
activations and losses wait for memory, not for arithmetic."""


@torch.no_grad()
def plan(config: PhiSExperiment) -> tuple[list[list[str]], float]:
    """Count the work of the experiment.

    Returns:
        The rows of the table, and the FLOPs of all training together.
    """
    images = torch.zeros(1, 3, config.size, config.size, device="meta")
    teachers = networks(config)
    forward, widths = {}, {}
    for label, (_, network) in teachers.items():
        network.to("meta").eval()
        forward[label] = total_flops(partial(network, images), network)
        features = network(images)
        widths[label] = tuple(None if f is None else f.shape[-1] for f in features)
    body, total = [], 0.0
    for label, (task, network) in teachers.items():
        work = 3 * forward[label] * config.teacher_steps * min(config.batch, 256)
        total += work
        body.append(_row(f"teacher {label} ({task})", network, forward[label], 1, work))
    for chosen in sets_of(config):
        student = build_student(
            "vit_tiny_patch16_224",
            widths,
            size=config.size,
            hidden=chosen.hidden,
            options=chosen.options,
            device="meta",
        )
        flops = total_flops(partial(student.answer, images), student)
        runs = len(chosen.arms) * chosen.seeds
        each = 3 * flops * runs + sum(forward.values()) * chosen.seeds
        work = each * config.steps * chosen.batch
        total += work
        name = f"students, {chosen.name}: {len(chosen.arms)} arms x {chosen.seeds} seeds"
        body.append(_row(name, student, flops, runs, work))
    return body, total


def _row(name: str, model: torch.nn.Module, flops: float, runs: int, work: float) -> list[str]:
    count = sum(p.numel() for p in model.parameters())
    return [name, f"{count / 1e6:.2f} M", f"{flops / 1e9:.3f}", str(runs), f"{work / 1e15:.3f}"]


def print_plan(config: PhiSExperiment) -> None:
    """Print the models, the runs, their FLOPs and the estimated time; write nothing.

    Raises:
        ValueError: `config.out` exists, or there is no such device.
    """
    Run.refuse_existing(config.out)
    device = device_of(config.device)
    body, total = plan(config)
    head = ["what", "parameters", "GFLOP an image, forward", "runs", "PFLOP in all"]
    print_table(f"{config.steps} steps of batch {config.batch}, {config.size} px", head, body)
    here, h200 = (total / (EFFICIENCY * rate) for rate in (matmul_rate(device), H200))
    print(
        f"{total / 1e15:.2f} PFLOP: about {here:,.0f} s of training on this {device.type}, "
        f"{h200:,.0f} s on an H200 (estimated at {EFFICIENCY:.0%} of the matrix product's rate; "
        "the run measures a step before it begins, and --seconds shortens it). Nothing was written."
    )
