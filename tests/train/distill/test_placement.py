"""Teachers that are cut over ranks: which can be, and what each holds."""

import pytest

from zoo.teachers.open import open_teacher
from zoo.train.distill.placement import away, check_blocks, teacher_blocks


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


def test_a_rank_holds_its_share_and_two_blocks_whole():
    assert away([10] * 40, 8) == 400 - 400 / 8 - 20
    assert away([10], 8) == 0
    assert away([], 8) == 0
