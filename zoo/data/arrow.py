"""Tables of images and texts as Hugging Face's `datasets` keeps them: Arrow files, and Parquet.

`save_to_disk` writes a stream of Arrow batches a file, which is mapped into memory: a row is read
from its place, in any order, and the ranks and workers of a machine share the memory. A row of
Parquet cannot be read by itself, so such a file is written as Arrow once, into the user's cache.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.data.images import UnreadableImage, printable
from zoo.data.shards import is_shard
from zoo.files import cache_dir, checked, read_json, written_whole

SUFFIXES = (".arrow", ".parquet")
STATE, PARTS = "state.json", "dataset_dict.json"
"""Files of `save_to_disk`: what belongs to a data set, and the parts of several."""
ROWS = 256
"""Rows of Parquet in memory at a time while it is written as Arrow."""

_log = logging.getLogger(__name__)


class Columns(NamedTuple):
    """Which columns of a table are read."""

    image: str
    label: str | None
    classes: tuple[str, ...]
    """Names of the labels; empty if they are numbers without names."""


class _Rows(NamedTuple):
    """The opened tables: what lies where."""

    ends: np.ndarray
    """[batches]: rows up to the end of each batch."""
    images: list[Any]
    """The column of images of each batch, as Arrow arrays of bytes."""
    paths: list[Any]
    """And of their paths, for images that lie in files of their own; `None` without."""
    labels: np.ndarray
    """[rows] int64: -1 for none; empty without labels."""


@dataclass(frozen=True, eq=False)
class ArrowSource:
    """A column of encoded images in tables, and a column of labels where there is one."""

    files: tuple[Path, ...]
    """The tables, as they were given."""
    columns: Columns
    counts: tuple[int, ...] = field(repr=False)
    """Rows of each."""

    @classmethod
    def open(cls, files: Sequence[Path]) -> "ArrowSource | None":
        """Map tables of one folder; `None` if they have no column of images.

        Raises:
            ValueError: a table is damaged or has other columns than the first, several columns
                hold images, a label has no name, or pyarrow is missing.
        """
        columns = columns_of(files[0])
        if columns is None:
            return None
        for file in files[1:]:
            if columns_of(file) != columns:
                raise ValueError(
                    f"{file} has other columns of images, labels or classes than {files[0]}."
                )
        counts = tuple(sum(len(b) for b in batches(mapped(file, columns))) for file in files)
        _check_count(files, sum(counts))
        source = cls(tuple(files), columns, counts)
        source._check_labels()
        return source

    @cached_property
    def _rows(self) -> _Rows:
        sizes, images, paths, labels = [0], [], [], []
        for file in self.files:
            for batch in batches(mapped(file, self.columns)):
                column = batch.column(self.columns.image)
                with _named(file):
                    column.validate(full=True)  # before a damaged offset reads other memory
                inside = [part.name for part in column.type] if column.type.num_fields else []
                images.append(column.field("bytes") if inside else column)
                paths.append(column.field("path") if "path" in inside else None)
                sizes.append(len(batch))
                if self.columns.label:
                    with _named(file):
                        numbers = batch.column(self.columns.label).cast("int64").fill_null(-1)
                    labels.append(numbers.to_numpy(zero_copy_only=False))
        return _Rows(
            np.cumsum(sizes), images, paths, np.concatenate(labels or [np.empty(0, np.int64)])
        )

    def _check_labels(self) -> None:
        labels, names = self._rows.labels, self.columns.classes
        place = self.files[0] if len(self.files) == 1 else self.files[0].parent
        if names and len(labels) and labels.max() >= len(names):
            raise ValueError(
                f"{place} has the label {labels.max()}, and names {len(names)} classes, counted "
                "from 0."
            )
        if without := int((labels < 0).sum()):
            _log.warning(
                "%d of %d images of %s have no label, so the classes of the others are not used.",
                without, len(labels), place,
            )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        # a worker that is started anew maps the files itself
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    @cached_property
    def _numbers(self) -> np.ndarray:
        """The labels that occur, sorted; empty without."""
        labels = self._rows.labels
        return np.unique(labels[:0] if (labels < 0).any() else labels)

    @property
    def classes(self) -> Sequence[str]:
        if not len(self._numbers):
            return ()
        return self.columns.classes or tuple(map(str, self._numbers.tolist()))

    def __len__(self) -> int:
        return sum(self.counts)

    @cached_property
    def _begins(self) -> np.ndarray:
        return np.cumsum((0, *self.counts))

    def key(self, index: int) -> str:
        file = int(np.searchsorted(self._begins, index, side="right")) - 1
        return f"{printable(self.files[file].name)}/{index - int(self._begins[file])}"

    def label(self, index: int) -> int | None:
        if not len(self._numbers):
            return None
        label = int(self._rows.labels[index])
        return label if self.columns.classes else int(np.searchsorted(self._numbers, label))

    def read(self, index: int) -> bytes:
        rows = self._rows
        batch = int(np.searchsorted(rows.ends, index, side="right")) - 1
        row = index - int(rows.ends[batch])
        if (data := rows.images[batch][row].as_py()) is not None:
            return data
        path = rows.paths[batch] and rows.paths[batch][row].as_py()
        if not path:
            raise UnreadableImage(f"{self.key(index)} is empty.")
        place = self.files[0].parent / path
        if not place.is_file():  # a device or a pipe would never end
            raise OSError(f"{self.key(index)} is in {path}, which is no file here")
        return place.read_bytes()


def tables_in(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """List the tables of a folder, those alone whose name begins with one of `names` if any.

    Of a folder that `save_to_disk` wrote they are those that it names: `datasets` keeps what it
    computes beside them.

    Raises:
        ValueError: one of them is missing.
    """
    if (folder / STATE).is_file():
        if names:
            return []
        listed = checked(read_json(folder / STATE).get("_data_files"), list[dict[str, str]],
                         f"_data_files of {folder / STATE}")  # fmt: skip
        files = [folder / Path(one.get("filename", "")).name for one in listed]
        if missing := [file for file in files if not file.is_file()]:
            raise ValueError(f"{missing[0]} is missing, which {folder / STATE} lists.")
        return files
    found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    return [p for p in found if is_shard(p.name, names) and not p.name.startswith("cache-")]


def parts_in(folder: Path) -> list[str]:
    """List the parts of a folder that a `DatasetDict` wrote."""
    if not (folder / PARTS).is_file():
        return []
    return read_json(folder / PARTS, dict[str, list[str]]).get("splits", [])


def columns_of(file: Path) -> Columns | None:
    """Find the columns of images and labels of a table; `None` without one of images.

    The features that `datasets` writes into the schema decide; without them, the one column that
    holds bytes, or bytes and a path, and whole numbers called label.

    Raises:
        ValueError: several columns hold images, or the table is damaged.
    """
    pa = _pyarrow(file)
    with _named(file):
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            schema = pq.read_schema(file)
        else:
            schema = _reader(file).schema
        names = schema.names
    if len(set(names)) < len(names):
        raise ValueError(f"{file} has two columns of one name.")
    features = _features(schema, file)
    images = [name for name, f in features.items() if f.get("_type") == "Image"]
    images = [name for name in images if name in names] or [
        field.name for field in schema if _holds_bytes(pa, field.type)
    ]
    if not images:
        return None
    if len(images) > 1:
        raise ValueError(
            f"{file} has {len(images)} columns of images ({', '.join(images)}); keep one of them "
            "(datasets: select_columns)."
        )
    if not _holds_bytes(pa, schema.field(images[0]).type):
        raise ValueError(
            f"{file}: the column {images[0]} holds {schema.field(images[0]).type}, not the bytes "
            "of encoded images."
        )
    named = {name: f for name, f in features.items() if f.get("_type") == "ClassLabel"}
    whole = [f.name for f in schema if pa.types.is_integer(f.type)]
    labels = [name for name in whole if name in named] or [n for n in whole if n == "label"]
    if len(labels) != 1:
        return Columns(images[0], None, ())
    classes = named.get(labels[0], {}).get("names") or ()
    return Columns(images[0], labels[0], tuple(map(str, classes)))


def _features(schema: Any, file: Path) -> dict[str, dict[str, Any]]:
    """Read the features of a schema's metadata; nested ones are no image and no label."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
        return {name: f for name, f in features.items() if isinstance(f, dict)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: what datasets wrote into its schema is damaged.") from error


def _holds_bytes(pa: Any, kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(part.name == "bytes" and _holds_bytes(pa, part.type) for part in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def texts(file: Path) -> Iterator[str]:
    """Yield the rows of a table's column `text`.

    Raises:
        ValueError: there is no such column, a row is empty, or the table is damaged.
    """
    pa = _pyarrow(file)
    number = 0
    for batch in _batches_of_any(file, ["text"]):
        with _named(file):
            names = batch.schema.names
        if "text" not in names or not (
            pa.types.is_string(kind := batch.schema.field("text").type)
            or pa.types.is_large_string(kind)
        ):
            raise ValueError(
                f"{file} has no column of texts called text; it has {', '.join(names)}."
            )
        column = batch.column("text")
        with _named(file):
            column.validate(full=True)
        for row in column:
            number += 1
            if (text := row.as_py()) is None:
                raise ValueError(f"{file}: row {number} has no text.")
            yield text


def _batches_of_any(file: Path, names: list[str]) -> Iterator[Any]:
    if file.suffix != ".parquet":
        yield from batches(file)
        return
    import pyarrow.parquet as pq

    with _named(file):
        yield from pq.ParquetFile(file).iter_batches(ROWS, columns=names)


def batches(file: Path) -> Iterator[Any]:
    """Yield the record batches of an Arrow file, mapped.

    Raises:
        ValueError: it is damaged.
    """
    with _named(file):
        reader = _reader(file)
        if hasattr(reader, "num_record_batches"):
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from reader


def mapped(file: Path, columns: Columns) -> Path:
    """Return the Arrow file of a table: itself, or what its Parquet is written as, once.

    Raises:
        ValueError: it is damaged.
    """
    if file.suffix != ".parquet":
        return file
    import pyarrow as pa
    import pyarrow.parquet as pq
    from filelock import FileLock  # brings asyncio along, which no worker needs

    wanted = [name for name in (columns.image, columns.label) if name]
    about = file.stat()
    state = f"{file.resolve()} {about.st_size} {about.st_mtime_ns} {columns}"
    place = cache_dir() / "arrow" / f"{hashlib.sha256(state.encode()).hexdigest()[:24]}.arrow"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        if not place.is_file():
            _log.warning("%s is written as Arrow once, to %s.", file, place)
            with _named(file):
                schema = pq.read_schema(file)
            schema = pa.schema([schema.field(name) for name in wanted])
            with (
                written_whole(place) as temporary,
                pa.OSFile(str(temporary), "wb") as sink,
                pa.ipc.new_stream(sink, schema) as writer,
            ):
                for batch in _batches_of_any(file, wanted):
                    writer.write_batch(batch.select(wanted))
    return place


def _reader(file: Path) -> Any:
    import pyarrow as pa

    source = pa.memory_map(str(file))
    begins = source.read(6)
    source.seek(0)
    return pa.ipc.open_file(source) if begins == b"ARROW1" else pa.ipc.open_stream(source)


def _check_count(files: Sequence[Path], count: int) -> None:
    """Hold the rows against what `save_to_disk` wrote down: a cut file ends as a whole one does.

    Raises:
        ValueError: they are others.
    """
    about = files[0].parent / "dataset_info.json"
    state = files[0].parent / STATE
    if not about.is_file() or not state.is_file() or tables_in(files[0].parent) != list(files):
        return
    part = read_json(state).get("_split")
    splits = read_json(about).get("splits") or {}
    known = splits.get(part) if isinstance(splits, dict) else None
    if isinstance(known, dict) and known.get("num_examples", count) != count:
        raise ValueError(
            f"{files[0].parent} has {count:,} rows, and {known['num_examples']:,} when it was "
            "saved: copy it again."
        )


def _pyarrow(file: Path) -> Any:
    if not find_spec("pyarrow"):
        raise ValueError(f"{file} is read by pyarrow: pip install 'backbone-zoo[parquet]'.")
    import pyarrow

    return pyarrow


@contextmanager
def _named(file: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # of a name, too
        if isinstance(error, FileNotFoundError):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is not a readable table: {reason}") from error
