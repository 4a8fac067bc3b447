"""The part of `zoo prune` that meets a budget: candidates, and the one nearest to its parent."""

import copy
import re
import shutil
import time
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from zoo.axes import Shapes
from zoo.commands.prune.distill import CUT, Distillation, train_briefly
from zoo.commands.prune.halving import halve, hypertrick
from zoo.commands.prune.request import Prune
from zoo.commands.prune.write import write_child
from zoo.eval.speed.models import timed
from zoo.students.prune.budget import Budget
from zoo.students.prune.candidates import Candidate, Search
from zoo.students.prune.cost import CostModel
from zoo.students.prune.journal import Journal
from zoo.students.prune.library import Parent
from zoo.students.prune.outline import RankLayers, outline, sample_of
from zoo.students.prune.plan import Plan
from zoo.students.prune.prune import Child
from zoo.train.device import autocast

ROUNDS = 7
"""Forward passes that a latency is the least of, after two that warm up."""


class Cutter(Protocol):
    """What a search asks of the part of `zoo prune` that cuts."""

    names: tuple[str, ...]
    """Scores; candidates are cut by the first."""

    device: torch.device

    @property
    def influence(self) -> RankLayers | None:
        """What ranks the layers of a list, if there are samples."""
        ...

    def far(self, child: nn.Module) -> float:
        """Return how far a model is from the parent on held-out data."""
        ...

    def cut(self, plan: Plan, name: str) -> tuple[Child, float]:
        """Cut by a plan and a score; return the child and its distance from the parent."""
        ...


class Row(NamedTuple):
    """A candidate, and how far it is from its parent after so many steps of training."""

    candidate: Candidate
    distance: float | None = None
    steps: int = 0


Rows = list[Row]


@dataclass(frozen=True)
class Found:
    """What a search has found."""

    parent: Candidate
    rows: "Rows"
    budgets: tuple[Budget, ...]
    stopwatch: "Stopwatch"
    folder: Path | None = None

    @property
    def winner(self) -> Candidate:
        """The candidate nearest to its parent, of those that learnt longest."""
        return min(self.rows, key=lambda row: (-row.steps, row.distance or 0.0)).candidate

    @property
    def best(self) -> Plan:
        """How the winner is made."""
        return Plan.parse(self.winner.words)

    def print_latency(self, child: nn.Module) -> None:
        """Time the child, beside what was expected of it."""
        if self.winner.latency_ms is not None:
            found = self.stopwatch.time(child)
            print(f"latency  expected {self.winner.latency_ms:.3g} ms, measured {found:.3g} ms")

    def as_json(self) -> dict[str, Any]:
        """Return what `prune.json` keeps, and the report draws."""
        winner = self.winner.words
        rows = [
            dict(to=c.words, cost=c.values(), distance=far, steps=steps, chosen=c.words == winner)
            for c, far, steps in self.rows
        ]
        return dict(parent=self.parent.values(), candidates=rows)

    def files(self) -> dict[str, bytes]:
        """Return the plot, if matplotlib is there: FLOPs and distance, or another cost."""
        if find_spec("matplotlib") is None:
            print("No plot: matplotlib is missing (pip install 'backbone-zoo[train]').")
            return {}
        from zoo.eval.report.figures import FAINT, STUDENT_COLOUR
        from zoo.eval.report.plots import quality

        asked = {budget.what for budget in self.budgets}
        known = [what for what in self.winner.values() if what != "active"]
        cost = next((what for what in reversed(known) if what not in asked), known[0])
        points = [
            (candidate.values()[cost], far, "chosen" * won, STUDENT_COLOUR if won else FAINT)
            for candidate, far, _ in self.rows
            if far is not None
            for won in (candidate == self.winner,)
        ]
        png = quality(
            "candidates", cost, "distance to the parent", points, more_is_better=False, lower=True
        )
        return {"search.png": png}

    def forget(self) -> None:
        """Delete what a resumed search would need."""
        if self.folder:
            shutil.rmtree(self.folder)


@dataclass(frozen=True)
class Stopwatch:
    """Time models on the device at hand."""

    args: Prune
    parent: Parent
    shapes: Shapes
    rank_layers: RankLayers | None

    def __call__(self, plan: Plan) -> float:
        """Time a plan's model, whose numbers mean nothing."""
        device = str(self._device)
        child = outline(
            self.parent, self.shapes, plan, self.rank_layers, self.args.form, device=device
        )
        return self.time(child)

    @torch.inference_mode()
    def time(self, model: nn.Module) -> float:
        """Return the milliseconds of a forward pass."""
        device, inputs = self._device, self._inputs()

        def step() -> None:
            with autocast("auto", device):
                model(**inputs)

        timed(step, str(device), 2)
        return 1000 * min(timed(step, str(device), ROUNDS))

    @property
    def _device(self) -> torch.device:
        return next(self.parent.model.parameters()).device

    def _inputs(self) -> dict[str, Any]:
        sample, batch = sample_of(self.parent), self.args.search.batch
        if (own := self.parent.sample) is not None:
            return {key: x.expand(batch, *x.shape[1:]).to(self._device) for key, x in own.items()}
        if sample is None:
            ids = torch.zeros(batch, self.args.length, dtype=torch.long, device=self._device)
            return {"input_ids": ids}
        return {
            key: torch.zeros(batch, *x.shape[1:], dtype=x.dtype, device=self._device)
            for key, x in sample.items()
        }


