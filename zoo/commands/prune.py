"""Make a smaller model of a trained one: where words, a parent, scores and cuts meet."""

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from zoo.axes import Axis, Shapes, named_shapes, numbered
from zoo.commands.prune_data import Samples, batches_of, read_samples, split
from zoo.commands.prune_depth import rank_layers, thin
from zoo.commands.prune_distill import CUT, Distillation, plan_distillation, print_training
from zoo.commands.prune_request import Prune
from zoo.commands.prune_write import before_of, scores_of, write_child
from zoo.students.prune.library import Parent
from zoo.students.prune.parent import open_parent
from zoo.students.prune.plan import Plan
from zoo.students.prune.proof import forward_of, prove, tensors
from zoo.students.prune.prune import Child, ScoreUnits, prune
from zoo.students.prune.ranking import BLIND, Measure
from zoo.students.prune.taylor import gives_logits
from zoo.train.device import autocast, device_of


def print_shapes(name: str) -> None:
    """Print a model's tensors with their named dims, and its axes with their sizes."""
    model = open_parent(name, dequantise=True).model
    shapes = named_shapes(model)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file has no width that names should be cut to
    console.print(_tensors(shapes, model.state_dict()))
    console.print(_axes(shapes))
    console.print(f"{shapes.count():,} numbers in {_num_tensors(shapes)} tensors")


def _tensors(shapes: Shapes, state: dict) -> Table:
    table = Table("tensor", "length", "named shape")
    rows: dict[tuple[str, ...], int] = {}
    for name, shape in shapes.tensors.items():
        scope = _scope(str(shape))
        row = (numbered(name), " ".join(map(str, state[name].shape)), numbered(scope))
        rows[row] = rows.get(row, 0) + 1
    for (name, lengths, shape), times in rows.items():
        table.add_row(name + (f"  x{times}" if times > 1 else ""), lengths, shape)
    return table


def _axes(shapes: Shapes) -> Table:
    table = Table("axis", "units", "tensors", "may be cut")
    rows: dict[tuple[str, str, str, str], int] = {}
    for axis, size in shapes.sizes.items():
        slots = len({slot.param for slot in shapes.slots(axis)})
        reason = f"no: {shapes.fixed[axis]}" if axis in shapes.fixed else "yes"
        row = (numbered(axis), str(size), str(slots), reason)
        rows[row] = rows.get(row, 0) + 1
    for (axis, size, slots, reason), times in rows.items():
        table.add_row(axis + (f"  x{times}" if times > 1 else ""), size, slots, reason)
    return table


def _scope(shape: str) -> str:
    """Leave out of a shape the module that its letters belong to."""
    return re.sub(r"[\w.]+\.(?=[\w#]+)", "", shape)


# Cutting


def prune_model(args: Prune, words: list[str]) -> Distillation | None:
    """Cut a model, print what became of it, and write it.

    Args:
        words: Options of `zoo distill`, with --distill.

    Returns:
        How the child is to be trained, if it is.
    """
    plan = Plan.parse(args.to)
    if args.data is None and (args.score not in BLIND or plan.layers or plan.sublayers):
        raise ValueError(
            "Scores of activations, and the choice of layers, look at data: give --data. Without, "
            "there are --score magnitude and --score random, for widths."
        )
    if plan.sublayers and args.form != "zoo":
        raise ValueError("No constructor leaves out branches of layers; give --form zoo.")
    device = device_of(args.device)
    if device.type == "mps":
        raise ValueError("Scores are summed in float64, which mps does not have; --device cpu.")
    parent = open_parent(args.model, dequantise=args.dequantise)
    shapes = named_shapes(parent.model)
    plan.sizes(shapes)  # refuses before data are read
    distillation = plan_distillation(args, parent, words) if args.distill else None
    parent.model.to(device)
    samples = None
    if args.data is not None:
        samples = read_samples(
            parent, args.data, number=args.samples, length=args.length, seed=args.seed
        )
        prove_axes(args, parent, shapes, list(plan.sizes(shapes)), samples)
    child, chosen, distances = _best(args, plan, parent, shapes, samples)
    print_child(shapes, child, chosen)
    if args.dry_run or args.out is None:
        if distillation:
            print_training(distillation, child)
        return None
    about = dict(
        model=args.model, to=args.to, score=chosen.name, distances=distances,
        before=before_of(shapes, child), scores=scores_of(child, chosen.units),
        without=list(child.built.emulated),
    )  # fmt: skip
    write_child(child, args.out / CUT if distillation else args.out, about)
    if distillation is None:
        print(f"model  {args.out}")
    return distillation


