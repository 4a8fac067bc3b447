"""See what passes through the weights of a model: the tap under every score of activations.

Whoever multiplies by a weight whose columns run along an axis sees that axis's activations. A mode
that looks at every product knows those weights by their storage, so layers that pass a bare weight,
a copy in another precision, or one expert's view of a packed one, are seen too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo.students.prune.plan import PROJECTOR, VISION, part_of

CONVS = {torch.conv1d, torch.conv2d, torch.conv3d, F.conv_transpose1d, F.conv_transpose2d}
"""Products whose channels stand in dim 1; a linear layer has them last."""
PRODUCTS = {F.linear, *CONVS}
CASTS = {Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16}
ORDERS = {"mean": 1, "l2": 2, "max": torch.inf}

OverTokens = Literal["mean", "l2", "max", "var"]
OverSamples = Literal["l2", "mean", "var"]
Inputs = Mapping[str, Any]
Total = Callable[[Tensor], Tensor]
"""Adds a tensor up over the ranks (`zoo.train.mesh.sum_over_ranks`)."""


def alone(x: Tensor) -> Tensor:
    """Add up over one rank."""
    return x


class Tap(NamedTuple):
    """A weight that is looked for."""

    name: str
    dim: int
    """Of the weight: its columns are measured in what goes into the product, or its rows in what
    comes out."""
    of: Callable[[Tensor], Tensor] | None = None
    """None: what goes in is measured. Else what comes out, after this."""


class Taps(TorchFunctionMode):
    """Aggregate what goes into watched weights (or comes out): over tokens, then over samples.

    Nothing here waits for the device. Sums over tokens are float32 for half precisions, those over
    samples float64.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Iterable[Tap],
        tokens: OverTokens = "mean",
        samples: OverSamples = "l2",
    ):
        super().__init__()
        state = model.state_dict(keep_vars=True)
        self.taps = {tap.name: tap for tap in taps}
        self.watched = {state[n].untyped_storage()._cdata: t for n, t in self.taps.items()}
        self.whole = {name: state[name] for name in self.taps}
        self.tokens, self.samples = tokens, samples
        self.tables: set[str] = set()
        self.lengths: dict[str, int] = {}
        self.sums = {name: self._zeros(name) for name in self.taps}
        self.calls = dict.fromkeys(self.taps, 0)
        self.copies: dict[str, Tensor] = {}
        self.number, self.batch = 0, 1
        self.mask: Tensor | None = None
        self.last: tuple[Tensor, int, int, Tensor] | None = None

    def _zeros(self, name: str) -> Tensor:
        whole, dim = self.whole[name], self.taps[name].dim
        shape = (len(whole), 1 + whole.shape[2]) if self._is_packed(name) else (2, whole.shape[dim])
        return torch.zeros(shape, dtype=torch.float64, device=whole.device)

    def run(self, model: nn.Module, batches: Iterable[Inputs]) -> None:
        """Show the model all batches.

        Raises:
            ValueError: there are none, or tokens that are padding cannot be told from others.
        """
        with torch.no_grad(), seen_products(model), self:
            for batch in batches:
                if not self.number:
                    self._find_tables(model, batch)
                self.batch = len(next(iter(batch.values())))
                self.number += self.batch
                mask = batch.get("attention_mask")
                self.mask = None if mask is None or bool(mask.all()) else mask
                model(**batch)
                self.last = None
        if not self.number:
            raise ValueError("Scores need data to look at, and there are no samples.")

    def _find_tables(self, model: nn.Module, batch: Inputs) -> None:
        """Find the weights whose input is the same for one sample and for two: position tables."""
        short = all(v.ndim == 2 for v in batch.values())  # of a text a few tokens tell
        one = {k: v[:1, :16] if short else v[:1] for k, v in batch.items()}
        lengths = []
        for number in (1, 2):
            model(**{k: v.repeat_interleave(number, 0) for k, v in one.items()})
            lengths.append(dict(self.lengths))
        self.tables = {name for name, n in lengths[0].items() if lengths[1].get(name) == n}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:  # one function of torch's, of several products
            with _no_dispatch(), self:
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in PRODUCTS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            tap = self.watched.get(weight.untyped_storage()._cdata)
            if tap is not None:
                x = (args[0] if args else kwargs["input"]) if tap.of is None else tap.of(out)
                self._see(tap.name, x, weight, func in CONVS)
        elif func in CASTS and type(args[0]) is nn.Parameter and out is not args[0]:
            tap = self.watched.get(args[0].untyped_storage()._cdata)
            if tap is not None:  # kept alive, so that no other tensor takes its place in memory
                if (old := self.copies.get(tap.name)) is not None:
                    self.watched.pop(old.untyped_storage()._cdata, None)
                self.copies[tap.name] = out
                self.watched[out.untyped_storage()._cdata] = tap
        return out

    def _see(self, name: str, x: Tensor, weight: Tensor, is_conv: bool) -> None:
        width = x.shape[1] if is_conv else x.shape[-1]
        if not self.number:
            self.lengths[name] = x.numel() // width
            return
        whole = self.whole[name]
        self.calls[name] += 1
        if self._is_packed(name):  # one expert of a packed weight: routed tokens
            self._add_expert(name, x.reshape(-1, width), weight.storage_offset() // whole.stride(0))
            return
        if self.last is None or self.last[0] is not x or self.last[1:3] != (x._version, is_conv):
            # Windows, flattened tokens and pooled heads fold back: the sample is the slowest dim. A
            # table that all samples share (positions) counts for each of them.
            samples = 1 if name in self.tables else self.batch
            rows = x.flatten(2).transpose(1, 2) if is_conv else x
            values = self._over_tokens(name, rows.reshape(samples, -1, width))
            if name in self.tables:
                values = values.expand(self.batch, width)
            # q, k and v read one and the same tensor
            self.last = (x, x._version, is_conv, torch.stack([(values**2).sum(0), values.sum(0)]))
        self.sums[name].add_(self.last[3])

    def _over_tokens(self, name: str, x: Tensor) -> Tensor:
        """Aggregate [samples, tokens, width] to [samples, width], in float64."""
        kind = torch.promote_types(x.dtype, torch.float32)
        number: Any = x.shape[1]
        sees_images = part_of(name) == VISION or PROJECTOR in name  # whose tokens are no padding
        if self.mask is not None and number > 1 and not sees_images:
            if self.mask.shape != x.shape[:2]:
                raise ValueError(
                    f"{name} sees {number} tokens of each sample, and attention_mask has "
                    f"{self.mask.shape[1]}; give rows of one length, without padding."
                )
            x = x * self.mask.unsqueeze(-1).to(x.dtype)
            number = self.mask.sum(1, keepdim=True)
        if self.tokens == "var":
            mean = x.sum(1, dtype=kind).double() / number
            squares = torch.linalg.vector_norm(x, 2, dim=1, dtype=kind).double() ** 2
            return squares / number - mean**2
        norm = torch.linalg.vector_norm(x, ORDERS[self.tokens], dim=1, dtype=kind).double()
        return norm / number if self.tokens == "mean" else norm

    def _add_expert(self, name: str, x: Tensor, expert: int) -> None:
        if self.mask is not None or self.tokens not in ("mean", "l2"):
            raise ValueError(
                f"{name} sees tokens that a router sent, and cannot tell samples and padding "
                "apart; give rows of one length, and aggregate tokens by mean or l2."
            )
        kind = torch.promote_types(x.dtype, torch.float32)
        sums = torch.linalg.vector_norm(x, ORDERS[self.tokens], dim=0, dtype=kind).double()
        into = self.sums[name]
        into[expert, 0] += len(x)
        into[expert, 1:] += sums if self.tokens == "mean" else sums**2

    def scores(self, total: Total = alone) -> dict[str, Tensor]:
        """Return the score of the columns of each weight that was seen, [columns], on the CPU.

        Of a packed weight [experts, columns], and under `NAME tokens` how many tokens each expert
        got, [experts, 1].
        """
        seen = total(torch.tensor([float(self.number), *map(float, self.calls.values())]))
        number, *calls = seen.double().tolist()
        out = {}
        for (name, sums), times in zip(self.sums.items(), calls, strict=True):
            sums = total(sums).cpu()
            if not times:
                continue
            if self._is_packed(name):
                tokens, values = sums[:, :1], sums[:, 1:]
                out[f"{name} tokens"] = tokens
                out[name] = values / tokens.clamp(min=1) if self.tokens == "mean" else values.sqrt()
                continue
            squares, values = sums
            mean = values / number
            spread = squares / number - mean**2
            out[name] = {"l2": squares.sqrt(), "mean": mean, "var": spread}[self.samples]
        return out

    def _is_packed(self, name: str) -> bool:
        return self.taps[name].dim == 2 and self.whole[name].ndim == 3


@contextmanager
def _no_dispatch() -> Iterator[None]:
    """Let functions written in Python run, whose products then are dispatched one by one."""
    asks = F.has_torch_function  # pyright: ignore[reportAttributeAccessIssue]
    F.has_torch_function = lambda _: False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        F.has_torch_function = asks  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def seen_products(model: nn.Module) -> Iterator[None]:
    """Let a model compute by products that a tap sees, where it has fused or grouped ones too.

    And without a cache of keys and states, which nothing would read.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    padding: list[Any] = [m for m in model.modules() if getattr(m, "pads_rank", False)]
    any_model: Any = model
    experts = None
    if getattr(getattr(model, "config", None), "_experts_implementation", "eager") != "eager":
        experts = any_model.get_experts_implementation()
        any_model.set_experts_implementation("eager")
    torch.backends.mha.set_fastpath_enabled(False)
    configs: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    caching = {id(c): c for c in configs if getattr(c, "use_cache", False)}.values()
    for config in caching:
        config.use_cache = False
    for module in padding:
        module.pads_rank = False
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for config in caching:
            config.use_cache = True
        for module in padding:
            module.pads_rank = True
        if experts is not None:
            any_model.set_experts_implementation(experts)
