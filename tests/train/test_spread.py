"""`zoo distill --text` whose rows and experts lie over processes is the one of one process."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from safetensors.torch import load_file

from zoo.cli import main
from zoo.train.checkpoint import checkpoints, read_checkpoint, split

ON_FLOAT64 = Path(__file__).with_name("on_float64.py")
NAMES = ("mixtral", "nemotron")
SIZES: dict[str, Any] = dict(
    vocab_size=257, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
    num_experts_per_tok=2,
)  # fmt: skip
RUN = shlex.split(
    "distill --text text.txt --losses.ce 1 --losses.balance 0.01 --losses.router-z 0.001 "
    "--optim.ema 0.9 --optim.clip 0.1 --length 30 --batch 4 --eval-rows 6 --every.log 1 "
    "--every.evaluate 2 --every.checkpoint 2 --keep 3 --device cpu --precision float64"
)
"""Three batches are evaluated: an odd number, so that one group of processes has none at last."""
CROWDED = RUN + shlex.split("--student lm:crowded --losses.kl 0 --steps 2 --optim.lr 1e-6")
"""A Nemotron-H all of whose tokens want the first two experts, and which hardly learns."""


def nemotron_h(bias: slice, value: float):
    config = transformers.NemotronHConfig(
        **SIZES, layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
        intermediate_size=8, moe_intermediate_size=8, moe_shared_expert_intermediate_size=8,
        n_routed_experts=8, mamba_num_heads=4, mamba_head_dim=4, ssm_state_size=4, n_groups=2,
        chunk_size=4,
    )  # fmt: skip
    model = transformers.NemotronHForCausalLM(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer[bias] = value
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Write the models: of four ranks the last one's experts of Nemotron-H receive no token."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SIZES, intermediate_size=8, num_hidden_layers=2, num_local_experts=8
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder / "mixtral")
    nemotron_h(slice(6, 8), -10).save_pretrained(folder / "nemotron")
    nemotron_h(slice(2), 10).save_pretrained(folder / "crowded")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return folder


@pytest.fixture(autouse=True)
def place(models, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.chdir(tmp_path)
    for path in models.iterdir():
        Path(path.name).symlink_to(path)


def commands(out: str, steps: int, *more: str, slices: int = 2) -> list[list[str]]:
    """Let each model learn from the other."""
    how = f"--losses.hidden 0.3 --optim.lr 1e-2 --slices {slices} --steps {steps}".split()
    return [
        [
            *RUN,
            *how,
            *f"--student lm:{ours} --teachers lm:{theirs} --out {out}/{ours}".split(),
            *more,
        ]
        for ours, theirs in (NAMES, NAMES[::-1])
    ]


def on_processes(number: int, lines: list[list[str]]) -> None:
    Path("commands.json").write_text(json.dumps(lines))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    command = [sys.executable, *torchrun, str(ON_FLOAT64), "commands.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def on_one(lines: list[list[str]], monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location("on_float64", ON_FLOAT64)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with monkeypatch.context() as patch:
        module.widen(patch.setattr)
        for words in lines:
            main(words)


def newest(folder: str) -> dict:
    return read_checkpoint(checkpoints(Path(folder, "checkpoints"))[-1])


def rows(folder: str) -> list[dict]:
    return [json.loads(row) for row in Path(folder, "metrics.jsonl").read_text().splitlines()]


def assert_same_rows(ours: list[dict], theirs: list[dict]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.pop("kind") == other.pop("kind")
        assert mine == pytest.approx(other, rel=1e-12, abs=1e-12)


def assert_same(ours: str, theirs: str) -> None:
    """Weights, average, optimizer, metrics and export, to 1e-12."""
    for name in NAMES:
        one, other = f"{ours}/{name}", f"{theirs}/{name}"
        saved = [newest(folder) for folder in (one, other)]
        for part in ("model", "ema", "parts", "optimizer"):
            a, b = (split(state[part])[0] for state in saved)
            assert a.keys() == b.keys()
            for key, value in a.items():
                assert value.numel() == 0 or (value - b[key]).abs().max() < 1e-12, (name, key)
        assert_same_rows(rows(one), rows(other))
        first, second = (load_file(Path(f, "export/model.safetensors")) for f in (one, other))
        assert first.keys() == second.keys()
        assert max((first[key] - second[key]).abs().max().item() for key in first) < 1e-12
        configs = [Path(f, "export/config.json").read_text() for f in (one, other)]
        assert configs[0] == configs[1]


@pytest.mark.slow
def test_two_processes_that_share_rows_and_experts_learn_what_one_does(monkeypatch):
    """And with room for an even share, of 60 tokens that want two experts 15 find room in each."""
    on_one(commands("one", 3), monkeypatch)
    shared = ["--sequence", "2", "--experts", "2"]
    crowd = [*CROWDED, *shared, "--capacity", "1", "--slices", "2", "--out", "crowd"]
    on_processes(2, [*commands("two", 3, *shared), crowd])
    assert_same("two", "one")
    dropped = [row["dropped"] for row in rows("crowd") if row["kind"] == "train"]
    assert dropped == [0.75, 0.75]
    about = json.loads(Path("two/mixtral/about.json").read_text())
    assert (about["config"]["sequence"], about["config"]["experts"]) == (2, 2)


@pytest.mark.long
def test_four_processes_one_without_a_token_learn_what_one_does_and_two_and_one_go_on(monkeypatch):
    """Rows over two processes, experts over four: neither group lies in the other."""
    on_one(commands("one", 6), monkeypatch)
    on_processes(4, commands("four", 6, "--sequence", "2", "--experts", "4"))
    assert_same("four", "one")
    on_processes(4, commands("square", 6, "--sequence", "2", "--experts", "2"))
    assert_same("square", "one")
    on_processes(4, commands("experts", 6, "--experts", "2", slices=4))
    on_one(commands("sliced", 6, slices=4), monkeypatch)
    assert_same("experts", "sliced")
    for step, processes, layout in ((2, 2, ("--experts", "2")), (4, 1, ("--sequence", "1"))):
        for name in NAMES:
            for later in checkpoints(Path("four", name, "checkpoints"))[step // 2 :]:
                shutil.rmtree(later)
            assert newest(f"four/{name}")["step"] == step
        lines = [["distill", "--resume", f"four/{name}", *layout] for name in NAMES]
        if processes == 1:
            on_one([[*line, "--experts", "1"] for line in lines], monkeypatch)
        else:
            on_processes(processes, lines)
        assert_same("four", "one")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--sequence", "2"), "needs 2 processes and there is one: torchrun"),
        (("--sequence", "8", "--dry-run"), "4 heads with 2 of keys do not split over 8 ranks"),
        (("--experts", "3", "--dry-run"), "8 experts do not split over 3 ranks"),
        (("--sequence", "31"), "Rows of 30 tokens have none for some of 31"),
        (("--experts", "2", "--ranks", "fsdp"), "--ranks fsdp would cut them"),
        (("--capacity", "-1"), "capacity is -1; it is 0 (off) or more"),
    ],
)
def test_what_cannot_be_spread_is_refused_before_any_work(more, words, capsys):
    with pytest.raises(SystemExit):
        main([*commands("out", 2)[0], *more])
    assert words in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [("experts", "is no mixture of experts, which --experts is for"),
     ("capacity", "which --capacity is for"), ("sequence", "attention_dropout 0.1")],
)  # fmt: skip
def test_a_dense_model_with_dropout_is_refused(option, words, capsys):
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=4, attention_dropout=0.1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained("dense")
    how = f"--student lm:dense --losses.kl 0 --{option} 2 --dry-run".split()
    with pytest.raises(SystemExit):
        main([*RUN[:5], *how])
    assert words in capsys.readouterr().err


def test_the_plan_says_what_a_process_holds(capsys):
    """Two layers of 8 experts of 3 x 16 x 8 weights."""
    main([*commands("out", 2)[0], "--sequence", "2", "--experts", "4", "--dry-run"])
    found = " ".join(capsys.readouterr().out.split())
    assert "each process: 15 tokens of a row, 0.00 of 0.01 M weights of the experts" in found


def test_models_of_many_sizes_and_masks_are_not_spread(capsys):
    with pytest.raises(SystemExit):
        main(["mask", "lm:mixtral", "--text", "text.txt", "--experts", "2", "--out", "out"])
    assert "--experts 2 is for zoo distill --text" in capsys.readouterr().err


def test_a_run_that_drops_tokens_keeps_its_layout(monkeypatch, capsys):
    """On one process too experts have room for so many tokens, and the export drops none."""
    room = dict(tight=["--capacity", "1"], wide=["--capacity", "4"], free=[])
    on_one([[*CROWDED, *more, "--out", name] for name, more in room.items()], monkeypatch)
    tight, wide, free = (rows(name) for name in ("tight", "wide", "free"))
    assert [row["dropped"] for row in tight if row["kind"] == "train"] == [0.75, 0.75]
    assert tight[0] == free[0]  # before training, evaluated without a capacity
    assert {row.pop("dropped", 0) for row in wide} == {0}
    assert_same_rows(wide, free)
    with pytest.raises(SystemExit):
        main(["distill", "--resume", "tight", "--experts", "2"])
    assert "keeps its --experts (1 there, 2 here)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "device",
    [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.long)],
)  # fmt: skip
def test_one_process_under_torchrun_learns_what_it_does_without(device):
    """On a GPU that is NCCL's group of one: gradients, counts and the checkpoint go through it."""
    given = f"--device {device} --precision float32"
    words = shlex.split(shlex.join(CROWDED).replace("--device cpu --precision float64", given))
    words += ["--capacity", "1"]
    main([*words, "--out", "alone"])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command = [sys.executable, *torchrun, "-m", "zoo", *words, "--out", "group"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for mine, other in zip(rows("group"), rows("alone"), strict=True):
        assert mine.pop("kind") == other.pop("kind")
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-4)
    dropped = [row["dropped"] for row in rows("group") if row["kind"] == "train"]
    assert dropped == pytest.approx([0.75, 0.75], abs=1e-6)  # counted in float32
