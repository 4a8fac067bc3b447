"""A tensor as `torch.save` writes it, in three pieces.

`torch.save` calls a Python stream forty times for a tensor, and each time a thread beside training
takes Python's lock from it. All but the numbers depends on shape and type alone, so it is made once
for each, and many tensors are written in one call of the system.
"""

import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Pieces = tuple[bytes, memoryview, bytes]
LOCAL_HEADER = 30
"""Bytes of a zip file's entry before its name (APPNOTE 4.3.7)."""


class SavedTensors:
    """The bytes around tensors' numbers, remembered by shape and type."""

    def __init__(self):
        self._around: dict[tuple[torch.Size, torch.dtype], tuple[bytes, bytes]] = {}

    def pieces(self, x: Tensor) -> Pieces:
        """Return a file that `torch.load` reads, as three pieces.

        Args:
            x: On the host.
        """
        key = (x.shape, x.dtype)
        if key not in self._around:
            self._around[key] = around(torch.zeros(x.shape, dtype=x.dtype))
        before, after = self._around[key]
        numbers = x.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return before, numbers.data, after


def around(x: Tensor) -> tuple[bytes, bytes]:
    """Return what `torch.save` writes before and behind a tensor's numbers."""
    file = io.BytesIO()
    with without_crc():
        torch.save(x, file)
    written = file.getbuffer()
    with zipfile.ZipFile(file) as entries:
        (entry,) = (e for e in entries.infolist() if e.filename.endswith("/data/0"))
    at = entry.header_offset
    lengths = (int.from_bytes(written[at + i : at + i + 2], "little") for i in (26, 28))
    start = at + LOCAL_HEADER + sum(lengths)
    return bytes(written[:start]), bytes(written[start + x.nbytes :])


@contextmanager
def without_crc() -> Iterator[None]:
    """Keep torch from computing checksums: each file gets one that is faster and checked."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_all(file: io.FileIO, pieces: Sequence[bytes | memoryview]) -> None:
    """Write pieces one behind the other.

    Raises:
        OSError: the disk is full, say.
    """
    left = [memoryview(piece) for piece in pieces]
    while left:
        # a part of it at 2 GB, and as a disk gets full; Windows takes one at a time
        several = hasattr(os, "writev")
        written = os.writev(file.fileno(), left) if several else os.write(file.fileno(), left[0])
        whole = 0
        for piece in left:
            if written < len(piece):
                break
            written -= len(piece)
            whole += 1
        left = left[whole:]
        if left:
            left[0] = left[0][written:]
