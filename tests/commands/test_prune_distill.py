"""A pruned model learns from its parent: in two commands and in one."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import zoo
from zoo.cli import main
from zoo.eval.speed.cost import cost
from zoo.features import read_features
from zoo.students.export import load_export
from zoo.students.prune.library import Parent, save
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.setup import new_student, prepare

ARGUMENTS: dict[str, Any] = dict(embed_dim=24, depth=3, num_heads=4, img_size=32)


@pytest.fixture(scope="module")
def place(tmp_path_factory, paint_squares):
    """Coloured squares, and a folder of timm with a tiny ViT of another mean than its name's."""
    place = tmp_path_factory.mktemp("heal")
    paint_squares(place / "images")
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=5, **ARGUMENTS)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    model.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    save(Parent(model, "vit_tiny_patch16_224", ARGUMENTS), place / "vit")
    return place


def cut(place: Path, name: str) -> Path:
    out = place / name
    words = f"--to stream=0.5,layers=2 --data {place}/images --samples 8 --out {out}"
    main(["prune", str(place / "vit"), *words.split()])
    return out


FEW = "--batch 8 --calibration 4 --optim.ema 0 --every.log 1 --every.evaluate 2 --heads.hidden 16"


def test_a_pruned_student_starts_from_its_cut_weights_and_keeps_its_parent_and_other_teachers(
    place,
):
    child = cut(place, "child")
    names = (f"timm:local-dir:{place}/vit", "rule:edges@32")
    config = Distill(
        data=str(place / "images"), student=f"local-dir:{child}", size=32, batch=8, calibration=4,
        teachers=tuple(map(TeacherSpec.parse, names)), out=place / "unused", device="cpu",
    )  # fmt: skip
    setup = prepare(config)
    student = new_student(setup, {})
    weights = load_file(child / "model.safetensors")
    own = student.backbone.state_dict()
    assert all(torch.equal(own[name], weights[name]) for name in own)
    assert student.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    # and so does a run: at no rate, the export is the child
    words = f"--student local-dir:{child} --teachers {' '.join(names)} --size 32 --steps 2 {FEW}"
    rate = "--optim.lr 1e-12 --optim.min-lr 0 --optim.weight-decay 0"
    data = f"--data {place}/images --out {place}/two"
    main(["distill", *f"{words} {rate} {data}".split()])
    export = load_file(place / "two" / "export" / "model.safetensors")
    assert all(torch.allclose(export[name], weights[name], atol=1e-9) for name in export)
    last = json.loads((place / "two" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"vit/summary", "vit/spatial", "edges/spatial"} <= last.keys()
    model: Any = timm.create_model(f"local-dir:{place}/two/export", pretrained=True)
    assert (model.embed_dim, len(model.blocks)) == (12, 2)


def test_what_is_no_folder_of_timm_cannot_be_a_student(place):
    with pytest.raises(ValueError, match="holds no model of timm"):
        zoo.distill(student="local-dir:nowhere", teachers=["rule:edges"], data=place / "images")


def heal(place: Path, name: str, *words: str) -> Path:
    out = place / name
    options = f"--to stream=0.5,layers=2 --data {place}/images --samples 8 --out {out}"
    behind = f"--teachers rule:edges@32 {FEW} --optim.lr 3e-3".split()
    main(["prune", str(place / "vit"), *options.split(), "--distill", "6", *behind, *words])
    return out


def evaluations(run: Path) -> list[dict]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "eval"]


def test_one_command_cuts_and_distils_and_a_stopped_one_goes_on(place, monkeypatch, capsys):
    out = heal(place, "one")
    about = json.loads((out / "prune.json").read_text())
    assert about["distilled"] == dict(steps=6, teachers=["vit", "edges"])
    assert about["before"]["numbers"] > about["numbers"]
    trained, as_cut = (load_file(f / "model.safetensors") for f in (out, out / "cut"))
    assert not torch.equal(trained["blocks.0.mlp.fc1.weight"], as_cut["blocks.0.mlp.fc1.weight"])
    model: Any = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert (model.embed_dim, len(model.blocks)) == (12, 2)
    assert [row["step"] for row in evaluations(out / "run") if row["arm"] == "student"] == [2, 4, 6]
    # the same again, stopped behind the third step
    from zoo.train import loop

    def stop(*args, **kwargs):
        update(*args, **kwargs)
        if args[0].step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    update = loop.update
    monkeypatch.setattr(loop, "update", stop)
    with pytest.raises(SystemExit) as stopped:
        heal(place, "stopped")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert f"Continue with zoo prune --resume {place}/stopped" in capsys.readouterr().err
    assert not (place / "stopped" / "model.safetensors").exists()
    monkeypatch.undo()
    main(["prune", "--resume", str(place / "stopped")])
    again = load_file(place / "stopped" / "model.safetensors")
    assert all(torch.equal(trained[name], again[name]) for name in trained)


