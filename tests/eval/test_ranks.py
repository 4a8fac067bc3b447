"""What several ranks measure together is what one of them measures alone, to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]

SCRIPT = '''
import logging
import warnings
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import torch

from zoo.commands.evaluate.run import evaluate
from zoo.data.text import open_text
from zoo.eval.settings import ClassifySettings
from zoo.eval.subject import EvalRequest
from zoo.language.tokenizers import open_tokenizer
from zoo.teachers.open import open_teacher
from zoo.train import mesh, pretext
from zoo.train.distill.calibrate import _fitted, calibrate
from zoo.train.distill.config import Distill, Losses, TeacherSpec
from zoo.train.distill.same import _same_on_ranks
from zoo.train.distill.setup import prepare
from zoo.train.distill.teachers import optimize_teachers
from zoo.train.distill.token_task import evaluate_text
from zoo.commands.distill.run import log_evaluation, new_student
from zoo.features import Batch

warnings.simplefilter("ignore")
logging.disable()
CPU = torch.device("cpu")


def alone(call):
    """Rank 0 does by itself what all do together."""
    with mesh.alone():
        return call() if mesh.is_first() else None


def calibration():
    """Moments, kept tokens, and all that is made of them; 12 images in 4 slices a step."""
    setup = prepare(config)
    kinds = ("phi_s", "pca")
    found = calibrate(setup)
    return _fitted(found, kinds, setup) if mesh.is_first() else None


def check_calibration():
    together, one = calibration(), alone(calibration)
    if one is not None:
        assert one.keys() == together.keys() and len(one) > 20
        for key, value in one.items():
            gap = (together[key] - value).abs().max().item()
            assert gap <= 1e-12 * value.abs().max().item(), (key, gap)


def evaluation():
    """13 images held out, of which one cannot be read, in batches of 3; then kNN and the probe."""
    setup, rows = prepare(config), []
    student = new_student(setup, {})
    logged = SimpleNamespace(log=lambda kind, step, values: rows.append(values))
    log_evaluation(logged, setup, dict(raw=student), {}, "student", 0)
    return rows if mesh.is_first() else None


def check_evaluation_in_a_run():
    together, one = evaluation(), alone(evaluation)
    if one is not None:
        assert together == one, (together, one)
        assert one[0]["unreadable"] == 1 and "knn/top1" in one[0] and "fidelity/min" in one[0]


def command(out):
    on = ("knn", "linear", "similar", "correspondence", "classify")
    data = dict.fromkeys(on, (Path("photos"),))
    names = {"classify": ClassifySettings(names=Path("names.json"))}
    how = dict(size=32, batch=4, out=Path(out), data=data, settings=names)
    request = EvalRequest(on=on, **how)
    return evaluate("test_vit", request, show=False)


def check_the_command():
    together, one = command("together.jsonl"), alone(lambda: command("alone.jsonl"))
    if one is None:
        assert together == []
        return
    assert len(together) == len(one) == 5
    for ours, theirs in zip(together, one, strict=True):
        assert ours.values == theirs.values and ours.unreadable == theirs.unreadable == 1
        assert ours.weights_hash == theirs.weights_hash and ours.data_hash == theirs.data_hash
        for name, scores in theirs.scores().items():
            assert scores.keys == ours.scores()[name].keys
            assert (scores.top == ours.scores()[name].top).all()
    assert len(Path("together.jsonl").read_text().splitlines()) == 5


class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = torch.nn.Embedding(300, 8), torch.nn.Linear(8, 300, bias=False)
        self.base_model, self.config = self, SimpleNamespace()

    def forward(self, input_ids, use_cache, output_hidden_states):
        return SimpleNamespace(last_hidden_state=self.inner(input_ids))

    def get_output_embeddings(self):
        return self.head


def check_text():
    """5 batches of rows over 2 ranks, the last of them shorter."""
    Path(f"text{mesh.rank()}.txt").write_text("The quick brown fox jumps over the dog. " * 40)
    text = open_text(f"text{mesh.rank()}.txt", open_tokenizer("bytes"), 32)
    how = dict(rows=14, batch=3)
    def measured():
        return dict(evaluate_text(Tower(), {}, text, CPU, **how))
    together, one = measured(), alone(measured)
    assert len(set(mesh.gather(tuple(together.values())))) == 1
    assert one is None or (together == one and one["bpb"] > 1)


def check_teachers():
    """8 bits are decided by rank 0; other weights on a rank are noticed."""
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(mesh.rank()))
    teacher = open_teacher("timm:test_vit/random@64")
    assert _same_on_ranks(teacher)
    sample = lambda: Batch(images)
    found = optimize_teachers({"t": teacher}, precision="int8", compiled=False, sample=sample)
    assert len({(one["t"].layers, one["t"].fidelity) for one in mesh.gather(found)}) == 1
    assert _same_on_ranks(teacher)
    with torch.no_grad():
        teacher.network.norm.bias[0] += mesh.rank()
    assert not _same_on_ranks(teacher)


def check_a_training_of_rank_0():
    """A pretext teacher: rank 0 trains and saves, and the other finds what it has written."""
    pretext.STEPS, pretext.BATCH = 3, 4
    asked = replace(config, teachers=(TeacherSpec(name="pretext:gradients"),))
    assert _same_on_ranks(prepare(asked).teachers["gradients"])


def check_mesh():
    r = mesh.rank()
    assert mesh.share() == (r, 2) and alone(mesh.share) in ((0, 1), None)
    mine = [(r, i) for i in range(70 * (1 - r))]  # more than travel at once, and none
    assert mesh.gathered(mine) == [(0, i) for i in range(70)]
    assert mesh.gathered_on_first(mine) == ([(0, i) for i in range(70)] if r == 0 else None)
    assert mesh.tensor_from_first(torch.tensor([1.0 + r])).item() == 1
    assert mesh.by_first(lambda: mesh.world(), patience=mesh.MORE_PATIENCE) == 1
    assert mesh.together(mesh.world, here=True) == 2 and mesh.together(mesh.world, here=r == 0) == 1
    names = {str(r)}
    mesh.union(names)
    assert names == {"0", "1"}


with mesh.ranks(CPU):
    config = mesh.with_slices(Distill(
        data="photos", student="test_vit", size=32, batch=12, slices=4, steps=2, calibration=3,
        teachers=(TeacherSpec(name="rule:colour@32"), TeacherSpec(name="rule:edges@48", summary=0)),
        losses=Losses(spatial="smooth_l1"), eval_images=13, probe_images=40, device="cpu",
        precision="float64",
    ))
    check_mesh()
    check_a_training_of_rank_0()
    check_teachers()
    check_text()
    check_calibration()
    check_evaluation_in_a_run()
    check_the_command()
    print(f"rank {mesh.rank()} is done")
'''


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    """Calibration, evaluation of a run, `zoo eval`, text, the gate of 8 bits: one spawn for all."""
    draws = np.random.default_rng(0)
    for split, each in (("train", 20), ("val", 7)):
        for number, name in enumerate(("dark", "light")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(each - number * (split == "val")):
                pixels = np.clip(40 + 100 * number + draws.normal(0, 60, (40, 48, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "photos/val/dark/3.png").write_bytes(b"no image")
    (tmp_path / "names.json").write_text('{"dark": 1, "light": [0, 2]}')
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    around = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=paths, ZOO_CACHE=str(tmp_path))
    done = subprocess.run(
        [*command, "--nproc-per-node=2", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=around,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("is done") == 2
