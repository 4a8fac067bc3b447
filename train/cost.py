"""The cost model of a distillation step: FLOPs over the rates that networks reach.

Per image on one GPU, for teachers t with the FLOPs F_t of a forward pass, a student with F_S, the
rate P of a plain matrix product, and the shares of it that networks reach:

    time = Σ F_t / (q_t m_t P) + 3 F_S / (m_S P)

q_t is what 8 bits gain; without a compiler the shares are smaller (`EAGER`). A mosaic of k x k
images has 1/k² of its canvas's FLOPs in each. Heads are part of the student. Transfers and decoding
are taken to hide behind this.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CONSTANTS = json.loads(Path(__file__).with_name("constants.json").read_text())
"""What was measured or is assumed, on which machine and when."""
_SHARES = CONSTANTS["shares"]
TEACHER: Mapping[str, float] = _SHARES["teacher"]
"""Share of P that a compiled teacher reaches, by how its name begins; the longest that fits."""
STUDENT: Mapping[str, float] = _SHARES["student"]
"""The same for forward and backward of a student, with what is left of a step around it."""
EAGER: Mapping[str, float] = _SHARES["eager"]
"""What is left of these shares without a compiler; SAM's relative positions then stand in memory as
whole matrices."""
EIGHT_BITS: Mapping[str, float] = _SHARES["eight_bits"]
"""What a compiled teacher gains with all of its linear layers in 8 bits."""


@dataclass(frozen=True)
class Estimate:
    """Seconds for an image."""

    teachers: Mapping[str, float]
    student: float

    @property
    def total(self) -> float:
        return sum(self.teachers.values()) + self.student


def share(table: Mapping[str, float], name: str) -> float:
    """Look up a network's share of the rate of a plain product."""
    return table[max((key for key in table if name.startswith(key)), key=len)]


def estimate(
    teachers: Mapping[str, tuple[str, float]],
    student: tuple[str, float],
    rate: float,
    *,
    compiled: bool = True,
    student_compiled: bool | None = None,
    precision: str = "bf16",
    eight: Mapping[str, float] | None = None,
) -> Estimate:
    """Estimate a step.

    Args:
        teachers: For each label the architecture and the FLOPs of a forward pass of one image.
        student: The same, heads included.
        rate: FLOP/s of a plain bfloat16 product on the machine.
        compiled: The teachers are.
        student_compiled: The same of the student, which by default is as the teachers are.
        precision: Of the teachers.
        eight: Share of each teacher's work that is in 8 bits; all of it if not given.
    """

    def left(name: str, compiled: bool) -> float:
        return 1.0 if compiled else share(EAGER, name)

    seconds = {}
    for label, (name, flops) in teachers.items():
        part = 1.0 if eight is None else eight.get(label, 1.0)
        plain = flops / (share(TEACHER, name) * rate)
        seconds[label] = plain * (1 - part + part / EIGHT_BITS[precision]) / left(name, compiled)
    name, flops = student
    left_of_it = left(name, compiled if student_compiled is None else student_compiled)
    return Estimate(seconds, 3 * flops / (share(STUDENT, name) * rate) / left_of_it)
