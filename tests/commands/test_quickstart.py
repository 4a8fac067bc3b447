"""The quickstart in small: real teachers out of wheels, stored features, one table, twice equal."""

from dataclasses import replace

import pytest

from zoo.commands.distill import args
from zoo.commands.distill.run import distill
from zoo.eval.report.terminal import print_tables
from zoo.teachers.cache import Cache
from zoo.train.config import Every
from zoo.train.distill.recipes import RECIPES

pytest.importorskip("skimage", reason="scikit-image ships the photographs; it is an extra")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """One crop of each half of a photograph, a teacher of ten steps, students of four."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("zoo.data.embedded.HALF_CROPS", {"train": 1, "val": 1})
    monkeypatch.setattr("zoo.train.pretext.STEPS", 5)
    monkeypatch.setattr("zoo.train.pretext.BATCH", 8)
    stages = args._recipe("quickstart")
    if not any("wheel" in spec.name for spec in stages[""].teachers):
        pytest.skip("the extra demo is not installed")
    every = Every(log=2, checkpoint=4, evaluate=4)
    run = stages[""]
    teachers = tuple(  # at 96 px: a fifth of the work
        replace(spec, name=f"{spec.name}@96") if "wheel" in spec.name else spec
        for spec in run.teachers
    )
    run = replace(run, teachers=teachers, size=64)
    return replace(run, batch=4, steps=4, calibration=2, device="cpu", every=every)


@pytest.mark.slow
def test_the_quickstart_ends_with_a_table_that_a_second_run_repeats(small, tmp_path, capsys):
    tables, metrics = [], []
    for name in "ab":
        run = distill(replace(small, out=tmp_path / name))
        capsys.readouterr()
        print_tables(run.path)
        tables.append(capsys.readouterr().out)
        metrics.append((run.path / "metrics.jsonl").read_bytes())
    assert tables[0] == tables[1] and metrics[0] == metrics[1]
    for word in ("tf_efficientnet_lite2", "gradients", "untrained", "not normalised", "kNN, %"):
        assert word in tables[0]
    stored = [p.parent.name for p in (tmp_path / "a" / "features").rglob("cache.json")]
    assert len(stored) == 2 and "features" in stored  # training views, and the held-out images
    assert all(not Cache.open(p.parent).missing() for p in tmp_path.glob("a/**/cache.json"))


def test_without_its_packages_the_quickstart_says_so_and_trains_all_its_teachers(
    monkeypatch, capsys
):
    monkeypatch.setattr(args, "is_installed", lambda name: False)
    assert args._recipe("quickstart") == {"": RECIPES["pretext"]()}
    assert "pip install 'backbone-zoo[demo]'" in capsys.readouterr().err
