"""The ranks of a run: where every collective stands. On one process each is the identity.

`torchrun` starts the processes and says which is which; nothing else here knows how many there are.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.train.config import Training
from zoo.train.numa import bind_to_node

T = TypeVar("T")
C = TypeVar("C", bound=Training)
PATIENCE = timedelta(minutes=30)
"""How long ranks wait for what rank 0 does alone: writing, exporting, filling a cache."""
MORE_PATIENCE = timedelta(days=30)
"""The same for a training of rank 0 alone. Should it die, torchrun stops those that wait."""
AT_ONCE = 64
"""Objects of each rank that travel in one collective: features of many batches are gigabytes."""
LINGER = 2.0
"""Seconds that rank 0 gives others to stop with the same words, so that one of them says it."""

_alone = False


def world() -> int:
    """Return the number of ranks that work together; 1 within `alone`."""
    return dist.get_world_size() if _joined() else 1


def _joined() -> bool:
    return dist.is_initialized() and not _alone


@contextmanager
def alone() -> Iterator[None]:
    """Within this context every collective is the identity, as on one process."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    """Return the number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Tell whether this is rank 0, which alone writes the run's folder and speaks."""
    return rank() == 0


def first_of_machine() -> bool:
    """Tell whether no rank before this one is on its machine; every rank calls this.

    Not by LOCAL_RANK, which torchrun sets to 0 for all where each sees no GPU but its own.
    """
    mine, _ = share()
    hosts = gather(socket.gethostname())
    return hosts.index(hosts[mine]) == mine


def launched() -> int:
    """Return how many processes torchrun has started, whether they have joined or not."""
    return int(os.environ.get("WORLD_SIZE", 1))


def under_torchrun() -> bool:
    """Tell whether torchrun has started this process, which then may cut weights even alone."""
    return launched() > 1 or "TORCHELASTIC_RUN_ID" in os.environ


def launch() -> str | None:
    """Return the name that torchrun has for all processes that it starts at once and again."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name


@contextmanager
def ranks(device: torch.device) -> Iterator[None]:
    """Join the ranks that torchrun has started, and leave them in the end; alone, do nothing.

    What a GPU holds goes through NCCL, what the host decides through gloo, which waits for no GPU.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose streams are meant from here on, whoever joins ranks
    if not under_torchrun() or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        bind_to_node(device)
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        _gloo_group.cache_clear()
        dist.destroy_process_group()


def say_once(text: str, say: Callable[[], object]) -> None:
    """Say something, such as what stops all ranks, on the first rank that comes to it.

    No collective: an error may be of one rank alone, and ranks may be gone.
    """
    if not dist.is_initialized():
        say()
        return
    try:
        store = dist.PrefixStore("said", dist.distributed_c10d._get_default_store())
        first = store.add(text, 1) == 1
    except dist.DistError:
        first, store = True, None
    if first:
        say()
    end = time.monotonic() + LINGER
    with suppress(dist.DistError):  # the store may end with rank 0, so that one is the last to go
        while store and is_first() and store.add(text, 0) < world() and time.monotonic() < end:
            time.sleep(0.05)


def saving_group() -> dist.ProcessGroup | None:
    """Return a gloo group of its own for what is saved beside training; None alone.

    On the default group a collective of the writing thread could meet one of a backward pass.
    """
    return _gloo_group(PATIENCE) if _joined() else None


@cache
def _gloo_group(patience: timedelta) -> dist.ProcessGroup:
    """Return one more group of all ranks; all make it at the same time."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=patience))


def with_slices(config: C) -> C:
    """Return the config with `auto` slices settled: the number of ranks that a run starts with.

    Raises:
        ValueError: the ranks cannot share the slices out, or the slices the batch; weights are to
            be cut, and there are no ranks, or this training keeps them whole.
    """
    cuts = config.ranks in ("fsdp", "hsdp")
    if cuts and not config.may_cut:
        raise ValueError(
            f"--ranks {config.ranks} is for zoo distill; this training keeps whole weights on each "
            "process: --ranks ddp."
        )
    if cuts and not dist.is_initialized():
        raise ValueError(
            f"--ranks {config.ranks} cuts the weights over processes; start them with torchrun "
            "--nproc-per-node N -m zoo ..."
        )
    if config.slices == "auto" and world() > 1:
        config = replace(config, slices=world() // config.ranks_a_slice)
    slices_of_rank(config.num_slices, config.ranks_a_slice)
    return config


def slices_of_rank(num_slices: int, together: int = 1) -> tuple[int, ...]:
    """Return the slices of each batch that this rank takes.

    Args:
        together: Ranks that take a slice together; neighbours.

    Raises:
        ValueError: they do not share out evenly.
    """
    which, groups = share()[0] // together, world() // together
    count, rest = divmod(num_slices, groups)
    if rest:
        near = [n for n in range(1, num_slices + 1) if num_slices % n == 0]
        best = min(near, key=lambda n: abs(n - groups))
        what = "processes" if together == 1 else f"groups of {together} processes"
        raise ValueError(
            f"{groups} {what} cannot share {num_slices} slices; the nearest number that can is "
            f"{best}, or start a new run with --slices {groups} (or a multiple)."
        )
    return tuple(range(which * count, (which + 1) * count))


@torch.no_grad()
def sum_over_ranks(x: Tensor) -> Tensor:
    """Add a statistic up over the ranks; `x` itself when there is one."""
    if not _joined():
        return x
    x = x.clone()  # the caller's stays as it is
    dist.all_reduce(x)
    return x


@torch.no_grad()
def tensor_from_first(x: Tensor) -> Tensor:
    """Return rank 0's tensor on every rank; those of the others have its shape and dtype."""
    if not _joined():
        return x
    x = x.clone()
    dist.broadcast(x, src=0)
    return x


