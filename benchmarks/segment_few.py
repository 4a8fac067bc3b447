"""Linear segmentation on a small set: exported students and untrained twins, over seeds.

    python3 benchmarks/segment_few.py EXPORT_OR_NAME ... --data CAMVID --out DIR [--tiny]

Each model stays frozen; batch norm and one linear layer are trained on its last map
(`zoo.eval.dense.segment`). An export is compared with a twin of the same backbone with random
weights, which shows the value of its training. The script writes `segment_few.json` (every number
of every seed, and the settings), `segment_few.md` (the table) and `segment_few.png` (one validation
image with the prediction of each model) to DIR. The data has any layout of `zoo eval --on segment`;
CamVid's 184 images take about 10 s for each model and seed on one H200. `--tiny` needs no data and
no GPU: coloured blocks, two small models, a few steps.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from zoo.eval.dense.segment import SegmentSettings, segment
from zoo.eval.dense.segment_data import open_segments
from zoo.eval.examples import Example
from zoo.eval.registry import Picture, Scores, Subject
from zoo.eval.subject import open_student
from zoo.files import written_whole
from zoo.students.build import build_student
from zoo.students.student import Student

TINY = ("eradio_nano", "resnet18")
TINY_SETTINGS = SegmentSettings(crop=64, stride=48, steps=6, batch=2, pictures=1)
MEASURES = ("segment/miou", "segment/mean_accuracy", "segment/pixel_accuracy")
LABEL = 16
"""Height of a line of text in the image, in pixels."""


def models(targets: Sequence[str], size: int | None) -> Iterator[tuple[str, Student]]:
    """Open each target, and after an export its twin with random weights."""
    for target in targets:
        student = open_student(target, size)
        folder = Path(target)
        named = folder.parent.name if folder.name == "export" else folder.name
        yield (named if folder.is_dir() else target), student
        if folder.is_dir():
            torch.manual_seed(0)
            name, kwargs = student.recipe
            options = {k: v for k, v in kwargs.items() if k not in ("num_classes", "img_size")}
            twin = build_student(name, {}, size=student.size[0], options=options).eval()
            yield f"{named}, untrained", twin


def measure(
    name: str,
    student: Student,
    data: Path,
    settings: SegmentSettings,
    seed: int,
    device: torch.device,
) -> tuple[dict[str, float], Picture | None, float]:
    """Return the numbers of one model and seed, a picture, and the seconds."""
    began = time.perf_counter()
    precision = "amp" if device.type == "cuda" else "float32"
    subject = Subject(name=name, made=student, device=device, precision=precision, seed=seed)
    numbers, shown = {}, None
    for key, value in segment(subject, data, settings):
        if isinstance(value, Picture):
            shown = shown or value
        elif not isinstance(value, Example):
            numbers[key] = value.value if isinstance(value, Scores) else value
    return numbers, shown, time.perf_counter() - began


def blocks(root: Path) -> Path:
    """Write coloured blocks with their masks: three classes, four images in each part."""
    draws = np.random.default_rng(0)
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]], np.uint8)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(4):
            truth = draws.integers(3, size=(3, 4)).repeat(32, axis=0).repeat(32, axis=1)
            noisy = colours[truth] + draws.integers(0, 40, size=(*truth.shape, 3), dtype=np.uint8)
            Image.fromarray(noisy).save(root / "images" / split / f"{i}.png")
            Image.fromarray(truth.astype(np.uint8)).save(root / "masks" / split / f"{i}.png")
    (root / "classes.json").write_text(json.dumps(["red", "green", "blue"]))
    return root


def table(rows: dict[str, list[dict[str, float]]], parameters: dict[str, float]) -> str:
    """Return a Markdown table of the measures: mean ± standard deviation over seeds."""
    heads = ["model", "parameters, M", *(m.partition("/")[2] for m in MEASURES)]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name, seeds in rows.items():
        cells = [name, f"{parameters[name]:.1f}"]
        for measure in MEASURES:
            values = np.array([found[measure] for found in seeds])
            spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.2f}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mosaic(shown: dict[str, Picture]) -> Image.Image:
    """Return the image, its truth and each model's prediction side by side, with their names."""
    panels = [np.split(picture.pixels, 3, axis=1) for picture in shown.values()]
    tiles = [("image", panels[0][0]), ("truth", panels[0][1])]
    tiles += [(name, panel[2]) for name, panel in zip(shown, panels, strict=True)]
    height, width = tiles[0][1].shape[:2]
    columns = min(4, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, pixels) in enumerate(tiles):
        x, y = i % columns * width, i // columns * (height + LABEL)
        draw.text((x + 3, y + 2), name, fill="black")
        sheet.paste(Image.fromarray(pixels), (x, y + LABEL))
    return sheet


