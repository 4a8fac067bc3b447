"""`zoo plan`: a run on many GPUs, counted by hand for a tiny student."""

import json
import math
import shlex
from dataclasses import replace

import pytest
import torch

from zoo.cli import main
from zoo.commands.cluster.models import Models
from zoo.commands.cluster.plan import column, forms, notes
from zoo.commands.cluster.step_time import student_seconds
from zoo.teachers.open import open_teacher
from zoo.train.cluster import GPUS, with_links
from zoo.train.config import Optim
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.launching import Operators
from zoo.train.distill.placement import teacher_blocks

RUN = Distill(
    teachers=(TeacherSpec(name="timm:test_vit/random@64"),),
    student="test_vit",
    size=64,
    batch=512,
    slices=16,
    steps=1000,
    optim=Optim(ema=0.0),
)
H200 = GPUS["h200"]


@pytest.fixture(scope="module")
def models() -> Models:
    """Models whose kernels are launched in no time: computing is all there is."""
    return replace(Models.of(RUN), operators=Operators({}, 0, 0))


@pytest.mark.parametrize(("ranks", "share"), [("auto", 1), ("fsdp", 16), ("hsdp", 8)])
def test_a_rank_holds_its_share_of_weights_gradients_and_moments(ranks, share, models):
    found = column(replace(RUN, ranks=ranks), models, 16, H200)
    # rows are cut, and the last share is padded
    whole = 4 * sum(
        math.ceil(p.shape[0] / share) * share * p[0].numel() for p in models.module.parameters()
    )
    assert found.method == ("ddp" if ranks == "auto" else ranks)
    gathered = found.held["gathered"]
    assert (gathered > 0) == (share > 1)
    assert sum(found.held.values()) - gathered == pytest.approx(4 * whole / share)
    averaged = column(replace(RUN, ranks=ranks, optim=Optim(ema=0.9)), models, 16, H200)
    assert averaged.held["average"] == pytest.approx(whole / share)


def test_a_step_and_its_gpu_hours_by_hand(models):
    found = column(RUN, models, 16, H200)
    (teacher,), student = models.teachers.values(), models.student
    rate = 790e12 * 0.88  # not compiled
    image = teacher.flops / (0.58 * rate) + 3 * student.flops / (0.30 * rate)
    assert found.compute.total == pytest.approx(image)
    assert found.step == pytest.approx(32 * image + found.waits)
    hours = 16 * 1000 * found.step / 3600
    assert found.gpu_hours == pytest.approx(hours * (1 + found.failures.lost))


def test_gpus_compile_by_default_where_the_run_is_long_enough(models):
    """The rule of `speed`: from 200 s of plain steps, on several without CUDA graphs."""
    one = replace(RUN, batch=32, slices=1)
    (teacher,), student = models.teachers.values(), models.student
    image = teacher.flops / (0.58 * 790e12) + 3 * student.flops / (0.30 * 790e12)
    long = math.ceil(200 / (32 * image / 0.88)) + 12  # behind the steps that are timed
    for steps, compiled in ((long, True), (long - 1, False)):
        found = column(replace(one, steps=steps), models, 1, H200)
        assert (found.form.teachers, found.form.blocks) == (compiled, compiled)
        assert found.compute.total == pytest.approx(image if compiled else image / 0.88)
        assert found.activations == pytest.approx(32 * models.saved * (0.5 if compiled else 1))
    asked = replace(one, speed="compiled", steps=1)
    assert column(asked, models, 1, H200).form.blocks
    assert not column(replace(asked, ranks="fsdp"), models, 1, H200).form.blocks
    several = replace(RUN, steps=long)  # 32 images each, as on one
    for steps, compiled in ((long, True), (long - 1, False)):
        form = column(replace(several, steps=steps), models, 16, H200).form
        assert (form.teachers, form.blocks, form.graphs) == (compiled, compiled, False)
    cut = column(replace(several, ranks="fsdp"), models, 16, H200)
    seconds, part = cut.compute, 3 * student.flops / (0.30 * 790e12)
    assert list(seconds.teachers.values()) == [pytest.approx(image - part)]
    assert seconds.student == pytest.approx(part / 0.88)  # whose weights are cut
    lines = forms([found, column(several, models, 16, H200)])
    assert "on 1 GPU: plain (not all: the" in lines[0]
    assert "on 16 GPUs: channels last, student compiled, teachers compiled" in lines[1]


