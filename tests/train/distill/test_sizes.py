import pytest
import torch

from zoo.features import Batch
from zoo.teachers.open import open_teacher
from zoo.teachers.teacher import Teacher, fingerprint
from zoo.train.distill.sizes import at_size, match_student_size, sizes_of

GRIDS = {96: (6, 6), 160: (10, 10), 128: (8, 8)}
NAME = "timm:test_vit/random@160"


@pytest.fixture(scope="module")
def following():
    return match_student_size(NAME, open_teacher, GRIDS, 160)


def test_the_teacher_has_the_students_grid_at_each_size(following):
    batch = Batch(torch.rand(2, 3, 160, 160))
    for size, grid in GRIDS.items():
        teacher = at_size(following, size)
        assert teacher(batch).spatial.shape[1:3] == grid == teacher.grid
    assert isinstance(following, Teacher)
    assert sizes_of(following) == [(96, 96), (160, 160), (128, 128)]
    assert following.size == (160, 160) and following.grid == (10, 10)
    assert torch.equal(following(batch).spatial, at_size(following, 160)(batch).spatial)


def test_the_features_at_a_size_are_those_of_the_teacher_opened_alone(following):
    batch = Batch(torch.rand(2, 3, 160, 160))
    alone = open_teacher("timm:test_vit/random@96")
    assert torch.equal(at_size(following, 96)(batch).spatial, alone(batch).spatial)


def held(network) -> int:
    """Bytes in memory: of each storage once, whoever holds it."""
    tensors = [*network.parameters(), *network.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_only_the_tables_of_positions_are_in_memory_more_than_once_also_in_bf16():
    following = match_student_size(NAME, open_teacher, GRIDS, 160)
    one, normalisation = open_teacher(NAME), 2 * 3 * 4  # mean and deviation of each size, float32
    tables = following.spatial_dim * (37 + 65)  # 6·6 and 8·8 cells, each with a class token
    assert held(following) == held(one) + 4 * tables + 2 * normalisation
    assert fingerprint(following) != fingerprint(one)
    one.to_bf16()
    for size in GRIDS:
        at_size(following, size).to_bf16()
    assert held(following) == held(one) + 2 * tables + 2 * normalisation


def test_a_teacher_without_a_map_or_of_one_size_cannot_follow():
    with pytest.raises(ValueError, match="no map whose grid"):
        match_student_size("x", lambda text: Mapless(), GRIDS, 160)
    with pytest.raises(ValueError, match="takes 64 px; leave out @80"):
        match_student_size(
            "pretext:gradients",
            lambda text: open_teacher(text, device="meta"),
            {160: (20, 20)},
            160,
        )


class Mapless:
    grid = None


def test_a_teacher_that_does_not_follow_is_itself_at_every_size():
    teacher = open_teacher("rule:edges")
    assert at_size(teacher, 5) is teacher
