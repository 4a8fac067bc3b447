"""Features of many images in shards that can be resumed, read and searched.

    OUT/index.json                  the model, its hash, the data's hash, the width, the parts
    OUT/train-000003.parquet        rows 3·rows .. 4·rows of the part, in the data's order
    OUT/val-000000.parquet          (.npz where pyarrow is not installed)

A shard holds the columns `key`, `label` (-1 for none) and `summary`, one row an image, and the
names of the images that could not be read.
"""

import json
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from zoo.commands.embed_request import Embed
from zoo.data.loader import centre_crops
from zoo.data.sources import Source, open_labelled
from zoo.data.unreadable import note_lost
from zoo.eval.registry import Subject
from zoo.eval.results import hash_data, hash_weights
from zoo.eval.speed.models import Case, measure
from zoo.eval.speed.throughput import case_name
from zoo.eval.stored import (
    BY_NAME,
    INDEX,
    PARTS,
    StoredShard,
    about_features,
    shard_path,
    write_shard,
)
from zoo.eval.subject import EvalRequest, about_model, open_subject
from zoo.features import Batch
from zoo.files import written_whole
from zoo.students.student import Student
from zoo.train.fields import changed
from zoo.train.interrupt import Interrupt, Interrupted


@dataclass(kw_only=True)
class Rate:
    """The pace from each part's first shard on, which pays for the start of the workers."""

    ends: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """Of each part: when a shard's features were whole on the host, and how many there were."""

    def add(self, part: str, images: int) -> None:
        self.ends.setdefault(part, []).append((time.perf_counter(), images))

    @property
    def steady(self) -> float | None:
        """Images a second between the ends of the first and of the last shard of a part."""
        seconds = sum(ends[-1][0] - ends[0][0] for ends in self.ends.values())
        images = sum(images for ends in self.ends.values() for _, images in ends[1:])
        return images / seconds if seconds > 0 else None


def embed(request: Embed) -> Path:
    """Write the features of both parts of `request.data` to `request.out`.

    Shards that an earlier call has written are kept; the same request continues there.

    Workers decode images into pinned memory. Nobody waits for the device between batches: features
    stay on it until a shard is full; another thread then fetches and writes them.

    Raises:
        ValueError: the folder holds features of another model, data or setting.
        Interrupted: a signal came; full shards are kept.
    """
    parts = dict(zip(PARTS, open_labelled(request.data, 0.2), strict=True))
    subject = open_subject(
        request.model,
        EvalRequest(size=request.size, batch=request.batch, precision=request.precision),
    )
    index = _index(request, subject.student, parts)
    _start(request.out, index)
    console, rate, began = Console(), Rate(), time.perf_counter()
    todo = [(part, n) for part, source in parts.items() for n in _missing(request, part, source)]
    images = sum(min(request.rows, len(parts[part]) - n * request.rows) for part, n in todo)
    done = sum(map(len, parts.values())) - images
    if done:
        console.print(f"{done:,} images are embedded already; {images:,} are left.")
    with Interrupt() as stop, Progress(console=console, transient=True) as bar:
        task = bar.add_task("embed", total=images)
        with ThreadPoolExecutor(1) as writer:
            waiting: list[Future] = []
            for part, numbers in _runs(todo):
                for shard in _shards(request, subject, parts[part], numbers, stop):
                    waiting.append(writer.submit(_write, request, part, shard, rate))
                    bar.advance(task, len(shard.keys) + len(shard.lost))
                    if len(waiting) > 2:  # no more than that many shards wait in memory
                        waiting.pop(0).result()
                if stop.signal is not None:
                    break
            for last in waiting:
                last.result()
    if stop.signal is not None:
        raise Interrupted(stop.signal, f"stopped; the same command continues in {request.out}.")
    _print_rates(request, subject.student, images, time.perf_counter() - began, rate, console)
    return request.out


def _index(request: Embed, student: Student, parts: dict[str, Source]) -> dict[str, Any]:
    return dict(
        model=dict(target=request.model, **about_model(student)),
        weights_hash=hash_weights(student),
        data=str(request.data),
        data_hash=hash_data(request.data),
        precision=request.precision,
        dtype="float16" if request.half else "float32",
        form=request.form,
        rows=request.rows,
        parts={part: len(source) for part, source in parts.items()},
        classes=list(parts["train"].classes),
        labels=BY_NAME,
        command=request.command,
    )


def _start(out: Path, index: dict[str, Any]) -> None:
    """Write the index, or check that what is there is a part of the same whole."""
    path = out / INDEX
    if path.is_file():
        there = about_features(out)
        differing = [k for k in index if k != "command" and there.get(k) != index[k]]
        if differing:
            found = "; ".join(f"{k}: {there.get(k)}, not {index[k]}" for k in differing[:3])
            raise ValueError(f"{out} holds other features ({found}). Give another folder.")
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no {INDEX}; give a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(index, indent=1) + "\n")


