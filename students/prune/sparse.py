"""2:4 weights as a GPU multiplies them: half of each, and two bits that say where they were.

Checkpoints keep plain tensors with zeros in them, which every library loads; this is the form in
memory. It is torch's `SparseSemiStructuredTensor`, of which torch has two kinds, for cuSPARSELt and
for CUTLASS. xformers' `sp24` is no third: it thins a weight anew so that its transpose is 2:4 too,
and so drops weights that a mask along the inputs keeps (`benchmarks/nm_speed.py`).
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.students.prune.nm import Pattern

DTYPES = (torch.bfloat16, torch.float16)
TWO_OF_FOUR = Pattern(2, 4)


def kinds() -> dict[str, Callable[[Tensor], Tensor]]:
    """Return what turns a 2:4 weight into each of torch's two forms; one may refuse the device."""
    sparse: Any = torch.sparse
    return {
        "cusparselt": sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense,
        "cutlass": sparse.SparseSemiStructuredTensorCUTLASS.from_dense,
    }


def two_of_four(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers whose weights are 2:4, by name; a layer of zeros alone is none."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and layer.in_features % 4 == 0
        and TWO_OF_FOUR.holds(layer.weight)
        and layer.weight.any()
    }


@torch.no_grad()
def compress(model: nn.Module, *, tokens: int = 4096, form: str = "fastest") -> list[str]:
    """Store the 2:4 weights of a model on a GPU so that their zeros are not multiplied; in place.

    For each size of a layer the forms are timed beside the dense one, and the fastest stays. On an
    H200 with torch 2.11 that is the dense one: each call of torch's operator takes 0.5 ms on the
    host. Recorded in a CUDA graph, cuSPARSELt is up to 1.3 times as fast from 4,096 tokens on. The
    outputs are those of the dense weights with zeros, up to rounding. It is for inference: the
    weights need no gradients any more, and are not saved in this form.

    Args:
        model: On CUDA, in bfloat16 or float16; elsewhere it stays as it is, and a log line says so.
        tokens: Rows of a typical input (batch times length), for the timing.
        form: `cusparselt` or `cutlass` to take one without timing, for a model whose forward pass
            is then recorded in a CUDA graph.

    Returns:
        The names of the layers that are stored so.

    Raises:
        ValueError: there is no such form.
    """
    if form not in (known := ("fastest", *kinds())):
        raise ValueError(f"There is no form {form!r} of 2:4 weights; there are {', '.join(known)}.")
    layers = two_of_four(model)
    on_gpu = {n: m for n, m in layers.items() if m.weight.is_cuda and m.weight.dtype in DTYPES}
    log = logging.getLogger(__name__)
    if len(on_gpu) < len(layers):
        log.warning(
            "%d layers stay dense with zeros: 2:4 is multiplied on CUDA alone, in bfloat16 and "
            "float16.",
            len(layers) - len(on_gpu),
        )
    fastest: dict[tuple[torch.Size, torch.dtype], Callable[[Tensor], Tensor] | None] = {}
    found = []
    for name, layer in on_gpu.items():
        key = (layer.weight.shape, layer.weight.dtype)
        if key not in fastest:
            timed = form == "fastest"
            fastest[key] = _fastest(layer.weight.detach(), tokens) if timed else kinds()[form]
        if (make := fastest[key]) is not None:
            sparse = make(layer.weight.detach().contiguous())
            layer.weight = nn.Parameter(sparse, requires_grad=False)
            found.append(name)
    log.info("%d of %d 2:4 layers are stored as such.", len(found), len(layers))
    return found


def _fastest(weight: Float[Tensor, "D C"], tokens: int) -> Callable[[Tensor], Tensor] | None:
    """Time a weight in each form; `None` if it is fastest dense."""
    x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    times: dict[Callable[[Tensor], Tensor] | None, float] = {None: _milliseconds(x, weight)}
    for name, form in kinds().items():
        try:
            times[form] = _milliseconds(x, form(weight.contiguous()))
        except (RuntimeError, NotImplementedError) as error:  # not for this device, size or build
            reason = str(error).splitlines()[0]
            logging.getLogger(__name__).info("%s cannot take it: %s", name, reason)
    return min(times, key=lambda form: times[form])


def _milliseconds(x: Tensor, weight: Tensor) -> float:
    """Return the least time of three rounds of twenty products."""
    found = []
    for _ in range(4):  # the first warms up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            nn.functional.linear(x, weight)
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return min(found[1:])
