"""What DCP writes of a state, planned once a run, and written so that training is not held up.

A checkpoint is written by a thread beside training. The copying lets other threads run; the Python
around it does not, and training, which lends its turn at each operator, gets it back five
milliseconds later at the earliest. So as little Python as possible runs there: a state of the same
shapes is planned as the one before it. What is left is spread out, with a rest at each tensor.
"""

import dataclasses
import threading
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from zoo.train.staging import Shapes, shapes

REST = 0.002
"""Seconds of rest at a tensor."""


def without_helpers() -> None:
    """Keep a thread beside training from starting OpenMP threads of its own.

    They would outnumber the cores, upon which GNU's OpenMP lets all threads sleep between two
    operators; on a CPU, waking them made a step of a small ViT twice as slow ever after.
    """
    if threading.current_thread() is not threading.main_thread():
        torch.set_num_threads(1)  # of this thread, and of those that start later


class Planner(DefaultSavePlanner):
    """DCP's planner for the checkpoints of one run, whose tensors are cut in the same way.

    A rank whose tensors are those of the checkpoint before says so, and sends no plan.

    Args:
        hurry: Set when somebody waits for the checkpoint: then nothing rests.
    """

    def __init__(self, hurry: threading.Event):
        super().__init__()
        self.hurry = hurry
        self._shapes = self._new = Shapes()
        self._final = SavePlan([])
        self._plans = list[SavePlan]()
        """Of all ranks; on the one that coordinates."""
        self._metadata: Metadata | None = None

    def create_local_plan(self) -> SavePlan:
        """Plan this rank's tensors."""
        without_helpers()
        self._new = shapes(self.state_dict)
        if self._new == self._shapes:
            return SavePlan([], usable=False)
        return super().create_local_plan()

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Share the tensors of all ranks out, on the rank that coordinates."""
        if not any(plan.usable for plan in all_plans):
            assert self._metadata is not None
            return all_plans, dataclasses.replace(self._metadata)
        before = self._plans or all_plans
        plans = [new if new.usable else old for new, old in zip(all_plans, before, strict=True)]
        shared, metadata = super().create_global_plan(plans)
        self._plans, self._metadata = plans, dataclasses.replace(metadata)
        return shared, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Take what the coordinator says; it is kept, since all ranks have planned by now."""
        if new_plan.usable:
            self._final, self._shapes = new_plan, self._new
        self.plan = self._final
        return self._final

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Return a tensor, after a rest."""
        self.hurry.wait(REST)
        return super().resolve_data(write_item)

    def forget(self) -> None:
        """Let go of the tensors that are written."""
        self.state_dict = {}
