import copy
import json
import re
import signal

import numpy as np
import pytest
import torch

from zoo.cli import main
from zoo.data.plan import Plan
from zoo.eval.language.recall import copying_sample, phonebook_sample
from zoo.experiments.corpus import standard_library
from zoo.experiments.mixers.cells import Bench, Cell
from zoo.experiments.mixers.config import SCALES, TOWERS, MixersExperiment
from zoo.experiments.mixers.text import (
    MixedFeed,
    RecallTask,
    all_names,
    book_drill,
    string_drill,
)
from zoo.experiments.mixers.towers import build, count, quickened
from zoo.language.tokens import Tokens, read_tokens
from zoo.train.config import Optim
from zoo.train.interrupt import Interrupted
from zoo.train.state import TrainState

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


def halves(drill, second):
    """The text of a drill, whose second half is learnt and nothing else."""
    text = drill.ids.tobytes().decode()
    begins = len(text) - 1 - second
    assert drill.learnt.tolist() == [begins <= i < len(text) - 1 for i in range(len(text))]
    return text


def test_a_drill_is_written_as_the_benchmarks_are_and_its_second_half_is_learnt():
    rng, every = np.random.default_rng(0), np.arange(len(all_names()))
    text = halves(book_drill(rng, 5, every), 5 * 17)
    book, asked = (part.splitlines() for part in text.strip().split("\n\n"))
    assert len(set(book)) == 5 and len(asked) == 5 and set(asked) <= set(book)
    sample = phonebook_sample(rng, 5, "", shots=4, reversed=False)
    shape = r"([A-Z][a-z]{5}: [1-9]\d\d-\d{4}\n){5}\n([A-Z][a-z]{5}: [1-9]\d\d-\d{4}\n){5}\n"
    assert re.fullmatch(shape, text) and re.fullmatch(shape, f"{sample.text}{sample.answer}\n\n")
    text = halves(string_drill(rng, 7), 8)
    shown = copying_sample(rng, 7, "", shots=1).text
    assert re.fullmatch(r"([a-z]{7})\n\1\n\n", text)
    assert re.fullmatch(r"\n([a-z]{7})\n\1\n\n[a-z]{7}\n", shown)


def feed_of(corpus, *, tasks=0.3, grown=0, held_out=()):
    plan = Plan(len(corpus.train), 5, 0)
    device = torch.device("cpu")
    return MixedFeed(corpus.train, plan, device, tasks, (4, 8), grown, held_out, 0)


def test_the_share_of_drills_is_kept_and_a_step_is_a_pure_function():
    feed = feed_of(standard_library(64))
    assert sum(map(feed.number_of_tasks, range(20))) == 30
    (third,) = feed.batches(3, 4)
    *_, last = feed_of(standard_library(64)).batches(0, 4)
    assert torch.equal(third.ids, last.ids) and torch.equal(third.learnt, last.learnt)


def test_names_that_are_measured_are_in_no_drill():
    corpus = standard_library(256)
    names = re.compile(r"[A-Z][a-z]{5}(?=: \d)")

    def drawn(held_out):
        feed = feed_of(corpus, tasks=0.9, held_out=held_out)
        return {
            n for step in range(30) for n in names.findall(feed.drills(step).ids.tobytes().decode())
        }

    some = drawn(())
    held = set(list(some)[:50])
    assert len(some) > 300 and not held & drawn(held)


def test_drills_grow():
    feed = feed_of(standard_library(64), tasks=0.9, grown=100)

    def longest(steps):
        rows = "".join(feed.drills(s).ids.tobytes().decode() for s in steps)
        return max(len(twice) for twice in re.findall(r"\b([a-z]+)\n\1\n", rows))

    assert longest(range(10)) == 4 and longest(range(100, 110)) == 8


def test_the_loss_is_of_files_and_of_what_is_learnt_of_drills_alone():
    torch.manual_seed(0)
    corpus, task, model = standard_library(64), RecallTask(2.0), build("attention", TINY)
    state, feed = TrainState.of(model, Optim()), feed_of(corpus)
    (batch,) = feed.batches(3, 4)
    assert 0 < batch.drills < len(batch.ids)
    found = task.losses(state, batch, None, 3)
    logits = model(input_ids=batch.ids).logits[:, :-1].log_softmax(-1)
    nll = -logits.gather(2, batch.ids[:, 1:, None]).squeeze(2)
    text = nll[batch.drills :].mean()
    drills = nll[: batch.drills][batch.learnt[: batch.drills, 1:]].mean()
    means = {name: loss.total / feed.counts(3)[name] for name, loss in found.items()}
    torch.testing.assert_close(means, dict(text=text, drills=drills))
    torch.testing.assert_close(task.weigh(means, 3), text + 2 * drills)


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
        main([*words, "--resume", "--tasks", "0.2"])
    assert "begun with --tasks 0.5" in capsys.readouterr().err


def test_an_unknown_tower_is_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit):
        main(["experiment", "mixers", "--towers", "mamba"])
    assert "mamba2" in capsys.readouterr().err


class Impatient(Bench):
    """Whoever looks on presses Ctrl-C at the first measurement."""

    def on_the_way(self, model):
        signal.raise_signal(signal.SIGINT)
        return super().on_the_way(model)


def test_a_training_that_was_stopped_goes_on_to_the_same_row(tmp_path):
    cell, rows = Cell("attention", seed=1), []
    for name in ("stopped", "whole"):
        config = MixersExperiment(tiny=True, device="cpu", out=tmp_path / name)
        if name == "stopped":
            with pytest.raises(Interrupted, match="step 6"):
                Impatient(config).run(cell)
        rows.append(Bench(config).run(cell))
    (stopped, whole), timed = rows, ("seconds", "train_seconds")
    assert len(whole["curve"]) == 2
    assert {k: v for k, v in stopped.items() if k not in timed} == {
        k: v for k, v in whole.items() if k not in timed
    }
