"""Make a smaller model of a trained one: where words, a parent, scores and cuts meet."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from zoo.axes import Axis, Shapes, State, named_shapes
from zoo.commands.prune_data import Samples, batches_of, read_samples, split
from zoo.commands.prune_request import Prune
from zoo.commands.prune_search import search
from zoo.students.prune import score
from zoo.students.prune.budget import split_budgets
from zoo.students.prune.layers import block_influence
from zoo.students.prune.library import Parent, save
from zoo.students.prune.parent import open_parent
from zoo.students.prune.plan import Plan
from zoo.students.prune.proof import tensors
from zoo.students.prune.prune import Child, prune
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
    console.print(f"{shapes.count():,} numbers in {len(shapes.tensors) - len(shapes.tied)} tensors")


def _tensors(shapes: Shapes, state: dict) -> Table:
    table = Table("tensor", "length", "named shape")
    rows: dict[tuple[str, ...], int] = {}
    for name, shape in shapes.tensors.items():
        scope = _scope(str(shape))
        row = (_numbered(name), " ".join(map(str, state[name].shape)), _numbered(scope))
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
        row = (_numbered(axis), str(size), str(slots), reason)
        rows[row] = rows.get(row, 0) + 1
    for (axis, size, slots, reason), times in rows.items():
        table.add_row(axis + (f"  x{times}" if times > 1 else ""), size, slots, reason)
    return table


def _scope(shape: str) -> str:
    """Leave out of a shape the module that its letters belong to."""
    return re.sub(r"[\w.]+\.(?=[\w#]+)", "", shape)


def _numbered(name: str) -> str:
    """Write `#` for the numbers of layers, so that layers of one form take one row."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


# Cutting


def prune_model(args: Prune) -> None:
    """Cut a model, print what became of it, and write it."""
    budgets, words = split_budgets(args.to)
    plan = Plan.parse(words) if words or not budgets else Plan({})
    looks = args.score not in ("magnitude", "random") or plan.layers or plan.stages
    if args.data is None and (not args.dry_run if budgets else looks):
        raise ValueError(
            "Scores of activations, and the choice of layers, look at data: give --data. Without, "
            "there are --score magnitude and --score random, for widths."
        )
    device = device_of(args.device)
    if device.type == "mps":
        raise ValueError("Scores are summed in float64, which mps does not have; --device cpu.")
    parent = open_parent(args.model, dequantise=args.dequantise)
    shapes = named_shapes(parent.model)
    plan.sizes(shapes)  # refuses before data are read
    parent.model.to(device)
    samples = None
    if args.data is not None:
        samples = read_samples(
            parent, args.data, number=args.samples, length=args.length, seed=args.seed
        )
    calibration = Calibration(args, parent, shapes, samples)
    found = None
    if budgets:

        def attempt(plan: Plan) -> float:
            return cut(args, plan, parent, calibration, calibration.names[0])[0]

        rank = calibration.rank if samples else None
        found = search(args, budgets, plan, parent, shapes, rank, attempt)
        if args.dry_run:
            return
        plan = found.best
    child, chosen = _best(args, plan, parent, calibration)
    print_child(shapes, child, chosen)
    if found:
        found.print_latency(child.built.model)
    if args.dry_run or args.out is None:
        return
    about: dict[str, Any] = dict(model=args.model, to=args.to, score=chosen.name)
    files = {}
    if found:
        about["search"], files = found.as_json(), found.files()
    write_child(child, args.out, about, files)
    if found:
        found.forget()
    print(f"model  {args.out}")


class Chosen:
    """A score: what ranks the units, and which axes it could not see."""

    def __init__(
        self, name: str, shapes: Shapes, state: State, columns: dict[str, Tensor], seed: int
    ):
        self.name, self.shapes, self.state, self.seed = name, shapes, state, seed
        self.columns = columns
        if name == "contribution":
            self.columns = score.contribution(columns, shapes, state)
        self.unseen: list[Axis] = []

    def __call__(self, axis: Axis) -> tuple[Tensor, tuple[Axis, ...]]:
        if self.name == "random":
            return score.random(self.shapes, axis, self.seed), ()
        if self.name != "magnitude":
            try:
                return score.unit_scores(self.columns, self.shapes, axis)
            except ValueError:
                self.unseen.append(axis)
        return score.magnitude(self.shapes, self.state, axis), ()


