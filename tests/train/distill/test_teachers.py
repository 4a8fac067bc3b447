"""Teachers brought into form, and teachers one batch ahead."""

import copy
import dataclasses
from typing import Any

import pytest
import torch

from zoo.features import Batch
from zoo.teachers.mosaic import Mosaic
from zoo.teachers.open import open_teacher
from zoo.teachers.teacher import Frozen
from zoo.train.distill.sizes import frozen
from zoo.train.distill.teachers import optimize_teachers


def batches(count: int) -> list[Batch]:
    return [Batch(torch.rand(2, 3, 64, 64)) for _ in range(count)]


def test_auto_leaves_teachers_as_they_are():
    teacher = open_teacher("timm:test_vit/random@64")
    (batch,) = batches(1)
    before = teacher(batch).spatial
    told = optimize_teachers({"t": teacher}, precision="auto", compiled=False, sample=lambda: batch)
    assert told == {} and not teacher.in_bf16
    torch.testing.assert_close(teacher(batch).spatial, before, rtol=0, atol=0)


def test_bf16_and_int8_teachers_say_nearly_the_same_and_their_fidelity_is_told():
    (batch,) = batches(1)
    exact = open_teacher("timm:test_vit/random@64")(batch).spatial
    for precision, lost in (("bf16", 1e-3), ("int8", 2e-3)):
        teacher = open_teacher("timm:test_vit/random@64")
        told = optimize_teachers(
            {"t": teacher}, precision=precision, compiled=False, sample=lambda: batch
        )
        error = (teacher(batch).spatial.float() - exact).square().mean() / exact.var()
        assert error < lost
        assert set(told) == ({"t"} if precision == "int8" else set())
    assert told["t"].fidelity > 1000


def test_layers_that_were_decided_before_are_taken_without_measuring_again():
    """By a run that is resumed; on other ranks by what rank 0 has measured."""
    (batch,) = batches(1)
    how: Any = dict(precision="int8", compiled=False)
    first, second = (open_teacher("timm:test_vit/random@64") for _ in range(2))
    told = optimize_teachers({"t": first}, sample=lambda: batch, **how)

    def never() -> Batch:
        raise AssertionError("measured again")

    again = optimize_teachers({"t": second}, sample=never, decided=told, **how)
    assert again == told
    torch.testing.assert_close(second(batch).spatial, first(batch).spatial, rtol=0, atol=0)
    other = dataclasses.replace(told["t"], layers=("nothing",))
    with pytest.raises(ValueError, match="no linear layer nothing"):
        optimize_teachers({"t": first}, sample=never, decided={"t": other}, **how)


def test_a_teacher_in_a_mosaic_is_measured_on_canvases():
    teacher = open_teacher("timm:test_vit/random@128", mosaic=2)
    (batch,) = batches(1)
    told = optimize_teachers({"t": teacher}, precision="int8", compiled=False, sample=lambda: batch)
    assert isinstance(teacher, Mosaic) and frozen(teacher) == [teacher.teacher]
    assert told["t"].share == 1
    assert len(frozen(open_teacher("rule:colour"))) == 1


@pytest.mark.slow
def test_a_compiled_teacher_says_the_same():
    teacher = open_teacher("timm:test_vit/random@64")
    assert isinstance(teacher, Frozen)
    plain = copy.deepcopy(teacher)
    for block in teacher.network.blocks:
        block.compile(dynamic=False, backend="eager")
    (batch,) = batches(1)
    torch.testing.assert_close(teacher(batch).spatial, plain(batch).spatial)
    again = copy.deepcopy(teacher)  # a copy is not compiled, and may be changed
    assert all(block._compiled_call_impl is None for block in again.network.blocks)
    torch._dynamo.reset()


def test_the_facts_of_8_bits_are_plain_data():
    teacher = open_teacher("timm:test_vit/random@64")
    (batch,) = batches(1)
    told = optimize_teachers({"t": teacher}, precision="fp8", compiled=False, sample=lambda: batch)[
        "t"
    ]
    assert dataclasses.asdict(told)["kind"] == "fp8"
    assert told.describe().startswith("fp8 in ")