def test_what_no_constructor_builds_learns_too(place, capsys):
    torch.manual_seed(0)
    model: Any = timm.create_model("test_efficientnet", num_classes=5)
    save(Parent(model, "test_efficientnet", dict(num_classes=5)), place / "efficient")
    out, parent = place / "any_width", str(place / "efficient")
    options = f"--to ffn=0.5,C1=9 --form zoo --data {place}/images --samples 8 --out {out}"
    behind = f"--distill 2 --size 32 {FEW} --optim.lr 1e-3".split()
    main(["prune", parent, *options.split(), *behind])
    assert f"zoo.create_model('local-dir:{out}/run/export'" in capsys.readouterr().out
    # the trained model stands in both folders; in the export with heads that tell what it learnt
    own: Any = zoo.create_model(f"local-dir:{out}", pretrained=True)
    assert own.blocks[1][0].conv_exp.in_channels == 9
    student = load_export(out / "run" / "export")
    check = load_file(out / "run" / "export" / "check.safetensors")
    for backbone in (own, student.backbone):
        torch.testing.assert_close(read_features(backbone, check["images"])[0], check["summary"])
    as_cut: Any = zoo.create_model(f"local-dir:{out}/cut", num_classes=0)
    assert not torch.equal(as_cut.conv_stem.weight, own.conv_stem.weight)
    with torch.device("meta"):
        assert zoo.create_model(f"local-dir:{out}").conv_stem.weight.is_meta
    _, macs = cost(f"local-dir:{out}/run/export,num_classes=0", 32)  # as `zoo eval` counts them
    assert 0 < macs < cost("test_efficientnet,num_classes=0", 32)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--distill 2 --to ffn=0.5", "--to stands before --distill"),
        ("--to ffn=0.5 --distill 2 --teachers timm:nothing", "There is no timm model 'nothing'"),
        ("--to ffn=0.5 --distill 2 --optim.lr x", "optim.lr"),
        ("--to ffn=0.5 --distill -1", "--distill is -1"),
        ("--resume IMAGES", "There is no run of zoo prune --distill"),
    ],
)
def test_a_wrong_training_ends_with_one_line_and_leaves_nothing(place, words, message, capsys):
    before = {path for path in place.rglob("*") if "wrong" in path.name}
    out = place / "wrong"
    common = f"--data {place}/images --samples 8 --out {out}" if "--resume" not in words else ""
    with pytest.raises(SystemExit):
        main(["prune", str(place / "vit"), *common.split(), *words.replace("IMAGES", "x").split()])
    assert message in capsys.readouterr().err
    assert {path for path in place.rglob("*") if "wrong" in path.name} == before


@pytest.mark.parametrize("parent", ["vit", "llama"])
def test_a_dry_run_shows_cut_and_training_and_writes_nothing(place, monkeypatch, capsys, parent):
    monkeypatch.setenv("ZOO_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    data = "images" if parent == "vit" else text_and_llama(place)
    before = {*place.rglob("*")}
    words = f"{parent} --to stream=0.5 --data {data} --samples 8 --length 16 --dry-run --distill 7"
    main(["prune", *words.split()])
    printed = " ".join(capsys.readouterr().out.split())
    assert "tensors" in printed
    assert re.search(r"params [\d,]+ -> [\d,]+ .*flops [\d,]+ -> [\d,]+", printed)
    assert "7 steps" in printed
    assert {p for p in place.rglob("*") if "cache" not in p.parts} <= before


def test_a_random_parent_has_nothing_to_teach(place, capsys):
    words = f"test_vit/random --to ffn=0.5 --data {place}/images --out {place}/r --distill 2"
    with pytest.raises(SystemExit):
        main(["prune", *words.split()])
    assert "nothing to teach" in capsys.readouterr().err
    assert not (place / "r").exists()


def text_and_llama(place: Path) -> str:
    """A text, and a folder of transformers with a tiny Llama of bytes."""
    transformers = pytest.importorskip("transformers")
    (place / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(place / "llama")
    return "text.txt"


def test_a_pruned_llama_recovers_towards_its_parent(place, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("ZOO_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    text_and_llama(place)
    words = "--to ffn=0.5,stream=0.5 --data text.txt --samples 16 --length 16 --out small"
    behind = "--batch 8 --optim.lr 1e-2 --every.evaluate 15"
    main(["prune", "llama", *words.split(), "--distill", "30", *behind.split()])
    assert "perplexity" in capsys.readouterr().out
    curve = [row["kl/llama"] for row in evaluations(place / "small" / "run")]
    assert len(curve) == 3
    assert curve[2] < curve[1] < curve[0]
    # a teacher of another vocabulary is refused once the cut is there, and takes it along
    other = transformers.LlamaConfig(vocab_size=300, hidden_size=32, num_attention_heads=2)
    transformers.LlamaForCausalLM(other).save_pretrained(place / "other")
    wrong = words.replace("small", "wrong").split()
    with pytest.raises(SystemExit):
        main(["prune", "llama", *wrong, "--distill", "30", "--teachers", "lm:other"])
    assert "has 300 tokens and the student 257" in capsys.readouterr().err
    assert not (place / "wrong").exists()
    child = transformers.AutoModelForCausalLM.from_pretrained(place / "small")
    assert child.config.hidden_size == 16
    about = json.loads((place / "small" / "prune.json").read_text())
    assert about["numbers"] == sum(p.numel() for p in child.parameters())
    assert about["distilled"]["teachers"] == ["llama"]
