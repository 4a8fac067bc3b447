"""The device of a run, and the precision in which models run on it."""

import contextlib
import platform

import torch

from zoo.train.distill.config import Distill


def device_of(config: Distill) -> torch.device:
    """Resolve `auto`, and refuse a device that is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here; use --device cpu, or auto.")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def autocast(config: Distill, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context in which models run: bf16 on CUDA unless the config says otherwise."""
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def machine(device: torch.device) -> str:
    """Name what the run ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"
