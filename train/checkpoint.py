"""Checkpoints: a folder a step, which all ranks write together while training goes on.

Tensors go through torch's distributed checkpoints (DCP), each rank its own, small ones joined into
one; numbers and names stand in `state.json`. Beside each file lies its checksum. The folder gets
its name when everything in it is written, so a checkpoint is whole or is none. Another number of
ranks, or none, reads it too.
"""

import errno
import json
import os
import pickle
import shutil
import threading
import warnings
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from zoo.files import read_json
from zoo.train.mesh import any_rank, rank, saving_group, world
from zoo.train.planner import Planner
from zoo.train.saved_tensor import Pieces, SavedTensors, write_all
from zoo.train.shard import is_cut
from zoo.train.staging import Staging, Tensors

State = dict[str, Any]
"""Nested dicts and lists of tensors, numbers and names."""
Like = Callable[[str, torch.Size], Tensor | None]
"""The sharded tensor that a name of a checkpoint belongs to; None for an ordinary one."""
STATE = "state.json"
SUM = ".crc32"
TENSORS = "tensors"
PACKED = "packed"
SMALL = 2**16
"""Elements up to which tensors are joined: DCP takes a third of a millisecond for each."""
AT_ONCE = 256
"""Pieces of a file that one call of the system writes; three are a tensor."""


class Writer(dcp.FileSystemWriter):
    """DCP's writer, with checksums, whose folder appears under its name when it is whole.

    The tensors are written as DCP writes them, with less Python beside training.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder = folder
        self.staging = Staging()
        self.rest: Any = None
        self.step, self.kept, self.best = 0, 1, -1
        self._saved = SavedTensors()
        self._staged = Tensors()
        self.rehearsed: Tensors | None = None
        """Set while a save is rehearsed: then nothing is written. Empty without memory."""
        self._known: tuple[SavePlan, Tensors, list[Pieces]] | None = None

    def making(self) -> Path:
        """Return the folder that is written to."""
        return self.folder / f".step_{self.step:08d}.tmp"

    def storage_meta(self) -> None:
        """Leave this machine's path out of the metadata."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the folder, unless nothing will be written."""
        return plan if self.rehearsed is not None else super().prepare_local_plan(plan)

    def stage(self, state_dict: State) -> State:
        """Copy the tensors to the host."""
        self._staged = self.staging.copy(state_dict[TENSORS])
        return {TENSORS: self._staged}

    def write_data(self, plan: SavePlan, planner: Any) -> TorchFuture[list[WriteResult]]:
        """Write this rank's tensors into one file, and its checksum beside it."""
        written = list[WriteResult]()
        if self.rehearsed is None:
            self.staging.wait()
            if plan.items:
                name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
                written, total = self._write_tensors(name, plan, planner)
                (self.making() / (name + SUM)).write_text(f"{total:08x}")
        elif self.rehearsed:
            self._pieces(plan, planner)
        planner.forget()
        self._staged = Tensors()
        done = TorchFuture[list[WriteResult]]()
        done.set_result(written)
        return done

    def _write_tensors(
        self, name: str, plan: SavePlan, planner: Any
    ) -> tuple[list[WriteResult], int]:
        """Write a file; return where each tensor lies in it, and its CRC-32."""
        items, written, start, total = self._pieces(plan, planner), list[WriteResult](), 0, 0
        for item, pieces in zip(plan.items, items, strict=True):
            length = sum(map(len, pieces))
            written.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            start += length
        with (self.making() / name).open("wb", buffering=0) as file:
            pieces = list(chain.from_iterable(items))
            for first in range(0, len(pieces), AT_ONCE):
                block = pieces[first : first + AT_ONCE]
                write_all(file, block)
                for piece in block:
                    total = zlib.crc32(piece, total)
            os.fsync(file.fileno())
        return written, total

    def _pieces(self, plan: SavePlan, planner: Any) -> list[Pieces]:
        """Return what is written of each tensor: as before, if the same memory was copied to."""
        memory = self._staged if self.rehearsed is None else self.rehearsed
        if self._known and self._known[0] is plan and self._known[1] is memory:
            return self._known[2]
        pieces = [self._saved.pieces(planner.resolve_data(item)) for item in plan.items]
        # on a CPU each state has memory of its own
        kept = memory is self.rehearsed or memory is self.staging.memory
        self._known = (plan, memory, pieces) if kept else None
        return pieces

    def finish(self, metadata: Any, results: Any) -> None:
        """Rank 0, behind all ranks: write the rest, and give the folder its name."""
        if self.rehearsed is not None:
            return
        making, path = self.making(), self.folder / name_of(self.step)
        super().finish(metadata, results)
        (making / STATE).write_text(json.dumps(self.rest))
        for name in (".metadata", STATE):
            write_sum(making / name)
        shutil.rmtree(path, ignore_errors=True)
        making.rename(path)
        for old in checkpoints(self.folder)[: -self.kept]:
            if old.name != name_of(self.best):
                remove(old)


