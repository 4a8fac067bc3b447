"""`zoo distill --text`: language models into a smaller one."""

import json
import shutil

import pytest
import torch

from zoo.cli import main

transformers = pytest.importorskip("transformers")
SIZES = dict(
    vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
TEXT = "the quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    for seed, (name, changes) in enumerate(
        dict(parent={}, small=dict(intermediate_size=8), other=dict(vocab_size=300)).items()
    ):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**(SIZES | changes))
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    return tmp_path


def run(
    *words: str,
    teacher: str = "lm:parent",
    out: str = "out",
    text: str = "text.txt",
    length: int = 16,
) -> None:
    small = ("--student", "lm:small", "--batch", "8")
    words = ("--text", text, *small, "--length", str(length), *words)
    teachers = ["--teachers", teacher] if teacher else []
    main(["distill", *words, *teachers, "--out", out, "--optim.lr", "3e-3"])


def evaluations(folder) -> list[dict]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "eval"]


def test_the_divergence_from_the_parent_falls_and_the_export_is_transformers_own(place, capsys):
    run("--steps", "40", "--every.evaluate", "20")
    about = json.loads((place / "out" / "about.json").read_text())
    assert about["after"]["kl/parent"] < about["before"]["kl/parent"] / 2
    assert [row["step"] for row in evaluations(place / "out")] == [0, 20, 40]
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "out" / "export").eval()
    ids = torch.tensor([list(TEXT[:64].encode())])
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(about["after"]["loss"], abs=0.3)
    assert "perplexity" in capsys.readouterr().out


def test_a_dry_run_says_what_is_trained_and_leaves_nothing(place, capsys):
    before = sorted(place.glob("*"))
    run("--dry-run", "--steps", "40", "--losses.hidden", "1")
    printed = " ".join(capsys.readouterr().out.split())
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "small")
    held = sum(p.numel() for p in model.parameters())
    assert f"all {(held + 16 * 16) / 1e6:,.2f} M parameters" in printed  # a projection too
    looked_up = model.get_input_embeddings().weight.numel()
    flops = 2 * (held - looked_up - 3 * 16)  # norms multiply no matrix
    assert f"{flops / 1e9:,.4g}" in printed
    assert "40 steps: about" in printed
    assert {*place.glob("*")} - {*before} <= {place / "cache"}


def test_a_teachers_likeliest_tokens_alone_are_a_lower_bound_that_a_whole_vocabulary_reaches(place):
    for name, k in (("out", "0"), ("few", "4"), ("all", "256")):
        run("--steps", "2", "--every.log", "1", "--losses.top-k", k, out=name)
    whole, few, every = (lines(place / name)[0]["parent/kl"] for name in ("out", "few", "all"))
    assert 0 < few < 0.99 * whole
    assert every == pytest.approx(whole, rel=1e-4)
    with pytest.raises(SystemExit):
        run("--steps", "2", "--losses.top-k", "4", "--losses.kind", "jsd", out="refused")


def test_text_alone_is_learnt_without_a_teacher(place):
    run("--steps", "40", "--losses.kl", "0", "--losses.ce", "1", teacher="")
    about = json.loads((place / "out" / "about.json").read_text())
    assert about["after"]["bpb"] < 0.75 * about["before"]["bpb"]


