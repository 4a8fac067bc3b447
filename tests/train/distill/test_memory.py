"""What a step is estimated to hold, against what it holds and against the memory that there is."""

import re
from dataclasses import replace

import pytest
import torch

from zoo.cli import main as zoo
from zoo.features import Batch
from zoo.students.build import build_student
from zoo.teachers.open import open_teacher
from zoo.train.device import autocast
from zoo.train.distill import memory, setup
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.memory import check_step, may_not_fit, peak_bytes, saved_bytes
from zoo.train.distill.setup import prepare

CPU = torch.device("cpu")
WIDTHS = {"one": (64, 96)}


def held(student, images, side, precision="float32"):
    """The bytes of all tensors that autograd keeps for a backward pass, but for the weights."""
    own = {t.data_ptr() for t in (*student.parameters(), *student.buffers())}
    found, alive = {}, []

    def note(x):
        alive.append(x)
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
    with hooks, autocast(precision, CPU):
        student(Batch(torch.rand(images, 3, side, side)), size=(side, side))
    return sum(n for at, n in found.items() if at not in own)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_the_estimate_is_what_autograd_keeps_for_any_number_of_images(name):
    size, images = 64, 5
    meta = build_student(name, WIDTHS, size=size, device="meta")
    estimate = saved_bytes(meta, size, Distill(), CPU).each
    real = held(build_student(name, WIDTHS, size=size).train(), images, size) / images
    assert 0.8 * real < estimate < 1.25 * real


def test_weights_in_a_lower_precision_are_held_once_not_for_each_image():
    """At 32 px the weights of a ResNet-18 are more than what eight images leave."""
    meta = build_student("resnet18", WIDTHS, size=32, device="meta")
    each, once = saved_bytes(meta, 32, Distill(precision="bf16"), CPU)
    real = held(build_student("resnet18", WIDTHS, size=32).train(), 8, 32, "bf16")
    assert once > 8 * each
    assert 8 * each + once == pytest.approx(real, rel=0.02)


def test_plain_attention_would_hold_a_matrix_that_fused_attention_does_not():
    """Four times the tokens: about four times the bytes, not sixteen."""
    meta = build_student("vit_tiny_patch16_224", WIDTHS, size=64, dynamic=True, device="meta")
    small, large = (saved_bytes(meta, side, Distill(), CPU).each for side in (128, 256))
    assert 3.5 < large / small < 5


def test_a_teachers_peak_is_within_a_factor_of_two_of_what_is_alive_at_once():
    teacher = open_teacher("timm:vit_tiny_patch16_224/random@64", device="meta")
    width, tokens = 192, 17
    # the hidden layer of a block before and after its GELU, beside the residual
    alive = 4 * tokens * (2 * 4 * width + width)
    assert alive / 2 < peak_bytes(teacher, Distill(), CPU) < 2 * alive


def test_a_batch_that_cannot_fit_is_refused_with_its_figures_before_any_data_is_opened(tmp_path):
    teacher = TeacherSpec(name="timm:resnet18/random@32")
    shared = dict(student="resnet18", teachers=(teacher,), device="cpu", out=tmp_path / "o")
    config = Distill(data=str(tmp_path / "nowhere"), batch=2**18, size=64, **shared)
    said = r"slice of 262,144 images at 64 px takes about [\d,]+\.\d GB: .* MB between .* has .* GB"
    with pytest.raises(ValueError, match=said):
        prepare(config)
    assert not (tmp_path / "o").exists()


def test_sizes_and_slices_decide_what_is_estimated(monkeypatch):
    meta = build_student("resnet18", {}, size=64, device="meta")
    needed = saved_bytes(meta, 64, Distill(), CPU).each
    monkeypatch.setattr(memory, "memory_of", lambda _: 16 * needed + 4 * memory.weight_bytes(meta))
    fits = Distill(batch=15, size=64, precision="float32")
    check_step(fits, CPU, {}, meta)
    with pytest.raises(ValueError, match="slice of 17 images at 64 px"):
        check_step(Distill(batch=17, size=64), CPU, {}, meta)
    check_step(Distill(batch=28, size=64, slices=2), CPU, {}, meta)
    with pytest.raises(ValueError, match="slice of 10 images at 96 px"):
        check_step(Distill(batch=15, sizes=(64, 96), batches=(15, 10)), CPU, {}, meta)


def test_small_runs_are_not_estimated():
    assert not may_not_fit(Distill(batch=16, size=64), CPU)


def test_a_step_that_was_found_to_fit_is_not_counted_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(setup, "may_not_fit", lambda *_: True)
    counted = []
    monkeypatch.setattr(setup, "check_step", lambda *_: counted.append(1))
    run = Distill(teachers=(TeacherSpec(name="timm:test_vit/random@32"),), student="eradio_nano")
    for config, times in (
        (run, 1),
        (replace(run, steps=7, out=tmp_path), 1),
        (replace(run, batch=run.batch + 1), 2),
        (replace(run, student="eradio_xxxtiny"), 3),
        (run, 3),
    ):
        setup.check_memory_of_step(config, CPU)
        assert len(counted) == times


def test_a_step_that_does_not_fit_is_refused_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(memory, "memory_of", lambda _: 1e6)
    run = Distill(teachers=(TeacherSpec(name="timm:test_vit/random@32"),), student="eradio_nano")
    for _ in range(2):
        with pytest.raises(ValueError, match="takes about"):
            setup.check_memory_of_step(run, CPU)


def test_a_dry_run_says_what_a_step_beside_a_teacher_of_a_billion_parameters_holds(
    tmp_path, capsys
):
    words = ["distill", "custom", "--data", "embedded/photos", "--student", "test_vit"]
    words += ["--teachers", "timm:vit_giant_patch14_reg4_dinov2/random@224", "--size", "64"]
    zoo([*words, "--batch", "64", "--device", "cpu", "--out", str(tmp_path / "run"), "--dry-run"])
    told = re.search(
        r"a step holds about ([\d.]+) GiB: weights ([\d.]+) GiB", capsys.readouterr().out
    )
    assert told
    published = 1_134.77e6 * 4 / 2**30  # timm's count of its parameters
    assert float(told[1]) > float(told[2]) == pytest.approx(published, abs=0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("student, size", [("resnet50", 128), ("mambavision_t", 160)])
def test_on_a_gpu_a_plain_run_holds_what_the_dry_run_says(student, size, tmp_path, capsys):
    words = ["distill", "custom", "--data", "embedded/photos", "--student", student]
    words += ["--teachers", "timm:efficientnet_lite0/random@224", "--size", str(size)]
    words += ["--batch", "64", "--steps", "6", "--calibration", "4", "--eval-images", "8"]
    words += ["--speed", "plain", "--device", "cuda", "--out", str(tmp_path / "run")]
    zoo([*words, "--dry-run"])
    told = re.search(r"a step holds about ([\d.,]+) (MiB|GiB)", capsys.readouterr().out)
    assert told
    scale = {"MiB": 2**20, "GiB": 2**30}[told[2]]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    zoo(words)
    held = torch.cuda.max_memory_allocated() - before
    assert float(told[1].replace(",", "")) * scale == pytest.approx(held, rel=0.15)