class Saver:
    """Write one checkpoint after another, at most one at a time, beside training."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._writer = Writer(folder)
        self._going: Future | None = None
        self._rehearsal: Future | None = None
        self._hurry = threading.Event()
        self._planner = Planner(self._hurry)

    def prepare(self, state: State) -> None:
        """Make beside training what the first save would hold it up for; every rank calls this.

        That is the pinned memory that a state is copied to, the plan, and what surrounds the
        numbers in the file.
        """
        tensors = packed(split(state)[0])[0]
        reserved, group = self._writer.staging.reserve(tensors), saving_group()
        if reserved is not None:
            pool = ThreadPoolExecutor(1, "rehearsal")
            self._rehearsal = pool.submit(self._rehearse, reserved, tensors, group)
            pool.shutdown(wait=False)

    def _rehearse(self, reserved: Future[Tensors], tensors: Tensors, group: Any) -> None:
        """Do all of a save but the writing; a rank without memory too, since others wait for it."""
        memory = reserved.result() if reserved.exception() is None else Tensors()
        self._writer.rehearsed = memory
        try:
            self._save(memory or tensors, group)
        finally:
            self._writer.rehearsed = None

    def _save(self, tensors: Tensors, group: Any, how: Callable[..., Any] = dcp.save) -> Any:
        """Call one of DCP's saves."""
        without_warning()
        return how(
            {TENSORS: tensors},  # DCP logs each entry of the top level
            checkpoint_id=self._writer.making(),
            storage_writer=self._writer,
            planner=self._planner,
            process_group=group,
            no_dist=group is None,
        )

    def hold(self) -> None:
        """Let the device wait, before it changes the state, until that is copied."""
        self._writer.staging.hold()

    def begin(self, state: State, *, kept: int) -> None:
        """Copy a state and write it in the background; every rank calls this.

        Args:
            kept: How many of the newest stay when it is written. So does the state's `best`.

        Raises:
            OSError: the checkpoint before it could not be written; nor is this one.
        """
        self.wait()
        if self._rehearsal is not None:
            self._hurry.set()
            self._rehearsal.exception()  # one that went wrong will do so again, and is told then
            self._rehearsal = None
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors, rest = split(state)
        tensors, places = packed(tensors)
        self._writer.step, self._writer.kept = state["step"], kept
        self._writer.rest = {PACKED: places, **rest}
        self._writer.best, _ = state.get("best") or (-1, None)
        save = dcp.async_save  # pyright: ignore[reportAttributeAccessIssue]
        self._hurry.clear()
        self._going = self._save(tensors, saving_group(), save)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written; every rank calls this.

        Raises:
            OSError: it could not be written; the checkpoints before it are still there.
        """
        going, self._going = self._going, None
        if going is None:
            return
        self._hurry.set()
        try:
            going.result()
        except (OSError, CheckpointException) as error:
            full = any_rank(is_full(self.folder))  # asked before its place is free again
            shutil.rmtree(self._writer.making(), ignore_errors=True)
            cause = os.strerror(errno.ENOSPC) if full else cause_of(error)
            what = f"The checkpoint of step {self._writer.step} was not saved ({cause})"
            raise OSError(f"{what}; {after_failure(self.folder)}") from None

    def failed(self) -> bool:
        """Tell whether the checkpoint that was being written is known to be lost."""
        going = self._going
        return going is not None and going.done() and going.exception() is not None


def is_full(folder: Path) -> bool:
    """Tell whether a disk is full; torch's writer of tensors does not say so."""
    return shutil.disk_usage(folder).free < 2**20


def after_failure(folder: Path) -> str:
    """Say what is left of a run that could not write, and what to do."""
    before = checkpoints(folder)
    kept = f"{before[-1]} survives" if before else "there is no earlier one"
    return f"{kept}. Make room, then continue with --resume {folder.parent}."


def cause_of(error: BaseException) -> BaseException:
    """Return what went wrong on the first rank on which it did."""
    if not isinstance(error, CheckpointException):
        return error
    cause, _ = next(iter(error.failures.values()))
    return cause


def without_warning() -> None:
    """Keep DCP from telling a single process that it is one."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step_{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, oldest first; earlier versions wrote files, `.pt`."""
    return sorted(folder.glob("step_*"), key=lambda path: path.name.removesuffix(".pt"))