def test_small_images_hide_less_of_the_communication(models):
    sizes = replace(RUN, sizes=(32, 64), batches=(512, 128))
    small, large = student_seconds(sizes, 1e-3, 16)
    assert large == small  # a quarter of the images, with four times the pixels
    assert small + large == pytest.approx((512 + 128) / 16 * 1e-3)


def test_a_partition_waits_for_its_slower_group(models):
    found = column(replace(RUN, sizes=(32, 64), partition=(3, 1)), models, 16, H200)
    (teacher,), student = models.teachers.values(), models.student
    rate = 790e12 * 0.88
    large = teacher.flops / (0.58 * rate) + 3 * student.flops / (0.30 * rate)
    assert found.images * found.compute.total < found.time.seconds == pytest.approx(32 * large)


def test_a_cut_teacher_is_gathered_once_for_each_slice_and_held_in_shares(models):
    (spec,) = RUN.teachers
    cut = replace(RUN, teachers=(replace(spec, place="shard", rate=0.5),), slices=64)
    found = column(cut, Models.of(cut), 16, H200)
    (whole,) = models.teachers.values()
    blocks = teacher_blocks(open_teacher(spec.name, device=torch.device("meta")).to_bf16())
    assert found.gathered.within == pytest.approx(0.5 * 64 / 16 * sum(blocks) * 7 / 8)
    assert found.teachers == pytest.approx(whole.bytes - sum(blocks) * 7 / 8 + 2 * max(blocks))


def test_more_slices_hold_less_and_send_more(models):
    few = column(replace(RUN, ranks="fsdp"), models, 8, H200)
    many = column(replace(RUN, ranks="fsdp", slices=64), models, 8, H200)
    assert many.activations == few.activations / 4
    assert many.sent.within == pytest.approx(4 * few.sent.within)


def test_a_recipe_is_planned_without_a_gpu_and_without_its_weights(capsys):
    main(shlex.split(
        "plan custom --gpus 8 64 --gpu a100 --teachers timm:test_vit.r160_in1k@64 "
        "--student test_vit --size 64 --steps 800"
    ))  # fmt: skip
    out = " ".join(capsys.readouterr().out.split())
    assert "on A100" in out and "256 (256)" in out and "2,048 (2,048)" in out
    assert "Without --batch it grows with the GPUs (32 images each)" in out
    main(shlex.split(
        "plan custom --gpus 64 --teachers timm:test_vit/random@64 --student test_vit --size 64 "
        "--batch 128"
    ))  # fmt: skip
    out = " ".join(capsys.readouterr().out.split())
    assert "128 (128)" in out and "Without --batch" not in out


def test_what_does_not_fit_is_said(models):
    for one, said in ((models, False), (replace(models, saved=1e12), True)):
        lines = notes(RUN, [column(RUN, one, 16, H200)], "h200", H200)
        assert any("does not fit" in line for line in lines) == said


def test_measured_links_take_the_place_of_assumed_ones(models, tmp_path, capsys):
    path = tmp_path / "links.json"
    path.write_text(json.dumps(dict(how="measured", within=30.0, hop_within=1e-5, rows=[])))
    slow = with_links(H200, path)
    assert (slow.within, slow.hop_within) == (30.0, 1e-5)
    assert (slow.between, slow.hop_between) == (H200.between, H200.hop_between)
    assumed, measured = (column(RUN, models, 8, kind) for kind in (H200, slow))
    assert measured.sent.within == assumed.sent.within
    bandwidth = assumed.sent.within / 1e9
    hops = assumed.sent.reductions * 14
    assert measured.sent.seconds == pytest.approx(bandwidth / 30 + hops * 1e-5)
    main(shlex.split(
        "plan custom --gpus 8 --teachers timm:test_vit/random@64 --student test_vit --size 64 "
        f"--batch 128 --links {path}"
    ))  # fmt: skip
    out = " ".join(capsys.readouterr().out.split())
    assert "links measured; between nodes modelled" in out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "how"),
        (dict(how="x"), "has no links"),
        (dict(how="x", within=0.0), "within is 0.0"),
        (dict(how="x", within="fast"), "within"),
        (dict(how="x", within=3.0, hop_within=-1.0), "hop_within is -1.0"),
    ],
)
def test_a_file_of_links_that_is_none_is_refused(content, words, tmp_path):
    path = tmp_path / "links.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as error:
        with_links(H200, path)
    assert str(path) in str(error.value)
