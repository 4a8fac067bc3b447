"""What training changes, and a checkpoint therefore holds."""

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zoo.train.average import Average
from zoo.train.checkpoint import SMALL, Like, joined, split
from zoo.train.config import Optim
from zoo.train.freeze import freeze
from zoo.train.mesh import is_first, same_on_all
from zoo.train.optim import build_optimizer
from zoo.train.run import Run
from zoo.train.shard import cut_like, filled, is_cut, is_sharded, mesh_of, method_of, shard

T = TypeVar("T")


class Learned(nn.Module):
    """Everything that learns, as one module that runs what it is given.

    Learned weights of losses are in it too: outside of the wrapped module DDP would leave each rank
    its own.
    """

    def __init__(self, model: nn.Module, parts: Mapping[str, nn.Module]):
        super().__init__()
        self.model, self.parts = model, nn.ModuleList(parts.values())

    def forward(self, run: Callable[[], T]) -> T:
        return run()


@dataclass
class TrainState:
    """Everything that training changes."""

    model: Any
    optimizer: torch.optim.Optimizer
    ema: Average | None = None
    parts: Mapping[str, nn.Module] = field(default_factory=dict)
    """What else learns or remembers, such as learned weights of losses."""
    step: int = 0
    unread: list[Tensor] = field(default_factory=list)
    """Losses of the steps since the last log line; on the device, so that no step waits."""
    names: tuple[str, ...] = ()
    """Of the losses, in the order of those rows."""
    skeleton: Any = None
    """Where the weights are cut over ranks: on rank 0 a plain model on the host, for evaluation."""

    best: tuple[int, float] | None = None
    """The step whose evaluation was the best so far, and its measure."""
    gathered: tuple[int, dict[str, Any]] | None = None
    """The forms of a step."""
    learned: Any = None
    """Model and parts as one module: a `Learned`."""
    pauses: bool = False
    """Whether this rank compiles in the step that is under way, whose time so tells nothing."""
    spread: bool = False
    """Whether ranks run a model together, which therefore every one of them has."""

    def __post_init__(self):
        if self.learned is None:
            self.learned = Learned(self.model, self.parts)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        optim: Optim,
        *,
        groups: Iterable[dict[str, Any]] | None = None,
        parts: Mapping[str, nn.Module] | None = None,
        ranks: str = "ddp",
        place: Callable[[nn.Module], None] | None = None,
        apart: Collection[str] = (),
    ) -> "TrainState":
        """Put an optimizer and an average beside a model that is to be trained.

        Args:
            groups: Parameter groups; `scale` in one multiplies its learning rate. By default
                norms, biases and what the model's backbone exempts are not decayed.
            parts: Their parameters are trained as well, without weight decay.
            ranks: Of `Training`; with groups it must be ddp.
            place: Spreads a model over ranks that run it together, in place; some of its weights
                may be cut behind it.
            apart: See `build_optimizer`.
        """
        if optim.lora and not any(".lora_A." in name for name, _ in model.named_parameters()):
            raise ValueError("optim.lora is for students; this training has no adapters.")
        if optim.freeze:
            freeze(model, optim.freeze)
        ema = Average(model, optim.ema) if optim.ema else None
        parts, skeleton = parts or {}, None
        learned = Learned(model, parts)
        method = "ddp" if place else method_of(ranks, model)
        if place:
            skeleton = copy.deepcopy(model).cpu() if is_first() else None
            for whole in (model, ema.module) if ema else (model,):
                place(whole)
        if method != "ddp":
            assert groups is None, "groups name parameters that are about to be cut"
            assert same_on_all(list(learned.parameters())), "the ranks begin differently"
            skeleton = copy.deepcopy(model).cpu() if is_first() else None
            mesh = mesh_of(method, next(model.parameters()).device)
            for whole in (learned, ema.module) if ema else (learned,):
                shard(whole, mesh)
        optimizer = build_optimizer(model, optim, groups, apart)
        for part in parts.values():
            if own := list(part.parameters()):
                optimizer.add_param_group(dict(params=own, weight_decay=0.0))
        return cls(
            model, optimizer, ema, parts, skeleton=skeleton, learned=learned, spread=bool(place)
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def parameters(self) -> list[nn.Parameter]:
        """List what the optimizer changes."""
        modules = (self.model, *self.parts.values())
        return [p for module in modules for p in module.parameters()]

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on.

        A forward pass may go on while it is copied: what one changes is here as it is now.
        """
        return dict(
            step=self.step,
            model=_state_of(self.model),
            optimizer=self.optimizer.state_dict(),
            ema=self.ema.module.state_dict() if self.ema else None,
            parts={name: _state_of(part) for name, part in self.parts.items()},
            best=self.best,
            # a few numbers, whose number changes: not among the tensors
            unread=[(str(row.dtype).removeprefix("torch."), row.tolist()) for row in self.unread],
        )

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        state = self._cut(_upgraded(state))
        self.step, self.best = state["step"], state.get("best")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load(state["ema"])
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.unread = [
            row.to(self.device)
            if isinstance(row, Tensor)
            else torch.tensor(row[1], dtype=getattr(torch, row[0]), device=self.device)
            for row in state["unread"]
        ]

    def resume(self, run: Run) -> None:
        """Go on from the newest checkpoint of a run, if there is one; forget later log lines."""
        if saved := run.load(self.like()):
            self.load(saved)
        run.sweep()
        run.keep(lambda row: row["step"] <= self.step)

    def improves(self, measure: float | None) -> bool:
        """Tell whether an evaluation of this step is the best so far, and remember it."""
        if measure is None or math.isnan(measure) or (self.best and measure <= self.best[1]):
            return False
        self.best = self.step, measure
        return True

    def like(self) -> Like:
        """Return what says of a checkpoint's tensor which one here, cut over ranks, it is of."""
        modules = dict(model=self.model) | (dict(ema=self.ema.module) if self.ema else {})
        modules |= {f"parts.{name}": part for name, part in self.parts.items()}
        named = {f"{of}.{n}": t for of, m in modules.items() for n, t in m.state_dict().items()}
        learned = [p for group in self.optimizer.param_groups for p in group["params"]]

        def like(name: str, size: torch.Size) -> Tensor | None:
            if name.startswith("optimizer.state."):  # optimizer.state.INDEX.exp_avg
                found = learned[int(name.split(".")[2])]
            else:
                found = named.get(name)
            return found if found is not None and is_cut(found) and found.shape == size else None

        return like

    def _cut(self, state: dict[str, Any]) -> dict[str, Any]:
        """Cut the tensors that are whole as those here are."""
        if not is_sharded(self.learned):
            return state
        tensors, rest = split(state)
        like = self.like()
        for name, value in tensors.items():
            if not is_cut(value) and (shard := like(name, value.shape)) is not None:
                tensors[name] = cut_like(value.to(shard.device), shard)
        return joined(rest, tensors)

    @property
    def forms(self) -> dict[str, Any]:
        """What may be evaluated and exported: `average`, if there is one, and `raw`.

        Weights that are cut over ranks, and models that ranks run together, are gathered for it,
        once a step: every rank asks, and rank 0 gets models.
        """
        found = (dict(average=self.ema.module) if self.ema else {}) | dict(raw=self.model)
        if not (self.spread or is_sharded(self.learned)):
            return found
        if self.gathered is None or self.gathered[0] != self.step:
            forms = {name: self._gathered(model) for name, model in found.items()}
            self.gathered = self.step, forms
        return self.gathered[1]

    @property
    def averaged(self) -> Any:
        """The averaged model where there is one, otherwise the model itself; as `forms`.

        But one that ranks run together, every one of them gets.
        """
        if self.spread:
            return self.ema.module if self.ema else self.model
        return next(iter(self.forms.values()))

    def _gathered(self, model: nn.Module) -> Any:
        plain = copy.deepcopy(self.skeleton)
        return filled(plain and plain.to(self.device), model)


def _state_of(module: nn.Module) -> dict[str, Any]:
    """Return a module's state, with copies of its large buffers.

    The optimizer waits until parameters are copied (`zoo.train.staging`), and small tensors are
    joined into one of their own, but a queue or a memory bank changes in the next forward pass.
    """
    large = {n for n, x in module.named_buffers(remove_duplicate=False) if x.numel() > SMALL}
    state = module.state_dict()
    return {name: x.clone() if name in large else x for name, x in state.items()}


def _upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint from when the loop knew distillation alone."""
    if "student" not in state:
        return state
    weighting = dict(state.get("weighting") or {})
    if state.get("loss_ema") is not None:
        weighting["running"] = state["loss_ema"]
    return dict(state, model=state["student"], parts=dict(weighting=weighting))
