"""Teachers that are cut over ranks: which can be, and what each holds."""

from dataclasses import replace

import pytest
import torch

from zoo.features import Batch
from zoo.teachers.open import open_teacher
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.placement import away, check_blocks, gathered, idle, teacher_blocks


def test_the_blocks_of_a_vit_hold_nearly_all_of_it_and_others_are_refused():
    vit = open_teacher("timm:test_vit/random@64")
    check_blocks("timm:test_vit", vit)
    assert teacher_blocks(vit) == [
        sum(p.nbytes for p in block.parameters()) for block in vit.network.blocks
    ]
    for name, match in (
        ("rule:edges@64", "has no network"),
        ("timm:test_resnet/random@64", "% of its weights"),
        ("zoo:eradio_nano/random@64", "channels last"),
    ):
        with pytest.raises(ValueError, match=match):
            check_blocks(name, open_teacher(name))


def test_a_rank_of_a_group_puts_the_teachers_of_the_others_away():
    config = Distill(
        teachers=tuple(
            TeacherSpec.parse(f"timm:test_vit/random@64{at}") for at in ("", ",at=64", ",at=96")
        ),
        size=64, sizes=(64, 96), partition=(3, 1), slices=4,
    )  # fmt: skip
    assert idle(config, (0, 1)) == ["test_vit_2_2"]
    assert idle(config, (3,)) == ["test_vit_2"]
    assert idle(config, (0, 1, 2, 3)) == []
    assert idle(replace(config, partition=(), teachers=config.teachers[:1]), (0,)) == []
    teachers = {"a": open_teacher("timm:test_vit/random@64"), "b": open_teacher("rule:edges@64")}
    batch = Batch(torch.rand(1, 3, 64, 64))
    before = teachers["a"](batch).spatial
    with gathered(teachers, ["a", "b"], torch.device("cpu")):
        torch.testing.assert_close(teachers["a"](batch).spatial, before, rtol=0, atol=0)


def test_a_rank_holds_its_share_and_two_blocks_whole():
    assert away([10] * 40, 8) == 400 - 400 / 8 - 20
    assert away([10], 8) == 0
    assert away([], 8) == 0
