"""What training changes, and a checkpoint therefore holds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.train.average import Average
from zoo.train.config import Optim
from zoo.train.freeze import freeze
from zoo.train.optim import build_optimizer
from zoo.train.run import Run


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

    @classmethod
    def of(
        cls,
        model: nn.Module,
        optim: Optim,
        *,
        groups: Iterable[dict[str, Any]] | None = None,
        parts: Mapping[str, nn.Module] | None = None,
    ) -> "TrainState":
        """Put an optimizer and an average beside a model that is to be trained.

        Args:
            groups: Parameter groups; `scale` in one multiplies its learning rate. By default
                norms, biases and what the model's backbone exempts are not decayed.
            parts: Their parameters are trained as well, without weight decay.
        """
        if optim.lora and not any(".lora_A." in name for name, _ in model.named_parameters()):
            raise ValueError("optim.lora is for students; this training has no adapters.")
        if optim.freeze:
            freeze(model, optim.freeze)
        ema = Average(model, optim.ema) if optim.ema else None
        optimizer = build_optimizer(model, optim, groups)
        for part in (parts or {}).values():
            if learned := list(part.parameters()):
                optimizer.add_param_group(dict(params=learned, weight_decay=0.0))
        return cls(model, optimizer, ema, parts or {})

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def parameters(self) -> list[nn.Parameter]:
        """List what the optimizer changes."""
        modules = (self.model, *self.parts.values())
        return [p for module in modules for p in module.parameters()]

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on."""
        return dict(
            step=self.step,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            ema=self.ema.module.state_dict() if self.ema else None,
            parts={name: part.state_dict() for name, part in self.parts.items()},
            unread=list(self.unread),
        )

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        state = _upgraded(state)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load(state["ema"])
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.unread = [row.to(self.device) for row in state["unread"]]

    def resume(self, run: Run) -> None:
        """Go on from the newest checkpoint of a run, if there is one; forget later log lines."""
        if saved := run.load():
            self.load(saved)
        run.keep(lambda row: row["step"] <= self.step)

    @property
    def averaged(self) -> Any:
        """The averaged model where there is one, otherwise the model itself."""
        return self.ema.module if self.ema else self.model

    @property
    def forms(self) -> dict[str, Any]:
        """What may be evaluated and exported: `average`, if there is one, and `raw`."""
        return (dict(average=self.ema.module) if self.ema else {}) | dict(raw=self.model)


def _upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint from when the loop knew distillation alone."""
    if "student" not in state:
        return state
    weighting = dict(state.get("weighting") or {})
    if state.get("loss_ema") is not None:
        weighting["running"] = state["loss_ema"]
    return dict(state, model=state["student"], parts=dict(weighting=weighting))
