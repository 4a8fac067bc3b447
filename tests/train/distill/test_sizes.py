"""A teacher that follows the student's size: many sizes, one network."""

from functools import partial

import pytest
import timm
import torch

from zoo.features import Batch
from zoo.teachers.mosaic import Mosaic
from zoo.teachers.open import open_teacher
from zoo.teachers.quantize import QuantizedLinear
from zoo.teachers.teacher import Teacher
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.plan_cost import model_costs
from zoo.train.distill.sizes import at_size, every_size, match_student_size
from zoo.train.distill.teachers import frozen, optimize_teachers

GRIDS = {96: (6, 6), 160: (10, 10), 128: (8, 8)}
NAME = "timm:test_vit/random@160"
TEN = {16 * cells: (cells, cells) for cells in range(2, 12)}


def pointers(network) -> set[int]:
    return {p.data_ptr() for p in network.parameters()}


@pytest.fixture(scope="module")
def following():
    return match_student_size(NAME, open_teacher, GRIDS, 160)


def test_the_teacher_has_the_students_grid_at_each_size(following):
    batch = Batch(torch.rand(2, 3, 160, 160))
    for size, grid in GRIDS.items():
        teacher = at_size(following, size)
        assert teacher(batch).spatial.shape[1:3] == grid == teacher.grid
    assert isinstance(following, Teacher)
    assert [t.size for t in every_size(following)] == [(160, 160), (96, 96), (128, 128)]
    assert following.size == (160, 160) and following.grid == (10, 10)
    assert torch.equal(following(batch).spatial, at_size(following, 160)(batch).spatial)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # timm's resizing of Swin's tables
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize(
    ("model", "patch"),
    [
        ("timm:test_vit", 16),
        ("timm:test_efficientnet", 32),
        slow("timm:swin_tiny_patch4_window7_224", 32),
        ("timm:vit_small_patch16_dinov3", 16),
        slow("zoo:mambavision_t", 32),
        slow("zoo:faster_vit_0_224", 32),
        ("zoo:eradio_nano", 16),
        ("rule:edges", 16),
    ],
)
def test_the_features_at_a_size_are_those_of_the_teacher_opened_alone(model, patch):
    weights = "" if model.startswith("rule") else "/random"
    side = 4 * patch if patch < 32 else 5 * patch
    grids = {64: (side // patch,) * 2, 96: (7 * 32 // patch,) * 2}
    batch = Batch(torch.rand(1, 3, side, side))
    found = at_size(match_student_size(model + weights, open_teacher, grids, 96), 64)
    alone = open_teacher(f"{model}{weights}@{side}")
    torch.testing.assert_close(found(batch).spatial, alone(batch).spatial, rtol=1e-5, atol=1e-5)


def test_ten_sizes_are_one_network_and_hold_its_parameters_once(monkeypatch):
    built, create = [], timm.create_model
    monkeypatch.setattr(
        "timm.create_model", lambda *a, **k: built.append(create(*a, **k)) or built[-1]
    )
    following = match_student_size(
        "timm:test_efficientnet/random",
        open_teacher,
        {32 * cells: (cells, cells) for cells in range(2, 12)},
        64,
    )
    assert len(built) == 1 and len(frozen(following)) == 10
    assert all(pointers(one) == pointers(built[0]) for one in every_size(following))
    one = sum(p.numel() for p in built[0].parameters())
    assert sum(p.numel() for p in following.parameters()) == one


def test_tables_of_positions_are_all_that_a_size_adds(following):
    one = sum(p.numel() for p in open_teacher(NAME).parameters())
    width = following.spatial_dim
    assert sum(p.numel() for p in following.parameters()) == one + width * (37 + 65)
    shared = set.intersection(*(pointers(t) for t in every_size(following)))
    assert len(shared) == len(list(open_teacher(NAME).parameters())) - 1


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_every_size_has_the_precision_that_is_asked_and_still_one_set_of_weights(precision):
    following = match_student_size(NAME, open_teacher, GRIDS, 160)
    batch = Batch(torch.rand(2, 3, 160, 160))
    exact = {size: at_size(following, size)(batch).spatial for size in GRIDS}
    told = optimize_teachers(
        {"t": following}, precision=precision, compiled=False, sample=lambda: batch
    )
    assert set(told) == ({"t"} if precision == "int8" else set())
    for size in GRIDS:
        teacher = at_size(following, size)
        loss = (teacher(batch).spatial.float() - exact[size]).square().mean() / exact[size].var()
        assert 0 < loss < 2e-3
        weights = {p.dtype for n, p in teacher.named_parameters() if "norm" not in n}
        assert weights == {torch.bfloat16}
        layers = [m for m in teacher.modules() if isinstance(m, QuantizedLinear)]
        assert len(layers) == (len(told["t"].layers) if told else 0)
        hooks = [len(m._forward_pre_hooks) for m in teacher.modules()]
        assert max(hooks) <= 1
    first, *others = every_size(following)
    for other in others:
        tensors = dict(other.state_dict())
        own = [k for k, v in first.state_dict().items() if v.data_ptr() != tensors[k].data_ptr()]
        assert own == ["network.pos_embed"]


def test_every_size_is_compiled():
    following = match_student_size(NAME, open_teacher, GRIDS, 160)
    optimize_teachers({"t": following}, precision="auto", compiled=True, sample=lambda: None)
    blocks = [block for t in every_size(following) for block in t.network.blocks]
    assert blocks and all(block._compiled_call_impl is not None for block in blocks)


@pytest.mark.gpu
def test_on_a_gpu_ten_sizes_take_the_memory_of_one_network_and_run_compiled():
    name, opened = "timm:vit_small_patch16_dinov3/random", partial(open_teacher, device="cuda")
    grids = {16 * cells: (cells, cells) for cells in range(6, 16)}
    before = torch.cuda.memory_allocated()
    following = match_student_size(name, opened, grids, 96)
    batch = Batch(torch.rand(2, 3, 240, 240, device="cuda"))
    exact = {size: at_size(following, size)(batch).spatial for size in grids}
    kept = sum(x.numel() * x.element_size() for x in exact.values())
    optimize_teachers({"t": following}, precision="bf16", compiled=True, sample=lambda: batch)
    torch.cuda.synchronize()
    weights = sum(p.numel() * p.element_size() for p in following.parameters())
    assert torch.cuda.memory_allocated() - before < 2 * (
        weights + kept
    )  # ten networks would be ten times
    for size in grids:
        ours = at_size(following, size)(batch).spatial.float()
        assert (ours - exact[size]).square().mean() / exact[size].var() < 2e-3


def test_a_mosaic_follows_with_its_tiles():
    opened = lambda text: open_teacher(text, mosaic=2)  # noqa: E731
    following = match_student_size("timm:test_vit/random", opened, {64: (4, 4), 96: (6, 6)}, 64)
    assert isinstance(at_size(following, 96), Mosaic)
    batch = Batch(torch.rand(4, 3, 96, 96))
    expected = open_teacher("timm:test_vit/random@192", mosaic=2)(batch).spatial
    torch.testing.assert_close(at_size(following, 96)(batch).spatial, expected)


def test_the_plan_counts_a_following_teacher_once_at_its_precision():
    following = TeacherSpec(name="timm:test_efficientnet/random", follow=True)
    run = Distill(
        teachers=(following,), student="test_vit", size=64, sizes=(64, 96, 128), calibration=9
    )
    one = model_costs(run)[0][0]
    alone = open_teacher("timm:test_efficientnet/random")
    tensors = (*alone.parameters(), *alone.buffers())
    assert one.params == sum(p.numel() for p in alone.parameters())
    assert one.bytes == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.long  # half a minute: ten networks of 7 billion parameters on the meta device
def test_ten_sizes_of_dinov3_7b_are_planned_as_13_gb():
    teacher = TeacherSpec(name="timm:vit_7b_patch16_dinov3/random", follow=True)
    run = Distill(
        teachers=(teacher,), student="test_vit", size=256, sizes=tuple(range(144, 304, 16)),
        teacher_precision="bf16",
    )  # fmt: skip
    (cost,), _, _ = model_costs(run)
    assert cost.params == pytest.approx(6.716e9, rel=1e-3)
    assert cost.bytes == pytest.approx(13.4e9, rel=0.01)


def test_a_teacher_without_a_map_or_of_one_size_cannot_follow():
    with pytest.raises(ValueError, match="no map whose grid"):
        match_student_size("x", lambda text: Mapless(), GRIDS, 160)
    with pytest.raises(ValueError, match=r"takes 64 px and no other size\. Leave out follow"):
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
