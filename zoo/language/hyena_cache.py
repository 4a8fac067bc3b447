"""What a StripedHyena 2 remembers while it generates: a few rows or a state for each layer."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache


class LayerState:
    """What one layer remembers of the tokens so far, by name; each tensor has rows of a batch.

    Of a size that does not grow with the text, but for attention's keys and values.
    """

    is_compileable = is_croppable = is_sliding = supports_early_init = False
    """What transformers asks of the layers of a cache."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def before(self, name: str, x: Tensor, count: int) -> Tensor:
        """Return the `count` tokens before `x` [B, T, channels], zeros at first; keep the last."""
        found = self.tensors.get(name)
        if found is None:
            found = x.new_zeros(len(x), count, x.shape[2])
        # A copy: a view would keep the whole prompt alive.
        last = x[:, -count:] if count else x[:, :0]
        self.tensors[name] = torch.cat([found, last], dim=1)[:, len(last[0]) :].clone()
        return found

    def appended(self, name: str, x: Tensor) -> Tensor:
        """Return all that was given under this name, joined along dim 2."""
        found = self.tensors.get(name)
        self.tensors[name] = x if found is None else torch.cat([found, x], dim=2)
        return self.tensors[name]

    def reset(self) -> None:
        """Forget all tokens."""
        self.tensors.clear()

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch."""
        self.tensors = {k: v.index_select(0, rows.to(v.device)) for k, v in self.tensors.items()}

    reorder_cache = batch_select_indices = select

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self.tensors = {k: v.repeat_interleave(repeats, 0) for k, v in self.tensors.items()}

    def crop(self, *_: Any) -> None:
        """Refuse to forget single tokens: a recurrent state cannot."""
        raise ValueError("StripedHyena 2 cannot take tokens back: its long filters keep a sum.")


class HyenaCache(Cache):
    """The states of all layers, and how many tokens they have seen."""

    def __init__(self, num_layers: int):
        states: list[Any] = [LayerState() for _ in range(num_layers)]
        super().__init__(layers=states)
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens were seen."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no most."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.length = 0
