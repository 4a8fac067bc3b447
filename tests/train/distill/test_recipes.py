"""Recipes: what they name exists, what they plan is plausible, and each shrinks to a laptop."""

import inspect
import re
from dataclasses import replace

import pytest
import timm

from zoo.commands.distill import distill
from zoo.teachers.name import TeacherName
from zoo.teachers.open import open_teacher
from zoo.train.config import to_json
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.plan_cost import model_costs
from zoo.train.distill.recipes import RECIPES, eupe_proxy, eupe_student, summary_of
from zoo.train.distill.tiny import tiny
from zoo.train.fields import built

PAPERS = [name for name in RECIPES if name not in ("custom", "quickstart", "pretext")]


def names_of(recipe: str) -> list[TeacherName]:
    return [TeacherName.parse(spec.name) for spec in RECIPES[recipe]().teachers]


@pytest.mark.parametrize("recipe", PAPERS)
def test_a_recipe_cites_its_paper_and_says_what_it_changes(recipe):
    told = inspect.getdoc(RECIPES[recipe])
    assert re.search(r"\(\d{4}\.\d{5}\b", told) and "\nChanged: " in told
    assert len(summary_of(RECIPES[recipe])) < 80


@pytest.mark.parametrize("recipe", PAPERS)
def test_every_tag_is_one_that_the_library_has_weights_for(recipe):
    for name in names_of(recipe):
        if name.kind == "timm":
            assert name.name in timm.list_pretrained(name.name.partition(".")[0] + ".*")
        elif name.kind == "open_clip":
            open_clip = pytest.importorskip("open_clip", reason="it is in the extra [teachers]")
            assert (name.name, name.weights) in open_clip.list_pretrained()
        else:
            assert name.kind == "zoo" and timm.is_model(name.name)


@pytest.mark.slow  # the large ones take seconds on the meta device
@pytest.mark.parametrize("recipe", PAPERS)
def test_every_recipe_can_be_planned_without_its_weights(recipe):
    run = RECIPES[recipe]()
    if any(spec.name.startswith("open_clip") for spec in run.teachers):
        pytest.importorskip("open_clip", reason="open_clip is in the extra [teachers]")
    teachers, student, _ = model_costs(run)
    assert len(teachers) == len(run.teachers)
    for spec, teacher in zip(run.teachers, teachers, strict=True):
        assert teacher.spatial_dim and (teacher.summary_dim or not spec.summary)
        assert teacher.flops > 0
    assert student.size == (run.size, run.size)


def test_the_published_sizes_of_am_radios_teachers_are_those_of_the_plan():
    """AM-RADIO (2312.06709, table 1): 633, 1137 and 637 M parameters."""
    pytest.importorskip("open_clip", reason="open_clip is in the extra [teachers]")
    counts = []
    for spec in RECIPES["am_radio"]().teachers:
        teacher = open_teacher(spec.name, device="meta")
        counts.append(round(sum(p.numel() for p in teacher.parameters()) / 1e6))
    assert counts == pytest.approx([633, 1137, 637], abs=2)


@pytest.mark.parametrize("recipe", [*PAPERS, "quickstart", "pretext"])
def test_a_tiny_recipe_keeps_what_makes_the_recipe(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    full = RECIPES[recipe]()
    small = tiny(full)
    assert [TeacherName.parse(s.name).kind for s in small.teachers] == [
        TeacherName.parse(s.name).kind for s in full.teachers
    ]
    for field in ("summary", "spatial", "rate", "follow"):
        assert [getattr(s, field) for s in small.teachers] == [
            getattr(s, field) for s in full.teachers
        ]
    assert replace(small.heads, hidden=full.heads.hidden) == full.heads
    assert replace(small.losses, shift=full.losses.shift) == full.losses
    assert bool(small.losses.shift) == bool(full.losses.shift)
    assert bool(small.sizes) == bool(full.sizes) and small.spectral == full.spectral
    assert (small.normalise, small.data) == (full.normalise, "embedded")
    assert built(Distill, to_json(small)) == small


@pytest.mark.parametrize("kind", ["timm", "open_clip", "hf", "zoo"])
def test_a_tiny_teacher_of_each_library_needs_no_weights(kind, tmp_path, monkeypatch):
    library = dict(open_clip="open_clip", hf="transformers").get(kind, "timm")
    pytest.importorskip(library, reason=f"{library} is in the extra [teachers]")
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = dict(timm="resnet50", open_clip="ViT-B-32/openai", hf="a/b", zoo="eradio_l")
    spec = TeacherSpec(name=f"{kind}:{names[kind]}", summary=0.5)
    (small,) = tiny(Distill(teachers=(spec,))).teachers
    teacher = open_teacher(small.name)
    assert sum(p.numel() for p in teacher.parameters()) < 1e6
    assert teacher.size == (64, 64) and teacher.summary_dim and teacher.spatial_dim
    assert small.summary == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["radio_v2_5", "c_radio_v4", "unic"])
def test_a_tiny_recipe_learns(recipe, tmp_path):
    if recipe != "unic":
        pytest.importorskip("open_clip", reason="open_clip is in the extra [teachers]")
    run = distill(replace(tiny(RECIPES[recipe]()), out=tmp_path / "run", device="cpu"))
    losses = re.findall(
        r'"kind": "train".*?"loss": ([\d.]+)', (run.path / "metrics.jsonl").read_text()
    )
    assert float(losses[-1]) < 0.75 * float(losses[0])
    assert (run.path / "export" / "heads.safetensors").is_file()


@pytest.mark.slow
def test_the_proxy_of_the_first_run_teaches_the_second(tmp_path):
    """EUPE as two runs; the second run's teacher is the first run's export."""
    first = distill(replace(tiny(eupe_proxy()), out=tmp_path / "proxy", device="cpu", steps=4))
    teacher = TeacherSpec(name=f"zoo:local-dir:{first.path / 'export'}")
    second = replace(tiny(eupe_student()), teachers=(teacher,), out=tmp_path / "student", steps=4)
    run = distill(replace(second, device="cpu"))
    assert (run.path / "export" / "config.json").is_file()
    (written,) = eupe_student().teachers
    assert str(eupe_proxy().out / "export" / "model.safetensors") in written.name
