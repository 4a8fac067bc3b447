"""Recipes: what they name exists, what they plan is plausible, and each shrinks to a laptop."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm

from zoo.commands.distill.stages import distill_stages
from zoo.teachers.name import TeacherName
from zoo.teachers.open import open_teacher
from zoo.train.config import to_json
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.plan_cost import model_costs
from zoo.train.distill.recipes import IMAGES, RECIPES, summary_of
from zoo.train.distill.setup import check_mosaics
from zoo.train.distill.stages import placed, plannable, stages_of
from zoo.train.distill.tiny import tiny, tiny_stages
from zoo.train.fields import built

PAPERS = [name for name in RECIPES if name not in ("custom", "quickstart", "pretext")]


def names_of(recipe: str) -> list[TeacherName]:
    stages = stages_of(RECIPES[recipe]())
    return [TeacherName.parse(spec.name) for run in stages.values() for spec in run.teachers]


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
        else:  # the student of an earlier stage
            assert name.kind == "zoo" and re.match(r"local-dir:\{\w+\}/export$", name.name)


@pytest.mark.slow  # the large ones take seconds on the meta device
@pytest.mark.parametrize("recipe", PAPERS)
def test_every_recipe_can_be_planned_without_its_weights(recipe):
    for run in plannable(stages_of(RECIPES[recipe]())).values():
        if any(spec.name.startswith("open_clip") for spec in run.teachers):
            pytest.importorskip("open_clip", reason="open_clip is in the extra [teachers]")
        teachers, student, _ = model_costs(run)
        assert len(teachers) == len(run.teachers)
        for spec, teacher in zip(run.teachers, teachers, strict=True):
            assert teacher.spatial_dim and (teacher.summary_dim or not spec.summary)
            assert teacher.flops > 0
        assert student.size == (run.size, run.size)
        check_mosaics(run)


def test_the_published_sizes_of_am_radios_teachers_are_those_of_the_plan():
    """AM-RADIO (2312.06709, table 1): 633, 1137 and 637 M parameters."""
    pytest.importorskip("open_clip", reason="open_clip is in the extra [teachers]")
    counts = []
    for spec in RECIPES["am_radio"]()["high"].teachers:
        teacher = open_teacher(spec.name, device="meta")
        counts.append(round(sum(p.numel() for p in teacher.parameters()) / 1e6))
    assert counts == pytest.approx([633, 1137, 637], abs=2)


@pytest.mark.parametrize("recipe", [*PAPERS, "quickstart", "pretext"])
def test_a_tiny_recipe_keeps_what_makes_the_recipe(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    stages = stages_of(RECIPES[recipe]())
    shrunk = tiny_stages(stages)
    assert list(shrunk) == list(stages)
    for full, small in zip(stages.values(), shrunk.values(), strict=True):
        assert [TeacherName.parse(s.name).kind for s in small.teachers] == [
            TeacherName.parse(s.name).kind for s in full.teachers
        ]
        for field in ("summary", "spatial", "rate", "follow"):
            assert [getattr(s, field) for s in small.teachers] == [
                getattr(s, field) for s in full.teachers
            ]
        assert replace(small.heads, hidden=full.heads.hidden) == full.heads
        assert replace(small.losses, shift=full.losses.shift) == full.losses
        for field in ("sizes", "batches", "start"):
            assert bool(getattr(small, field)) == bool(getattr(full, field))
        assert bool(small.losses.shift) == bool(full.losses.shift)
        assert small.spectral == full.spectral and small.start == full.start
        assert (small.normalise, small.data) == (full.normalise, "embedded")
        assert built(Distill, to_json(small)) == small


def test_the_rate_of_a_paper_stands_beside_the_papers_batch():
    """AM-RADIO 3.4 and PHI-S A.6: 1e-3 at 1,024. UNIC: 3e-4 for each 256. DeiT: 5e-4 at 512."""
    rates = dict(am_radio=1e-3 / 1024, eradio=1e-3 / 1024, radio_v2_5=1e-3 / 1024)
    rates |= dict(c_radio_v4=1e-3 / 1024, eupe=1e-3 / 1024)  # whose papers say none: RADIO's
    rates |= dict(unic=3e-4 / 256, proteus=5e-4 / 512)
    for name, each in rates.items():
        for run in stages_of(RECIPES[name]()).values():
            assert run.optim.lr == pytest.approx(each * run.batch), name
            assert run.num_slices > 1 or name == "proteus"


def test_a_student_sees_about_as_many_images_as_that_of_its_paper():
    for name, paper in IMAGES.items():
        ours = sum(run.steps * run.samples for run in stages_of(RECIPES[name]()).values())
        assert ours == pytest.approx(paper, rel=0.1), name


def test_the_stages_of_am_radio_are_those_of_the_paper():
    low, high = RECIPES["am_radio"]().values()
    assert (low.size, low.sizes, low.batch, len(low.teachers)) == (256, (), 1024, 2)
    assert high.start == Path("{low}") and high.student == low.student
    images = {size: high.steps / 2 * n for size, n in zip(high.sizes, high.batches, strict=True)}
    assert images == {432: 300_000 * 1024, 1024: 300_000 * 128}
    assert {spec.name.split(":")[1][:4]: spec.at for spec in high.teachers} == {
        "ViT-": 432, "vit_": 432, "samv": 1024,
    }  # fmt: skip


def test_unic_drops_paths_and_does_not_clip():
    """As the authors' own settings have it (naver/unic, 2024-08)."""
    optim = RECIPES["unic"]().optim
    assert (optim.drop_path, optim.clip, optim.ema) == (0.1, 0.0, 0.0)


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
    stages = tiny_stages(stages_of(RECIPES[recipe]()))
    stages = {
        name: replace(run, out=tmp_path / "run", device="cpu", steps=8 if run.start else run.steps)
        for name, run in stages.items()
    }
    run = distill_stages(stages)  # later ones go on from what the first has learnt
    first = next(iter(placed(stages).values())).out
    losses = re.findall(
        r'"kind": "train".*?"loss": ([\d.]+)', (first / "metrics.jsonl").read_text()
    )
    assert float(losses[-1]) < 0.75 * float(losses[0])
    assert (run.path / "export" / "heads.safetensors").is_file()