def _missing(request: Embed, part: str, source: Source) -> list[int]:
    count = -(-len(source) // request.rows)
    return [n for n in range(count) if not shard_path(request.out, part, n, request.form).is_file()]


def _runs(todo: Sequence[tuple[str, int]]) -> Iterator[tuple[str, range]]:
    """Join neighbouring shards, so that one loader serves them all."""
    place = 0
    while place < len(todo):
        part, first = todo[place]
        count = 1
        while todo[place + count : place + count + 1] == [(part, first + count)]:
            count += 1
        yield part, range(first, first + count)
        place += count


def call(data: str | Path, out: str | Path, model: str | Path, fields: Mapping[str, Any]) -> Path:
    """Carry out `zoo.embed`, whose docstring says what it takes."""
    request = Embed(data=Path(data), out=Path(out), model=str(model))
    command = f"zoo.embed({str(data)!r}, {str(out)!r}, model={str(model)!r})"
    return embed(changed(request, dict(command=command, **fields)))


@dataclass
class Shard:
    """A shard as it is collected; its features stay on the device."""

    number: int
    keys: list[str] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    summaries: list[Tensor] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Names of the images that could not be read."""


def _shards(
    request: Embed, subject: Subject, source: Source, numbers: range, stop: Interrupt
) -> Iterator[Shard]:
    """Return full shards until the part is done or a signal came."""
    rows = request.rows
    here, last = numbers.start * rows, min(len(source), numbers.stop * rows)
    shard = Shard(numbers.start)
    for part in _summaries(request, subject, source, here, last):
        if stop.signal is not None:
            return
        places, lost = part["positions"], part["lost"]
        end = here + len(places) + len(lost)
        while here < end:  # a batch may end one shard and begin the next
            cut = min(end, (shard.number + 1) * rows)
            some = slice(bisect_left(places, here), bisect_left(places, cut))
            shard.keys += part["keys"][some]
            shard.labels.append(part["labels"][some])
            shard.summaries.append(part["summaries"][some])
            shard.lost += [one.key for one in lost if here <= one.position < cut]
            here = cut
            if here in (last, (shard.number + 1) * rows):
                yield shard
                shard = Shard(shard.number + 1)


def _summaries(
    request: Embed, subject: Subject, source: Source, first: int, last: int
) -> Iterator[dict]:
    """Yield the parts of `centre_crops` with the `summaries` of their images, on the device."""
    parts = centre_crops(
        source,
        max(subject.student.size),
        request.batch,
        start=first,
        limit=last,
        workers=request.workers,
        pin=subject.device.type == "cuda",
    )
    dtype = torch.float16 if request.half else torch.float32
    known: set[str] = set()
    with torch.inference_mode():
        for part in parts:
            note_lost(part["lost"], known)
            summary = torch.empty(0, 0)
            if part["keys"]:
                features = subject.features(Batch(part["images"]).to(subject.device))
                summary = features.summary
                if summary is None:
                    assert features.spatial is not None
                    summary = features.spatial.mean(dim=(1, 2))
            yield part | dict(summaries=summary.to(dtype))


def _write(request: Embed, part: str, shard: Shard, rate: Rate) -> None:
    """Fetch a shard's features and write it, whole or not at all."""
    some = [summary for summary in shard.summaries if len(summary)]
    rows = torch.cat(some).cpu().numpy() if some else np.empty((0, 0), np.float32)
    rate.add(part, len(shard.keys))
    if not np.isfinite(rows).all():
        raise ValueError(
            f"Features of {part} shard {shard.number} are not finite in {rows.dtype}; try "
            "--no-half or --precision float32."
        )
    labels = torch.cat(shard.labels).numpy()
    path = shard_path(request.out, part, shard.number, request.form)
    with written_whole(path) as temporary:
        write_shard(temporary, StoredShard(shard.keys, labels, rows, shard.lost), request.form)


def _print_rates(
    request: Embed, student: Student, images: int, seconds: float, rate: Rate, console: Console
) -> None:
    """Print the throughput, and beside it what the model does alone."""
    if not images:
        console.print(f"{request.out} is complete.")
        return
    steady = rate.steady
    console.print(
        f"{images:,} images in {seconds:.1f} s, {images / seconds:,.1f} img/s with the start"
        + (f"; {steady:,.1f} img/s after each part's first shard" if steady else "")
        + f" -> {request.out}",
        highlight=False,
    )
    if not request.bench:
        return
    device = next(student.parameters()).device.type
    case = Case(
        model=case_name(student),
        size=student.size[0],
        batch=request.batch,
        precision=request.precision,
        device=device,
    )
    # As long as the embedding, within reason: a GPU at its power limit does not stay at one speed.
    batches = images // request.batch
    rounds = min(max(batches, 20), 100) if device == "cuda" else 5
    (row,) = measure([case], rounds=rounds, warmup=3)
    if row.error:
        raise ValueError(f"{case.describe()} could not be measured: {row.error}")
    reached = steady or images / seconds
    mean = request.batch * len(row.seconds) / sum(row.seconds)
    console.print(
        f"zoo bench, {case.describe()}: {row.images_per_s:,.1f} img/s (the median of {rounds} "
        f"batches; {mean:,.1f} in the mean); embedding reaches {reached / row.images_per_s:.1%} "
        f"({reached / mean:.1%} of the mean)",
        highlight=False,
    )