def remove(path: Path) -> None:
    """Remove a checkpoint."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def read_checkpoint(path: Path, like: Like | None = None) -> State:
    """Read a checkpoint; every rank calls this.

    Args:
        like: Gives the sharded tensors; all others are read whole.

    Raises:
        ValueError, OSError: it is not a checkpoint.
    """
    reader = Reader(path)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {}
    for name, entry in entries.items():
        assert isinstance(entry, dcp_metadata.TensorStorageMetadata)
        kind, name = entry.properties.dtype, name.removeprefix(f"{TENSORS}.")
        shard = like(name, entry.size) if like else None
        tensors[name] = (
            torch.empty(entry.size, dtype=kind)
            if shard is None
            else torch.empty_like(shard, dtype=kind)
        )
    group = saving_group()
    without_warning()
    try:
        dcp.load(
            {TENSORS: tensors}, storage_reader=reader, process_group=group, no_dist=group is None
        )
    except CheckpointException as error:  # a BaseException
        raise ValueError(str(cause_of(error))) from None
    rest = read_json(path / STATE, Any, most=2**30)
    return joined(rest, unpacked(tensors, rest.pop(PACKED, {})))


class Reader(dcp.FileSystemReader):
    """DCP's reader, which does not run what a file says."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = PlainUnpickler(file).load()
        if not isinstance(metadata, dcp_metadata.Metadata):
            raise ValueError(f"{self.path} holds a {type(metadata).__name__} for its metadata")
        return metadata


class PlainUnpickler(pickle.Unpickler):
    """Read the pickle that DCP writes: dataclasses of its own, sizes and types of tensors."""

    KINDS = (
        dcp_metadata.Metadata,
        dcp_metadata.MetadataIndex,
        dcp_metadata.TensorStorageMetadata,
        dcp_metadata.TensorProperties,
        dcp_metadata.ChunkStorageMetadata,
        dcp_metadata._MEM_FORMAT_ENCODING,
        _StorageInfo,
        _StoragePrefix,
        torch.Size,
    )
    ALLOWED = {(kind.__module__, kind.__qualname__): kind for kind in KINDS} | {
        ("torch.serialization", "_get_layout"): lambda name: {"torch.strided": torch.strided}[name]
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        if (found := self.ALLOWED.get((module, name))) is None:
            raise ValueError(f"it names {module}.{name}, which no checkpoint needs")
        return found


def damage(path: Path) -> str:
    """Say what is wrong with a checkpoint by its checksums; "" if nothing is.

    The files are shared out over the ranks; every rank calls this, and gets the same verdict.
    """
    files = sorted(path.iterdir()) if path.is_dir() else []
    named = [file for file in files if file.suffix != SUM]
    wrong = "" if {".metadata", STATE} <= {file.name for file in named} else "files are missing"
    for file in named[rank() :: world()]:
        beside = file.with_name(file.name + SUM)
        if not beside.is_file() or beside.read_text() != checksum(file):
            wrong = f"the checksum of {file.name} is another"
    if any_rank(bool(wrong)):
        return wrong or "a checksum is another"
    return ""


def checksum(path: Path) -> str:
    """Return the CRC-32 of a file, in hex."""
    total = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            total = zlib.crc32(block, total)
    return f"{total:08x}"


def write_sum(path: Path) -> None:
    """Write a file's checksum beside it."""
    path.with_name(path.name + SUM).write_text(checksum(path))


# A state as tensors, and JSON for the rest


def split(state: State) -> tuple[dict[str, Tensor], Any]:
    """Take the tensors out of a state; what is left can be written as JSON, to the bit."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach()
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"dict": [[key, walk(inner, f"{name}.{key}")] for key, inner in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [walk(inner, f"{name}.{i}") for i, inner in enumerate(value)]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"{name} of a state is a {type(value).__name__}")

    rest = {key: walk(value, key) for key, value in state.items()}
    return tensors, rest


def packed(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """Join small tensors into flat ones, one a type and device.

    Returns:
        What to write, and for each name in a flat tensor `[flat name, start, shape]`.
    """
    small: dict[str, list[str]] = defaultdict(list)
    for name, x in tensors.items():
        if x.numel() <= SMALL and not is_cut(x):
            small[f"{PACKED}.{str(x.dtype).removeprefix('torch.')}.{x.device.type}"].append(name)
    places = {}
    out = dict(tensors)
    for flat, names in small.items():
        parts = [out.pop(name) for name in names]
        starts = accumulate((x.numel() for x in parts), initial=0)
        for name, x, start in zip(names, parts, starts, strict=False):
            places[name] = [flat, start, list(x.shape)]
        out[flat] = torch.cat([x.reshape(-1) for x in parts])
    return out, places


def unpacked(tensors: dict[str, Tensor], places: Mapping[str, Any]) -> dict[str, Tensor]:
    """Undo `packed`."""
    flats = {flat for flat, _, _ in places.values()}
    out = {name: x for name, x in tensors.items() if name not in flats}
    for name, (flat, start, shape) in places.items():
        shape = torch.Size(shape)
        out[name] = tensors[flat][start : start + shape.numel()].view(shape).clone()
    return out


def joined(rest: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put the tensors back."""

    def walk(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {key: walk(inner) for key, inner in content}
        return (tuple if kind == "tuple" else list)(walk(inner) for inner in content)

    return {key: walk(value) for key, value in rest.items()}


def of_file(path: Path) -> State:
    """Read a checkpoint of an earlier version: one file, whose checksums torch does not check."""
    with zipfile.ZipFile(path) as file:
        if (bad := file.testzip()) is not None:
            raise ValueError(f"the checksum of {bad} is another")
    return torch.load(path, map_location="cpu", weights_only=True)
