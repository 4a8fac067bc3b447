"""`zoo distill` on two processes is `zoo distill` on one, with all that a rank could spoil."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from zoo.cli import main
from zoo.train.checkpoint import checkpoints, read_checkpoint

ROOT = Path(__file__).parents[2]
RUN = shlex.split(
    "distill --teachers rule:colour@64 rule:edges@64,summary=0 --student eradio_nano --size 64 "
    "--batch 8 --normalise alpha_only --device cpu --precision float64 --calibration 2 "
    "--eval-images 16 --probe-images 32 --every.log 1 --optim.drop-path 0.3 --optim.clip 0.5"
)
ALL = shlex.split("--losses.teacher-drop 0.5 --losses.mesa 1 --losses.shift 1 --optim.damp 0.01")


def environment(place: Path) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = dict(ZOO_CACHE=str(place / "cache"), OMP_NUM_THREADS="1")
    return {**own, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


FOUR = ("--slices", "4")
UNCERTAIN = ("--losses.weighting", "uncertainty")


def start(
    *words: str,
    processes: int = 1,
    more: tuple[str, ...] = (),
    module: Sequence[str] = ("-m", "zoo"),
) -> subprocess.Popen:
    alone = () if more else ("--standalone",)
    ranks = ["-m", "torch.distributed.run", *alone, f"--nproc-per-node={processes}", *more]
    command = [sys.executable, *(ranks if processes > 1 else ()), *module, *words]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


PORT = "29411"


def start_node(number: int, *words: str, processes: int = 2) -> subprocess.Popen:
    """Start one agent of two, which find each other as those of two machines do."""
    where = ("--nnodes=2", f"--node-rank={number}", "--master-addr=localhost")
    return start(*words, processes=processes, more=(*where, f"--master-port={PORT}"))


def finish(*started: subprocess.Popen) -> None:
    for process in started:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]


def run(*words: str, processes: int = 1) -> str:
    started = start(*words, processes=processes)
    out, err = started.communicate(timeout=300)
    assert started.returncode == 0, err[-3000:]
    return out


def newest(folder: str) -> dict:
    return read_checkpoint(checkpoints(Path(folder, "checkpoints"))[-1])


def tensors(tree, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {name: tree.double()}
    items = tree.items() if isinstance(tree, dict) else ()
    return {k: v for key, value in items for k, v in tensors(value, f"{name}.{key}").items()}


def largest_gap(ours: str, theirs: str) -> float:
    first, second = (newest(folder) for folder in (ours, theirs))
    gap = 0.0
    for part in ("model", "ema", "parts"):
        a, b = tensors(first[part]), tensors(second[part])
        assert a.keys() == b.keys()
        gap = max([gap, *((a[key] - b[key]).abs().max().item() for key in a)])
    return gap


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    names = ("one", "two")
    changes = (*FOUR, *ALL, *UNCERTAIN, "--steps", "4", "--losses.summary", "angle")
    main([*RUN, *changes, "--out", "one"])
    spoken = run(*RUN, *changes, "--out", "two", processes=2)
    assert largest_gap("one", "two") < 1e-12
    assert spoken.count("report ") == 1
    assert_same_metrics(*names)
    assert files("one") == files("two")
    timing = [json.loads(line) for line in Path("two", "timing.jsonl").read_text().splitlines()]
    assert [len(row["skew"]) for row in timing] == [2] * 4
    alone, shared = (load_file(Path(name, "normalizers.safetensors")) for name in names)
    assert alone.keys() == shared.keys()
    for key, value in alone.items():
        assert (shared[key] - value).abs().max() <= 1e-12 * value.abs().max()


def assert_same_metrics(*folders: str) -> None:
    one, two = (Path(name, "metrics.jsonl").read_text().splitlines() for name in folders)
    for mine, other in zip(map(json.loads, one), map(json.loads, two), strict=True):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            assert other[key] == (value if isinstance(value, str) else pytest.approx(value))


def files(folder: str) -> set[str]:
    """Return what a run has written but shards; TensorBoard's names have the time in them."""
    return {p.name for p in Path(folder).rglob("*") if not p.name.startswith(("events", "__"))}


@pytest.mark.long
@pytest.mark.parametrize("weighting", ["uncertainty", "adaloss"])
def test_four_processes_learn_what_one_does(weighting):
    changes = (*FOUR, *ALL, "--losses.weighting", weighting, "--steps", "20")
    run(*RUN, *changes, "--out", "one")
    run(*RUN, *changes, "--out", "four", processes=4)
    assert largest_gap("one", "four") < 1e-10


@pytest.mark.long
@pytest.mark.parametrize("weighting", ["uncertainty", "adaloss"])
def test_mosaics_and_spectral_norms_are_those_of_one_process(weighting):
    """The power iterations of a ViT's norms move once a step, mosaics are packed within a slice."""
    words = [
        {"rule:edges@64,summary=0": "rule:edges@64,summary=0,mosaic=2", "8": "16"}.get(w, w)
        for w in RUN
    ]
    words[words.index("eradio_nano")] = "test_vit"
    words += ["--student-options", "init_values=0.5", "--spectral"]
    changes = shlex.split("--losses.teacher-drop 0.5 --losses.mesa 1 --optim.damp 0.01 --steps 20")
    words += [*FOUR, *changes, "--losses.weighting", weighting]
    for name, processes in (("one", 1), ("two", 2), ("four", 4)):
        run(*words, "--out", name, processes=processes)
    for name in ("two", "four"):
        assert largest_gap("one", name) < 1e-10