def cost_model(args: Prune, parent: Parent, shapes: Shapes) -> CostModel:
    """Return what tells the cost of a parent and of each smaller one, without computing."""
    return CostModel(
        copy.deepcopy(parent.model).to("meta"),
        shapes,
        inputs=sample_of(parent),
        tokens=args.search.tokens,
        batch=args.search.batch,
    )


def search(
    args: Prune,
    budgets: tuple[Budget, ...],
    fixed: Plan,
    parent: Parent,
    shapes: Shapes,
    cutter: Cutter,
    distillation: Distillation | None = None,
) -> Found:
    """Find the plan whose child is nearest to its parent within the budgets.

    With `--dry-run` candidates are counted and printed, and no child is made.

    Args:
        fixed: What the user has said beside the budgets.
        cutter: Cuts by plans, and tells how far a child is from its parent.
        distillation: How candidates learn, with `--search.steps`.

    Raises:
        ValueError: the budget is impossible, nothing may vary, or the folder of the search is that
            of another one.
    """
    folder = None if args.dry_run else args.search.dir or _beside(args.out)
    journal = Journal(folder, {**_request(args), "training": repr(distillation)})
    stopwatch = Stopwatch(args, parent, shapes, cutter.influence)
    times = args.dry_run or "latency_ms" in (budget.what for budget in budgets)
    costs = cost_model(args, parent, shapes)
    finder = Search(
        parent, shapes, budgets, fixed, costs, cutter.influence, args.form, args.seed,
        stopwatch if times else None, () if args.part == "all" else (args.part,),
    )  # fmt: skip
    known = journal.candidates()
    if known is None:
        print("looking for models within the budget", flush=True)
        found = finder.candidates(args.search.candidates)
        known = finder.estimate(Plan({}), "the parent"), found
        journal.choose(*known)
    whole, found = known
    rows = [Row(candidate) for candidate in found]
    if not args.dry_run:
        far = compare(found, journal, cutter)
        last = {words: (0, distance) for words, distance in far.items()}
        if distillation and args.search.steps:
            train = Trainer(cutter, distillation, folder or Path())
            learn = halve if args.search.rule == "halving" else hypertrick
            last = learn(far, journal, args.search.steps, train)
        rows = [Row(c, last[c.words][1], last[c.words][0]) for c in found]
    print_candidates(whole, rows)
    kept = folder if args.search.dir is None else None
    return Found(whole, rows, budgets, stopwatch, kept)


def compare(candidates: list[Candidate], journal: Journal, cutter: Cutter) -> dict[str, float]:
    """Cut by each candidate's plan; return how far the children are from their parent."""
    far: dict[str, float] = {}
    began, done = time.perf_counter(), 0
    for i, candidate in enumerate(candidates, 1):
        known = journal.distance(candidate.words, 0)
        if known is None:
            _, known = cutter.cut(Plan.parse(candidate.words), cutter.names[0])
            journal.note(candidate.words, 0, known)
            done += 1
        far[candidate.words] = known
        left = (time.perf_counter() - began) / max(1, done) * (len(candidates) - i)
        text = f"{i}/{len(candidates)}  distance {known:.4f}  {candidate.words}  ETA {left:.0f} s"
        print(text, flush=True)
    return far


@dataclass(frozen=True)
class Trainer:
    """Trains candidates briefly, each in a folder of its own, and measures them."""

    cutter: Cutter
    distillation: Distillation
    folder: Path

    def __call__(self, words: str, steps: int) -> float:
        folder = self.folder / re.sub(r"[^\w.@]+", "-", words)
        if not (folder / CUT).is_dir():
            child, _ = self.cutter.cut(Plan.parse(words), self.cutter.names[0])
            write_child(child, folder / CUT, {})
        run = folder / f"after_{steps}"
        model = train_briefly(self.distillation, folder / CUT, run, steps)
        return self.cutter.far(model.to(self.cutter.device))


def print_candidates(parent: Candidate, rows: Rows) -> None:
    """Print what each candidate costs, and how far it is from its parent if that is known."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file has no width that plans should be cut to
    shown = [parent, *(row.candidate for row in rows)]
    has = {key for candidate in shown for key in candidate.values()}
    active = any(c.cost.active != c.cost.params for c in shown)
    columns = {"params": "M parameters", "active": "M active", "flops": "GFLOPs", "memory": "MB"}
    columns = {k: v for k, v in columns.items() if k in has and (k != "active" or active)}
    times = "latency_ms" in has
    learn = any(row.steps for row in rows)
    table = Table(
        Column("keeps", overflow="fold"),
        *columns.values(),
        *(["ms"] * times),
        "distance",
        *(["steps"] * learn),
    )
    for candidate, far, steps in [Row(parent), *rows]:
        values = candidate.values()
        scale = {"flops": 1e9}
        cells = [f"{values[key] / scale.get(key, 1e6):.4g}" for key in columns]
        cells += [f"{values['latency_ms']:.3g}" if "latency_ms" in values else ""] * times
        cells += ["" if far is None else f"{far:.4f}", *([str(steps or "")] * learn)]
        table.add_row(candidate.words, *cells)
    console.print(table)


def _request(args: Prune) -> dict[str, Any]:
    """Return what decides about the results of a search."""
    names = ("model", "to", "part", "data", "score", "samples", "length", "form", "seed")
    options = {name: getattr(args, name) for name in names}
    options |= {f"search.{k}": v for k, v in asdict(replace(args.search, dir=None)).items()}
    return {key: str(value) for key, value in options.items()}


def _beside(out: Path | None) -> Path | None:
    return out.with_name(f"{out.name}.search") if out else None
