"""The result files of `zoo eval`: a JSON line for each benchmark, with arrays and images beside."""

import csv
import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from zoo.data.index import INDEX
from zoo.eval.average_precision import AveragePrecision
from zoo.eval.examples import Example, small
from zoo.eval.registry import Parts, Picture, Scores
from zoo.files import checked_fields, parse_json, read_arrays, try_writing, written_whole

SUFFIX = ".jsonl"
TRAINED = "trained"
"""In the settings of a measured model that was trained before: what it is and how it was trained,
which belongs to the model and not to the measurement."""
NEUTRAL = ("workers", "pictures", "predictions", "confusion", TRAINED)
"""Settings of benchmarks that change no number, or are the model's."""
KINDS: Mapping[str, type[Parts]] = {"top": Scores, "right": AveragePrecision}
"""The kind of a number, by the name of an array that only this kind has in the file."""
ENDS = 4096
"""Bytes at the beginning and at the end of each file that the hash of a data set reads."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One benchmark of one model on one data set, with everything needed to run it again."""

    target: str
    benchmark: str
    values: Mapping[str, float | None]
    """The numbers by name; `None` where a number is not finite."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    protocol: str | None = None
    """The named protocol, its source, and what departs from it."""
    unreadable: int = 0
    """Images that could not be read; they are in none of the numbers."""
    data: str | None = None
    data_hash: str | None = None
    features: str | None = None
    """The folder of stored features, if they were read instead of the images."""
    weights_hash: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    """`name`, `size`, `parameters` and `macs` of the backbone."""
    precision: str = "float32"
    batch: int | None = None
    seed: int = 0
    seconds: float | None = None
    date: str | None = None
    command: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    load: float | None = None
    """Processes that ran or waited on the machine in the minute before."""
    scores_file: str | None = None
    """File of the scores of single images, relative to the result file."""
    pictures: Sequence[Mapping[str, str]] = ()
    """`name`, `file` and `caption` of each image for the report."""
    examples: Sequence[Mapping[str, Any]] = ()
    """The model on the images that all models are shown on (`zoo.eval.examples`): `key`, the words
    or the file of `image`, `truth` and `prediction`, `score`, `right` and `legend`."""
    place: Path | None = None
    """The folder of the result file; not written."""
    kept: Mapping[str, Parts] = field(default_factory=dict)
    """Scores of single images, before they are written."""

    @property
    def case(self) -> tuple[str, str | None, str]:
        """What two records must have in common to be compared: benchmark, data and settings.

        Settings that change no number (`NEUTRAL`) do not count.
        """
        settings = {name: x for name, x in self.settings.items() if name not in NEUTRAL}
        return self.benchmark, self.dataset, json.dumps(settings, sort_keys=True)

    @property
    def dataset(self) -> str | None:
        """The hash of the data, or its path where it was not hashed."""
        return self.data_hash or self.data

    @property
    def size(self) -> int | None:
        """Side of the images that the network saw, in pixels."""
        return self.model.get("size")

    @property
    def conditions(self) -> dict[str, Any]:
        """What else the numbers depend on, besides target, case, seed and weights."""
        found: dict[str, Any] = dict(size=self.size, precision=self.precision)
        if self.features:
            found["stored features"] = self.features
        if self.benchmark == "speed":
            machine = self.machine.get("gpu") or self.machine.get("processor")
            found |= dict(batch=self.batch, machine=machine, threads=self.threads)
        return found

    @property
    def identity(self) -> tuple[Any, ...]:
        """Two records of one identity are one measurement, made twice."""
        conditions = json.dumps(self.conditions, sort_keys=True)
        return self.target, *self.case, conditions, self.seed, self.weights_hash

    def scores(self) -> dict[str, Parts]:
        """Return the scores of single images by the name of their number.

        Raises:
            ValueError: their file is missing or damaged.
        """
        if self.kept or not self.scores_file or self.place is None:
            return dict(self.kept)
        path = self.place / self.scores_file
        try:
            found: dict[str, dict[str, Any]] = {}
            for key, array in read_arrays(path).items():
                part, _, name = key.partition("/")
                found.setdefault(name, {})[part] = array
            return {
                name: kind(**parts | {"keys": parts["keys"].reshape(-1).tolist()})
                for name, parts in found.items()
                for mark, kind in KINDS.items()
                if mark in parts
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"The scores of single images, {path}, cannot be read: {error}."
            ) from None


KNOWN = {f.name for f in fields(Record)} - {"place", "kept"}
"""What a line has."""
START = '{"target": '
"""How a line begins."""


def write(
    out: Path,
    record: Record,
    scores: Mapping[str, Parts],
    pictures: Mapping[str, Picture],
    examples: Sequence[Example] = (),
) -> Record:
    """Append a record to `out`, and write its scores and images into `files_of(out)`.

    Return the record with the names of these files.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder = files_of(out)
    stem = "-".join((_slug(record.target), record.benchmark, _identity(record)))
    changes: dict[str, Any] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    if scores or pictures or examples:
        folder.mkdir(exist_ok=True)
    if scores:
        arrays = {}
        for name, one in scores.items():
            parts = zip(one._fields, one, strict=True)
            arrays |= {f"{part}/{name}": np.asarray(x) for part, x in parts if x is not None}
        path = folder / f"{stem}.npz"
        with written_whole(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
        changes["scores_file"] = f"{folder.name}/{path.name}"
    shown = []
    for name, picture in pictures.items():
        path = folder / f"{stem}-{_slug(name)}.png"
        Image.fromarray(np.ascontiguousarray(picture.pixels)).save(path)
        if picture.table:
            csv_file = path.with_suffix(".csv")
            with written_whole(csv_file) as temporary, temporary.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(picture.table)
        shown.append(dict(name=name, file=f"{folder.name}/{path.name}", caption=picture.caption))
    kept = [_kept_example(folder, f"{stem}-{i}", one) for i, one in enumerate(examples)]
    changes |= dict(pictures=shown, examples=kept, place=out.parent)
    line = {f.name: getattr(record, f.name) for f in fields(record)} | changes
    written = Record(**line)
    with out.open("a+b") as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read() not in (b"", b"\n")  # by a kill: what comes now begins a line
        text = "\n" * torn + json.dumps(_plain(written), ensure_ascii=False) + "\n"
        file.write(text.encode())
    return written


def _kept_example(folder: Path, stem: str, one: Example) -> dict[str, Any]:
    """Write the pixels of an example; return what the record says of it."""
    found: dict[str, Any] = dict(key=one.key, score=one.score, right=one.right)
    found["legend"] = [[name, [int(x) for x in colour]] for name, colour in one.legend]
    for part in ("image", "truth", "prediction"):
        value = getattr(one, part)
        if isinstance(value, str):
            found[part] = value
            continue
        name = f"{stem}-{part}.{'jpg' if part == 'image' else 'png'}"
        small(value, smooth=part == "image").convert("RGB").save(folder / name, quality=88)
        found[part] = dict(file=f"{folder.name}/{name}")
    return found


def check_out(out: Path) -> None:
    """Refuse a result file that results cannot be appended to.

    Raises:
        ValueError: its name does not end in .jsonl, it holds something else, or it cannot be
            written.
    """
    if out.suffix != SUFFIX:
        raise ValueError(f"Results are lines of JSON: give --out a name that ends in {SUFFIX}.")
    try_writing(out.parent)
    if not out.exists():
        return
    try:
        with out.open("a"):
            pass
    except OSError as error:
        raise ValueError(f"Cannot write to {out}: {error.strerror}. Give another --out.") from error
    _records(out)


def finished(out: Path, record: Record) -> Record | None:
    """Return the last record of the same measurement in a result file, if there is one."""
    known = read(out) if out.is_file() else []
    same = [r for r in known if (r.target, _identity(r)) == (record.target, _identity(record))]
    return same[-1] if same else None


def work_of(out: Path, record: Record) -> Path:
    """Return the folder beside a result file for the training of a measurement."""
    return out.with_name(f"{out.stem}.work") / f"{record.benchmark}-{_identity(record)}"


def files_of(out: Path) -> Path:
    """Return the folder beside a result file for its scores and pictures."""
    return out.with_name(f"{out.stem}_files")


def _plain(record: Record) -> dict[str, Any]:
    line = asdict(record)
    for own in ("place", "kept"):
        del line[own]
    line["values"] = {name: finite(value) for name, value in record.values.items()}
    return line


def finite(value: float | None) -> float | None:
    """Return the number, or `None` if it is not finite and JSON cannot hold it."""
    return value if value is not None and math.isfinite(value) else None


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-")[-60:]


def _identity(record: Record) -> str:
    identity = (
        f"{record.case} {record.weights_hash} {record.model} {record.precision} {record.seed}"
    )
    return hashlib.sha256(identity.encode()).hexdigest()[:10]


def read(path: Path) -> list[Record]:
    """Read all records of a result file, also those of a case that was measured twice.

    Raises:
        ValueError: there is no such file, or a line of it is not a result.
    """
    if not path.is_file():
        raise ValueError(f"There is no result file {path}; zoo eval writes one with --out.")
    found = _records(path)
    if not found:
        raise ValueError(f"{path} holds no result; zoo eval appends them with --out.")
    return found


def _records(path: Path) -> list[Record]:
    """Read the results in a file; lines that a kill has cut are skipped, and said."""
    found = []
    for number, text in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        if not text.strip():
            continue
        what = f"Line {number} of {path}"
        try:
            line = parse_json(text, dict[str, Any], what)
            own = {key: value for key, value in line.items() if key in KNOWN}
            found.append(replace(checked_fields(Record, own, what), place=path.parent))
        except ValueError as error:
            if text[: len(START)] != START[: len(text)] or text.endswith("}"):
                raise ValueError(
                    f"{what} is not a result of zoo eval ({error}); give files that its --out "
                    "wrote."
                ) from None
            print(f"{what} is torn, as a kill leaves it, and was skipped.", file=sys.stderr)
    return found


def latest(records: Sequence[Record]) -> list[Record]:
    """Keep the last record of each measurement (`Record.identity`), in the order of the first ones.

    Measurements that differ in any way (settings, data, size, precision, seed, weights) all stay.
    """
    return list({record.identity: record for record in records}.values())


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with names such as training.steps."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def hash_weights(model: nn.Module) -> str:
    """Hash the names, types, shapes and bytes of a model's weights and buffers."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()[:16]


def hash_data(path: Path) -> str:
    """Hash a file or folder: names, sizes, and the first and last bytes of every file.

    The middle of a large file is not read, since data sets can be terabytes; a change there that
    keeps the size goes unnoticed.
    """
    digest = hashlib.sha256()
    root = path if path.is_dir() else path.parent
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if file.name == INDEX:  # holds the times of the shards, which another copy has not
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root).as_posix()} {size}\n".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(ENDS))
            if size > ENDS:
                handle.seek(max(ENDS, size - ENDS))
                digest.update(handle.read())
    return digest.hexdigest()[:16]