@pytest.mark.long
def test_a_run_goes_from_two_processes_to_four_to_one(tmp_path):
    changes = (*FOUR, *ALL, *UNCERTAIN, "--steps", "6", "--every.checkpoint", "2", "--keep", "3")
    run(*RUN, *changes, "--out", "one")
    run(*RUN, *changes, "--out", "moved", processes=2)
    for step, processes in ((2, 4), (4, 1)):
        for later in checkpoints(Path("moved/checkpoints"))[step // 2 :]:
            shutil.rmtree(later)
        assert newest("moved")["step"] == step
        run("distill", "--resume", "moved", processes=processes)
    assert largest_gap("one", "moved") < 1e-12


BROKEN = {
    "all slices draw from one stream": "uncertainty",
    "the noise of DAMP is a rank's own": "uncertainty",
    "batch statistics are a rank's own": "uncertainty",
    "learned weights are outside of what is reduced": "uncertainty",
    "losses are not reduced": "adaloss",
}


@pytest.mark.long
@pytest.mark.parametrize("fix", BROKEN)
def test_a_fix_that_is_taken_out_shows(fix):
    changes = (*FOUR, *ALL, "--losses.weighting", BROKEN[fix], "--steps", "3")
    run(*RUN, *changes, "--out", "one")
    broken = [str(Path(__file__).with_name("unfixed.py")), fix]
    finish(start(*RUN, *changes, "--out", "two", processes=2, module=broken))
    assert largest_gap("one", "two") > 1e-6


@pytest.mark.long
def test_a_stop_of_one_rank_is_one_of_all_and_one_process_goes_on(tmp_path):
    run(*RUN, *FOUR, "--steps", "6", "--out", "whole")
    started = start(*RUN, *FOUR, "--steps", "6", "--out", "cut", processes=2)
    metrics = Path("cut/metrics.jsonl")
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert started.poll() is None, started.communicate()[1][-3000:]
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    _, err = started.communicate(timeout=120)
    assert started.returncode != 0
    assert "which is saved" in err
    assert 2 <= newest("cut")["step"] < 6
    run("distill", "--resume", "cut")
    assert largest_gap("whole", "cut") < 1e-12


TOGETHER = """
import json, sys, traceback
from contextlib import redirect_stderr
from pathlib import Path
import torch.distributed as dist
from zoo.cli import main
from zoo.train.mesh import PATIENCE

dist.init_process_group("gloo", timeout=PATIENCE)
for name, words in json.loads(Path("commands.json").read_text()).items():
    sys.argv = ["zoo", *words]
    with open(f"{name}.{dist.get_rank()}.err", "w") as err, redirect_stderr(err):
        try:
            main(words)
        except SystemExit as stop:
            assert stop.code == 2
        except BaseException:
            traceback.print_exc()
            raise
    dist.barrier()
dist.destroy_process_group()
"""
"""Command lines on one process group: to start processes costs more than to carry them out."""


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Return a folder in which two processes have carried out commands, with what these need."""
    place = tmp_path_factory.mktemp("two")
    (place / "images").mkdir()
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 255, (100, 100, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"images/{i:02d}.png")
    lines = dict(
        cut=[*RUN, *CUT, "--out", "cut", "--ranks", "fsdp"],
        odd=[*RUN, "--slices", "1", "--steps", "2", "--out", "odd"],
        list=["list"],
        placed=[*PLACED, *ALL, *TWO_STEPS, "--out", "placed"],
    )
    if find_spec("transformers"):
        write_language_models(place)
        lines["text"] = [*TEXT, "--out", "text"]
    (place / "commands.json").write_text(json.dumps(lines))
    (place / "together.py").write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "together.py"], cwd=place, env={**os.environ, **environment(place)},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    told = [path.read_text()[-1500:] for path in sorted(place.glob("*.err"))]
    assert done.returncode == 0, "\n".join([*told, done.stderr[-3000:]])
    return place


def write_language_models(place: Path) -> None:
    import transformers

    (place / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    sizes = dict(intermediate_size=64, num_attention_heads=2, vocab_size=257)
    for name, dim in (("student", 16), ("teacher", 32)):
        config = transformers.LlamaConfig(hidden_size=dim, num_hidden_layers=3, **sizes)
        transformers.LlamaForCausalLM(config).save_pretrained(place / name)


@pytest.mark.slow
def test_processes_that_cannot_share_the_slices_are_refused_in_one_line(two):
    told = sorted((two / f"odd.{rank}.err").read_text() for rank in range(2))
    assert told[0] == "" and told[1].count("\n") == 1  # one of them says it
    assert "2 processes cannot share 1 slices; 2 would do, or leave out --slices" in told[1]
    assert not (two / "odd").exists()


@pytest.mark.slow
def test_a_command_of_one_process_says_so_under_torchrun(two):
    assert "zoo list runs on one process" in (two / "list.0.err").read_text()


CUT = (*FOUR, *ALL, *UNCERTAIN, *shlex.split("--steps 4 --every.checkpoint 2"))


@pytest.mark.slow
def test_weights_cut_over_two_processes_learn_what_whole_ones_do(two, monkeypatch):
    """FSDP2, and a checkpoint of two shards that one process goes on from."""
    monkeypatch.chdir(two)
    assert {p.name for p in Path("cut").rglob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    shutil.copytree("cut", "one")
    shutil.rmtree("one/checkpoints/step_00000004")
    main(["distill", "--resume", "one", "--ranks", "ddp"])
    assert largest_gap("one", "cut") < 1e-12


@pytest.mark.long
def test_shards_are_read_by_as_many_processes_or_by_one(tmp_path):
    changes = (*FOUR, *ALL, *UNCERTAIN, "--steps", "4", "--every.checkpoint", "2")
    run(*RUN, *changes, "--out", "one")
    run(*RUN, *changes, "--out", "cut", "--ranks", "fsdp", processes=2)
    assert largest_gap("one", "cut") < 1e-12
    assert files("cut") == files("one")
    for processes, ranks in ((1, "ddp"), (2, "fsdp")):
        shutil.rmtree(checkpoints(Path("cut/checkpoints"))[-1])  # goes on from step 2
        run("distill", "--resume", "cut", "--ranks", ranks, processes=processes)
        assert largest_gap("one", "cut") < 1e-12


TEXT = shlex.split(
    "distill --text text.txt --student lm:student --teachers lm:teacher,place=shard "
    "lm:teacher,hidden=0 --losses.hidden 0.5 --normalise phi_s --calibration 2 --length 32 "
    "--batch 4 --slices 2 --steps 2 --held-out 0.1 --eval-rows 5 --device cpu "
    "--precision float64 --every.log 1 --every.evaluate 1"
)


@pytest.mark.slow
def test_a_cut_teacher_of_tokens_teaches_what_it_does_whole(two, monkeypatch, capfd):
    """In calibration, in training, and in evaluations, of which the ranks have unequal shares."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(two)
    main([*TEXT, "--out", "text_one"])
    assert "there is one process, so place=shard leaves it whole" in capfd.readouterr().out
    assert largest_gap("text_one", "text") < 1e-12
    assert_same_metrics("text_one", "text")


@pytest.mark.long
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_that_is_cut_learns_what_a_whole_one_does(tied):
    """The head is read as a parameter, outside of any layer's forward pass."""
    transformers = pytest.importorskip("transformers")
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    for name in ("student", "teacher"):
        config = transformers.LlamaConfig(vocab_size=257, tie_word_embeddings=tied, **sizes)
        transformers.LlamaForCausalLM(config).save_pretrained(name)
    words = shlex.split(
        "distill --text text.txt --student lm:student --teachers lm:teacher --losses.ce 1 "
        "--losses.hidden 0.5 --length 32 --batch 8 --slices 2 --steps 4 --device cpu --every.log 1"
    )
    run(*words, "--out", "one")
    run(*words, "--ranks", "fsdp", "--out", "two", processes=2)
    one, two = (
        [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-5)


@pytest.mark.long
def test_weights_cut_within_nodes_and_copied_between_them_learn_the_same(tmp_path):
    """HSDP on two agents with two processes each, as two nodes are."""
    changes = (*FOUR, *ALL, *UNCERTAIN, "--steps", "20")
    run(*RUN, *changes, "--out", "one")
    command = [*RUN, *changes, "--out", "four", "--ranks", "hsdp"]
    finish(*(start_node(i, *command) for i in range(2)))
    assert largest_gap("one", "four") < 1e-10


PLACED = shlex.split(
    "distill --data images --teachers timm:test_vit/random@64,follow=1,place=shard "
    "rule:edges@96,summary=0,at=96 timm:test_vit/random@64,rate=0.5,at=64 --student eradio_nano "
    "--size 64 --sizes 64 96 --partition 1 1 --batch 12 --batches 8 4 --normalise none "
    "--device cpu --precision float64 --calibration 2 --eval-images 4 --every.log 1 "
    "--every.evaluate 1 --optim.drop-path 0.3"
)
"""A teacher that is cut over the ranks, and two that one of two groups of slices has."""


TWO_STEPS = ("--slices", "2", "--steps", "2")


@pytest.mark.slow
def test_cut_teachers_and_groups_of_two_processes_teach_what_they_do_on_one(
    two, monkeypatch, capfd
):
    """In calibration, in training at both sizes, and where rank 0 evaluates alone."""
    monkeypatch.chdir(two)
    main([*PLACED, *ALL, *TWO_STEPS, "--out", "placed_one"])
    assert "there is one process, so place=shard leaves it whole" in capfd.readouterr().err
    assert largest_gap("placed_one", "placed") < 1e-12
    assert_same_metrics("placed_one", "placed")
