"""A run that goes on from the student of an earlier one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zoo
from zoo.features import Batch
from zoo.students.export import load_export


@pytest.fixture(scope="module")
def first(tmp_path_factory, paint_squares):
    """A run with one teacher, on a few images of coloured squares."""
    place = tmp_path_factory.mktemp("start")
    paint_squares(place / "images")
    return run(place, "first", teachers=["rule:edges@32"], student="test_vit", size=64)


def run(place: Path, name: str, **fields):
    optim = dict(lr=3e-3, ema=0.5) | fields.pop("optim", {})
    return zoo.distill(
        **dict(
            data=place / "images", batch=8, steps=8, calibration=4, out=place / name, device="cpu",
            every=dict(log=2, checkpoint=100, evaluate=100), optim=optim,
        )
        | fields
    )  # fmt: skip


def losses(run, name):
    rows = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows if row["kind"] == "train"]


@pytest.mark.slow
def test_a_new_teacher_for_an_old_student_leaves_its_trunk_and_its_old_head(first):
    place = first.path.parent
    second = run(
        place, "second", start=first.path, teachers=["rule:colour@32"],
        optim=dict(freeze="trunk"), steps=40, heads=dict(hidden=24),
    )  # fmt: skip
    before, after = (load_file(r.path / "export" / "model.safetensors") for r in (first, second))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    fell = losses(second, "colour/spatial")
    assert fell[-1] < fell[0] / 2
    old, new = (load_export(r.path / "export") for r in (first, second))
    assert set(new.heads) == {"edges", "colour"}
    batch = Batch(torch.rand(2, 3, 64, 64))
    assert torch.equal(old(batch)["edges"].spatial, new(batch)["edges"].spatial)
    # a third run goes on from both, though their heads differ in width
    third = run(
        place, "third", start=second.path, teachers=["rule:edges@32"], optim=dict(freeze="trunk"),
        steps=1,
    )  # fmt: skip
    kept = load_export(third.path / "export")(batch)["colour"].spatial
    assert torch.equal(kept, new(batch)["colour"].spatial)


@pytest.mark.slow
def test_heads_of_an_earlier_student_answer_in_the_space_of_the_new_run(first):
    place, batch = first.path.parent, Batch(torch.rand(2, 3, 64, 64))
    # such a rate changes nothing, so what is exported is what the run began with
    again = run(
        place, "again", start=first.path, teachers=["rule:edges@32", "rule:colour@32"], steps=1,
        calibration=3, seed=5, normalise="standardize", optim=dict(lr=1e-12, min_lr=0.0),
    )  # fmt: skip
    before, after = (load_export(r.path / "export")(batch)["edges"] for r in (first, again))
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(old, new, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_student_goes_on_at_another_size(first):
    other = run(
        first.path.parent, "other", start=first.path, teachers=["rule:edges@48"], size=96, steps=1
    )
    assert load_export(other.path / "export").size == (96, 96)


@pytest.mark.slow
def test_adapters_are_merged_into_an_ordinary_export(first):
    pytest.importorskip("peft", reason="peft is not installed; it is in [lora]")
    other = run(
        first.path.parent, "adapted", start=first.path, teachers=["rule:edges@32"],
        optim=dict(lora=4), steps=4,
    )  # fmt: skip
    before, after = (load_file(r.path / "export" / "model.safetensors") for r in (first, other))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    ends = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
    assert changed == {key for key in before if key.startswith("blocks.") and key.endswith(ends)}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(student="test_vit2"), "is test_vit, and this run's is test_vit2"),
        (dict(student_options=["depth=3"]), r"with other options \(depth\)"),
        (dict(pretrained=True), "leave out one of them"),
        (dict(optim=dict(freeze="9")), "the trunk has 6 blocks"),
        (dict(start="nowhere"), "no run, no export"),
    ],
)
def test_what_does_not_fit_the_earlier_student_is_refused_before_any_work(first, fields, match):
    with pytest.raises(ValueError, match=match):
        run(
            first.path.parent, "wrong",
            **(dict(start=first.path, teachers=["rule:edges@32"]) | fields),
        )  # fmt: skip
    assert not (first.path.parent / "wrong").exists()
