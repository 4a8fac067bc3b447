"""A run goes on with the images that it began with, or says what is different."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from zoo.train.distill.same import check_same_images
from zoo.train.run import Run


def setup(train=5, val=2, lost=()):
    return SimpleNamespace(train=range(train), val=range(val), lost=dict.fromkeys(lost, "cut"))


def test_a_run_that_is_resumed_with_other_images_is_refused_and_told_what_differs(tmp_path):
    run = Run(tmp_path)
    check_same_images(run, setup(lost=["old/place/b.tar"]))
    check_same_images(run, setup(lost=["new/place/b.tar"]))  # moved as a whole
    assert run.read_json("images.json") == dict(train=5, val=2, lost_shards=["b.tar"])
    with pytest.raises(ValueError, match=r"began \(train: 5 there, 4 here\)"):
        check_same_images(run, setup(train=4, lost=["b.tar"]))
    with pytest.raises(ValueError, match=r"lost_shards: \['b\.tar'\] there, \[\] here"):
        check_same_images(run, setup())


def test_a_run_from_before_this_record_gets_one(tmp_path: Path):
    check_same_images(Run(tmp_path), setup())
    assert (tmp_path / "images.json").is_file()
