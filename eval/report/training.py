"""Build the page of a run that is no distillation of images: its losses, numbers and pictures."""

import json
from pathlib import Path

import numpy as np

from zoo.eval.report import figures
from zoo.eval.report.page import build_report, run_facts, status_of
from zoo.eval.report.parts import Gallery, PageImage, Row, Table, compared, course, template_of
from zoo.eval.report.run_folder import RunFolder, read_run, series
from zoo.files import written_whole

MOST_PICTURES = 24
WORDS = {
    "detect": "detector",
    "distill_text": "language model from teachers",
    "elastic": "model of several sizes",
    "mask": "sparse language model",
    "mask_images": "sparse model",
    "pretext": "teacher",
}
"""What a run of a kind makes."""


def build_page(run_dir: Path) -> Path:
    """Write `report.html` into the folder of a run of any kind; return the page's path.

    Raises:
        ValueError: as `build_report`.
        OSError: the folder cannot be written to.
    """
    run = read_run(run_dir)
    if run.config.get("kind", "distill") == "distill":
        return build_report(run_dir)
    return build_training(run)


def build_training(run: RunFolder) -> Path:
    """Write `report.html` into a run's folder, with the sections for which it holds something."""
    gallery = Gallery(run.path / "figures")
    kind = str(run.config.get("kind"))
    name = run.config.get("backbone") or run.config.get("student") or run.config.get("model") or ""
    detector = run.config.get("detector")
    what = WORDS.get(kind, kind)
    title = f"{detector or what} over {name}" if detector else f"{name or run.path.name}: {what}"
    page = template_of("training.html.j2").render(
        title=title,
        status=status_of(run, finished=bool(run.ours)),
        numbers=_numbers(run),
        losses=_curves(run, gallery),
        pictures=_pictures(run, gallery),
        samples=_samples(run),
        facts=run_facts(run),
        command=run.about.get("command"),
        config=json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else None,
        notes=run.notes,
    )
    target = run.path / "report.html"
    with written_whole(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def _numbers(run: RunFolder) -> Table | None:
    own = ("kind", "step", "time", "arm")
    keys = dict.fromkeys(k for arm in run.arms.values() for k in arm if k not in own)
    rows = [Row(k, compared(k, [arm.get(k) for arm in run.arms.values()])) for k in keys]
    return Table(["measure", *run.arms], rows) if rows else None


def _samples(run: RunFolder) -> list[dict[str, str]]:
    """Return what a language model wrote before and after its run, behind some prompts."""
    found = run.about.get("samples")
    found = found if isinstance(found, list) else []
    return [{k: str(v) for k, v in one.items()} for one in found if isinstance(one, dict)]


def _curves(run: RunFolder, gallery: Gallery) -> list[PageImage]:
    """Draw each number that training has logged over its steps."""
    keys = dict.fromkeys(key for line in run.train for key in line if key not in ("kind", "step"))
    pictures = []
    for i, key in enumerate(keys):
        steps, values = series(run.train, key)
        if len(steps) > 1:
            png = figures.curves(key, [(key, steps, values, figures.STUDENT_COLOUR)])
            pictures.append(gallery.add(png, f"curve-{i}-{key}", course(key, values)))
    return pictures


def _pictures(run: RunFolder, gallery: Gallery) -> list[tuple[PageImage, str]]:
    """Read the pictures that the run has left of its predictions."""
    from zoo.data.images import UnreadableImage, read_rgb

    found = []
    for path in sorted((run.path / "pictures").glob("*.png"))[:MOST_PICTURES]:
        try:
            pixels = np.asarray(read_rgb(path))
        except (UnreadableImage, OSError):
            continue
        png = figures.tile(pixels, side=720)
        found.append((gallery.add(png, f"picture-{path.stem}", path.stem), path.stem))
    return found
