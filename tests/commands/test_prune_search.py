"""`zoo prune --to params=0.5`: the table, the child, and a search that was stopped on the way."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from zoo.cli import main
from zoo.commands.prune.halving import halve, hypertrick
from zoo.commands.prune.search import compare
from zoo.students.prune.candidates import Candidate
from zoo.students.prune.cost import Cost
from zoo.students.prune.journal import Journal
from zoo.students.prune.library import Parent, save
from zoo.students.prune.plan import Plan

NO_COST = Cost(1, 1, 2, 0, 0, None)
FAR = {"ffn=0.5": 0.3, "layers=0.5": 0.1, "stream=0.5": 0.4, "heads=0.5": 0.2}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(draws.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    return folder


@pytest.fixture
def vit(tmp_path):
    """A folder of timm with a small ViT whose output is its stream."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = dict(embed_dim=48, depth=3, num_heads=6, img_size=32)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    save(Parent(model, "vit_tiny_patch16_224", arguments), tmp_path / "vit")
    return tmp_path / "vit"


def words_of(vit: Path, images: Path, out: Path, to: str = "params=0.5") -> list[str]:
    options = f"--data {images} --samples 8 --search.candidates 3 --out {out}"
    return f"prune {vit} --to {to} {options}".split()


def test_a_budget_gives_a_plain_child_with_its_candidates_and_a_plot(vit, images, tmp_path, capsys):
    out = tmp_path / "half"
    main(words_of(vit, images, out))
    printed = capsys.readouterr().out
    assert "3/3  distance" in printed
    about = json.loads((out / "prune.json").read_text())["search"]
    (chosen,) = (row for row in about["candidates"] if row["chosen"])
    assert chosen["distance"] == min(row["distance"] for row in about["candidates"]) > 0.01
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    numbers = sum(p.numel() for p in model.parameters())
    assert numbers == chosen["cost"]["params"] <= 0.5 * about["parent"]["params"]
    assert not (tmp_path / "half.search").exists()
    pytest.importorskip("matplotlib")
    assert (out / "search.png").read_bytes().startswith(b"\x89PNG")


def test_a_latency_is_predicted_and_then_measured(vit, images, tmp_path, capsys):
    main(f"prune {vit} --to params=0.5 --dry-run --search.candidates 2".split())
    assert " ms " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(words_of(vit, images, tmp_path / "fast", "latency_ms=0.001"))
    assert "is impossible here; the smallest" in capsys.readouterr().err
    assert not (tmp_path / "fast").exists()


class Stopping:
    """Cuts whose distances are known, until it is stopped."""

    names: tuple[str, ...] = ("activation",)
    device = torch.device("cpu")
    influence = None

    def __init__(self, cuts: int):
        self.left = cuts

    def cut(self, plan: Plan, name: str) -> tuple[Any, float]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        what = [*plan.axes, *(["layers"] if plan.layers else [])]
        return None, FAR[f"{what[0]}=0.5"]

    def far(self, child: nn.Module) -> float:
        raise AssertionError


def test_a_search_that_was_stopped_cuts_only_what_is_left(tmp_path):
    candidates = [Candidate(words, NO_COST) for words in FAR]
    with pytest.raises(KeyboardInterrupt):
        compare(candidates, Journal(tmp_path, {}), Stopping(2))
    again = Stopping(2)
    assert compare(candidates, Journal(tmp_path, {}), again) == FAR
    assert again.left == 0


def test_halving_trains_the_better_half_twice_as_long_and_resumes(tmp_path):
    trained = []

    def train(words: str, steps: int) -> float:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((words, steps))
        return FAR[words] / steps

    with pytest.raises(KeyboardInterrupt):
        halve(FAR, Journal(tmp_path, {}), 10, train)
    trained.clear()
    last = halve(FAR, Journal(tmp_path, {}), 10, train)
    assert trained == [("heads=0.5", 10), ("layers=0.5", 20), ("heads=0.5", 20)]
    assert {words: steps for words, (steps, _) in last.items()} == {
        "ffn=0.5": 10, "stream=0.5": 10, "layers=0.5": 20, "heads=0.5": 20,
    }  # fmt: skip


def test_hypertrick_trains_the_nearest_first_and_stops_who_is_among_the_worst(tmp_path):
    trained = []

    def train(words: str, steps: int) -> float:
        if len(trained) == 4:
            raise KeyboardInterrupt
        trained.append((words, steps))
        return (FAR[words] if steps == 10 else 1 - FAR[words]) / steps

    with pytest.raises(KeyboardInterrupt):
        hypertrick(FAR, Journal(tmp_path, {}), 10, train)
    trained.clear()
    last = hypertrick(FAR, Journal(tmp_path, {}), 10, train)
    # the nearest goes on unheard, (1 - √0.5) 4 = 1.2; the next is worse than it, and so are all
    assert last == {
        "layers=0.5": (20, 0.9 / 20), "heads=0.5": (10, 0.02), "ffn=0.5": (10, 0.03),
        "stream=0.5": (10, 0.04),
    }  # fmt: skip
    assert trained == [("stream=0.5", 10)]  # before the interruption: layers twice, heads, ffn


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--to params=0.5", "look at data: give --data"),
        ("--to params=0.5,params=0.5 --dry-run", "give each once"),
        ("--to params=0.00001 --dry-run", "is impossible here; the smallest model"),
        ("--to params=0.5 --dry-run --search.candidates 0", "are at least 1"),
        ("--to params=0.5 --dry-run --search.steps 5", "give it too"),
        ("--to layers@7=0.5 --dry-run --score magnitude", "look at data"),
    ],
)
def test_wrong_budgets_end_with_one_line_and_write_nothing(words, message, vit, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit):
        main(["prune", str(vit), *words.split(), "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.long
def test_a_search_killed_at_a_random_second_gives_the_same_table(vit, images, tmp_path, capsys):
    main(words_of(vit, images, tmp_path / "whole"))
    out = tmp_path / "again"
    command = [sys.executable, "-m", "zoo", *words_of(vit, images, out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    time.sleep(random.uniform(5, 30))
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not out.exists():
        main(words_of(vit, images, out))
    tables = [json.loads((tmp_path / n / "prune.json").read_text()) for n in ("whole", "again")]
    assert tables[0]["search"] == tables[1]["search"]
