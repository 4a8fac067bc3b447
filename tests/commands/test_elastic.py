"""`zoo elastic` and `zoo export`: one checkpoint, many sizes."""

import json
import re
import shutil

import pytest
import torch

from zoo.cli import main
from zoo.data.text import open_text
from zoo.language.tokenizers import open_tokenizer
from zoo.train.distill.token_task import evaluate_text
from zoo.train.elastic_router import ROUTER, open_router

transformers = pytest.importorskip("transformers")
TEXT = "the quick brown fox jumps over the lazy dog. " * 60
SIZES = "small:ffn=0.5,stream=0.75,heads=0.5;medium:ffn=0.75,layers=2"
COMMON = ["--text", "text.txt", "--length", "32", "--batch", "8", "--optim.lr", "3e-3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, learn_llama):
    """A tiny Llama that has learnt its text, and an elastic run from it."""
    place = tmp_path_factory.mktemp("elastic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_CACHE", str(place / "cache"))
        patch.chdir(place)
        learn_llama(place, TEXT, num_hidden_layers=3, num_key_value_heads=1).rename(
            place / "parent"
        )
        elastic("--steps", "60", "--out", "run")
        yield place


def elastic(*words: str, sizes: str = SIZES) -> None:
    main(["elastic", "lm:parent", "--sizes", sizes, *COMMON, *words])


def loss(folder) -> float:
    """The loss of a plain checkpoint on the rows that the run was measured on."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    _, held = open_text("text.txt", open_tokenizer("bytes"), 32).split(0.05)
    return dict(evaluate_text(model, {}, held, torch.device("cpu"), rows=256, batch=8))["loss"]


def test_training_makes_every_size_better_than_its_cut_and_keeps_the_whole(trained):
    about = json.loads((trained / "run/about.json").read_text())
    before, after = about["before"], about["after"]
    assert after["small"]["loss"] < 0.6 * before["small"]["loss"]
    assert after["medium"]["loss"] < before["medium"]["loss"]
    assert before["full"]["kl/parent"] < 1e-6  # sorted, and the same function
    assert after["full"]["loss"] < before["full"]["loss"] + 0.1
    numbers = about["numbers"]
    assert numbers["small"] < numbers["medium"] < numbers["full"]


@pytest.mark.parametrize("size", ["small", "medium", "full"])
def test_a_size_exports_as_a_plain_checkpoint_with_the_loss_it_was_measured_with(
    trained, size, capsys
):
    about = json.loads((trained / "run/about.json").read_text())
    main(["export", "run", "--size", size, "--out", f"out-{size}"])
    numbers = about["numbers"][size]
    assert f"{numbers:,} of" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(f"out-{size}")
    assert sum(p.numel() for p in model.parameters()) == numbers
    assert loss(f"out-{size}") == pytest.approx(about["after"][size]["loss"], rel=1e-4)


def test_a_size_between_those_that_were_trained_works_too(trained):
    about = json.loads((trained / "run/about.json").read_text())
    main(["export", "run", "--size", "ffn=0.6,stream=0.875", "--out", "between"])
    assert loss("between") < 0.8 * about["before"]["small"]["loss"]


def test_a_run_resumes_to_the_bit_and_slices_draw_sizes_of_their_own(trained):
    words = ("--steps", "4", "--every.checkpoint", "2", "--slices", "4", "--every.log", "1")
    elastic(*words, "--shares", "1", "1", "2", "--out", "again")
    export = trained / "again" / "export"
    before = (export / "model.safetensors").read_bytes()
    shutil.rmtree(trained / "again" / "checkpoints" / "step_00000004")
    shutil.rmtree(export)
    main(["elastic", "--resume", "again"])
    assert (export / "model.safetensors").read_bytes() == before
    assert json.loads((export / "elastic.json").read_text())["sizes"] == SIZES


def test_a_router_chooses_sizes_that_export(trained, capsys):
    choices = "ffn=0.25|0.5|1.0,layers=1|2|3"
    words = ("--router", "static", "--choices", choices, "--steps", "40", "--out", "routed")
    elastic(*words, "--router-lr", "3e-3", sizes="half:params=0.5;most:params=0.75")
    assert "chosen   half:ffn=" in capsys.readouterr().out
    about = json.loads((trained / "routed/about.json").read_text())
    shares = {name: n / about["numbers"]["full"] for name, n in about["numbers"].items()}
    assert shares["half"] < shares["most"] <= 1
    main(["export", "routed", "--size", "half", "--out", "out-half"])
    assert loss("out-half") == pytest.approx(about["after"]["half"]["loss"], rel=1e-4)


@pytest.mark.slow
def test_an_adaptive_router_gives_each_token_its_widths_and_loads_again(trained, capsys):
    words = ("--router", "adaptive", "--choices", "ffn=0.25|0.5|1.0", "--steps", "40")
    budgets = "half:params=0.7;most:params=0.9"
    elastic(*words, "--every.checkpoint", "20", "--out", "adaptive", sizes=budgets)
    capsys.readouterr()
    about = json.loads((trained / "adaptive/about.json").read_text())
    full = about["numbers"]["full"]
    for name, share in dict(half=0.7, most=0.9).items():
        assert about["numbers"][name] / full == pytest.approx(share, abs=0.12)
    folder = trained / "adaptive/export"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    _, held = open_text("text.txt", open_tokenizer("bytes"), 32).split(0.05)
    options = dict(rows=256, batch=8)
    with open_router(model, folder).at_budget("half"):
        found = dict(evaluate_text(model, {}, held, torch.device("cpu"), **options))
    assert found["loss"] == pytest.approx(about["after"]["half"]["loss"], rel=1e-4)
    whole = dict(evaluate_text(model, {}, held, torch.device("cpu"), **options))
    assert whole["loss"] == pytest.approx(about["after"]["full"]["loss"], rel=1e-4)
    main(["export", "adaptive", "--size", "half", "--out", "adaptive-half"])
    kept = re.search(r"([\d,]+) of", capsys.readouterr().out)
    assert kept and int(kept[1].replace(",", "")) < full  # what most tokens were given
    before = (folder / ROUTER).read_bytes()
    shutil.rmtree(trained / "adaptive/checkpoints/step_00000040")
    main(["elastic", "--resume", "adaptive"])
    assert (folder / ROUTER).read_bytes() == before
    with pytest.raises(ValueError, match="has no router"):
        open_router(model, trained / "run/export")


def test_a_dry_run_prints_what_each_size_has_and_writes_nothing(trained, capsys):
    elastic("--dry-run", "--out", "dry")
    said = capsys.readouterr().out
    numbers = json.loads((trained / "run/about.json").read_text())["numbers"]
    assert all(f"{number:,}" in said for number in numbers.values())
    assert not (trained / "dry").exists()


@pytest.mark.parametrize(
    ("words", "sizes", "message"),
    [
        ((), "", "There is no size"),
        ((), "small:experts=0.5", "has no 'experts'"),
        ((), "small:heads=2", "is the whole model"),
        ((), "small:stream=0.5;big:blub=1", "has no 'blub'"),
        ((), "small:model.layers.0.mlp.f=0.5", "--form zoo"),
        ((), "small:attention_layers=2", "leaves out sub-layers"),
        (("--router", "static"), "small:params=0.5", "give both"),
        (("--router", "static", "--choices", "ffn=0.5|1.0"), SIZES, "is no budget"),
        (("--router", "static", "--choices", "ffn=0.5"), "a:params=0.5", "leaves no choice"),
        (("--router", "adaptive", "--choices", "stream=0.5|1.0"), "a:params=0.5", "of all layers"),
        (("--shares", "1", "2"), SIZES, "shares are 2 numbers"),
        (("--shares", "0", "0", "0"), SIZES, "not all 0"),
        (("--shares", "-1", "0", "0"), SIZES, "0 or more"),
    ],
)
def test_a_wrong_size_ends_in_one_line_and_leaves_nothing(trained, capsys, words, sizes, message):
    with pytest.raises(SystemExit) as stopped:
        elastic(*words, "--out", "wrong", sizes=sizes)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (trained / "wrong").exists()


@pytest.mark.parametrize(
    ("run", "size", "message"),
    [
        ("run", "tiny", "it has small, medium, full"),
        ("run", "ffn=0.25", "was trained with 24 units and more, not with 12"),
        ("run", "layers=1", "was trained with 2 units and more"),
        ("parent", "small", "holds no elastic model"),
        ("nothing", "small", "holds no elastic model"),
    ],
)
def test_a_size_that_was_not_trained_is_no_export(trained, capsys, run, size, message):
    with pytest.raises(SystemExit) as stopped:
        main(["export", run, "--size", size, "--out", "wrong"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (trained / "wrong").exists()
