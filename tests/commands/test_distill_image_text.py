import json
import shutil

import pytest

from zoo.cli import main

pytest.importorskip("transformers")

WORDS = "--tower resnet10t@32 --language llama_tiny/random --batch 8 --eval-samples 16"


def zoo(text):
    main(text.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    zoo(f"distill --image-text generated:48 {WORDS} --steps 3 --out {folder}/run")
    return folder / "run"


def rows(run, kind):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_a_run_ends_with_a_llava_its_controls_and_a_page_of_answers(run):
    about = json.loads((run / "about.json").read_text())
    assert {"after", "shuffled", "blind", "question_alone"} <= about.keys()
    assert [row["step"] for row in rows(run, "eval")] == [0, 3]
    page = (run / "report.html").read_text()
    shown = json.loads((run / "questions.json").read_text())
    assert shown and all(one["question"] in page for one in shown)
    assert page.count("data:image/png") >= len(shown)


@pytest.mark.long
def test_a_run_that_goes_on_ends_where_one_that_was_not_stopped_does(run, tmp_path):
    words = f"distill --image-text generated:48 {WORDS} --every.checkpoint 2 --every.log 1"
    zoo(f"{words} --steps 3 --out {tmp_path}/whole")
    zoo(f"{words} --steps 3 --out {tmp_path}/part")
    for step in (tmp_path / "part" / "checkpoints").glob("*3*"):
        shutil.rmtree(step)
    zoo(f"distill --resume {tmp_path}/part")
    whole, part = (rows(tmp_path / name, "train") for name in ("whole", "part"))
    assert whole == part
    assert rows(tmp_path / "whole", "eval")[-1] == rows(tmp_path / "part", "eval")[-1]


def test_a_plan_writes_nothing_and_says_what_learns(tmp_path, capsys):
    zoo(
        f"distill --image-text generated:48 {WORDS} --learn projector --steps 3 "
        f"--out {tmp_path}/run --dry-run"
    )
    said = capsys.readouterr().out
    assert "projector learn for 3 steps of 8" in said
    assert not (tmp_path / "run").exists()


def test_only_the_parts_that_are_named_learn(run, tmp_path):
    from zoo.multimodal.open import open_vlm

    zoo(
        f"distill --image-text generated:48 --start {run} --learn projector --batch 8 --steps 2 "
        f"--eval-samples 16 --out {tmp_path}/run"
    )
    before, after = (open_vlm(str(place)).state_dict() for place in (run, tmp_path / "run"))
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and all("multi_modal_projector" in name for name in moved)


def test_a_model_is_measured_by_questions_with_both_controls(run, capsys, tmp_path):
    zoo(
        f"eval vlm:{run} --on sight,prefill --sight.samples 16 --prefill.rounds 1 "
        f"--out {tmp_path}/x.jsonl"
    )
    sight, prefill = map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())
    assert {"sight/exact", "sight/shuffled", "sight/blind"} <= sight["values"].keys()
    assert prefill["values"]["prefill/image_tokens"] == 1


def test_teachers_of_vision_beside_one_that_writes(run, tmp_path, capsys):
    """Each behind PHI-S and a projection of its own, on its own grid or the tower's."""
    from zoo.train.checkpoint import checkpoints, read_checkpoint

    words = (
        f"distill --image-text generated:48 {WORDS} --teachers vlm:{run} "
        "timm:test_vit/random@64,summary=0.25 rule:edges@32,spatial=0.5 "
        "rule:plan-human@32,spatial=0,summary=2,loss=cross_entropy --losses.kl 1 --vision 1 "
        f"--steps 2 --every.log 1 --every.checkpoint 1 --out {tmp_path}/taught"
    )
    zoo(f"{words} --dry-run")
    assert "test_vit" in capsys.readouterr().out
    zoo(words)
    logged = rows(tmp_path / "taught", "train")
    names = {"run/kl", "run/vision", "test_vit/vision", "edges/vision", "ce"}
    names |= {"test_vit/summary", "plan-human/summary"}
    weights = {"edges/vision": 0.5, "test_vit/summary": 0.25, "plan-human/summary": 2}
    assert {key for key in logged[0] if "/" in key or key == "ce"} == names
    weighed = sum(logged[1][n] * weights.get(n, 1) for n in names)
    assert logged[1]["loss"] == pytest.approx(weighed, rel=1e-5)
    last = checkpoints(tmp_path / "taught" / "checkpoints")[-1]
    learnt = read_checkpoint(last)["parts"]
    assert {"test_vit.weight", "plan-human/summary.weight"} <= learnt["projections"].keys()
    shutil.rmtree(last)
    zoo(f"distill --resume {tmp_path}/taught")
    assert rows(tmp_path / "taught", "train")[-1] == logged[-1]


