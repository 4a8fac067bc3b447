"""Make a smaller model of a trained one: where words, a parent, scores and cuts meet."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import zoo.multimodal  # noqa: F401  registers the towers
from zoo.axes import Axis, Shapes, named_shapes, numbered
from zoo.commands.prune.data import Samples, batches_of, read_samples, split
from zoo.commands.prune.depth import rank_layers, thin
from zoo.commands.prune.distill import CUT, Distillation, plan_distillation, print_training
from zoo.commands.prune.image_text import check_form, one_sample, takes_both
from zoo.commands.prune.request import Prune
from zoo.commands.prune.search import cost_model, search
from zoo.commands.prune.write import before_of, scores_of, write_child
from zoo.students.prune.budget import Budget, split_budgets
from zoo.students.prune.layers import block_influence
from zoo.students.prune.library import Parent
from zoo.students.prune.parent import open_parent
from zoo.students.prune.plan import Plan, in_part
from zoo.students.prune.proof import forward_of, prove, tensors
from zoo.students.prune.prune import Child, ScoreUnits, prune
from zoo.students.prune.ranking import BLIND, Measure
from zoo.students.prune.similarity import linear_cka
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
    budgets, plan, device = read_request(args)
    parent = open_parent(args.model, dequantise=args.dequantise)
    check_form(parent, args.form)
    if args.part != "all" and not takes_both(parent):
        raise ValueError(
            f"{type(parent.model).__name__} has no parts; --part is of a model of images and text."
        )
    shapes = named_shapes(parent.model)
    plan.sizes(shapes)  # refuses before data are read
    distillation = plan_distillation(args, parent, words) if args.distill else None
    parent.model.to(device)
    samples = None
    if args.data is not None:
        samples = read_samples(
            parent, args.data, number=args.samples, length=args.length, seed=args.seed
        )
    if takes_both(parent):
        parent = replace(parent, sample=one_sample(parent, samples))
    cutter, found = Cutter(args, parent, plan, samples), None
    if budgets:
        found = search(args, budgets, plan, parent, shapes, cutter, distillation)
        if args.dry_run:
            return None
        plan = found.best
    if samples is not None:
        prove_axes(args, parent, shapes, list(plan.sizes(shapes)), samples)
    child, chosen, distances = _best(cutter, plan)
    print_child(shapes, child, chosen)
    if found:
        found.print_latency(child.built.model)
    if args.dry_run or args.out is None:
        print_costs(args, parent, shapes, child)
        if distillation:
            print_training(distillation, child)
        return None
    about = dict(
        model=args.model, to=args.to, score=chosen.name, distances=distances,
        before=before_of(shapes, child), scores=scores_of(child, chosen.units),
        without=list(child.built.emulated),
    )  # fmt: skip
    files = found.files() if found else {}
    about |= dict(search=found.as_json()) if found else {}
    write_child(child, args.out / CUT if distillation else args.out, about, files)
    if found:
        found.forget()
    if distillation is None:
        print(f"model  {args.out}")
    return distillation


def read_request(args: Prune) -> tuple[tuple[Budget, ...], Plan, torch.device]:
    """Read what stays, and where to work; what cannot be is refused before anything is opened.

    Raises:
        ValueError: words exclude each other, or ask for data that are not given.
    """
    budgets, rest = split_budgets(args.to)
    if args.part != "all":
        rest = ",".join(in_part(word, args.part) for word in rest.split(",") if word)
    plan = Plan.parse(rest) if rest or not budgets else Plan({})
    layers = plan.layers or plan.stages or plan.sublayers or plan.parts
    looks = args.score not in BLIND or layers
    if args.data is None and (not args.dry_run if budgets else looks):
        raise ValueError(
            "Scores of activations, and the choice of layers, look at data: give --data. Without, "
            "there are --score magnitude and --score random, for widths."
        )
    if plan.sublayers and budgets:
        raise ValueError("A budget counts whole layers: cut attention_layers or ffn_layers alone.")
    if plan.sublayers and args.form != "zoo":
        raise ValueError("No constructor leaves out branches of layers; give --form zoo.")
    device = device_of(args.device)
    if device.type == "mps":
        raise ValueError("Scores are summed in float64, which mps does not have; --device cpu.")
    return budgets, plan, device


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


class Cutter:
    """Cuts a parent by plans and scores; what its samples show of it is measured once.

    Args:
        plan: Its axes are scored; for a budget all that may be cut.
    """

    def __init__(self, args: Prune, parent: Parent, plan: Plan, samples: Samples | None):
        self.args, self.parent, self.samples = args, parent, samples
        self.shapes = named_shapes(parent.model)
        self.device = next(parent.model.parameters()).device
        self.seen, self.held = split(samples, 0.25) if samples else ({}, {})
        budgets, _ = split_budgets(args.to)
        every = [axis for axis in self.shapes.sizes if axis not in self.shapes.fixed]
        axes = tuple(every if budgets else plan.sizes(self.shapes))
        both = args.score == "auto"
        self.names: tuple[str, ...] = (
            ("activation", "contribution")[: 2 if axes else 1] if both else (args.score,)
        )
        self.measure = Measure(
            model=parent.model,
            shapes=self.shapes,
            batches=self.batches,
            axes=axes,
            seed=args.seed,
            experts=args.expert_score,
        )
        self.influences: dict[str, Tensor] = {}

    def batches(self) -> Iterable[Samples]:
        """Return the samples that scores look at."""
        return batches_of(self.seen, self.args.batch, self.device)

    def cut(
        self, plan: Plan, name: str, rank: Callable[[str, int], Tensor] | None = None
    ) -> tuple[Child, float]:
        """Cut by one score; return the child and its distance from the parent on held-out data."""
        child = prune(
            self.parent,
            plan,
            self.units(name),
            rank_layers=rank or self.influence,
            probe=next(batches_of(self.held, 2, self.device), None),
            form=self.args.form,
        )
        return child, self.far(child.built.model)

    def far(self, child: nn.Module) -> float:
        """Return how far a model is from the parent on held-out data."""
        with autocast("auto", self.device):
            batches = batches_of(self.held, self.args.batch, self.device)
            return distance(self.parent.model, child, batches)

    def units(self, name: str) -> ScoreUnits:
        """Return a score of the units of each axis."""

        def score(axis: Axis) -> tuple[Tensor, tuple[Axis, ...]]:
            with autocast("auto", self.device):
                return self.measure.rank(name)(axis)

        return score

    @property
    def influence(self) -> Callable[[str, int], Tensor] | None:
        """What ranks the layers of a list for any number of them, if there are samples."""
        return self._influence if self.seen else None

    def _influence(self, path: str, length: int) -> Tensor:
        del length
        if path not in self.influences:
            with autocast("auto", self.device):
                found = block_influence(self.parent.model, path, self.batches())
            self.influences[path] = found
        return self.influences[path]


def _best(cutter: Cutter, plan: Plan) -> tuple[Child, Chosen, dict[str, float]]:
    """Cut by the score asked for; `auto`: by the one whose child is nearest to its parent.

    Returns:
        The child, its score, and the distance to the parent by each score that was tried.
    """
    args, parent = cutter.args, cutter.parent
    if plan.sublayers:
        parent = thin(args, plan, parent, cutter.shapes, cutter.batches)
        cutter = Cutter(args, parent, plan, cutter.samples)
    rank = rank_layers(args, plan, parent, cutter.batches) if cutter.seen else None
    tried = []
    for name in cutter.names:
        child, far = cutter.cut(plan, name, rank)
        tried.append((far, child, name))
        if len(cutter.names) > 1:
            print(f"{name:12} distance to the parent on held-out data {far:.4f}")
    _, child, name = min(tried, key=lambda item: item[0])
    distances = {name: far for far, _, name in tried if cutter.held}
    return child, Chosen(name, cutter.units(name), list(cutter.measure.left_out)), distances


@torch.no_grad()
def distance(parent: nn.Module, child: nn.Module, batches: Iterable[Samples]) -> float:
    """Compare the first outputs: KL divergence of logits over a vocabulary, cosine of classes.

    Of features it is one minus the linear CKA of both, since a cut may leave fewer channels, and
    all children of a parent are measured alike. Without samples it is 0.
    """
    total = count = 0.0
    features: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        outputs = [model(**batch) for model in (parent, child)]
        theirs, ours = (next(tensors(output)) for output in outputs)
        mask = batch.get("attention_mask")
        if gives_features(parent, outputs[0]) or theirs.shape != ours.shape:
            rows = (x.float().movedim(1 if x.ndim == 4 else -1, -1) for x in (theirs, ours))
            x, y = (x.flatten(0, -2) for x in rows)
            features.append((x, y))
            continue
        logits = gives_logits(parent, batch, theirs)
        for row, pair in enumerate(zip(ours, theirs, strict=True)):
            x, y = (output.float() for output in pair)  # one sample's logits at a time
            if logits and mask is not None:
                x, y = x[mask[row].bool()], y[mask[row].bool()]
            if logits:
                logs = x.log_softmax(-1), y.log_softmax(-1)
                far = F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
            else:
                far = 1 - F.cosine_similarity(x, y, dim=-1)
            total, count = total + far.sum().item(), count + far.numel()
    if features:
        x, y = (torch.cat(parts) for parts in zip(*features, strict=True))
        return 1 - linear_cka(x, y)
    return total / count if count else 0.0


def gives_features(model: nn.Module, output: Any) -> bool:
    """Tell whether a model ends in features, of as many channels as a cut leaves."""
    if isinstance(output, Mapping):
        return "logits" not in output
    return getattr(model, "num_classes", None) == 0


def print_costs(args: Prune, parent: Parent, shapes: Shapes, child: Child) -> None:
    """Print what parent and child cost, as far as their shapes tell."""
    costs = cost_model(args, parent, shapes)
    sizes = {axis: kept.shape[-1] for axis, kept, _ in child.cuts}
    before, after = costs.cost().as_dict(), costs.cost(sizes, child.layers).as_dict()
    for what, number in before.items():
        print(f"{what:8} {number:,} -> {after[what]:,}")


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