def compare(
    targets: Sequence[str],
    data: Path,
    settings: SegmentSettings,
    *,
    seeds: int,
    size: int | None,
    device: torch.device,
) -> tuple[dict[str, Any], str, Image.Image]:
    """Measure every model with every seed; return all numbers, the table, and the image.

    Raises:
        ValueError: a target or the data cannot be used.
    """
    train, val = open_segments(data, settings.layout)  # errors come before any model is built
    opened = list(models(targets, size))
    found: dict[str, list[dict[str, float]]] = {}
    seconds: dict[str, list[float]] = {}
    shown: dict[str, Picture] = {}
    parameters = {}
    for name, student in opened:
        student = student.to(device)
        parameters[name] = sum(p.numel() for p in student.backbone.parameters()) / 1e6
        for seed in range(seeds):
            numbers, picture, took = measure(name, student, data, settings, seed, device)
            found.setdefault(name, []).append(numbers)
            seconds.setdefault(name, []).append(round(took, 2))
            if picture is not None:
                shown.setdefault(name, picture)
            miou = numbers[MEASURES[0]]
            print(f"{name}, seed {seed}: mIoU {miou:.2f} in {took:.1f} s", flush=True)
        student.cpu()
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    about = dict(
        data=dict(layout=train.layout, train=len(train), val=len(val), classes=train.classes),
        settings=asdict(settings),
        seeds=seeds,
        targets=list(targets),
        device=gpu or "cpu",
        torch=torch.__version__,
        python=platform.python_version(),
        parameters_M=parameters,
        seconds=seconds,
        values=found,
    )
    return about, table(found, parameters), mosaic(shown)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the three files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "targets", nargs="*", help="folders of exports, or names of timm's and our models"
    )
    parser.add_argument("--data", type=Path, help="images with masks, in a known layout")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--stride", type=int, default=341)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--size", type=int, help="side of images for named models, in pixels")
    parser.add_argument("--tiny", action="store_true", help="a minute on a CPU, without data")
    args = parser.parse_args(arguments)
    if args.tiny:
        targets, settings, seeds, size = args.targets or TINY, TINY_SETTINGS, 2, 64
    else:
        if not args.targets or args.data is None:
            parser.error("name models and --data, or ask for --tiny")
        names = ("steps", "batch", "crop", "stride", "lr", "workers")
        settings = SegmentSettings(**{name: getattr(args, name) for name in names}, pictures=1)
        targets, seeds, size = args.targets, args.seeds, args.size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as made:
        data = args.data or blocks(Path(made))
        about, text, picture = compare(
            targets, data, settings, seeds=seeds, size=size, device=device
        )
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    about["command"] = " ".join(["segment_few.py", *(arguments or sys.argv[1:])])
    (args.out / "segment_few.json").write_text(json.dumps(about, indent=1) + "\n")
    (args.out / "segment_few.md").write_text(text + "\n")
    with written_whole(args.out / "segment_few.png") as temporary:
        picture.save(temporary, "PNG")


if __name__ == "__main__":
    main()
