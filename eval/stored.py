"""Read the features that `zoo embed` has stored, for kNN and the probes."""

import json
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from zoo.eval.extract import Extracted

INDEX = "index.json"
PARTS: tuple[str, ...] = ("train", "val")
Format = Literal["parquet", "npz"]


def _path(out: Path, part: str, number: int, form: str) -> Path:
    return out / f"{part}-{number:06d}.{form}"


def about_features(folder: Path) -> dict[str, Any]:
    """Read the index of a folder of features: model, data, precision and the sizes of the parts.

    Raises:
        ValueError: there is no index, or it is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{folder} holds no features: {INDEX} is missing. zoo embed writes one.")
    try:
        return cast(dict[str, Any], json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None


def load_features(folder: Path) -> tuple[Extracted, Extracted]:
    """Read both parts, in the precision in which they are stored.

    Raises:
        ValueError: the images have no classes, or as `read_part`.
    """
    about = about_features(folder)
    if not about["classes"]:
        raise ValueError(f"The images of {folder} have no classes, so nothing can be probed.")
    train, val = (read_part(folder, part) for part in PARTS)
    return train, val


def read_part(folder: Path, part: str) -> Extracted:
    """Read the shards of one part (`train` or `val`) into one matrix.

    Raises:
        ValueError: a shard is missing or damaged.
    """
    about = about_features(folder)
    total, rows = about["parts"][part], about["rows"]
    keys: list[str] = []
    labels = torch.empty(total, dtype=torch.long)
    summaries: Tensor | None = None
    for number in range(-(-total // rows)):
        path = _path(folder, part, number, about["form"])
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: run the zoo embed command again, which continues."
            )
        some_keys, some_labels, some = _read_shard(path)
        if summaries is None:  # allocated once, so that the shards are never in memory twice
            dtype = torch.float16 if some.dtype == np.float16 else torch.float32
            summaries = torch.empty(total, some.shape[1], dtype=dtype)
        here = slice(number * rows, number * rows + len(some))
        keys += some_keys
        summaries[here], labels[here] = torch.tensor(some), torch.tensor(some_labels)
    if summaries is None or len(keys) != total:
        raise ValueError(f"{folder} holds {len(keys)} rows of {part}, not {total}.")
    return Extracted(summaries, labels, keys)


def _read_shard(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return file["key"].tolist(), file["label"], file["summary"]
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]

    table = pyarrow.parquet.read_table(path)
    column = table["summary"].combine_chunks()
    rows = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
    return table["key"].to_pylist(), table["label"].to_numpy(), rows
