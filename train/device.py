"""The device of a run, and the precision in which models run on it."""

import math
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from zoo.train.config import Device, Precision

M = TypeVar("M", bound=nn.Module)


def device_of(name: Device) -> torch.device:
    """Resolve `auto`, and refuse a device that is not there.

    Raises:
        ValueError: it is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here; use --device cpu, or auto.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("There is no Apple GPU (mps) here; use --device cpu, or auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    own = os.environ.get("LOCAL_RANK")  # of torchrun: each process has a GPU of its own
    return torch.device(f"cuda:{own}" if name == "cuda" and own else name)


def memory_of(device: torch.device) -> float:
    """Return the bytes of memory that a device has, or that this process may take of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container; the word max where there is none
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    names = getattr(os, "sysconf_names", {})
    whole = (
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if "SC_PHYS_PAGES" in names
        else math.inf
    )
    return min(whole, int(allowed)) if allowed.isdigit() else whole


MOST_WORKERS = 32
"""That `auto` starts: each holds an interpreter and its part of the index."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def workers_of(workers: int | str, device: torch.device) -> int:
    """Resolve `auto` (`Training.workers`): one process less than the cores that this one may use.

    On a CPU reading shares the cores with the model, so more processes win nothing there.
    """
    if isinstance(workers, int):
        return workers
    mine = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type != "cuda" or mine <= 2:
        return 0
    return min(mine - 1, MOST_WORKERS)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager:
    """Return the context in which models run; `auto` is bf16 on CUDA and float32 elsewhere."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def in_precision(model: M, precision: Precision) -> M:
    """Return the model with the weights that a precision asks for: float64 has its own."""
    return model.double() if precision == "float64" else model


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """Let float32 products run in TF32 on CUDA: PHI-S's rotation of every target, grids matched.

    Their relative squared error is 1e-7, where bfloat16 features carry 1e-5.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def machine(device: torch.device) -> str:
    """Name what the run ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"
