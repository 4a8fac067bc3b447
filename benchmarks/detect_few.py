"""Train Mask R-CNN on a few COCO images with several backbones, to check that training works.

    python benchmarks/detect_few.py --data COCO_FOLDER --out benchmarks/results/detect-h200.json

This needs torch, torchvision, timm, matplotlib, faster-coco-eval and this repository. A model is a
registered name (random weights; `name.tag`: released ones) or the folder of an exported student,
optionally with a label: `--models mine=runs/mine/export resnet50`. Each (model, seed) runs in its
own process, `--jobs` at a time: the heads of detectors wait for the CPU, so several processes can
share a GPU. JSON is written after each; beside it are a Markdown table, a figure (losses, AP50 on
the training images and on others) and images of predictions.

    --tiny --device cpu   a trial: synthetic shapes, small models, few steps

With a few dozen images, AP50 on the training images shows whether training works at all; AP50 on
the others is a smoke test, not a ranking.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where zoo is not installed

from zoo.eval.detect.coco import CocoSplit, open_coco
from zoo.eval.detect.coco_metric import coco_metrics, coco_results
from zoo.eval.detect.config import Detect
from zoo.eval.detect.draw import side_by_side
from zoo.eval.detect.finding import find_objects, fitting
from zoo.eval.detect.shapes import write_shapes
from zoo.eval.detect.spec import Detector
from zoo.eval.detect.training import start, train_detector
from zoo.eval.speed.environment import environment
from zoo.train.config import Every
from zoo.train.run import Run

MODELS = ("fastervit_0", "mambavision_t", "eradio_xxxtiny", "resnet50", "convnext_tiny")
TINY = ("eradio_nano", "resnet18")
PICTURES = 3


@dataclass(frozen=True)
class Job:
    """One model with one seed."""

    label: str
    config: Detect
    pictures: Path | None
    seconds: float = math.inf
    """Time after which training stops, finished or not."""

    def about(self) -> dict[str, Any]:
        """Return the entries of the job in its row."""
        return dict(model=self.label, target=self.config.backbone, seed=self.config.seed)


class TimeIsUpError(Exception):
    """The time of a training is over."""


def run(job: Job) -> dict[str, Any]:
    """Train, measure on both parts, and return a row; a failure is a row with its error."""
    try:
        return job.about() | _measured(job)
    except Exception as error:  # keep the other rows of an expensive run
        return job.about() | dict(error=f"{type(error).__name__}: {error}")


def _measured(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)  # the processes share the cores
    torch.set_float32_matmul_precision("high")
    began, data = time.perf_counter(), Path(job.config.data)
    train = open_coco(data, "train")
    val = open_coco(data, "val").with_classes(train.classes)
    with tempfile.TemporaryDirectory() as place:
        config = replace(job.config, out=Path(place))
        state, run = start(config, train.classes), Run.create(config)
        trained = time.perf_counter()

        def check_time(_: Detector, step: int) -> float:
            if time.perf_counter() - trained > job.seconds:
                raise TimeIsUpError
            return 0.0  # nothing is measured on the way

        with contextlib.suppress(TimeIsUpError):
            train_detector(state, config, train, run, evaluate=check_time)
        rows, speeds = (_rows(run.path / name) for name in ("metrics.jsonl", "timing.jsonl"))
    detector, device = state.model, state.device
    scores = dict(_score("train", detector, train, device))
    scores |= dict(_score("val", detector, val, device))
    if job.pictures:
        _draw(job, detector, dict(train=train, val=val), device)
    body, heads = (sum(p.numel() for p in m.parameters()) for m in (detector.backbone, detector))
    return dict(
        weights=detector.spec.source.weights or "random",
        parameters=dict(backbone=body, detector=heads),
        scores=scores,
        losses=[row["loss"] for row in rows],
        every=config.every.log,
        steps=state.step,
        step_seconds=sum(row["seconds"] for row in speeds) / speeds[-1]["step"],
        seconds=time.perf_counter() - began,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _score(
    part: str, detector: Detector, split: CocoSplit, device: torch.device
) -> Iterator[tuple[str, float]]:
    """Yield AP in per cent, as COCO defines it and regardless of the class."""
    split = fitting(detector, split)
    results = []
    for image, found in find_objects(detector, split, device=device, batch=16):
        results += coco_results(found, image, split)
    for name, value in coco_metrics(split, results, masks=True):
        if name.endswith(("/AP", "/AP50")):
            yield f"{part}/{name}", 100 * value
    for name, value in coco_metrics(split, results, masks=True, class_agnostic=True):
        if name.endswith("/AP50"):
            yield f"{part}/{name} any class", 100 * value


def _draw(job: Job, detector: Detector, splits: dict[str, CocoSplit], device: torch.device) -> None:
    assert job.pictures is not None
    for part, split in splits.items():
        for image, found in find_objects(detector, split.first(PICTURES), device=device):
            name = f"{job.label}-{part}-{image.path.stem}.jpg"
            side_by_side(image, found, split).save(job.pictures / name, quality=85)


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: mean and spread over the seeds."""
    good = [row for row in rows if "scores" in row]
    columns = [
        f"{part}/{kind}/AP50{rest}"
        for part in ("train", "val")
        for kind in ("box", "mask")
        for rest in ("", " any class")
    ]
    lines = [
        "| model | backbone M | weights | seeds | steps | s/step | loss first → last | "
        + " | ".join(columns)
        + " |",
        "| --- " * (7 + len(columns)) + "|",
    ]
    for label in dict.fromkeys(row["model"] for row in good):
        mine = [row for row in good if row["model"] == label]
        ends = [np.mean([_end(row["losses"], at) for row in mine]) for at in (0, -1)]
        cells = [
            label,
            f"{mine[0]['parameters']['backbone'] / 1e6:.1f}",
            mine[0]["weights"],
            str(len(mine)),
            str(min(row["steps"] for row in mine)),
            f"{np.mean([row['step_seconds'] for row in mine]):.3f}",
            f"{ends[0]:.2f} → {ends[1]:.2f}",
            *(_spread([row["scores"].get(column, np.nan) for row in mine]) for column in columns),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [f"{r['model']} seed {r['seed']}: {r['error']}" for r in rows if "error" in r]
    return "\n".join([*lines, "", *failed])


def _end(losses: list[float], at: int) -> float:
    tenth = max(1, len(losses) // 10)
    return float(np.mean(losses[:tenth] if at == 0 else losses[-tenth:]))


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.1f}"


def draw_figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the losses of each run, and AP50 on both parts with a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [row for row in rows if "scores" in row]
    labels = list(dict.fromkeys(row["model"] for row in good))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for i, label in enumerate(labels):
        for row in (row for row in good if row["model"] == label):
            width = max(1, len(row["losses"]) // 25)
            smooth = np.convolve(row["losses"], np.ones(width) / width, mode="valid")
            first = row["seed"] == min(r["seed"] for r in good)
            steps = row["every"] * np.arange(1, len(smooth) + 1)
            left.plot(
                steps, smooth, color=f"C{i}", lw=1.2, alpha=0.8, label=label if first else None
            )
        for part, shift, alpha in (("train", -0.2, 1.0), ("val", 0.2, 0.45)):
            dots = [
                row["scores"][f"{part}/box/AP50 any class"] for row in good if row["model"] == label
            ]
            right.bar(i + shift, np.mean(dots), 0.36, color=f"C{i}", alpha=alpha)
            right.plot([i + shift] * len(dots), dots, "k.", ms=5)
    left.set(xlabel="step", ylabel="loss", title="Mask R-CNN: loss (mean of a few steps)")
    left.legend()
    right.set_xticks(range(len(labels)), labels, rotation=20)
    right.set(ylabel="box AP50, any class (%)", title="training images (full), others (pale)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def jobs_of(args: argparse.Namespace, folder: Path) -> list[Job]:
    """Return all jobs: every model with the first seed, then with the second, ..."""
    config = Detect(
        data=str(folder),
        size=args.size,
        width=args.width,
        steps=args.steps,
        batch=args.batch,
        precision=args.precision,
        device=args.device,
        every=Every(log=max(1, args.steps // 100), evaluate=1),
    )
    config = replace(config, optim=replace(config.optim, lr=args.lr, warmup=0.1))
    named = [model.rpartition("=")[::2] for model in args.models]
    pictures = args.out.with_suffix("") if args.out else None
    if pictures:
        pictures.mkdir(parents=True, exist_ok=True)
    return [
        Job(
            label or target,
            replace(config, backbone=target, seed=seed),
            pictures if seed == 0 else None,
            args.seconds,
        )
        for seed in range(args.seeds)
        for label, target in named
    ]


def parse() -> argparse.Namespace:
    """Read the command line; --tiny changes the defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tiny = "--tiny" in sys.argv
    parser.add_argument("--data", type=Path, help="COCO folder; synthetic shapes by default")
    parser.add_argument("--models", nargs="+", default=list(TINY if tiny else MODELS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6 if tiny else 300)
    parser.add_argument("--batch", type=int, default=2 if tiny else 16)
    parser.add_argument("--size", type=int, default=64 if tiny else 320)
    parser.add_argument("--width", type=int, default=32 if tiny else 256)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "float32"))
    parser.add_argument("--jobs", type=int, default=1 if tiny else 10, help="processes at a time")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="time after which a job's training stops"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


def _row(done: Future, job: Job) -> dict[str, Any]:
    """Return a job's row, also if its process died."""
    try:
        return done.result()
    except BrokenProcessPool as error:
        return job.about() | dict(error=str(error))


def main() -> None:
    """Run all jobs, and write the results after each."""
    args = parse()
    about = environment(" ".join(["python", *sys.argv]))
    about["settings"] = {k: str(v) for k, v in vars(args).items()}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        if args.data is None:
            write_shapes(Path(place), train=8, val=4)
        jobs = jobs_of(args, args.data or Path(place))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
            running = {pool.submit(run, job): job for job in jobs}
            for done in as_completed(running):
                row = _row(done, running[done])
                rows.append(row)
                summary = row.get("error") or {k: round(v, 1) for k, v in row["scores"].items()}
                print(f"{len(rows)}/{len(jobs)} {row['model']} seed {row['seed']}: {summary}")
                if args.out:
                    args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    order = [job.label for job in jobs]
    rows.sort(key=lambda row: (order.index(row["model"]), row["seed"]))
    print(table_of(rows))
    if args.out:
        args.out.with_suffix(".md").write_text(table_of(rows) + "\n")
        draw_figure(rows, args.out.with_suffix(".png"))
    if any("error" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
