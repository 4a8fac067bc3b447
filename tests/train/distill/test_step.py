import torch
from torch import nn

from zoo.features import Batch, Features, match_grid
from zoo.students.build import build_student
from zoo.students.student import MESA
from zoo.train.distill.losses import angle, mse, summary_loss
from zoo.train.distill.step import distill_step, spatial_term, summary_term

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


BATCH = Batch(torch.rand(2, 3, 32, 32))
TARGETS = {"a": teacher(6, 5)(BATCH), "b": teacher(None, 4)(BATCH)}


def terms(summary=summary_loss, *, each_image=False):
    return (
        summary_term("a", summary, each_image=each_image),
        spatial_term("a", mse, nn.Identity(), each_image=each_image),
        spatial_term("b", mse, nn.Identity(), each_image=each_image),
    )


MESA_TERM = spatial_term(MESA, mse, nn.Identity())


def align(label):
    return match_grid


def test_a_head_whose_teacher_is_not_sampled_gets_the_loss_zero_and_a_gradient():
    model = student()
    losses = distill_step(BATCH, model, {"a": TARGETS["a"]}, terms(), align)
    assert list(losses) == ["a/summary", "a/spatial", "b/spatial"]
    assert losses["b/spatial"].total.sum().item() == 0 and losses["b/spatial"].count == 0
    sum(loss.total.sum() for loss in losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad.abs().max() == 0 for p in model.heads["b"].parameters())
    for each_image in (False, True):  # one form for all, so that the weighting can stack them
        losses = distill_step(
            BATCH, model, {"a": TARGETS["a"]}, terms(each_image=each_image), align
        )
        assert len({loss.total.shape for loss in losses.values()}) == 1


def test_each_images_losses_add_up_to_those_of_the_batch():
    model = student()
    for targets in (TARGETS, {"b": TARGETS["b"]}):
        whole = distill_step(BATCH, model, targets, terms(), align)
        each = distill_step(BATCH, model, targets, terms(each_image=True), align)
        assert list(each) == list(whole)
        for name, loss in each.items():
            assert loss.total.shape == (2,) and loss.count == whole[name].count
            torch.testing.assert_close(loss.total.sum(), whole[name].total.sum())


def test_a_loss_is_a_sum_over_images_so_that_slices_add_up():
    model = student().eval()
    parts = [Batch(BATCH.images[i : i + 1]) for i in range(2)]
    targets = [
        {n: Features(*(x if x is None else x[i : i + 1] for x in f)) for n, f in TARGETS.items()}
        for i in range(2)
    ]
    whole = distill_step(BATCH, model, TARGETS, terms(), align)
    some = [distill_step(b, model, t, terms(), align) for b, t in zip(parts, targets, strict=True)]
    for name, loss in whole.items():
        torch.testing.assert_close(loss.total, some[0][name].total + some[1][name].total)
        assert loss.count == 2 and some[0][name].count == 1


def test_each_teachers_summary_has_its_own_loss():
    model = student()
    plain = distill_step(BATCH, model, TARGETS, terms(), align)
    mine = distill_step(BATCH, model, TARGETS, terms(angle), align)
    expected = 2 * angle(model(BATCH)["a"].summary, TARGETS["a"].summary)
    torch.testing.assert_close(mine["a/summary"].total, expected)
    assert mine["a/summary"] != plain["a/summary"]
    assert mine["a/spatial"] == plain["a/spatial"]


def test_a_student_is_at_no_distance_from_an_average_that_equals_it():
    model = student().eval()
    both, seeing = (*terms(), MESA_TERM), lambda b: model(b, mesa=True)
    losses = distill_step(BATCH, seeing, {MESA: model.own_map(BATCH), **TARGETS}, both, align)
    assert losses[f"{MESA}/spatial"].total.item() == 0
    other = student().eval()
    with torch.no_grad():
        for p in other.backbone.blocks.parameters():
            p.mul_(1.2)
    moved = distill_step(BATCH, seeing, {MESA: other.own_map(BATCH)}, (MESA_TERM,), align)
    assert moved[f"{MESA}/spatial"].total > 1e-3
