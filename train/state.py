"""What training changes, and a checkpoint therefore holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from zoo.students.student import MESA, Student
from zoo.train.distill.config import Distill
from zoo.train.distill.weighting import Weighting
from zoo.train.optim import build_optimizer


@dataclass
class TrainState:
    """Everything that training changes, and that a checkpoint therefore holds."""

    student: Student
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    weighting: Weighting
    step: int = 0
    unread: list[Tensor] = field(default_factory=list)
    """Losses of the steps since the last log line; on the device, so that no step waits."""

    @classmethod
    def of(
        cls, student: Student, config: Distill, baseline_losses: Mapping[str, float]
    ) -> "TrainState":
        """Put optimizer, average and weights beside a student that is to be trained."""
        ema = ModelEmaV3(student, decay=config.optim.ema) if config.optim.ema else None
        names = [
            f"{label}/{part}"
            for label, head in student.heads.items()
            for part in ("summary", "spatial")
            if getattr(head, part) is not None
        ]
        names += [f"{MESA}/spatial"] if config.losses.mesa else []
        specs = dict(zip(config.labels, config.teachers, strict=True))
        device = next(student.parameters()).device
        weighting = Weighting(names, specs, config.losses, baseline_losses, device=device)
        optimizer = build_optimizer(student, config.optim)
        if weighting.learned is not None:
            optimizer.add_param_group(dict(params=[weighting.learned], weight_decay=0.0))
        return cls(student, optimizer, ema, weighting)

    def state(self) -> dict[str, Any]:
        return dict(
            step=self.step,
            student=self.student.state_dict(),
            optimizer=self.optimizer.state_dict(),
            ema=self.ema.module.state_dict() if self.ema else None,
            weighting=self.weighting.state_dict(),
            loss_ema=self.weighting.running,
            unread=list(self.unread),
        )

    def load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.weighting.load_state_dict(state.get("weighting", {}))
        device = next(self.student.parameters()).device
        running = state["loss_ema"]
        self.weighting.running = None if running is None else running.to(device)
        self.unread = [row.to(device) for row in state["unread"]]

    @property
    def best(self) -> Student:
        """The student that is evaluated and exported: the averaged one, if there is one."""
        return self.average or self.student

    @property
    def average(self) -> Student | None:
        return cast(Student, self.ema.module) if self.ema else None
