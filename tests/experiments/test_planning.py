import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from zoo.cli import main
from zoo.experiments.planning.config import tiny
from zoo.experiments.planning.result import BEST, BLIND, share
from zoo.experiments.planning.run import (
    WEIGHTS,
    Answers,
    best_weights,
    chosen,
    controls,
    distillation,
    driven,
)
from zoo.experiments.planning.scenes import draw_scene, scenes, write_scenes
from zoo.teachers.planning import judge
from zoo.train.distill.plan_step import view_of


def test_a_scene_is_a_pure_function_and_says_all_that_the_rules_look_at():
    first, again = draw_scene(1, 5, 64), draw_scene(1, 5, 64)
    assert (first == again).all() and (first != draw_scene(1, 6, 64)).any()
    images = torch.from_numpy(scenes(1, 16, 64))
    for colour in (0, 1):  # noise stays on its side of 0.5
        assert ((images[:, colour] < 0.36) | (images[:, colour] > 0.64)).all()
    truth = judge(images)
    best = driven(truth, truth.total().argmax(-1))
    assert best["collides"] < 20 and best["leaves_the_road"] < 20


def test_who_knows_the_rules_drives_as_they_say():
    truth = judge(torch.from_numpy(scenes(2, 32, 64)))
    known = {name: getattr(truth, name).clamp(1e-3, 1 - 1e-3) for name in truth._fields}
    even = torch.full_like(truth.total(), -5.0)
    said = Answers(even, known, truth)
    weights = best_weights(said)
    assert all(w in WEIGHTS for w in weights)
    ours, best = (
        driven(truth, taken)["total"] for taken in (chosen(said, weights), truth.total().argmax(-1))
    )
    assert ours > 0.98 * best
    blind = driven(truth, chosen(said._replace(rules={}), ()))
    assert blind["total"] < 0.8 * ours


def test_no_other_blind_choice_does_better_than_the_control_where_it_was_chosen():
    images = torch.from_numpy(scenes(2, 32, 64))
    truth = judge(images)
    found = controls(truth, images)
    blind, driver, best = found[BLIND], found["the driver"], found[BEST]
    assert driver["total"] == pytest.approx(best["total"])
    each = [
        driven(truth, torch.full((32,), number))["total"]
        for number in range(truth.collision.shape[1])
    ]
    assert blind["total"] == pytest.approx(max(each)) and blind["total"] < 0.9 * best["total"]
    assert [share(found[what]["total"], found) for what in (BLIND, BEST)] == [0, 100]
    assert share((blind["total"] + best["total"]) / 2, found) == pytest.approx(50)


def test_students_learn_from_whole_scenes(tmp_path):
    config = replace(tiny(), out=tmp_path / "planning")
    config.out.mkdir()
    write_scenes(config.out / "scenes.tar", 1, 3, 32)
    run = distillation(config, "rules", 0)
    view = replace(view_of(run, {}, {}), flip=0.0)
    with tarfile.open(config.out / "scenes.tar") as tar:
        for number, entry in enumerate(tar):
            file = tar.extractfile(entry)
            assert file is not None
            shown = view.train(file.read(), np.random.default_rng(number))
            assert (shown == draw_scene(1, number, 32).transpose(2, 0, 1)).all()


def test_the_experiment_runs_is_resumed_and_draws(tmp_path, capsys):
    out = tmp_path / "planning"
    words = ["experiment", "planning", "--tiny", "--out", str(out)]
    assert not main([*words, "--dry-run"]) and not out.exists()
    assert not main(words)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["seed"]) for row in rows] == [("imitation", 0), ("rules", 0)]
    assert (out / "scenes.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "hits something, %: " in printed and "leaves the road, %: " in printed
    assert "one trajectory for every scene" in printed and "rules, in the scene before" in printed
    assert "% of what looking can gain" in printed
    before = (out / "result.json").read_text()
    assert not main([*words, "--resume"])
    assert (out / "result.json").read_text() == before
    with pytest.raises(SystemExit):
        main([*words, "--resume", "--steps", "4"])
    assert "was begun with --steps 3" in capsys.readouterr().err
