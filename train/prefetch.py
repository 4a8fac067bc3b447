"""Targets of the next batch, computed while the model learns from this one."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.train.task import Feed


@dataclass(frozen=True)
class Slice:
    """A slice of a batch, and where it belongs."""

    step: int
    index: int
    batch: Any


def numbered(feed: Feed, start: int, steps: int) -> Iterator[Slice]:
    """Return the slices of the steps `start`..`steps` that this process takes."""
    batches = iter(feed.batches(start, steps))
    for step in range(start, steps):
        for index in feed.slices:
            yield Slice(step, index, next(batches))


def side_stream(device: torch.device, *, wanted: bool) -> torch.cuda.Stream | None:
    """Return a stream for what runs beside a model, if it is wanted and the device has streams."""
    return torch.cuda.Stream(device) if wanted and device.type == "cuda" else None


def prefetch(
    slices: Iterable[Slice],
    targets: Callable[[Any, int], Any],
    autocast: Callable[[], AbstractContextManager],
    *,
    stream: torch.cuda.Stream | None = None,
) -> Iterator[tuple[Slice, Any]]:
    """Return slices with their targets, which take no gradient.

    Args:
        stream: Compute them one slice early, on this stream (`side_stream`): they fill what the
            small kernels of a model leave idle. The values are those of a call in place.
    """
    if stream is None:
        for part in slices:
            with torch.no_grad(), autocast():
                found = targets(part.batch, part.step)
            yield part, found
        return
    ready = None
    for part in slices:
        begun = part, *_begin(part, targets, stream, autocast)
        if ready is not None:
            yield _finish(*ready)
        ready = begun
    if ready is not None:
        yield _finish(*ready)


def _begin(
    part: Slice,
    targets: Callable[[Any, int], Any],
    stream: torch.cuda.Stream,
    autocast: Callable[[], AbstractContextManager],
) -> tuple[Any, torch.cuda.Event]:
    here = torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream), torch.no_grad(), autocast():
        found = targets(part.batch, part.step)
        done = torch.cuda.Event()
        done.record()
    for tensor in tensors_of(part.batch):  # resized images among them: nothing resizes twice
        tensor.record_stream(stream)
        tensor.record_stream(here)
    for tensor in tensors_of(found):
        tensor.record_stream(here)
    return found, done


def _finish(part: Slice, found: Any, done: torch.cuda.Event) -> tuple[Slice, Any]:
    torch.cuda.current_stream().wait_event(done)
    return part, found


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Find the tensors in dicts, sequences and objects with fields."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_of(value)
    elif hasattr(tree, "__dict__"):
        yield from tensors_of(vars(tree))