def test_a_teacher_s_features_are_learnt_on_the_coarser_grid_with_variance_1():
    import torch

    from zoo.features import Features
    from zoo.multimodal.image_text import ImageText
    from zoo.train.distill.config import TeacherSpec
    from zoo.train.distill.image_text_task import fit_features
    from zoo.train.distill.map_teacher import MapTeacher

    class Colours:
        """Each pixel of a map of 8 x 8: the colour there, of two channels ten times as large."""

        name, summary_dim, spatial_dim = "colours", 3, 4

        def __call__(self, batch):
            x = batch.at((8, 8)).permute(0, 2, 3, 1)
            return Features(x.mean((1, 2)), torch.cat([x, x[..., :1] * x[..., 1:2] * 10], -1))

    torch.manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 32, 64), dtype=torch.uint8)
    tokens = None
    batch = ImageText(tokens, tokens, [images], [range(16)])
    teacher = MapTeacher(Colours(), TeacherSpec(name="rule:colour", summary=0.0), cell=8)
    seen = teacher(images).spatial
    assert seen.shape == (16, 4, 8, 4)
    normalizer, summary = fit_features(teacher, [batch])
    normal = normalizer(seen).flatten(0, 2)
    assert (normal.var(0) - 1).abs().max() < 1e-4 and normal.mean(0).abs().max() < 1e-4
    assert summary is None

    # a constant answer's loss by angle is 1, by the definition of the dispersion
    spec = TeacherSpec(name="rule:colour", spatial=0.0, loss="angle")
    teacher = MapTeacher(Colours(), spec, cell=8)
    assert fit_features(teacher, [batch]) == (None, 3)
    theirs = teacher(images).summary
    assert teacher.summary_loss(theirs.mean(0).expand(16, 3), theirs) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    "words, says",
    [
        ("distill --image-text generated:48 --language llama_tiny/random", "--tower is missing"),
        ("distill --image-text nowhere " + WORDS, "no data at nowhere"),
        ("distill --image-text generate:48 " + WORDS, "Did you mean generated:48?"),
        (f"distill --image-text generated:48 {WORDS} --length 8", "longer than 8 tokens"),
        (f"distill --image-text generated:48 {WORDS} --learn tower tower", "each once"),
        (f"distill --image-text generated:48 {WORDS} --vision 1", "name --teachers vlm:RUN"),
        (f"distill --image-text generated:48 {WORDS} --stages prealign", "is for a mixture"),
        (f"distill --image-text generated:48 {WORDS} --teachers timm:test_vit", "give --vision 1"),
        (
            f"distill --image-text generated:48 {WORDS} --teachers tim:test_vit --vision 1",
            "Did you mean timm:test_vit?",
        ),
        (
            f"distill --image-text generated:48 {WORDS} --teachers timm:test_vot --vision 1",
            "Did you mean test_vit",
        ),
        (
            f"distill --image-text generated:48 {WORDS} --vision 1 --teachers rule:edges,rate=0.5",
            "rate= is of runs on images alone",
        ),
        (
            f"distill --image-text generated:48 {WORDS} --vision 1 --teachers rule:plan-human@32",
            "or its summary alone: ,spatial=0,summary=1",
        ),
        (
            f"distill --image-text generated:48 {WORDS} --vision 1 "
            "--teachers rule:colour@32,summary=1,loss=cross_entropy",
            "probabilities that add up to 1",
        ),
        (
            f"distill --image-text generated:48 {WORDS} --vision 1 --losses.kl 1 "
            "--teachers rule:edges",
            "no teacher writes text",
        ),
        (
            f"distill --image-text generated:48 {WORDS} --tower-options output_stride=7",
            "Correct --tower-options",
        ),
        ("eval vlm:UNFINISHED --on sight", "finish it with zoo distill --resume"),
        ("eval RUN --on knn --data x", "is a model of images and text; measure it with --on vqa"),
        ("eval vlm:nowhere --on sight", "no model of images and text in nowhere"),
        ("eval vlm:RUN --on sight,perplexity", "name them in two commands"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words, says, run, tmp_path, capsys):
    out = f" --out {tmp_path}/x" if words.startswith("distill") else ""
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "config.json", tmp_path / "begun")
    words = words.replace("UNFINISHED", str(tmp_path / "begun")).replace("RUN", str(run))
    with pytest.raises(SystemExit):
        zoo(words + out)
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
