import torch
from torch import nn

from zoo.features import Batch, Features
from zoo.students.build import build_student
from zoo.students.student import MESA
from zoo.train.distill.losses import angle, mse
from zoo.train.distill.step import distill_step

WIDTHS = {"a": (6, 5), "b": (None, 4)}


def student():
    torch.manual_seed(1)
    return build_student("test_vit", WIDTHS, size=32, hidden=8)


def teacher(summary, spatial):
    def features(batch):
        seed = torch.Generator().manual_seed(7)
        images = len(batch.images)
        made = torch.randn(images, spatial, generator=seed)[:, None, None].expand(-1, 3, 3, -1)
        return Features(summary and torch.randn(images, summary, generator=seed), made)

    return features


TEACHERS = {"a": teacher(6, 5), "b": teacher(None, 4)}
BALANCES = dict.fromkeys((*TEACHERS, MESA), nn.Identity())
BATCH = Batch(torch.rand(2, 3, 32, 32))


def test_a_head_whose_teacher_is_not_asked_gets_the_loss_zero_and_a_gradient():
    model = student()
    only_a = {"a": TEACHERS["a"]}
    losses = distill_step(BATCH, model, only_a, BALANCES, mse)
    assert list(losses) == ["a/summary", "a/spatial", "b/spatial"]
    assert losses["b/spatial"].item() == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad.abs().max() == 0 for p in model.heads["b"].parameters())


def test_each_images_losses_average_to_those_of_the_batch():
    model = student()
    asked = {"b": TEACHERS["b"]}
    for teachers in (TEACHERS, asked):
        whole = distill_step(BATCH, model, teachers, BALANCES, mse)
        each = distill_step(BATCH, model, teachers, BALANCES, mse, each_image=True)
        assert list(each) == list(whole)
        for name, loss in each.items():
            assert loss.shape == (2,)
            torch.testing.assert_close(loss.mean(), whole[name])


def test_each_teachers_summary_has_its_own_loss():
    model = student()
    plain = distill_step(BATCH, model, TEACHERS, BALANCES, mse)
    mine = distill_step(BATCH, model, TEACHERS, BALANCES, mse, summary_losses={"a": angle})
    seen = TEACHERS["a"](BATCH).summary
    torch.testing.assert_close(mine["a/summary"], angle(model(BATCH)["a"].summary, seen))
    assert mine["a/summary"] != plain["a/summary"]
    assert mine["a/spatial"] == plain["a/spatial"]


def test_a_student_is_at_no_distance_from_an_average_that_equals_it():
    model = student().eval()
    losses = distill_step(
        BATCH, lambda b: model(b, mesa=True), {MESA: model.own_map, **TEACHERS}, BALANCES, mse
    )
    assert losses[f"{MESA}/spatial"].item() == 0
    other = student().eval()
    with torch.no_grad():
        for p in other.backbone.blocks.parameters():
            p.mul_(1.2)
    teachers = {MESA: other.own_map}
    moved = distill_step(BATCH, lambda b: model(b, mesa=True), teachers, BALANCES, mse)
    assert moved[f"{MESA}/spatial"] > 1e-3
