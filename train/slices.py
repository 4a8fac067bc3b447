"""The slice: the part of a batch that is the unit of randomness and of batch statistics.

A batch is cut into S slices of equal size. Each is seeded by (seed, step, slice), each is
normalised by its own statistics, and what it adds to a gradient is a sum: so it matters neither
in which order one process takes them nor which process takes which.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.data.plan import mix
from zoo.train.mesh import sum_over_ranks


def slice_seed(seed: int, step: int, index: int) -> int:
    """Return the seed of what a network draws for a slice (dropout, drop path)."""
    return mix(seed, 2, step, index) if index else mix(seed, 2, step)


class SliceSeeds:
    """Seed torch for the slices of one step.

    What a step draws for all of its slices (the noise of DAMP) comes first, from the stream of
    slice 0, which goes on behind it whenever slice 0 is taken.
    """

    def __init__(self, seed: int, step: int, device: torch.device):
        self.seed, self.step, self.device = seed, step, device
        torch.manual_seed(slice_seed(seed, step, 0))
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Remember where the stream of slice 0 stands."""
        self._kept = [torch.get_rng_state()]
        if self.device.type == "cuda":
            self._kept.append(torch.cuda.get_rng_state(self.device))

    def begin(self, index: int) -> None:
        """Seed what slice `index` draws."""
        if index:
            torch.manual_seed(slice_seed(self.seed, self.step, index))
            return
        torch.set_rng_state(self._kept[0])
        if len(self._kept) > 1:
            torch.cuda.set_rng_state(self._kept[1], self.device)


class SliceBuffers:
    """Buffers that a forward pass moves, moved once a step: by the mean over all its slices.

    Running statistics of batch norms, and the vectors of a spectral norm's power iteration. Each
    slice starts from what the step started from. Which buffers move is found by comparing them
    before and behind the first slice of all, the one time that this waits for the device.
    """

    def __init__(self, model: nn.Module):
        self._buffers: Sequence[Tensor] = list(model.buffers())
        self._known = False
        self._before: list[Tensor] = []
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def begin_step(self) -> None:
        self._before = [buffer.clone() for buffer in self._buffers]
        self._sums = []

    @torch.no_grad()
    def end_slice(self) -> None:
        """Add up what this slice made of the buffers, and put them back."""
        if not self._known:
            moved = [
                not torch.equal(b, a) for b, a in zip(self._buffers, self._before, strict=True)
            ]
            self._buffers = [b for b, m in zip(self._buffers, moved, strict=True) if m]
            self._before = [b for b, m in zip(self._before, moved, strict=True) if m]
            self._known = True
        if self._sums:
            for total, buffer in zip(self._sums, self._buffers, strict=True):
                total.add_(buffer)
        else:
            self._sums = [buffer.clone() for buffer in self._buffers]
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)

    @torch.no_grad()
    def end_step(self, slices: int) -> None:
        """Move the buffers by the mean over the slices, a slice as often as ranks share it."""
        for buffer, mine in zip(self._buffers, self._sums, strict=True):
            total = sum_over_ranks(mine)
            buffer.copy_(total / slices if total.is_floating_point() else total // slices)
