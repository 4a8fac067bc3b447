"""Gemma 3 270M cut to 75 % and 50 % and distilled, on one GPU; see README.md beside this file.

python3 -m benchmarks.gemma.run gemma --out results --dry-run     # what each cell should take
python3 -m benchmarks.gemma.run gemma --out results --seconds 540
python3 -m benchmarks.gemma.run gemma --out results --resume      # goes on where that stopped
python3 -m benchmarks.gemma.run gemma --out results --table       # prints tables, draws the plot

`gemma` is what `unpack` wrote. Everything stands in results/results.json after each part.
"""

import argparse
import copy
import time
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gemma.cells import (
    KINDS,
    RATE,
    Cell,
    all_cells,
    body,
    operations,
    plan_of,
    print_plan,
    steps_of,
)
from benchmarks.gemma.depth import depth_table, study_depth
from benchmarks.gemma.results import Results, plot, score_table, table
from benchmarks.gemma.rows import Texts, joined, read_texts, source
from benchmarks.gemma.sample import sample
from benchmarks.gemma.students import Cutter
from benchmarks.gemma.training import Settings, learn, marks, measured, perplexity
from zoo.data.text import TextSource
from zoo.language.open import open_language_model
from zoo.students.prune.plan import Plan
from zoo.teachers.from_language import LanguageTeacher

SCORES = ("activation", "contribution", "magnitude", "random")
RATES = {"cut": (1e-4, 3e-4), "scratch": (1e-3, 3e-3)}
"""Learning rates that are tried, for a student that was cut and for one with new weights."""