def test_four_slices_are_one_batch_and_a_run_resumes_to_the_bit(place):
    run("--steps", "6", "--every.checkpoint", "3", "--precision", "float64")
    run("--steps", "6", "--slices", "4", "--precision", "float64", out="sliced")
    for one, four in zip(*(lines(place / name) for name in ("out", "sliced")), strict=True):
        assert one["loss"] == pytest.approx(four["loss"], rel=1e-10)
    before = (place / "out" / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(place / "out" / "checkpoints" / "step_00000006")
    shutil.rmtree(place / "out" / "export")
    main(["distill", "--resume", "out"])
    assert (place / "out" / "export" / "model.safetensors").read_bytes() == before


def test_two_texts_with_weights_are_learnt_together_and_resume(place):
    (place / "other.txt").write_text("pack my box with five dozen liquor jugs. " * 60)
    words = ("--steps", "6", "--every.checkpoint", "3")
    run(*words, text="text.txt=0.75,other.txt=0.25")
    before = (place / "out" / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(place / "out" / "checkpoints" / "step_00000006")
    main(["distill", "--resume", "out"])
    assert (place / "out" / "export" / "model.safetensors").read_bytes() == before


def test_the_form_of_attention_is_said_kept_and_changes_nothing_but_rounding(place, capsys):
    run("--steps", "3", "--every.log", "1")
    run("--steps", "3", "--every.log", "1", "--attention", "split", out="split")
    assert "attention  student split, parent split" in capsys.readouterr().out
    about = [json.loads((place / n / "about.json").read_text()) for n in ("out", "split")]
    assert about[0]["attention"] == dict(student="sdpa", parent="sdpa")
    assert about[1]["attention"] == dict(student="split", parent="split")
    for one, other in zip(lines(place / "out"), lines(place / "split"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert "zoo_" not in (place / "split" / "export" / "config.json").read_text()
    transformers.AutoModelForCausalLM.from_pretrained(place / "split" / "export")


@pytest.mark.parametrize(
    ("device", "hidden", "rounding"),
    [
        pytest.param("cpu", "0", 1e-4, marks=pytest.mark.slow),
        pytest.param("cpu", "1", 1e-4, marks=pytest.mark.long),
        pytest.param("cuda", "1", 2e-2, marks=pytest.mark.gpu),  # 16 bits
    ],
)
def test_compiled_layers_learn_what_plain_ones_do_and_are_compiled_once(
    place, capsys, device, hidden, rounding
):
    """One code for each model's layers: none more for evaluation and generation."""
    from torch._dynamo.utils import counters

    for name, inner in dict(parent=24, small=8).items():
        config = transformers.LlamaConfig(
            **(SIZES | dict(num_hidden_layers=3, intermediate_size=inner))
        )
        transformers.LlamaForCausalLM(config).save_pretrained(place / name)
    words = ("--steps", "4", "--every.log", "1", "--every.evaluate", "2", "--device", device)
    words += ("--losses.hidden", hidden)
    run(*words, out="plain")
    counters.clear()
    run(*words, "--speed", "compiled", out="fast")
    assert "speed  student compiled, parent compiled" in capsys.readouterr().out
    if hidden == "0":  # with torch 2.11 a tap of hidden states ends a graph
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    for mine, other in zip(*(lines(place / name) for name in ("fast", "plain")), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=rounding)
    about = json.loads((place / "fast" / "about.json").read_text())
    assert about["speed"] == dict(student="compiled", parent="compiled")


def test_what_cannot_be_compiled_is_refused_by_name_and_auto_leaves_a_cpu_as_it_is(place, capsys):
    run("--steps", "2", "--speed", "auto")
    assert json.loads((place / "out" / "about.json").read_text())["speed"] == {}
    with pytest.raises(SystemExit):
        run("--steps", "2", "--speed", "compiled", out="refused")
    assert "student is not compiled: it has no layers that are alike" in capsys.readouterr().err
    assert not (place / "refused").exists()
    with pytest.raises(SystemExit):
        main(["mask", "lm:small", "--text", "text.txt", "--speed", "compiled", "--out", "out"])
    assert "--speed compiled is for zoo distill --text" in capsys.readouterr().err


def test_hidden_states_are_matched_through_a_projection_and_resume_with_it(place):
    words = ("--losses.hidden", "1", "--losses.hidden-at", "0.0", "1.0", "--steps", "20")
    run(*words, "--every.checkpoint", "10", "--every.log", "1")
    first, *_, last = lines(place / "out")
    assert last["parent/hidden"] < first["parent/hidden"] / 2
    # it counts as much as the divergence did before it
    second = lines(place / "out")[1]
    alpha = first["parent/kl"] / first["parent/hidden"]
    expected = second["parent/kl"] + alpha * second["parent/hidden"]
    assert second["loss"] == pytest.approx(expected, rel=1e-4)
    before = (place / "out" / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(place / "out" / "checkpoints" / "step_00000020")
    main(["distill", "--resume", "out"])
    assert (place / "out" / "export" / "model.safetensors").read_bytes() == before


def several(place, *words: str, out: str = "out", steps: int = 6) -> None:
    """Distil next tokens and states of one teacher, and the states of one with more tokens."""
    teachers = ("--teachers", "lm:parent", "lm:other,kl=0")
    options = ("--losses.hidden", "1", "--calibration", "2", "--steps", str(steps))
    run(*teachers, *options, *words, teacher="", out=out)


def test_two_teachers_teach_one_by_its_tokens_and_both_by_their_states(place, capsys):
    several(place, "--normalise", "phi_s", "--every.checkpoint", "3", "--every.log", "1")
    first, *_ = lines(place / "out")
    assert {"parent/kl", "parent/hidden", "other/hidden"} <= first.keys()
    assert "other/kl" not in first
    # the projections begin as the mean, which loses 1 in the space of PHI-S
    assert first["other/hidden"] == pytest.approx(1, abs=0.05)
    assert first["parent/hidden"] == pytest.approx(1, abs=0.05)
    assert lines(place / "out")[-1]["other/hidden"] < first["other/hidden"]
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "out" / "export")
    student = transformers.AutoModelForCausalLM.from_pretrained(place / "small")
    shapes = [{n: p.shape for n, p in m.state_dict().items()} for m in (model, student)]
    assert shapes[0] == shapes[1]
    before = (place / "out" / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(place / "out" / "checkpoints" / "step_00000006")
    main(["distill", "--resume", "out"])
    assert (place / "out" / "export" / "model.safetensors").read_bytes() == before


def test_states_are_normalised_by_the_moments_of_the_tokens_that_count(place):
    from zoo.commands.distill.text import feed_of, normalizers, prepare
    from zoo.data.plan import mix
    from zoo.train.distill.token_config import DistillText, TokenLosses
    from zoo.train.run import Run

    config = DistillText(
        data="text.txt", student="lm:small", teachers=("lm:parent", "lm:other,kl=0"), length=16,
        batch=8, normalise="phi_s", calibration=8,
        losses=TokenLosses(hidden=1.0, hidden_at=(0.5, 1)),
        precision="float64", out=place / "run",
    )  # fmt: skip
    setup = prepare(config)
    found = normalizers(Run.create(config), setup)
    assert {label: len(several) for label, several in found.items()} == dict(parent=2, other=2)
    batches = list(feed_of(setup, mix(config.seed, 3)).batches(0, 8))
    for label, teacher in setup.teachers.items():
        for layer, normalizer in enumerate(found[label]):
            z = torch.cat([normalizer(teacher(b).hidden[layer][b.counted]) for b in batches])
            torch.testing.assert_close(z.mean(0), torch.zeros(16).double(), atol=1e-8, rtol=0)
            torch.testing.assert_close(z.var(0), torch.ones(16).double(), atol=1e-8, rtol=0)


def test_a_run_does_not_go_on_with_other_teachers_or_another_normaliser(place, capsys):
    several(place, "--normalise", "standardize", steps=2)
    for words in (("--normalise", "phi_s"), ("--teachers", "lm:parent")):
        with pytest.raises(SystemExit):
            main(["distill", "--resume", "out", *words])
        assert words[0].strip("-") in capsys.readouterr().err
    torch.manual_seed(9)
    changed = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    changed.save_pretrained(place / "parent")
    with pytest.raises(SystemExit):
        main(["distill", "--resume", "out"])
    assert "started with other weights of parent" in capsys.readouterr().err


def test_a_student_learns_from_what_it_writes_and_resumes_to_the_bit(place, capsys):
    own = ("--on-policy.fraction", "0.5", "--on-policy.length", "6", "--losses.kind", "reverse")
    run(*own, "--steps", "6", "--every.checkpoint", "3", "--every.log", "1")
    before = (place / "out" / "export" / "model.safetensors").read_bytes()
    assert lines(place / "out")[-1]["parent/kl"] < lines(place / "out")[0]["parent/kl"]
    shutil.rmtree(place / "out" / "checkpoints" / "step_00000006")
    main(["distill", "--resume", "out"])
    assert (place / "out" / "export" / "model.safetensors").read_bytes() == before


def test_without_rows_of_its_own_a_run_is_as_it_was_to_the_bit(place, capsys):
    run("--steps", "2", "--every.log", "1")
    run("--steps", "2", "--every.log", "1", "--on-policy.length", "6", out="off")
    written = [(place / n / "export" / "model.safetensors").read_bytes() for n in ("out", "off")]
    assert lines(place / "out") == lines(place / "off") and written[0] == written[1]
    (sample, *_) = json.loads((place / "out" / "about.json").read_text())["samples"]
    assert sample["prompt"] + sample["text"] in TEXT and sample["before"] != sample["text"]
    main(["report", "out"])
    page = (place / "out" / "report.html").read_text()
    assert "Generation" in page and sample["prompt"] in page


def lines(folder) -> list[dict]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize(
    ("wrong", "teacher", "message"),
    [
        ({}, "", "name --teachers"),
        ({}, "lm:other", "has 300 tokens and the student 257"),
        ({}, "lm:parent,kl=0", "Nothing is learnt from lm:parent"),
        ({}, "lm:parent,kl=much", "needs a number"),
        ({}, "lm:parent,rate=1", "the options of a teacher of tokens are kl=, hidden=, place="),
        ({}, "lm:parent,place=remote", "replicate (a whole copy on each process) or shard"),
        (dict(words=("--normalise", "phi_s")), "lm:parent", "no hidden states are compared"),
        (dict(words=("--losses.hidden-at", "1.5")), "lm:parent", "losses.hidden_at is (1.5,)"),
        ({}, "lm:./nothing", "config.json is missing"),
        (dict(text="nothing.txt"), "lm:parent", "There is no text"),
        (dict(words=("--losses.tau", "0")), "lm:parent", "tau"),
        (dict(words=("--on-policy.fraction", "1")), "lm:parent", "have no room for a prompt"),
        (dict(words=("--on-policy.fraction", "2")), "lm:parent", "on_policy.fraction"),
        (dict(length=100_000), "lm:parent", "a row has 2 or more"),
        (dict(words=("--attention", "varlen")), "lm:parent", "varlen does not run with lm:small"),
        (dict(words=("--optim.lora", "4")), "lm:parent", "this training has no adapters"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(place, capsys, wrong, teacher, message):
    with pytest.raises(SystemExit) as stopped:
        run(*wrong.pop("words", ()), teacher=teacher, **wrong)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (place / "out").exists()
