"""Where fused kernels run: on a GPU with Triton. Plain torch runs everywhere else."""

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

HAS_TRITON = importlib.util.find_spec("triton") is not None


def runs_kernels(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> bool:
    """Say whether a Triton kernel can take these tensors; warn once of a GPU without Triton."""
    if not all(t.is_cuda and t.dtype in dtypes for t in tensors):
        return False
    if not HAS_TRITON and not torch.compiler.is_compiling():
        _warn_once()
    return HAS_TRITON


@cache
def _warn_once() -> None:
    logging.getLogger(__name__).warning(
        "Triton is not installed: selective scans and window attention on the GPU run in plain "
        "torch, which is far slower."
    )


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Count a GPU's multiprocessors; 1 on a CPU, where Triton's interpreter runs."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may take; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
