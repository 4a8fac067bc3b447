"""One CUDA graph each way around a network of static shapes: two launches in place of thousands.

`torch.cuda.make_graphed_callables` does this too, but it records in the mode in which no other
thread may allocate memory, which the thread that pins a loader's batches does, and it moves running
statistics while it warms up.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 3
"""Runs before the recording, in which kernels are chosen and handles made."""


class Graphed:
    """A network that is recorded once and replayed from then on, forward and backward.

    Args:
        network: Gets one tensor and returns a tuple of tensors. Its parameters may change in place,
            but must stay where they are in memory.
        x: An input; later ones have its shape, type and device. It takes no gradient.
        pool: Of another recording, whose replays never come between this one's two.
        accumulates: Whether several backward passes come before the gradients are freed. Without,
            a parameter's gradient is the recording's own memory, which the next pass overwrites.
    """

    def __init__(
        self, network: nn.Module, x: Tensor, *, pool: Any = None, accumulates: bool = False
    ):
        self.x = x.detach().clone(memory_format=torch.preserve_format)
        self.learned = tuple(p for p in network.parameters() if p.requires_grad)
        self.accumulates = accumulates
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool
        stream = torch.cuda.Stream(x.device)
        torch.cuda.empty_cache()  # another stream takes nothing of what lies there for this one
        with left_as_it_was(network, x.device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    warm_up(network, self.x, self.learned)
            torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize(x.device)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with self._recording(self.forward, stream):
            self.outputs: Sequence[Tensor] = network(self.x)
        learns = [y for y in self.outputs if y.requires_grad]
        self.slopes = [torch.empty_like(y) if y.requires_grad else None for y in self.outputs]
        with self._recording(self.backward, stream):
            self.gradients = torch.autograd.grad(
                learns, self.learned, [s for s in self.slopes if s is not None], allow_unused=True
            )
        self.outputs = [y.detach() for y in self.outputs]

    def _recording(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Any:
        return torch.cuda.graph(
            graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"
        )

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return _Replayed.apply(self, x, *self.learned)  # pyright: ignore[reportReturnType]


class _Replayed(torch.autograd.Function):
    """A node of autograd in whose place a recording runs."""

    @staticmethod
    def forward(ctx: Any, graphed: Graphed, x: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
        ctx.graphed = graphed
        graphed.x.copy_(x)
        graphed.forward.replay()
        found = tuple(y.detach() for y in graphed.outputs)
        ctx.mark_non_differentiable(
            *(y for y, s in zip(found, graphed.slopes, strict=True) if s is None)
        )
        ctx.set_materialize_grads(True)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, /, *slopes: Tensor) -> tuple[Any, ...]:  # pyright: ignore
        graphed: Graphed = ctx.graphed
        for mine, slope in zip(graphed.slopes, slopes, strict=True):
            if mine is not None:
                mine.copy_(slope)
        graphed.backward.replay()
        copied: Callable[[Tensor], Tensor] = Tensor.clone if graphed.accumulates else Tensor.detach
        return None, None, *(None if g is None else copied(g) for g in graphed.gradients)


def warm_up(network: nn.Module, x: Tensor, learned: Sequence[Tensor]) -> None:
    """Run a network forward and backward, and leave no gradient behind."""
    outputs = [y for y in network(x) if y.requires_grad]
    slopes = [torch.zeros_like(y) for y in outputs]
    torch.autograd.grad(outputs, learned, slopes, allow_unused=True)


@contextmanager
def left_as_it_was(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Within this context a network runs without a trace: statistics and randomness come back."""
    buffers = list(network.buffers())
    before = [buffer.clone() for buffer in buffers]
    on_gpu = device.type == "cuda"
    drawn = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        torch.set_rng_state(drawn[0])
        if drawn[1] is not None:
            torch.cuda.set_rng_state(drawn[1], device)
