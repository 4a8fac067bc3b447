"""Write folders of images as webdataset's shards, with an index and the names of their classes."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from zoo.data.index import ShardIndex
from zoo.data.shards import shards_in
from zoo.data.sources import CLASSES, FolderSource, open_parts


def open_folders(folder: Path) -> dict[str, FolderSource]:
    """Open the images of a folder: its parts train and val, or all of it under the name "images".

    Raises:
        ValueError: it holds no image, or shards.
    """
    parts = {}
    for name, part in open_parts(folder).items():
        if not isinstance(part, FolderSource):
            raise ValueError(f"{folder} holds no image files; only folders of those are packed.")
        parts[name or "images"] = part
    return parts


def refuse_existing(folder: Path) -> None:
    """Raise a ValueError if there is something at `folder`."""
    if folder.exists():
        raise ValueError(f"{folder} is there already; choose another folder, or remove it.")


def write_shards(
    parts: Mapping[str, FolderSource],
    folder: Path,
    *,
    shard_bytes: int,
    written: Callable[[], object] = lambda: None,
) -> ShardIndex:
    """Write parts as shards `NAME-000000.tar` in a new folder, whole or not at all.

    Images keep their order and their bytes, so a run on the shards is the run on the folder. A
    sample's name is the path of its file without the ending, its dots as `_`: webdataset takes
    what follows the first dot for the ending. The class is a number in `.cls`, its name stands in
    `classes.json`.

    Args:
        shard_bytes: A shard is closed when it has so many bytes of images.
        written: Called after each image.

    Raises:
        ValueError: the folder exists, or webdataset is missing.
        OSError: a file cannot be read, or the disk is full.
    """
    if not find_spec("webdataset"):
        raise ValueError("Shards are written by webdataset: pip install 'backbone-zoo[train]'.")
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        making = place / "shards"  # with the rights of any new folder, which mkdtemp's has not
        making.mkdir()
        classes = sorted({name for part in parts.values() for name in part.classes})
        numbers = {name: str(number).encode() for number, name in enumerate(classes)}
        for name, part in parts.items():
            _write_part(part, making, name, numbers, shard_bytes, written)
        if classes:
            (making / CLASSES).write_text(json.dumps(classes, indent=0))
        index = ShardIndex.scan(shards_in(making))
        index.save()
        making.rename(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return index


def _write_part(
    part: FolderSource,
    folder: Path,
    name: str,
    numbers: Mapping[str, bytes],
    shard_bytes: int,
    written: Callable[[], object],
) -> None:
    from webdataset.writer import ShardWriter

    pattern = str(folder / name).replace("%", "%%") + "-%06d.tar"
    taken: set[str] = set()
    shards = ShardWriter(pattern, 2**62, shard_bytes, _to_disk, verbose=0, encoder=False, mtime=0)
    with shards as writer:
        for index, file in enumerate(part.files):
            sample: dict[str, str | bytes] = {"__key__": sample_key(file, taken)}
            sample[file.rpartition(".")[2].lower()] = part.read(index)
            if (label := part.label(index)) is not None:
                sample["cls"] = numbers[part.classes[label]]
            writer.write(sample)
            written()


def sample_key(file: str, taken: set[str]) -> str:
    """Return a name for the sample of a file that is not among `taken`, and add it to them."""
    folder, slash, name = file.rpartition("/")
    key = folder + slash + name.rpartition(".")[0].replace(".", "_")
    while key in taken:  # a.png beside a.jpg
        key += "_"
    taken.add(key)
    return key


def _to_disk(file: str) -> None:
    with Path(file).open("rb") as shard:
        os.fsync(shard.fileno())
