"""What a model costs at other sizes: parameters, bytes, FLOPs, from its named shapes."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from zoo.axes import Axis, Shapes, dim_size
from zoo.students.prune.plan import PROJECTOR, VISION, part_of

BYTES = 2
"""Of a number in bfloat16, in which models are served."""


@dataclass(frozen=True)
class Cost:
    """What one model costs."""

    params: int
    active: int
    """Parameters that a token meets: of experts, those of a router's choice."""
    weights: int
    """Bytes of the parameters; 2 each."""
    cache: int
    """Bytes of keys and values for all tokens of a batch."""
    state: int
    """Bytes of a batch's states of state-space layers and of their convolutions."""
    flops: int | None
    """Of a forward pass of one sample: two for each multiply-add. None where it is not known."""

    @property
    def memory(self) -> int:
        """Bytes of weights, cache and states."""
        return self.weights + self.cache + self.state

    def as_dict(self) -> dict[str, float | int]:
        """Return the numbers that a budget may speak of."""
        known = dict(params=self.params, active=self.active, memory=self.memory, flops=self.flops)
        return {what: number for what, number in known.items() if number is not None}


class CostModel:
    """Compute what a model would cost at other sizes and with fewer layers.

    FLOPs of a vision model, and of a Llava up to its projector, are counted once by torch, for each
    module, and follow the numbers in its tensors; that is exact for linear layers and convolutions,
    and near for attention. Those of a language model, and of a Llava's, follow from its shapes: two
    for each weight and token, 4 T² for each channel of a query head (no causal half is taken off),
    4 for each number of a state and token, two for each tap of a filter and token.

    Args:
        inputs: A sample on the meta device, for vision, or of an image with text.
        tokens: Length of the text that a language model has read.
        batch: How many texts it holds at once.
    """

    def __init__(
        self,
        model: nn.Module,
        shapes: Shapes,
        *,
        inputs: Mapping[str, Any] | None = None,
        tokens: int = 4096,
        batch: int = 1,
    ):
        self.shapes, self.tokens, self.batch = shapes, tokens, batch
        self.parameters = frozenset(name for name, _ in model.named_parameters())
        self.scopes = _scopes(shapes)
        config: Any = getattr(model, "config", None)
        self.top = _routed(config)
        self.windows = _windows(config, self.scopes)
        self.is_language = getattr(model, "main_input_name", "") == "input_ids"
        self.is_pair = hasattr(config, "vision_config")
        by_shapes = inputs is None or (self.is_language and "pixel_values" not in inputs)
        counted = {} if inputs is None or by_shapes else count_flops(model, inputs)
        self.by_module = [
            (path, flops, names)
            for path, flops in counted.items()
            if flops and (names := _scaling(shapes, path))
        ]
        self.lists = [f"{entry.path}." for entry in shapes.layers]
        self.text = inputs["input_ids"].shape[-1] if counted and self.is_language and inputs else 0
        """Tokens of a Llava's sample, those of its image among them."""

    def cost(
        self,
        sizes: Mapping[Axis, int] | None = None,
        layers: Mapping[str, Sequence[int]] | None = None,
    ) -> Cost:
        """Compute the cost if axes had these sizes, and lists of layers kept these alone."""
        sizes = {**self.shapes.sizes, **(sizes or {})}
        numbers, active, there = self._at(sizes, layers)
        own = [n for n in numbers if n in self.parameters and n not in self.shapes.tied]
        params = sum(numbers[name] for name in own)
        return Cost(
            params=params,
            active=round(sum(active[name] for name in own)),
            weights=BYTES * params,
            cache=sum(self._cache(scope, letters, sizes) for scope, letters in there.items()),
            state=sum(self._state(scope, letters, sizes) for scope, letters in there.items()),
            flops=self._flops(active, there, sizes, layers),
        )

    def _at(
        self, sizes: Mapping[Axis, int], layers: Mapping[str, Sequence[int]] | None
    ) -> tuple[dict[str, int], dict[str, float], dict[str, frozenset[str]]]:
        """Return the numbers of each tensor that stays, those that a token meets, the scopes."""
        numbers = {
            name: math.prod(dim_size(dim, sizes) for dim in shape.dims)
            for name, shape in self.shapes.tensors.items()
            if not layers or self._stays(name, layers)
        }
        active = {name: numbers[name] * self._share(name, sizes) for name in numbers}
        there = {s: v for s, v in self.scopes.items() if not layers or self._stays(f"{s}.", layers)}
        return numbers, active, there

    def _stays(self, name: str, layers: Mapping[str, Sequence[int]]) -> bool:
        for prefix in self.lists:
            if name.startswith(prefix) and prefix[:-1] in layers:
                number = name[len(prefix) :].partition(".")[0]
                return not number.isdigit() or int(number) in layers[prefix[:-1]]
        return True

    def _share(self, name: str, sizes: Mapping[Axis, int]) -> float:
        """Return how much of a tensor a token meets: all, but for packed experts."""
        shape = self.shapes.tensors[name]
        if len(shape.dims) == 3 and shape.read == 2 and len(shape.dims[0][0]) == 1:
            return min(1.0, self.top / dim_size(shape.dims[0], sizes))
        return 1.0

    def _cache(self, scope: str, letters: frozenset[str], sizes: Mapping[Axis, int]) -> int:
        if part_of(scope) == VISION:  # it sees an image once
            return 0
        fused = self.is_language and f"{scope}.qkv.weight" in self.shapes.tensors
        heads = "kd" if {"k", "d"} <= letters else "hd" if fused else ""
        if not heads:
            return 0
        held = min(self.tokens, self.windows.get(scope, self.tokens))
        return 2 * BYTES * self.batch * held * _product(scope, heads, sizes)

    def _state(self, scope: str, letters: frozenset[str], sizes: Mapping[Axis, int]) -> int:
        if f"{scope}.feature_filter" in self.shapes.tensors:
            return BYTES * self.batch * sum(held for held, _ in self._filters(scope, sizes))
        if not set("grps") <= letters:
            return 0
        convolved = self.shapes.tensors[f"{scope}.conv1d.weight"].dims
        numbers = _product(scope, "grps", sizes) + math.prod(dim_size(d, sizes) for d in convolved)
        return BYTES * self.batch * numbers

    def _filters(self, scope: str, sizes: Mapping[Axis, int]) -> list[tuple[int, int]]:
        """Return what StripedHyena 2's filters hold from token to token, and multiply at each."""
        dims = {
            name: [dim_size(dim, sizes) for dim in self.shapes.tensors[f"{scope}.{name}"].dims]
            for name in ("feature_filter", "filter", "residues")
            if f"{scope}.{name}" in self.shapes.tensors
        }
        rows, _, taps = dims["feature_filter"]
        found = [(rows * (taps - 1), rows * taps)]
        if "filter" in dims:
            length = dims["filter"][-1]
            return [*found, (rows // 3 * (length - 1), rows // 3 * length)]
        states = math.prod(dims["residues"])
        return [*found, (states, 2 * states)]

    def _flops(
        self,
        active: Mapping[str, float],
        there: Mapping[str, frozenset[str]],
        sizes: Mapping[Axis, int],
        layers: Mapping[str, Sequence[int]] | None,
    ) -> int | None:
        if self.by_module:
            counted = sum(
                flops * sum(active.get(n, 0) for n in names) / sum(names.values())
                for path, flops, names in self.by_module
                if not layers or self._stays(f"{path}.", layers)
            )
            return round(counted + self._text_flops(active, there, sizes, self.text))
        if not self.is_language or self.is_pair:
            return None
        return round(self._text_flops(active, there, sizes, self.tokens))

    def text_flops(
        self, sizes: Mapping[Axis, int], layers: Mapping[str, Sequence[int]] | None = None
    ) -> int:
        """Compute what of a Llava's FLOPs lies behind its projector; 0 for others."""
        if not self.text:
            return 0
        sizes = {**self.shapes.sizes, **sizes}
        _, active, there = self._at(sizes, layers)
        return round(self._text_flops(active, there, sizes, self.text))

    def _text_flops(
        self,
        active: Mapping[str, float],
        there: Mapping[str, frozenset[str]],
        sizes: Mapping[Axis, int],
        tokens: int,
    ) -> float:
        tensors = self.shapes.tensors
        text = [name for name in active if part_of(name) != VISION and PROJECTOR not in name]
        each = sum(2 * active[name] for name in text if tensors[name].read is not None)
        for scope, letters in there.items():
            if part_of(scope) == VISION:
                continue
            heads = "kqd" if {"k", "q", "d"} <= letters else "hd" if {"h", "d"} <= letters else ""
            seen = min(tokens, self.windows.get(scope, tokens))
            each += 4 * seen * _product(scope, heads, sizes) if heads else 0
            each += 4 * _product(scope, "grps", sizes) if set("grps") <= letters else 0
            if f"{scope}.feature_filter" in tensors:
                each += sum(2 * products for _, products in self._filters(scope, sizes))
        return each * tokens


def count_flops(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Count the FLOPs of a forward pass on the meta device: of each module, its children's aside.

    Returns:
        By the path of the module; that of the model itself is empty.
    """
    state = {name: t.detach() for name, t in model.state_dict().items()}  # no gradients to follow
    with FlopCounterMode(display=False) as counter, torch.no_grad(), _without_values(model, inputs):
        functional_call(model, state, (), dict(inputs))
    totals = {
        path.partition(".")[2]: sum(counts.values())
        for path, counts in counter.get_flop_counts().items()
        if path != "Global"
    }
    own = dict(totals)
    for path, flops in totals.items():
        outer = path
        while outer:
            outer = outer.rpartition(".")[0]
            if outer in totals:
                own[outer] -= flops
                break
    return own


@contextmanager
def _without_values(model: Any, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Let a Llava stop before its text, which shapes tell the FLOPs of, and which needs values."""
    if not {"input_ids", "pixel_values"} <= inputs.keys():
        yield
        return

    def forward(pixel_values: Tensor, **_: Any) -> Tensor:
        inner = model.model
        return inner.multi_modal_projector(inner.vision_tower(pixel_values).last_hidden_state)

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def _scaling(shapes: Shapes, path: str) -> dict[str, int]:
    """Return the tensors whose numbers a module's FLOPs follow: its own, else those below it."""
    below = {
        name: math.prod(dim_size(dim, shapes.sizes) for dim in shape.dims)
        for name, shape in shapes.tensors.items()
        if shape.read is not None and (not path or name.startswith(f"{path}."))
    }
    own = {name: n for name, n in below.items() if name.rpartition(".")[0] == path}
    return own or below


def _scopes(shapes: Shapes) -> dict[str, frozenset[str]]:
    """Return the modules that axes belong to, and the letters of each."""
    found: dict[str, set[str]] = {}
    for axis in shapes.sizes:
        scope, _, letter = axis.rpartition(".")
        found.setdefault(scope, set()).add(letter)
    return {scope: frozenset(letters) for scope, letters in found.items()}


def _product(scope: str, letters: str, sizes: Mapping[Axis, int]) -> int:
    return math.prod(sizes[f"{scope}.{letter}" if scope else letter] for letter in letters)


def _routed(config: Any) -> int:
    text = getattr(config, "text_config", config)
    return getattr(text, "num_experts_per_tok", None) or 1


def _windows(config: Any, scopes: Mapping[str, frozenset[str]]) -> dict[str, int]:
    """Return how many tokens back the attention of a module looks, where it does not to the first.

    A configuration without kinds of layers has its window in all of them.
    """
    text = getattr(config, "text_config", config)
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    found = {}
    for scope, letters in scopes.items():
        number = re.search(r"\.(\d+)\.", f"{scope}.")
        if window and "k" in letters and number:
            slides = kinds is None or kinds[int(number[1])] == "sliding_attention"
            found |= {scope: window} if slides else {}
    return found