class Calibration:
    """What a parent shows on samples: scores of its units and layers, each computed once."""

    def __init__(self, args: Prune, parent: Parent, shapes: Shapes, samples: Samples | None):
        self.names = ("activation", "contribution") if args.score == "auto" else (args.score,)
        self.model, self.shapes, self.batch, self.seed = parent.model, shapes, args.batch, args.seed
        self.device = next(parent.model.parameters()).device
        self.seen, self.held = split(samples, 0.25) if samples else ({}, {})
        self.state = parent.model.state_dict()
        self.columns: dict[str, Tensor] = {}
        self.axes: set[Axis] = set()
        self.ranks: dict[str, Tensor] = {}

    def chosen(self, name: str, axes: Iterable[Axis]) -> "Chosen":
        """Score the units of axes by one of the scores."""
        more = set(axes) - self.axes
        if more and {"activation", "contribution"} & set(self.names):
            self.axes |= more
            with autocast("auto", self.device):
                batches = batches_of(self.seen, self.batch, self.device)
                self.columns |= score.activation(self.model, self.shapes, batches, more)
        return Chosen(name, self.shapes, self.state, self.columns, self.seed)

    def rank(self, path: str, length: int) -> Tensor:
        """Rank the layers of a list."""
        del length
        if path not in self.ranks:
            with autocast("auto", self.device):
                batches = batches_of(self.seen, self.batch, self.device)
                self.ranks[path] = block_influence(self.model, path, batches)
        return self.ranks[path]


def cut(
    args: Prune, plan: Plan, parent: Parent, calibration: Calibration, name: str
) -> tuple[float, Child, Chosen]:
    """Cut by one score; return how far the child is from its parent on held-out data, too."""
    device, held = calibration.device, calibration.held
    ranking = calibration.chosen(name, plan.sizes(calibration.shapes))
    child = prune(
        parent,
        plan,
        ranking,
        rank_layers=calibration.rank if held else None,
        probe=next(batches_of(held, 2, device), None),
        form=args.form,
    )
    with autocast("auto", device):
        far = distance(parent.model, child.built.model, batches_of(held, args.batch, device))
    return far, child, ranking


def _best(
    args: Prune, plan: Plan, parent: Parent, calibration: Calibration
) -> tuple[Child, Chosen]:
    """Cut by the score asked for; `auto`: by the one whose child is nearest to its parent."""
    tried = []
    for name in calibration.names:
        tried.append(cut(args, plan, parent, calibration, name))
        if len(calibration.names) > 1:
            print(f"{name:12} distance to the parent on held-out data {tried[-1][0]:.4f}")
    _, child, ranking = min(tried, key=lambda item: item[0])
    return child, ranking


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
        logits = "input_ids" in batch and theirs.shape[:2] == batch["input_ids"].shape
        for pair in zip(ours, theirs, strict=True):  # one sample's logits in float32 at a time
            x, y = (output.float() for output in pair)
            if logits:
                logs = x.log_softmax(-1), y.log_softmax(-1)
                far = F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
            else:
                far = 1 - F.cosine_similarity(x, y, dim=-1)
            total, count = total + far.sum().item(), count + far.numel()
    return total / count if count else 0.0


def print_child(before: Shapes, child: Child, chosen: Chosen) -> None:
    """Print sizes before and after, and the proof."""
    table = Table("axis", "before", "after", title=f"by {chosen.name}")
    rows: dict[tuple[str, str, str], int] = {}
    for axis, kept, _ in child.cuts:
        row = (_numbered(axis), str(before.sizes[axis]), str(kept.shape[-1]))
        rows[row] = rows.get(row, 0) + 1
    for (axis, old, new), times in rows.items():
        table.add_row(axis + (f"  x{times}" if times > 1 else ""), old, new)
    for path, kept in child.layers.items():
        table.add_row(f"layers of {path}", "", ", ".join(map(str, kept)))
    table.add_row("numbers", f"{before.count():,}", f"{child.shapes.count():,}")
    Console().print(table)
    if chosen.unseen:
        print(f"by magnitude, as no product reads them: {', '.join(chosen.unseen[:6])}")
    if child.proof:
        print(f"child = masked parent: {child.proof.moved:.1e} of {child.proof.control:.1e}")


def write_child(
    child: Child, folder: Path, about: dict[str, Any], files: Mapping[str, bytes] = {}
) -> None:
    """Write checkpoint, tokenizer, and `prune.json` with what stayed; whole or not at all.

    Args:
        files: What else lies in the folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for file in _beside(child.built.folder):
            shutil.copy(file, making)
        child.built.model.cpu()
        save(child.built, making)
        kept = {cut.axis: dict(kept=cut.kept.tolist(), by=cut.by) for cut in child.cuts}
        about |= dict(kept=kept, layers=child.layers, numbers=child.shapes.count())
        (making / "prune.json").write_text(json.dumps(about) + "\n")
        for name, content in files.items():
            (making / name).write_bytes(content)
        making.chmod(0o755)
        for file in making.iterdir():
            file.chmod(0o644)
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _beside(folder: Path | None) -> list[Path]:
    """List what a folder of transformers has for its inputs: tokenizer, processor."""
    names = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*processor*.json")
    found = [file for name in names for file in folder.glob(name)] if folder else []
    return [*found, *(folder.glob("*.jinja") if folder else [])]
