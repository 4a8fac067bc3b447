import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from zoo.cli import main
from zoo.data.plan import Plan
from zoo.experiments.corpus import standard_library
from zoo.experiments.mixers.config import SCALES, TOWERS
from zoo.experiments.mixers.text import MixedFeed, task_row
from zoo.experiments.mixers.towers import build, count, quickened
from zoo.language.tokens import Tokens, read_tokens

pytest.importorskip("transformers")
TINY = SCALES["tiny"]


def test_the_towers_are_of_one_size():
    with torch.device("meta"):
        sizes = [count(build(tower, SCALES["full"])) for tower in TOWERS]
    assert max(sizes) < 1.01 * min(sizes) and 10e6 < min(sizes) < 30e6


def test_mamba2_computes_the_same_when_it_is_fast():
    torch.manual_seed(0)
    model = build("mamba2", TINY).eval()
    ours = quickened(copy.deepcopy(model), compiled=False)
    ids = torch.randint(256, (3, 50), generator=torch.Generator().manual_seed(1))
    last = [read_tokens(m, Tokens(ids, torch.zeros_like(ids))).last for m in (ours, model)]
    torch.testing.assert_close(*last, rtol=1e-4, atol=1e-5)  # both in float32
    for y in last:
        (y * y.detach().roll(1, -1)).mean().backward()
    for (name, p), q in zip(ours.named_parameters(), model.parameters(), strict=True):
        if q.grad is None:  # the head
            continue
        error = (p.grad - q.grad).abs().max()
        assert error < 1e-4 * q.grad.abs().max(), name


def test_a_row_of_tasks_has_the_answers():
    rng = np.random.default_rng(0)
    text = b"".join(task_row(rng, 4096, (8, 32)).tobytes() for _ in range(4)).decode()
    books = [part for part in text.split("\n") if ": " in part and part.count("-") == 1]
    names = [line.split(":")[0] for line in books]
    assert len(set(names)) < len(names)  # asked, and answered
    lines = text.split("\n")
    twice = [a for a, b in pairwise(lines) if a.isalpha() and a == b]
    assert len(twice) > 10


def test_the_share_of_tasks_is_kept_and_a_step_is_a_pure_function():
    corpus = standard_library(64)
    plan = Plan(len(corpus.train), 5, 0)
    feed = MixedFeed(corpus.train, plan, torch.device("cpu"), 0.3, (4, 8), 0)
    assert sum(map(feed.number_of_tasks, range(20))) == 30
    (third,) = feed.batches(3, 4)
    *_, last = feed.batches(0, 4)
    assert torch.equal(third.ids, last.ids)


def test_the_tiny_experiment_runs_and_what_is_done_is_not_done_again(tmp_path, capsys):
    out = tmp_path / "run"
    words = ["experiment", "mixers", "--tiny", "--out", str(out), "--towers", "attention", "mamba2"]
    main(words)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    state = {(r["tower"], r["context"]): r["cache_bytes"] for r in rows if r["context"]}
    assert state["attention", 128] > 1.4 * state["attention", 64]  # 64 + 4 tokens, 128 + 4
    assert state["mamba2", 128] == state["mamba2", 64]
    main([*words, "hyena", "--resume"])
    again = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert again[: len(rows)] == rows
    assert {row["tower"] for row in again[len(rows) :]} == {"hyena"}
    assert "study's order" in (out / "result.md").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*words, "--resume", "--tasks", "0.5"])
    assert "begun with --tasks 0.2" in capsys.readouterr().err


def test_an_unknown_tower_is_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit):
        main(["experiment", "mixers", "--towers", "mamba"])
    assert "mamba2" in capsys.readouterr().err
