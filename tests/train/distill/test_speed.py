"""What `speed` chooses, and that a student in that form is the same student."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.layers import DropPath

from zoo.compiled_blocks import compile_blocks
from zoo.features import Batch
from zoo.students.build import build_student
from zoo.train.device import autocast, tensor_cores
from zoo.train.distill import speed as module
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.setup import widths
from zoo.train.distill.sizes import frozen
from zoo.train.distill.speed import FastStudent, Speed, about_speed, choose, is_convolutional

CONFIG = Distill(
    speed="auto", teachers=(TeacherSpec(name="timm:test_vit/random@96"),), student="test_vit"
)
CUDA = torch.device("cuda")


def test_auto_is_everything_on_a_gpu_and_nothing_on_a_cpu():
    full = choose(CONFIG, CUDA)
    assert full.channels_last and full.blocks and full.graphs and full.teachers and full.overlap
    assert full.why == ()
    assert choose(CONFIG, torch.device("cpu")) == Speed()
    assert choose(replace(CONFIG, speed="plain"), CUDA) == Speed()


def test_what_is_left_out_is_said_with_its_reason():
    windows = choose(replace(CONFIG, attention_windows=(4,)), CUDA)
    assert windows.teachers and not windows.blocks and not windows.graphs
    assert "windows" in windows.describe()
    assert "several sizes" in choose(CONFIG, CUDA, nested=True).describe()
    assert Speed().without("no reason", graphs=False).why == ()  # there were none


def test_several_processes_record_nothing_and_leave_teachers_that_are_cut_as_they_are(monkeypatch):
    monkeypatch.setattr(module, "world", lambda: 2)
    form = choose(CONFIG, CUDA)
    assert form == replace(choose(CONFIG, CUDA, processes=1), graphs=False, why=form.why)
    assert "hide none of their sums" in form.describe()
    assert choose(CONFIG, torch.device("cpu")) == Speed()
    assert choose(replace(CONFIG, speed="plain", overlap=True), CUDA) == Speed(overlap=True)
    (spec,) = CONFIG.teachers
    cut = replace(CONFIG, teachers=(spec, replace(spec, name="timm:test_vit", place="shard")))
    form = choose(cut, CUDA)
    assert form.blocks and not (form.teachers or form.overlap) and "place=shard" in form.why[1]
    form = choose(replace(cut, compile_teachers=True, overlap=True), CUDA)
    assert form.teachers and form.overlap and len(form.why) == 1
    assert choose(cut, CUDA, processes=1).graphs  # nothing is cut on one


def test_teachers_whose_features_are_stored_are_not_compiled(tmp_path):
    form = choose(replace(CONFIG, cache=tmp_path, view_epochs=1), CUDA)
    assert form.blocks and not form.teachers and "cache" in form.describe()


def test_flags_add_to_the_plain_form():
    asked = replace(CONFIG, speed="plain", compile_teachers=True, overlap=True)
    assert choose(asked, CUDA) == Speed(teachers=True, overlap=True)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_fast_student_answers_and_learns_as_the_plain_one(name, monkeypatch):
    monkeypatch.setattr(module, "compile_blocks", partial(compile_blocks, backend="eager"))
    student = build_student(name, {"a": (8, 12), "b": (None, 4)}, size=64).double().train()
    batch, said = Batch(torch.rand(4, 3, 64, 64, dtype=torch.double)), []
    form = Speed(channels_last=True, blocks=True)
    fast = FastStudent(student, form, say=said.append, ready=lambda: said.append("ready"))
    for head in student.heads.values():
        monkeypatch.setattr(head, "compile", lambda **_: None)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    found, gradients = {}, {}
    for which, model in dict(fast=fast, plain=student).items():
        student.load_state_dict(before)
        found[which] = model(batch, mesa=True)
        parts = [part for features in found[which].values() for part in features]
        torch.stack([part.square().mean() for part in parts if part is not None]).sum().backward()
        gradients[which] = [
            None if p.grad is None else p.grad.clone() for p in student.parameters()
        ]
        found[which + " state"] = {k: v.clone() for k, v in student.state_dict().items()}
        student.zero_grad()
    assert found["fast"].keys() == found["plain"].keys()
    for label, features in found["plain"].items():
        for theirs, ours in zip(features, found["fast"][label], strict=True):
            torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients["fast"], gradients["plain"])
    # running statistics moved once: compiling left no trace of its own
    torch.testing.assert_close(found["fast state"], found["plain state"])
    first, second, last = said
    assert first == "ready" and "code of the student for 4 images of 64 px" in second
    assert "runs compiled for 4 images of 64 px" in last


def test_what_cannot_be_compiled_runs_plain_and_says_so(monkeypatch):
    def broken(network):
        def fail(*_, **__):
            raise RuntimeError("no compiler here\nand more")

        network.forward_intermediates = fail

    monkeypatch.setattr(module, "compile_blocks", broken)
    student, said = build_student("test_resnet", {"a": (8, 12)}, size=64).train(), []
    fast = FastStudent(student, Speed(blocks=True), say=said.append)
    batch = Batch(torch.rand(2, 3, 64, 64))
    torch.testing.assert_close(fast(batch)["a"], student(batch)["a"])
    assert said[-1] == "the student is not compiled: RuntimeError: no compiler here"


def test_convolutional_networks_are_told_from_those_that_only_begin_so():
    networks = (build_student(n, {"a": (8, 8)}, size=64) for n in ("test_vit", "test_resnet"))
    assert [is_convolutional(n.backbone) for n in networks] == [False, True]


def test_a_resumed_run_keeps_the_steps_at_which_compiled_code_took_over():
    first = about_speed("student compiled", None, 0)
    assert about_speed("student compiled", first, 40)["compiled_from"] == [0, 40]
    assert first["form"] == "student compiled"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "mambavision_t"])
def test_a_recorded_student_learns_as_the_plain_one(name):
    student = build_student(name, {"a": (8, 12)}, size=64).cuda().train()
    for each in student.modules():
        if isinstance(each, DropPath):
            each.drop_prob = 0.0  # the two draw apart
    batch, said = Batch(torch.rand(8, 3, 64, 64, device="cuda")), []
    fast = FastStudent(
        student, Speed(channels_last=True, blocks=True, graphs=True), say=said.append
    )
    for _ in range(3):
        gradients = []
        for model in (fast, student):
            with torch.autocast("cuda", torch.bfloat16):
                found = model(batch)["a"]
            assert found.summary is not None and found.spatial is not None
            (
                found.summary.float().square().mean() + found.spatial.float().square().mean()
            ).backward()
            gradients.append(
                torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
            )
            student.zero_grad()
        ours, theirs = gradients
        assert (ours - theirs).norm() / theirs.norm() < 0.1
    assert not [line for line in said if " not " in line]


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["student", "test_efficientnet"])
def test_what_is_compiled_beside_a_run_is_found_by_it(part, tmp_path, monkeypatch):
    """A setting that only one of the two has makes the caches useless: all is compiled twice."""
    from torch._dynamo.utils import counters

    from zoo.train.distill import compiling
    from zoo.train.distill.setup import prepare

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    config = replace(
        CONFIG, data="embedded", teachers=(TeacherSpec(name="timm:test_efficientnet/random@96"),),
        size=96, batch=8,
    )  # fmt: skip
    compiling.compile_part(config, part, torch.device("cuda"))
    torch._dynamo.reset()
    counters.clear()
    setup, device = prepare(config), torch.device("cuda")
    with tensor_cores(device), autocast("auto", device):
        if part == "student":
            student = build_student(
                config.student, widths(config, setup.teachers), size=96, device=device
            )
            fast = FastStudent(
                student.train(), Speed(channels_last=True, blocks=True), say=print, strict=True
            )
            fast(Batch(torch.zeros(8, 3, 96, 96, device=device)))
        else:
            for network in itertools.chain.from_iterable(map(frozen, setup.teachers.values())):
                network.to_bf16()
            compiling.take_over_teachers(setup, print)
    assert counters["inductor"]["fxgraph_cache_hit"] > 0
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