def any_rank(what: bool) -> bool:
    """Tell whether something is so on any rank; asked through gloo, so no GPU is waited for."""
    if not _joined():
        return what
    flag = torch.tensor(int(what))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def gather(what: Any) -> list[Any]:
    """Return every rank's object, in their order, on every rank."""
    if not _joined():
        return [what]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, what)
    return found


def share() -> tuple[int, int]:
    """Return which of how many shares this rank takes of work in units: every W-th, from its own.

    Work that is dealt out so comes back through `gathered` or `gathered_on_first`.
    """
    return (rank(), world()) if _joined() else (0, 1)


def gathered(items: Sequence[T]) -> list[T]:
    """Return the items of all ranks on every rank, those of rank 0 first."""
    rounds = _in_rounds(items, gather)
    return [item for part in zip(*rounds, strict=True) for some in part for item in some]


def gathered_on_first(items: Sequence[T]) -> list[T] | None:
    """Return the items of all ranks on rank 0, those of rank 0 first; None on the others."""
    rounds = _in_rounds(items, _gather_on_first)
    if share()[0]:
        return None
    return [item for part in zip(*rounds, strict=True) for some in part for item in some]


def _in_rounds(items: Sequence[T], collect: Callable[[Sequence[T]], Any]) -> list[Any]:
    most = max(gather(len(items)))
    return [collect(items[i : i + AT_ONCE]) for i in range(0, max(1, most), AT_ONCE)]


def _gather_on_first(what: Any) -> list[Any] | None:
    if not _joined():
        return [what]
    found: list[Any] | None = [None] * world() if is_first() else None
    dist.gather_object(what, found, dst=0)
    return found


def from_first(what: Any, *, patience: timedelta = PATIENCE) -> Any:
    """Return rank 0's object on every rank.

    Args:
        patience: How long the others wait for it.
    """
    if not _joined():
        return what
    held = [what]
    group = None if patience == PATIENCE else _gloo_group(patience)
    dist.broadcast_object_list(held, src=0, group=group)
    return held[0]


def by_first(call: Callable[[], T], *, patience: timedelta = PATIENCE) -> T:
    """Let rank 0 do something alone, and return its result on every rank once it is done.

    Within the call rank 0 is as one process: its collectives are the identity (`alone`).

    Args:
        patience: How long the others wait.

    Raises:
        ValueError: it failed there; the error is that of every rank.
    """
    if not _joined():
        return call()
    if patience != PATIENCE:
        _gloo_group(patience)  # made by all, before they part
    result, error = None, None
    if is_first():
        try:
            with alone():
                result = call()
        except Exception as failure:  # the others must not wait for what will not come
            from_first((None, str(failure) or type(failure).__name__), patience=patience)
            raise
    result, error = from_first((result, error), patience=patience)
    if error is not None:
        raise ValueError(error)
    return result  # pyright: ignore[reportReturnType]


def together(call: Callable[[], T], *, here: bool) -> T:
    """Call on every rank if all of them can; otherwise let rank 0 do it alone (`by_first`).

    Args:
        here: Whether this rank can: it has the model that is to be measured.
    """
    return by_first(call) if any_rank(not here) else call()


def union(names: set[str]) -> None:
    """Add what the other ranks have to a set, in place."""
    names.update(name for some in gather(sorted(names)) for name in some)


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Let rank 0 through alone; the others follow when it is done, and find what it has written.

    Each is as one process meanwhile (`alone`).

    Raises:
        ValueError: it failed there; the error is that of every rank.
    """
    if is_first():
        try:
            with alone():
                yield
        except Exception as failure:
            from_first(str(failure) or type(failure).__name__)
            raise
        from_first(None)
        return
    if (error := from_first(None)) is not None:
        raise ValueError(error)
    with alone():
        yield


def same_on_all(values: Sequence[Tensor]) -> bool:
    """Tell whether tensors are equal on all ranks, by their sums in float64."""
    if not _joined():
        return True
    mine = torch.stack([value.detach().sum(dtype=torch.float64).cpu() for value in values])
    low, high = mine.clone(), mine.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return torch.equal(low, high)