def prove_axes(
    args: Prune, parent: Parent, shapes: Shapes, axes: list[Axis], samples: Samples
) -> None:
    """Prove one axis of each form by permutation, with a control; random weights may be blind.

    Raises:
        ValueError: a table is wrong for this model, or these samples do not show an axis.
    """
    if args.model.endswith("/random"):
        return
    device = next(parent.model.parameters()).device
    forward = forward_of(parent.model, next(batches_of(samples, 2, device)))
    forms = {numbered(axis): axis for axis in axes}
    if forms:
        prove(shapes, dict(parent.model.state_dict()), forward, list(forms.values()))


class Chosen(NamedTuple):
    """The score that a child was cut by."""

    name: str
    units: ScoreUnits
    left_out: list[Axis]
    """Axes whose units were left out one by one, as no product reads them."""


def _best(
    args: Prune, plan: Plan, parent: Parent, shapes: Shapes, samples: Samples | None
) -> tuple[Child, Chosen, dict[str, float]]:
    """Cut by the score asked for; `auto`: by the one whose child is nearest to its parent.

    Returns:
        The child, its score, and the distance to the parent by each score that was tried.
    """
    device = next(parent.model.parameters()).device
    seen, held = split(samples, 0.25) if samples else ({}, {})

    def batches() -> Iterable[Samples]:
        return batches_of(seen, args.batch, device)

    if plan.sublayers:
        parent = thin(args, plan, parent, shapes, batches)
        shapes = named_shapes(parent.model)
    names = ("activation", "contribution") if args.score == "auto" else (args.score,)
    names = names if plan.sizes(shapes) else names[:1]
    measure = Measure(
        model=parent.model,
        shapes=shapes,
        batches=batches,
        axes=tuple(plan.sizes(shapes)),
        seed=args.seed,
        experts=args.expert_score,
    )

    def units(name: str) -> ScoreUnits:
        def score(axis: Axis) -> tuple[Tensor, tuple[Axis, ...]]:
            with autocast("auto", device):
                return measure.rank(name)(axis)

        return score

    probe = next(batches_of(held, 2, device), None)
    tried = []
    for name in names:
        child = prune(
            parent,
            plan,
            units(name),
            rank_layers=rank_layers(args, plan, parent, batches) if samples else None,
            probe=probe,
            form=args.form,
        )
        with autocast("auto", device):
            unseen = batches_of(held, args.batch, device)
            far = distance(parent.model, child.built.model, unseen)
        tried.append((far, child, name))
        if len(names) > 1:
            print(f"{name:12} distance to the parent on held-out data {far:.4f}")
    _, child, name = min(tried, key=lambda item: item[0])
    distances = {name: far for far, _, name in tried if held}
    return child, Chosen(name, units(name), list(measure.left_out)), distances


@torch.no_grad()
def distance(parent: nn.Module, child: nn.Module, batches: Iterable[Samples]) -> float:
    """Compare the first outputs: KL divergence of logits over a vocabulary, else cosine distance.

    It is 0 where nothing can be compared: there are no samples, or the output is what was cut.
    """
    total = count = 0.0
    for batch in batches:
        theirs, ours = (next(tensors(model(**batch))) for model in (parent, child))
        if theirs.shape != ours.shape:
            return 0.0
        logits = gives_logits(parent, batch, theirs)
        for pair in zip(ours, theirs, strict=True):  # one sample's logits in float32 at a time
            x, y = (output.float() for output in pair)
            if logits:
                logs = x.log_softmax(-1), y.log_softmax(-1)
                far = F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
            else:
                far = 1 - F.cosine_similarity(x, y, dim=-1)
            total, count = total + far.sum().item(), count + far.numel()
    return total / count if count else 0.0


def _num_tensors(shapes: Shapes) -> int:
    return len(shapes.tensors) - len(shapes.tied)


def print_child(before: Shapes, child: Child, chosen: Chosen) -> None:
    """Print sizes before and after, and the proof."""
    table = Table("axis", "before", "after", title=f"by {chosen.name}")
    rows: dict[tuple[str, str, str], int] = {}
    for axis, kept, _ in child.cuts:
        row = (numbered(axis), str(before.sizes[axis]), str(kept.shape[-1]))
        rows[row] = rows.get(row, 0) + 1
    for (axis, old, new), times in rows.items():
        table.add_row(axis + (f"  x{times}" if times > 1 else ""), old, new)
    for path, kept in child.layers.items():
        table.add_row(f"layers of {path}", "", ", ".join(map(str, kept)))
    for name, count in (("tensors", _num_tensors), ("numbers", Shapes.count)):
        table.add_row(name, f"{count(before):,}", f"{count(child.shapes):,}")
    Console().print(table)
    if chosen.left_out:
        print(f"left out one by one, as no product reads them: {', '.join(chosen.left_out[:6])}")
    if child.proof:
        print(f"child = masked parent: {child.proof.moved:.1e} of {child.proof.control:.1e}")
