"""Fidelity: 1 for the mean, infinite for a copy, and the same however the images are batched."""

import math

import pytest
import torch
import torch.nn.functional as F

from zoo.eval.fidelity import fidelity
from zoo.features import Batch, Features, at_grid


def images(count, size=8):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def batches(x, size):
    return [Batch(part) for part in x.split(size)]


def teacher(batch, scale=1.0, offset=0.0):
    """A 4 x 4 map of five channels, and a summary of six."""
    x = F.avg_pool2d(batch.images, 2)
    x = torch.cat([x, x[:, :2] * x[:, 1:]], dim=1).permute(0, 2, 3, 1)
    mixed = torch.cat([x, x[..., :1].square()], dim=-1).mean(dim=(1, 2))
    return Features(mixed * scale, x * scale + offset)


def measured(change, x, size=4, **how):
    def student(batch):
        target = teacher(batch, **how)
        return {"t": Features(target.summary, change(target.spatial))}

    return dict(fidelity(student, {"t": lambda b: teacher(b, **how)}, batches(x, size)))


def test_predicting_the_mean_of_these_images_is_fidelity_one_at_any_scale():
    x = images(10)
    for how in ({}, {"scale": 1e-3, "offset": 5.0}, {"scale": 30.0, "offset": -60.0}):
        mean = teacher(Batch(x), **how).spatial.double().mean(dim=(0, 1, 2)).float()
        got = measured(lambda m, mean=mean: mean.expand_as(m), x, **how)
        assert got["fidelity/t"] == pytest.approx(1, rel=2e-3), how


def test_a_perfect_student_has_infinite_fidelity_and_no_error():
    got = measured(lambda map_: map_.clone(), images(6))
    assert got["fidelity/t"] == got["fidelity/min"] == got["fidelity/geomean"] == math.inf
    assert got["mse/t"] == 0
    assert got["cosine/t/spatial"] == pytest.approx(1)
    assert got["cosine/t/summary"] == pytest.approx(1)


def test_the_numbers_equal_the_formula_written_down_plainly():
    x = images(7)
    theirs = teacher(Batch(x)).spatial.double()
    ours = theirs * 1.2 + 0.05
    got = measured(lambda map_: map_ * 1.2 + 0.05, x, size=3)
    mse = (ours - theirs).square().mean()
    sigma = torch.cov(theirs.flatten(0, 2).T, correction=0)
    assert got["mse/t"] == pytest.approx(mse.item(), rel=1e-6)
    assert got["fidelity/t"] == pytest.approx((sigma.trace() / (5 * mse)).item(), rel=1e-6)
    cosine = F.cosine_similarity(ours, theirs, dim=-1).mean()
    assert got["cosine/t/spatial"] == pytest.approx(cosine.item(), rel=1e-6)


def test_the_numbers_do_not_depend_on_the_batches():
    x = images(12)
    one, many = (measured(lambda m: m * 0.9, x, size, offset=40.0) for size in (12, 5))
    assert one == pytest.approx(many, rel=1e-9)


def test_fidelity_falls_fourfold_when_the_error_doubles_and_ignores_the_unit():
    x = images(6)
    noise = torch.randn(6, 4, 4, 5)
    by_error = [measured(lambda m, s=s: m + s * noise, x, 6)["fidelity/t"] for s in (0.1, 0.2)]
    assert by_error[0] == pytest.approx(4 * by_error[1], rel=1e-4)
    unit = measured(lambda m: m + 100 * 0.1 * noise, x, 6, scale=100.0)["fidelity/t"]
    assert unit == pytest.approx(by_error[0], rel=1e-4)


def test_a_finer_teacher_is_compared_at_the_students_grid():
    x = images(6)

    def student(batch):
        fine = teacher(batch).spatial.permute(0, 3, 1, 2)
        coarse = F.interpolate(fine, (2, 3), mode="bilinear", antialias=True)
        return {"t": Features(None, coarse.permute(0, 2, 3, 1))}

    got = dict(fidelity(student, {"t": teacher}, batches(x, 3)))
    assert got["fidelity/t"] > 1e9  # not infinite: the two ways to shrink round differently
    assert "cosine/t/summary" not in got


def fine_teacher(batch):
    """A 14 x 14 map of six channels, correlated between neighbours."""
    x = F.avg_pool2d(F.interpolate(batch.images, (28, 28), mode="bicubic"), 2)
    return Features(None, torch.cat([x, x.square()], dim=1).permute(0, 2, 3, 1))


