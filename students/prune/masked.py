"""A model at full width that computes what it would with fewer units, or fewer layers.

Whoever multiplies by a weight is known by the weight's storage, as for scores: its input is
multiplied by a mask of the columns that count. Norms look at the units that count and return zeros
for the others; a layer that does not count returns its input. So one model is all its prefixes,
with gradients, under autocast, and without copies of its weights.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo.axes import Axis, Part, Shapes, State, part_size
from zoo.students.prune.taps import CONVS

Share = Float[Tensor, "*B choices"]


class Widths(NamedTuple):
    """How many units of an axis count: the first ones, of each candidate's number."""

    sizes: tuple[int, ...]
    share: Share | Callable[[], Share] | None = None
    """How much of each candidate there is, for all samples or for each token, or what says so when
    it is needed; None for the only one. One of them is 1 and the others 0, or nothing that is said
    of a child holds; gradients may differ."""

    def mixture(self) -> Share:
        """Return how much of each candidate there is, now."""
        if self.share is None:
            return torch.ones(1)
        return self.share if isinstance(self.share, Tensor) else self.share()


Layers = Mapping[str, Sequence[int] | Float[Tensor, " layers"]]
"""Which layers of each list count: their numbers, or how much of each there is."""


@dataclass(frozen=True)
class Size:
    """How much of a model counts; nothing is said of what is whole."""

    widths: Mapping[Axis, Widths] = field(default_factory=dict)
    layers: Layers = field(default_factory=dict)
    buffers: State = field(default_factory=dict)
    """What a model of this size has in place of what this one computed from its width."""


class Masked:
    """What is to be found in a model; `at` gives it a size for a while."""

    def __init__(self, model: nn.Module, shapes: Shapes):
        self.model, self.shapes = model, shapes
        state = model.state_dict(keep_vars=True)
        self.names: dict[int, str] = {}
        for name, shape in shapes.tensors.items():
            if shape.read is not None:
                self.names[state[name].untyped_storage()._cdata] = name
        self.norms = {
            f"{path}.weight": module for path, module in model.named_modules() if is_norm(module)
        }
        self._fixed: dict[tuple, Tensor] = {}

    @contextmanager
    def at(self, size: Size) -> Iterator[None]:
        """Let the model compute as one of this size would."""
        patched = [*self._norms(size.widths), *self._layers(size.layers)]
        own = {name: self.model.get_buffer(name) for name in size.buffers}
        for module, forward in patched:
            module.forward = forward
        self._put(size.buffers)
        try:
            with _Masks(self._products(size.widths)):
                yield
        finally:
            for module, _ in patched:
                del module.forward
            self._put(own)

    def _put(self, buffers: State) -> None:
        for name, value in buffers.items():
            path, _, leaf = name.rpartition(".")
            self.model.get_submodule(path)._buffers[leaf] = value

    def _products(self, widths: Mapping[Axis, Widths]) -> dict[int, "_Product"]:
        """Find what is multiplied into the inputs and outputs of the products of each weight."""
        normed = {axis for name in self.norms for axis in self._letters(name, widths)}
        # The gradient of a choice comes from the norms where there are some, and not twice.
        widths = {
            axis: width._replace(share=width.mixture().detach())
            if axis in normed and width.share is not None
            else width
            for axis, width in widths.items()
        }
        read = {axis for axis in widths if self.shapes.readers(axis)}
        found = {}
        for storage, name in self.names.items():
            dims, column = self.shapes.tensors[name].dims, self.shapes.tensors[name].read
            assert column is not None
            rows = dims[1] if len(dims) == 3 and column == 2 else dims[0]
            # Units that no weight reads are masked where they are made: states of a scan.
            unread = {axis: widths[axis] for axis in widths if axis not in read}
            entry = _Product(
                self._mask(dims[column], {axis: widths[axis] for axis in read}),
                self._mask(rows, unread) if column else None,
            )
            if entry != (None, None):
                found[storage] = entry
        return found

    def _mask(self, dim: tuple[Part, ...], widths: Mapping[Axis, Widths]) -> Any:
        """Return the mask of a dim; what returns it, if it depends on what is chosen."""
        letters = [u for part in dim for u in part if isinstance(u, str) and u in widths]
        if not letters:
            return None
        device = next(self.model.parameters()).device
        if any(widths[letter].share is not None for letter in letters):
            return partial(along, dim, self.shapes.sizes, widths, device)
        key = (dim, *(widths[letter].sizes for letter in letters))
        if key not in self._fixed or self._fixed[key].device != device:
            self._fixed[key] = along(dim, self.shapes.sizes, widths, device)
        return self._fixed[key]

    def _norms(self, widths: Mapping[Axis, Widths]) -> Iterator[tuple[Any, Callable]]:
        for name, norm in self.norms.items():
            if letters := self._letters(name, widths):
                dim = self.shapes.tensors[name].dims[0]
                yield norm, self._norm(norm, dim, {u: widths[u] for u in letters})

    def _letters(self, name: str, widths: Mapping[Axis, Widths]) -> list[Axis]:
        dim = self.shapes.tensors[name].dims[0] if name in self.shapes.tensors else ()
        return [u for part in dim for u in part if isinstance(u, str) and u in widths]

    def _norm(self, norm: Any, dim: tuple[Part, ...], widths: Mapping[Axis, Widths]) -> Callable:
        mixed = [axis for axis, width in widths.items() if width.share is not None]
        assert len(mixed) < 2, f"{mixed} share a norm: their widths cannot be chosen apart"
        choices = range(len(widths[mixed[0]].sizes)) if mixed else [0]
        narrowed = []
        for i in choices:
            one = {a: Widths((w.sizes[i if a in mixed else 0],)) for a, w in widths.items()}
            narrowed.append(narrow(norm, self._mask(dim, one).nonzero()[:, 0]))
        if not mixed:
            return narrowed[0]

        def forward(*inputs: Tensor | None) -> Tensor:
            found = torch.stack([one(*inputs) for one in narrowed], -1)
            return (found * widths[mixed[0]].mixture().to(found.dtype)[..., None, :]).sum(-1)

        return forward

    def _layers(self, layers: Layers) -> Iterator[tuple[Any, Callable]]:
        for path, kept in layers.items():
            every: Any = self.model.get_submodule(path)
            for i, layer in enumerate(every):
                if isinstance(kept, Tensor):
                    yield layer, _faded(layer.forward, kept[i])
                elif i not in kept:
                    yield layer, _skipped

    def skipped(self, layers: Layers) -> list[nn.Parameter]:
        """List the parameters that a size without these layers does not touch."""
        return [
            parameter
            for path, kept in layers.items()
            for i, layer in enumerate(self.model.get_submodule(path).children())
            if not isinstance(kept, Tensor) and i not in kept
            for parameter in layer.parameters()
        ]


