"""Adapters of low rank: what they learn, and that they end in plain weights."""

import importlib.util
import sys

import pytest
import torch

from zoo.features import Batch
from zoo.students.build import build_student
from zoo.students.export import export_student, load_export
from zoo.students.lora import add_adapters
from zoo.train.config import Optim
from zoo.train.distill.config import Distill
from zoo.train.state import TrainState

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed; it is in [lora]"
)
WIDTHS = {"a": (8, 8)}


def adapted(name="test_vit", size=64, **how):
    student = build_student(name, WIDTHS, size=size, hidden=16)
    add_adapters(student, 4, **how)
    return student


def moved(student):
    """Take a few steps at a high rate, so that the adapters are not zero."""
    state = TrainState.of(student, Optim(lora=4, lr=0.05))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for _ in range(3):
        answer = student.train()(Batch(torch.rand(4, 3, 64, 64)))["a"]
        sum((x - 1).square().mean() for x in answer).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
    return {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}


@needs_peft
@pytest.mark.parametrize("name", ["test_vit", "eradio_nano", "mambavision_t"])
def test_every_adapter_and_every_head_learns_and_the_trunk_stays(name):
    student = adapted(name)
    learnt = moved(student)
    adapters = {n for n, _ in student.named_parameters() if ".lora_" in n}
    heads = {n for n, _ in student.named_parameters() if n.startswith("heads.")}
    assert adapters and learnt == adapters | heads


@needs_peft
def test_an_adapted_student_is_exported_as_an_ordinary_model_with_the_same_answers(tmp_path):
    plain = build_student("test_vit", WIDTHS, size=64, hidden=16).state_dict()
    student = adapted()
    moved(student)
    batch = Batch(torch.rand(2, 3, 64, 64))
    with torch.no_grad():
        student.eval()
        adapted_answers = student(batch)["a"]
        export_student(student.as_released(), tmp_path / "export", batch)
        back = load_export(tmp_path / "export")
        assert back.state_dict().keys() == plain.keys()
        for ours, theirs in zip(adapted_answers, back(batch)["a"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        without = {k: v for k, v in student.backbone.state_dict().items() if ".lora_" not in k}
        base = without["blocks.0.attn.qkv.base_layer.weight"]
        assert (back.backbone.blocks[0].attn.qkv.weight - base).abs().max() > 1e-3


@needs_peft
def test_adapters_change_nothing_at_first_and_stand_where_they_are_asked_for():
    torch.manual_seed(0)
    plain = build_student("test_vit", WIDTHS, size=64, hidden=16).eval()
    torch.manual_seed(0)
    student = adapted(layers=("qkv", "mlp.fc2")).eval()
    batch = Batch(torch.rand(2, 3, 64, 64))
    torch.testing.assert_close(student(batch)["a"], plain(batch)["a"], rtol=0, atol=0)
    places = {n.split(".lora_")[0] for n in student.backbone.state_dict() if ".lora_" in n}
    assert places == {f"blocks.{i}.{n}" for i in range(6) for n in ("attn.qkv", "mlp.fc2")}


@needs_peft
def test_layers_that_are_not_there_or_would_go_round_their_adapters_are_refused():
    with pytest.raises(ValueError, match=r"'query', and the student has no such layer.*qkv, proj"):
        adapted(layers=("query",))
    with pytest.raises(ValueError, match=r"does not run stages\.2\.\S*dt_proj as a layer"):
        adapted("mambavision_t", layers=("dt_proj",))


def test_adapters_exclude_what_they_cannot_stand_with():
    with pytest.raises(ValueError, match=r"leave out optim\.freeze trunk"):
        Optim(lora=4, freeze="trunk")
    with pytest.raises(ValueError, match="give their rank"):
        Optim(lora_layers=("qkv",))
    with pytest.raises(ValueError, match="leave one of them out"):
        Distill(spectral=True, optim=Optim(lora=4))
    with pytest.raises(ValueError, match="this training has no adapters"):
        TrainState.of(torch.nn.Linear(2, 2), Optim(lora=4))


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'backbone-zoo\[lora\]'"):
        adapted()
