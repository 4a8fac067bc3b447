"""The copy of a state on the host, from which a checkpoint is written while training goes on."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from zoo.train.shard import local

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[torch.Size, torch.dtype]]


class Staging:
    """Copies states to the host, one at a time.

    On a GPU the copying goes on beside what is queued behind it, into pinned memory that is kept
    for the next. Where the GPU has room, that reads a copy on the GPU itself, which is made in
    milliseconds. Else it reads the state, so weights may not change before `hold`; what a forward
    pass changes, such as the statistics of batch norms, is a copy already when it comes here
    (`TrainState.state`, `packed`).
    """

    def __init__(self):
        self.memory = Tensors()
        """Pinned, and kept; the same object as long as the states have the same shapes."""
        self._reserved: Future[Tensors] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.Event | torch.cuda.Event | None = None
        self._source = Tensors()
        self._in_place = False

    def reserve(self, tensors: Mapping[str, Tensor]) -> Future[Tensors] | None:
        """Take the pinned memory for such tensors, beside training; None if no GPU copies them.

        Eight gigabytes take fifteen seconds, for which the first checkpoint would hold training up.
        """
        if self._reserved is None and any(x.is_cuda for x in tensors.values()):
            pool = ThreadPoolExecutor(1, "pinned-memory")
            self._reserved = pool.submit(pinned_like, tensors)
            pool.shutdown(wait=False)
        return self._reserved

    def copy(self, tensors: Tensors) -> Tensors:
        """Return the tensors on the host, those that are cut as their part here.

        What a GPU copies is there after `wait`.
        """
        if not any(x.is_cuda for x in tensors.values()):
            return {name: like(x, local(x).to("cpu", copy=True)) for name, x in tensors.items()}
        memory = self._memory_for(tensors)
        parts = {name: local(x) for name, x in tensors.items()}
        self._in_place = not has_room(parts)
        if not self._in_place:
            parts = {name: x.clone() for name, x in parts.items()}
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for name, x in parts.items():
                local(memory[name]).copy_(x, non_blocking=True)
        self._copied = self._stream.record_event()
        self._source = parts  # what was made for this alone lives until it is copied
        return memory

    def hold(self) -> None:
        """Let all that the device is given from here on wait, if it could change what is copied."""
        copied = self._copied  # the thread that writes may be done with it meanwhile
        if copied is not None and self._in_place:
            torch.cuda.current_stream().wait_event(copied)

    def wait(self) -> None:
        """Wait until the state is copied."""
        if self._copied is not None:
            self._copied.synchronize()
        self._copied, self._source = None, Tensors()

    def _memory_for(self, tensors: Tensors) -> Tensors:
        """Return the memory that is there, or was reserved, if it is for these tensors."""
        reserved, self._reserved = self._reserved, None
        if reserved is not None and reserved.exception() is None:
            self.memory = reserved.result()
        if shapes(self.memory) != shapes(tensors):
            self.memory = pinned_like(tensors)
        return self.memory


def has_room(parts: Tensors) -> bool:
    """Tell whether the GPU can hold these twice without training, at its peak, missing the place.

    Half of their size is left over for what the allocator cannot join.
    """
    device = next(x.device for x in parts.values() if x.is_cuda)
    size = sum(x.nbytes for x in parts.values() if x.is_cuda)
    free, _ = torch.cuda.mem_get_info(device)
    here = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return free + here > 1.5 * size


def shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return what two states must share for one's memory, and its plan, to fit the other."""
    return {name: (x.shape, x.dtype) for name, x in tensors.items()}


def like(x: Tensor, part: Tensor) -> Tensor:
    """Return a tensor that is cut as `x` is, and has `part` on this rank."""
    return DTensor(part, x._spec, requires_grad=False) if isinstance(x, DTensor) else part


def pinned_like(tensors: Mapping[str, Tensor]) -> Tensors:
    """Make memory of the host, of the same shapes and cuts, to which a GPU copies fast."""
    made = {}
    for name, x in tensors.items():
        part = local(x)
        memory = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
        made[name] = like(x, memory)
    return made