def along(
    dim: tuple[Part, ...],
    sizes: Mapping[Axis, int],
    widths: Mapping[Axis, Widths],
    device: torch.device,
) -> Float[Tensor, "*B length"]:
    """Return how much of each place along a dim of a tensor counts."""
    parts = []
    for part in dim:
        out = torch.ones(1, device=device)
        for unit in part:
            own = torch.ones(part_size((unit,), sizes), device=device)
            if isinstance(unit, str) and unit in widths:
                own = _prefix(widths[unit], len(own), device)
            out = (out[..., :, None] * own[..., None, :]).flatten(-2)
        parts.append(out)
    if len(parts) == 1:
        return parts[0]
    lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*lead, -1) for part in parts], -1)


def _prefix(width: Widths, units: int, device: torch.device) -> Float[Tensor, "*B units"]:
    ends = torch.tensor(width.sizes, device=device)
    table = (torch.arange(units, device=device) < ends[:, None]).float()
    if width.share is None:
        return table[0]
    share = width.mixture()
    return share @ table.to(share)


class _Product(NamedTuple):
    columns: Tensor | Callable[[], Tensor] | None
    rows: Tensor | Callable[[], Tensor] | None


class _Masks(TorchFunctionMode):
    """Multiply masks into the inputs and outputs of products with known weights."""

    def __init__(self, products: Mapping[int, _Product]):
        super().__init__()
        self.products = products

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear and func not in CONVS:
            return func(*args, **kwargs)
        given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
        found = self.products.get(given["weight"].untyped_storage()._cdata)
        if found is None:
            return func(*args, **kwargs)
        spatial = given["input"].ndim - 2 if func in CONVS else 0
        if found.columns is not None:
            rest = {k: v for k, v in kwargs.items() if k not in ("input", "weight")}
            x = _times(given["input"], found.columns, spatial)
            args, kwargs = (x, given["weight"], *args[2:]), rest
        out = func(*args, **kwargs)
        return out if found.rows is None else _times(out, found.rows, spatial)


def _times(x: Tensor, mask: Tensor | Callable[[], Tensor], spatial: int) -> Tensor:
    """Multiply along the channels, which stand before `spatial` other dims; or the last ones."""
    mask = (mask if isinstance(mask, Tensor) else mask()).to(x.dtype)
    if spatial and mask.ndim > 1:
        raise ValueError("A convolution's channels cannot be chosen for each token.")
    return x * mask.view(*mask.shape, *[1] * spatial)


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module normalises over its channels, as batch norm does not."""
    batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return "Norm" in type(module).__name__ and not batch


def unsaved(model: nn.Module) -> State:
    """Return what a model computed itself: the buffers that no checkpoint holds."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def narrow(norm: Any, kept: Tensor) -> Callable[..., Tensor]:
    """Return a norm's forward pass over these channels alone, with zeros for the others."""
    small = copy.copy(norm)
    small._parameters = dict(norm._parameters)
    full = norm.weight.shape[0]
    if hasattr(norm, "normalized_shape"):
        small.normalized_shape = (len(kept),)
    if hasattr(norm, "group_size"):
        small.group_size = norm.group_size * len(kept) // full
    dim = 1 if "2d" in type(norm).__name__ else -1

    def forward(*inputs: Tensor | None) -> Tensor:
        for name, value in norm._parameters.items():  # those of the call, which may be replaced
            small._parameters[name] = None if value is None else value[kept]
        cut = [x if x is None else x.index_select(dim, kept) for x in inputs]
        y = type(norm).forward(small, *cut)
        shape = [full if i == dim % y.ndim else n for i, n in enumerate(y.shape)]
        return y.new_zeros(shape).index_copy_(dim, kept, y)

    return forward


def _passing(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _skipped(*args: Any, **kwargs: Any) -> Tensor:
    return _passing(args, kwargs)


def _faded(forward: Callable, share: Tensor) -> Callable[..., Tensor]:
    """Weigh what a layer adds to the stream."""

    def faded(*args: Any, **kwargs: Any) -> Tensor:
        x = _passing(args, kwargs)
        return x + share.to(x.dtype) * (forward(*args, **kwargs) - x)

    return faded
