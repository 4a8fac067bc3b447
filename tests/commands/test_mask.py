"""`zoo mask`: N of each M weights of a language model stay."""

import json

import pytest

from zoo.cli import main
from zoo.students.prune.nm import Pattern

transformers = pytest.importorskip("transformers")
TEXT = "the quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture(scope="module")
def trained(tmp_path_factory, learn_llama):
    """A tiny Llama that has learnt its text, so that zeros hurt it."""
    place = tmp_path_factory.mktemp("mask")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_CACHE", str(place / "cache"))
        patch.chdir(place)
        learn_llama(place, TEXT, num_hidden_layers=2, num_key_value_heads=2)
        yield place


def masked(place, method: str, *words: str, name: str = "") -> dict:
    out = place / (name or method)
    common = ["--text", "text.txt", "--length", "32", "--batch", "8", "--out", str(out)]
    main(["mask", "lm:runs/distill_text/export", "--method", method, *common, *words])
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "export")
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.mlp.down_proj):
            assert Pattern(2, 4).holds(linear.weight)
            assert (linear.weight != 0).float().mean() > 0.49
    assert (model.lm_head.weight != 0).float().mean() > 0.9
    return json.loads((out / "about.json").read_text())["results"]


def test_the_export_is_2_4_and_updates_and_learning_help(trained, capsys):
    found = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        results = masked(trained, method)
        found[method] = results[method]["loss"]
    results = masked(trained, "learned", "--steps", "60", "--optim.lr", "3e-3")
    assert results["begins"]["loss"] == pytest.approx(found["magnitude"], rel=0.15)
    assert found["sparsegpt"] < found["magnitude"]
    assert results["learned"]["loss"] < found["magnitude"]
    assert "perplexity" in capsys.readouterr().out


def test_masks_are_learnt_on_from_those_of_another_run(trained):
    one = ("--steps", "1", "--prior")
    found = masked(trained, "learned", *one, "sparsegpt", name="general")
    moved = masked(trained, "learned", *one, str(trained / "general"), name="task")
    assert moved["begins"]["loss"] == pytest.approx(found["learned"]["loss"], rel=0.1)


@pytest.mark.parametrize(
    ("method", "says"),
    [("learned", "logits of masks"), ("wanda", "nothing; wanda looks at 80 rows")],
)
def test_a_dry_run_says_what_is_thinned_and_leaves_nothing(trained, capsys, method, says):
    options = f"--method {method} --text text.txt --length 32 --out dry --dry-run"
    main(["mask", "lm:runs/distill_text/export", *options.split()])
    printed = " ".join(capsys.readouterr().out.split())
    assert says in printed
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert f"{weights / 1e6:.2f} M weights of 14 layers to 2:4" in printed
    assert not (trained / "dry").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--pattern", "4:2"), "keeps nothing or everything"),
        (("--pattern", "x"), "no pattern"),
        (("--method", "learned", "--prior", "runs/distill_text"), "is not 2:4"),
        (("--method", "learned", "--prior", "nowhere"), "no run of zoo mask"),
        (("--method", "learned", "--optim.lora", "4"), "this training has no adapters"),
    ],
)
def test_what_is_refused_leaves_no_folder(trained, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        given = () if "--method" in words else ("--method", "wanda")
        common = ["--text", "text.txt", "--length", "32", "--out", str(trained / "wrong")]
        main(["mask", "lm:runs/distill_text/export", *given, *common, *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (trained / "wrong").exists()
