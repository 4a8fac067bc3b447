"""`zoo eval`: measure a run, an exported student, or any registered model."""

import json
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from zoo.eval.extract import extract
from zoo.eval.fidelity import fidelity
from zoo.eval.knn import knn
from zoo.eval.linear import linear_probe
from zoo.features import Batch
from zoo.pipeline import held_out, prepare, probe
from zoo.students.export import load_export
from zoo.students.student import Student, build_student
from zoo.teachers.teacher import unknown_name
from zoo.train.data import eval_batches, open_splits
from zoo.train.run import Run


def evaluate_target(
    target: str, data: Path | None, *, size: int | None, batch: int, out: Path | None
) -> None:
    """Measure `target`, print a table, and append the numbers to `out` as one JSON line.

    Raises:
        ValueError: the target is unknown, or labelled data is missing.
    """
    folder = Path(target)
    if (folder / "config.json").is_file() and (folder / "export").is_dir():
        values = dict(_measure_run(Run(folder)))
    else:
        values = dict(_probe_model(_student(target, size), data, batch))
    table = Table("measure", "value", title=target)
    for name, value in values.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    if out:
        with out.open("a") as file:
            file.write(json.dumps(dict(target=target, data=str(data or ""), **values)) + "\n")


def _measure_run(run: Run) -> Iterator[tuple[str, float]]:
    setting = prepare(run.config())
    student = load_export(run.path / "export", device=setting.device)
    with setting.autocast():
        yield from fidelity(student, setting.teachers, held_out(setting))
    yield from probe(student.look, setting)


def _student(target: str, size: int | None) -> Student:
    if Path(target).is_dir():
        return load_export(Path(target))
    if not timm.is_model(target.partition(".")[0]):
        raise unknown_name(target, timm.list_models(), "run, export or registered model")
    if size is None:
        config = timm.get_pretrained_cfg(target)
        size = config.input_size[-1] if config else 224
    return build_student(target, {}, size=size, pretrained="." in target).eval()


def _probe_model(student: Student, data: Path | None, batch: int) -> Iterator[tuple[str, float]]:
    if data is None:
        raise ValueError("Name labelled images with --data: one sub-folder a class, or shards.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = student.to(device)
    sources = open_splits(data, 0.2)
    if not sources[0].classes:
        raise ValueError(f"{data} has no classes: one sub-folder a class, or .cls in the shards.")

    def batches(source) -> Iterator[Batch]:
        total = -(-len(source) // batch)
        images = eval_batches(source, max(student.size), batch)
        for some in track(images, "extract", total=total, transient=True):
            yield some.to(device)

    bank, queries = (extract(student.look, batches(source)) for source in sources)
    assert bank.labels is not None and queries.labels is not None
    sets = (bank.summaries, bank.labels, queries.summaries, queries.labels)
    yield from knn(*sets)
    yield from linear_probe(*sets)