def of_stride(stride, function):
    """A student whose map samples a function of the image at the centres of its cells."""

    def student(batch):
        places = (torch.arange(224 // stride) + 0.5) * stride / 224
        return {"t": Features(None, function(batch, places))}

    return student


def one_vector_an_image(batch, places):
    mean = 0.9 * fine_teacher(batch).spatial.mean((1, 2), keepdim=True)
    return mean.expand(-1, len(places), len(places), -1)


def test_students_of_two_strides_with_one_function_are_equally_faithful_on_the_teachers_grid():
    x = batches(images(40) * torch.linspace(0.1, 1, 40)[:, None, None, None], 8)
    found = {
        stride: dict(fidelity(of_stride(stride, one_vector_an_image), {"t": fine_teacher}, x))
        for stride in (16, 32)
    }
    for measure in ("t", "min", "geomean"):
        own = [found[stride][f"fidelity_own_grid/{measure}"] for stride in (16, 32)]
        assert own[0] == pytest.approx(own[1], rel=1e-4)
    # on the smaller of both grids a coarse student has less to answer for
    assert found[32]["fidelity/t"] > 1.3 * found[16]["fidelity/t"]
    assert found[16]["fidelity/t"] == pytest.approx(found[16]["fidelity_own_grid/t"])


def test_on_its_own_grid_a_teacher_asks_for_what_a_coarse_map_has_lost():
    def blurred(batch):
        return {"t": Features(None, at_grid(fine_teacher(batch).spatial, (7, 7)))}

    x = images(20)
    got = dict(fidelity(blurred, {"t": fine_teacher}, batches(x, 20)))
    truth = fine_teacher(Batch(x)).spatial
    error = (at_grid(at_grid(truth, (7, 7)), (14, 14)) - truth).square().mean()
    spread = (truth - truth.mean((0, 1, 2))).square().mean()
    assert got["fidelity/t"] > 1e9
    assert got["fidelity_own_grid/t"] == pytest.approx((spread / error).item(), rel=1e-4)


def test_the_minimum_and_the_geometric_mean_run_over_the_teachers_with_maps():
    x = images(8)
    noise = torch.randn(8, 4, 4, 5)

    def student(batch):
        target = teacher(batch)
        near, far = target.spatial + 0.05 * noise, target.spatial + 0.2 * noise
        return {
            "near": Features(target.summary, near),
            "far": Features(None, far),
            "mapless": Features(-target.summary, None),
        }

    def mapless(batch):
        return Features(teacher(batch).summary, None)

    teachers = {"near": teacher, "far": teacher, "mapless": mapless}
    got = dict(fidelity(student, teachers, batches(x, 8)))
    assert got["fidelity/min"] == got["fidelity/far"] < got["fidelity/near"]
    both = got["fidelity/far"] * got["fidelity/near"]
    assert got["fidelity/geomean"] == pytest.approx(math.sqrt(both))
    assert got["cosine/mapless/summary"] == pytest.approx(-1)
    assert "fidelity/mapless" not in got


def test_a_student_that_gives_nan_is_not_reported_as_good():
    got = measured(lambda m: m * math.nan, images(4))
    assert all(math.isnan(got[f"fidelity/{what}"]) for what in ("t", "min", "geomean"))


def test_the_callers_gradients_stay_on_between_the_numbers():
    running = fidelity(lambda b: {"t": teacher(b)}, {"t": teacher}, batches(images(4), 4))
    next(running)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_missing_heads_wrong_widths_reserved_names_and_no_images_are_refused():
    x = batches(images(4), 4)
    with pytest.raises(ValueError, match="no head for 't'; it has 'u'"):
        list(fidelity(lambda b: {"u": teacher(b)}, {"t": teacher}, x))
    with pytest.raises(ValueError, match="spatial head for 't' has 4 channels"):
        measured(lambda m: m[..., :4], images(4))
    with pytest.raises(ValueError, match="cannot be called 'min'"):
        list(fidelity(lambda b: {"min": teacher(b)}, {"min": teacher}, x))
    with pytest.raises(ValueError, match="there was no batch"):
        list(fidelity(lambda b: {"t": teacher(b)}, {"t": teacher}, []))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_on_a_gpu_no_batch_waits_for_the_device_and_the_numbers_are_those_of_the_cpu():
    def student(batch):
        target = teacher(batch)
        return {"t": Features(target.summary * 0.9, target.spatial[:, ::2] * 0.9)}

    x = images(12)
    given = [batch.to("cuda", non_blocking=False) for batch in batches(x, 5)]

    def watched():
        torch.cuda.set_sync_debug_mode("error")
        yield from given
        torch.cuda.set_sync_debug_mode("default")

    try:
        there = dict(fidelity(student, {"t": teacher}, watched()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert there == pytest.approx(dict(fidelity(student, {"t": teacher}, batches(x, 5))), rel=1e-4)
