"""Which scales of a distillation the page names."""

import json
from dataclasses import asdict
from typing import get_args

from zoo.eval.report.scales import MAPS, WEIGHTS, imposed_scales
from zoo.train.distill.config import Distill, Losses, Normalise, TeacherSpec


def written(**changes):
    """The config of a run as its folder holds it."""
    return json.loads(json.dumps(asdict(Distill(data="photos", **changes)), default=str))


def test_every_scale_and_weighting_of_a_run_has_words():
    assert set(MAPS) == set(get_args(Normalise)) - {"none"}
    kinds = get_args(Losses.__annotations__["weighting"])
    assert set(WEIGHTS) == set(kinds) - {"static"}


def test_a_page_names_what_is_imposed_and_nothing_else():
    teachers = (TeacherSpec(name="rule:edges@64"),)
    assert imposed_scales(written(teachers=teachers, normalise="none")) == []
    (maps,) = imposed_scales(written(teachers=teachers))
    assert "PHI-S" in maps and "variance 1" in maps
    weighed = (TeacherSpec(name="rule:edges@64", summary=0.0, spatial=0.5),)
    losses = Losses(weighting="adaloss")
    found = imposed_scales(
        written(teachers=weighed, losses=losses, normalise_summary="standardize")
    )
    assert "AdaLoss" in found[2] and "UNIC" in found[1]
    assert "rule:edges@64 summary × 0, rule:edges@64 spatial × 0.5" in found[3]
    assert imposed_scales({}) == [] == imposed_scales({"losses": 3, "teachers": ["a"]})
