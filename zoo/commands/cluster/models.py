"""The models of a planned run, without weights: what is counted once for all numbers of GPUs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from zoo.students.student import Student
from zoo.train.distill.config import Distill
from zoo.train.distill.launching import Operators
from zoo.train.distill.memory import largest_slice, saved_bytes
from zoo.train.distill.plan_cost import Cost, costs_of
from zoo.train.distill.setup import meta_models


@dataclass(frozen=True)
class Models:
    """What is counted once for all numbers of GPUs."""

    teachers: Mapping[str, Cost]
    student: Cost
    operators: Operators
    """As a CPU would run them, in bfloat16: the constants of `launching` are for these."""
    saved: float
    """Bytes that the student keeps for the backward pass, for an image of the largest slice."""
    module: Student

    @classmethod
    def of(cls, config: Distill) -> "Models":
        """Build them on the meta device, and count."""
        networks, module = meta_models(config)
        costs, student = costs_of(config, networks, module, "cuda")
        side, _ = largest_slice(config)
        config, cpu = replace(config, precision="bf16"), torch.device("cpu")
        operators = Operators.of(config, networks, module, cpu)
        saved = saved_bytes(module, side, config, cpu)
        return cls(
            dict(zip(config.labels, costs, strict=True)), student, operators, saved.each, module
        )