class Bench:
    """The parent, the texts and the results, and the parts that are measured."""

    def __init__(self, args: argparse.Namespace, results: Results):
        self.args, self.results, self.began = args, results, time.perf_counter()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.settings = Settings(args.steps, args.batch, args.length, self.device)
        self.texts: Texts = read_texts(args.folder, args.length)
        self.parent: Any = open_language_model(str(args.folder / "model"), device=self.device)
        self.teacher = LanguageTeacher("parent", self.parent)
        self.speed = RATE

    @cached_property
    def cutter(self) -> Cutter:
        """Scores of the parent, made when something is cut first."""
        return self._cutter_of(self.parent)

    def _cutter_of(self, model: Any) -> Cutter:
        options = dict(rows=self.args.score_rows, batch=self.args.batch)
        return Cutter(model, self.texts.seen, **options)

    @cached_property
    def tuned(self) -> tuple[LanguageTeacher, Cutter]:
        """The parent after training on the text (2408.11796, section 3.1), and its scores."""
        model, lr = copy.deepcopy(self.parent).float().requires_grad_(True), min(RATES["cut"])
        learn(model, None, self.corpus(), self.texts.held, self.settings, lr=lr, seed=0, at=())
        model.requires_grad_(False)
        held = perplexity(model, self.texts.held, self.settings)
        test = perplexity(model, self.texts.test, self.settings)
        self.results.put("tuned", dict(held=held, test=test, lr=lr))
        self.say(f"the parent tuned on the text: held {held:.2f}, test {test:.2f}")
        return LanguageTeacher("parent", model), self._cutter_of(model)

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.args.seconds - (time.perf_counter() - self.began)

    def say(self, text: str) -> None:
        """Print a line with the time."""
        print(f"[{time.perf_counter() - self.began:5.0f} s] {text}", flush=True)

    def corpus(self) -> TextSource:
        """Return what students train on: the parent's samples, and the seen text."""
        path = self.args.folder / "samples.npy"
        if not path.is_file():
            options = dict(rows=self.args.sample_rows, batch=self.args.sample_batch)
            made = sample(self.parent, self.texts, device=self.device, **options)
            np.save(path, made.tokens.reshape(-1, made.length))
        return joined(source("samples", np.load(path)), self.texts.seen)

    def dense(self) -> None:
        """Measure the parent."""
        held = perplexity(self.parent, self.texts.held, self.settings)
        test = perplexity(self.parent, self.texts.test, self.settings)
        self.results.put("dense", dict(held=held, test=test, body=body(self.parent)))
        self.say(f"dense: held {held:.2f}, test {test:.2f}")

    def scores(self) -> None:
        """Cut a quarter of the neurons by each score; `auto` takes what is nearer to the parent."""
        found = {}
        runs = [(name, 0) for name in SCORES] + [("random", 1)]
        for name, seed in runs:
            child = self.cutter.cut(Plan({"ffn": 0.75}), name, seed).built.model
            label = f"{name}, second draw" if seed else name
            four = perplexity(child, self.texts.held, self.settings, rows=4)
            far = measured(child, {"parent": self.teacher}, self.texts.held, self.settings)
            found[label] = dict(perplexity=four, kl=far["kl/parent"], held=far["perplexity"])
            self.say(f"ffn=0.75 by {label}: perplexity {four:.1f}, KL {far['kl/parent']:.3f}")
        auto = min(("activation", "contribution"), key=lambda name: found[name]["kl"])
        four = perplexity(self.parent, self.texts.held, self.settings, rows=4)
        self.results.put("scores", dict(by=found, auto=auto, dense=four))

    def rates(self, text: TextSource) -> None:
        """Choose each kind of training's learning rate by short runs, on the held-out text."""
        settings, chosen = self.settings._replace(steps=self.args.rate_steps), {}
        for begin, loss in KINDS:
            cell, tried = Cell(0.5, "both", begin, loss), {}
            for lr in RATES[cell.kind.partition("-")[0]]:
                student, _ = self.cutter.student(cell, self.results["scores"]["auto"])
                teacher = self.teacher if loss == "kd" else None
                held = self.texts.held
                curve, _ = learn(student, teacher, text, held, settings, lr=lr, seed=0, at=())
                tried[lr] = curve[settings.steps]
                self.say(f"{cell.kind} at {lr:g}: {tried[lr]:.1f} after {settings.steps} steps")
            chosen[cell.kind] = dict(
                lr=min(tried, key=lambda lr: tried[lr]),
                tried={f"{lr:g}": value for lr, value in tried.items()},
            )
        self.results.put("rates", chosen)

    def cell(self, cell: Cell, text: TextSource) -> None:
        """Train one cell, and measure it on the test text."""
        began = time.perf_counter()
        settings = self.settings._replace(steps=steps_of(self.parent, cell, self.args.steps))
        parent, cutter = self.tuned if cell.tuned else (self.teacher, self.cutter)
        student, kept = cutter.student(cell, self.results["scores"]["auto"])
        teacher = parent if cell.loss == "kd" else None
        lr = self.results["rates"][cell.kind]["lr"]
        at = [0, *marks(settings.steps)]
        curve, seconds = learn(
            student, teacher, text, self.texts.held, settings, lr=lr, seed=cell.seed, at=at
        )
        test = perplexity(student, self.texts.test, self.settings)
        whole = time.perf_counter() - began
        tokens = settings.steps * settings.batch * settings.length
        spent = operations(self.parent, body(student), cell) * tokens
        self.speed = spent / whole
        plan = plan_of(self.parent.config, cell.share, cell.shape)
        self.results.put_cell(
            cell.name,
            dict(
                asdict(cell), body=body(student), plan=asdict(plan), kept=kept, lr=lr,
                curve={str(step): value for step, value in curve.items()},
                steps=settings.steps, tokens=tokens, operations=spent, test=test, seconds=seconds,
                whole=whole,
            ),
        )  # fmt: skip
        path = " ".join(f"{value:.0f}" for value in curve.values())
        self.say(f"{cell.name}: {path}, test {test:.1f}; {seconds:.1f} of {whole:.1f} s")

    def fits(self, cell: Cell) -> bool:
        """Tell whether a cell would end before the time does, at the speed of the last one."""
        steps = steps_of(self.parent, cell, self.args.steps)
        each = operations(self.parent, cell.share * body(self.parent), cell)
        tokens = steps * self.settings.batch * self.settings.length
        return each * tokens / self.speed < self.left()

    def run(self, parts: list[str]) -> None:
        """Measure what is asked for and not there yet."""
        text = self.corpus()
        self.say(f"{len(text):,} rows to train on, {len(self.texts.held)} held out")
        if "dense" not in self.results:
            self.dense()
        if "scores" not in self.results:
            self.scores()
        if "grid" in parts:
            if "rates" not in self.results:
                self.rates(text)
            for cell in all_cells(self.args.seeds):
                if cell.name in self.results["cells"]:
                    continue
                if not self.fits(cell):
                    self.say(f"no time for {cell.name}")
                    break
                self.cell(cell, text)
        if "depth" in parts and "depth" not in self.results:
            study_depth(self.parent, self.texts, self.settings, self.results, self.say)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what makes results comparable."""
    names = ("steps", "batch", "length", "score_rows", "rate_steps", "sample_rows")
    return {name: getattr(args, name) for name in names}


def main() -> None:
    """Run, or print what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="what unpack wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="*", default=["grid", "depth"], choices=("grid", "depth"))
    parser.add_argument("--seconds", type=float, default=540, help="no cell starts that ends later")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="rows a step")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3, help="for half by both")
    parser.add_argument("--score-rows", type=int, default=256)
    parser.add_argument("--rate-steps", type=int, default=40)
    parser.add_argument("--sample-rows", type=int, default=4096)
    parser.add_argument("--sample-batch", type=int, default=2048)
    parser.add_argument("--tiny", action="store_true", help="few and short steps: a rehearsal")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="print the plan of a real run")
    parser.add_argument("--table", action="store_true", help="print tables and draw the plot only")
    args = parser.parse_args()
    if args.tiny:
        small = dict(steps=4, batch=2, length=16, seeds=2, score_rows=8, rate_steps=2)
        vars(args).update(small, sample_rows=12, sample_batch=8)
    results = Results(
        args.out / "results.json", settings_of(args), resume=args.resume or args.table
    )
    if not args.table:
        torch.set_float32_matmul_precision("high")
        bench = Bench(args, results)
        if args.dry_run:
            print_plan(bench.parent, all_cells(args.seeds), args.steps, args.batch * args.length)
            return
        bench.run(args.parts)
    report(results, args.out)


def report(results: Results, out: Path) -> None:
    """Print the tables of what is there, and draw the curves."""
    if "scores" in results:
        print(score_table(results["scores"]))
    if results["cells"]:
        print(table(results.content))
        plot(results.content, out / "recovery.png")
    if "depth" in results:
        print(depth_table(results["depth"]))


if __name__ == "__main__":
    main()
