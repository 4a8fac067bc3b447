"""Read the features that `zoo embed` has stored, for kNN and the probes."""

import json
import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch

from zoo.eval.extract import Extracted
from zoo.files import checked, parse_json, read_arrays, read_json

INDEX = "index.json"
PARTS: tuple[str, ...] = ("train", "val")
BY_NAME = "by name"
"""How labels are matched between the parts; older folders do not say."""
Format = Literal["parquet", "npz"]

_log = logging.getLogger(__name__)


class Counts(TypedDict):
    """The images of each part."""

    train: int
    val: int


class Target(TypedDict):
    """The model: as the user named it, and what `about_model` says."""

    target: str
    name: str
    size: int
    parameters: int
    macs: int | float | None


class Index(TypedDict):
    """What `index.json` says of a folder of features."""

    model: Target
    weights_hash: str
    data: str
    data_hash: str
    precision: str
    dtype: str
    form: Format
    rows: int
    """Images a shard."""
    parts: Counts
    classes: list[str]
    labels: NotRequired[str]
    command: str | None


class StoredShard(NamedTuple):
    """The rows of a shard."""

    keys: list[str]
    labels: np.ndarray
    summaries: np.ndarray
    unreadable: list[str]
    """Names of the images that could not be read; they have no row."""


def shard_path(out: Path, part: str, number: int, form: str) -> Path:
    """Return where a shard of a part lies."""
    return out / f"{part}-{number:06d}.{form}"


def about_features(folder: Path) -> Index:
    """Read the index of a folder of features: model, data, precision and the sizes of the parts.

    Raises:
        ValueError: there is no index, or it is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{folder} holds no features: {INDEX} is missing. zoo embed writes one.")
    about = read_json(path, Index)
    if about["rows"] < 1 or min(about["parts"].values()) < 1:
        raise ValueError(f"{path}: rows and the parts must be at least 1.")
    return about


def load_features(folder: Path) -> tuple[Extracted, Extracted]:
    """Read both parts, in the precision in which they are stored.

    Raises:
        ValueError: the images have no classes, or as `read_part`.
    """
    about = about_features(folder)
    if not about["classes"]:
        raise ValueError(f"The images of {folder} have no classes, so nothing can be probed.")
    if about.get("labels") != BY_NAME:
        _log.warning(
            "%s was written when labels were matched by position: if train and val of %s differ "
            "in a class, embed them again.", folder, about["data"],
        )  # fmt: skip
    train, val = (read_part(folder, part) for part in PARTS)
    return train, val


def read_part(folder: Path, part: str) -> Extracted:
    """Read the shards of one part (`train` or `val`) into one matrix.

    Raises:
        ValueError: a shard is missing or damaged.
    """
    about = about_features(folder)
    total, rows = about["parts"][part], about["rows"]
    paths = [shard_path(folder, part, n, about["form"]) for n in range(-(-total // rows))]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing:
        raise ValueError(f"{missing} is missing: run the zoo embed command again, which continues.")
    keys: list[str] = []
    lost: list[str] = []
    labels = torch.empty(0, dtype=torch.long)
    summaries = torch.empty(0, 0)
    for number, path in enumerate(paths):
        shard = read_shard(path)
        images = min(rows, total - number * rows)
        if len(shard.keys) + len(shard.unreadable) != images:
            raise ValueError(f"{path} has {len(shard.keys)} rows for {images} images.")
        lost += shard.unreadable
        if not shard.keys:
            continue
        if not keys:  # allocated once, so that the shards are never in memory twice
            dtype = torch.float16 if shard.summaries.dtype == np.float16 else torch.float32
            summaries = torch.empty(total, shard.summaries.shape[1], dtype=dtype)
            labels = torch.empty(total, dtype=torch.long)
        if shard.summaries.shape[1] != summaries.shape[1]:
            raise ValueError(f"{path} has features of another width than the shard before.")
        here = slice(len(keys), len(keys) + len(shard.keys))
        summaries[here], labels[here] = torch.tensor(shard.summaries), torch.tensor(shard.labels)
        keys += shard.keys
    return Extracted(summaries[: len(keys)], labels[: len(keys)], keys, tuple(lost))


def read_shard(path: Path) -> StoredShard:
    """Read a shard that `write_shard` wrote.

    Raises:
        ValueError: it is damaged, or its columns do not fit together.
    """
    try:
        shard = _read_npz(path) if path.suffix == ".npz" else _read_parquet(path)
    except Exception as error:  # pyarrow raises whatever it stumbles over
        raise ValueError(f"The shard {path} cannot be read: {error!r}.") from error
    n = len(shard.keys)
    floats, numbers = shard.summaries.dtype.kind == "f", shard.labels.dtype.kind == "i"
    if not floats or not numbers or shard.labels.shape != (n,) or shard.summaries.ndim != 2:
        raise ValueError(f"The shard {path} lacks numbers: it needs key, label and summary.")
    if len(shard.summaries) != n:
        raise ValueError(f"The shard {path} has {n} keys and {len(shard.summaries)} rows.")
    checked(shard.keys + shard.unreadable, list[str], f"The keys of {path}")
    return shard


def write_shard(path: Path, shard: StoredShard, form: Format) -> None:
    """Write a shard that `read_shard` reads."""
    keys, labels, summaries, unreadable = shard
    if form == "npz":
        with path.open("wb") as file:
            lost = np.array(unreadable, str)
            columns: dict[str, Any] = dict(key=np.array(keys, str), label=labels)
            np.savez(file, **columns, summary=summaries, unreadable=lost)
        return
    import pyarrow  # pyright: ignore[reportMissingImports]
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    flat = pyarrow.array(np.ascontiguousarray(summaries).reshape(-1))
    columns = dict(
        key=pyarrow.array(keys, pyarrow.string()),
        label=pyarrow.array(labels),
        summary=pyarrow.FixedSizeListArray.from_arrays(flat, max(1, summaries.shape[1])),
    )
    table = pyarrow.table(columns, metadata=dict(unreadable=json.dumps(unreadable)))
    pyarrow.parquet.write_table(table, path)


def _read_npz(path: Path) -> StoredShard:
    arrays = read_arrays(path)
    names = [arrays["key"], arrays.get("unreadable", np.empty(0, str))]
    keys, lost = (array.reshape(-1).tolist() for array in names)
    return StoredShard(keys, arrays["label"], arrays["summary"], lost)


def _read_parquet(path: Path) -> StoredShard:
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    table = pyarrow.parquet.ParquetFile(path).read()
    column = table["summary"].combine_chunks()
    rows = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
    about = (table.schema.metadata or {}).get(b"unreadable", b"[]")
    lost = parse_json(about, list[str], f"What {path} says of unreadable images")
    return StoredShard(table["key"].to_pylist(), table["label"].to_numpy(), rows, lost)
