"""lmms-eval's own command finds the model by its entry point, and scores it as `zoo eval` does."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval.api.model", reason="lmms-eval is not installed")

import torch

from zoo.cli import main
from zoo.data.conversations import open_part
from zoo.data.generated_vqa import Generated
from zoo.eval.multimodal.answers import generate_answers
from zoo.eval.multimodal.subject import open_image_text_subject

ROOT = Path(__file__).parents[2]
TASK = """
task: zoo_drawn
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function drawn.pictures
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8, until: ["\\n\\n"]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
PICTURES = """
from PIL import Image


def pictures(row):
    return [Image.open(row["picture"])]
"""


def write_task(folder, run):
    """Write a task of drawn questions, for lmms-eval and in LLaVA's form.

    The right answer to two of three is what the model says, where it says something.
    """
    for number in range(24):
        Generated(24, part=1).drawn(number).image.save(folder / f"{number}.png")
    write_rows(folder, answers_of(Generated(24, part=1)))
    subject = open_image_text_subject(
        str(run), device=torch.device("cpu"), precision="float32", batch=8, seed=0
    )
    source = subject.source(open_part(folder))
    said = generate_answers(subject.model, source, range(24), subject.device)
    assert len(set(said)) > 1
    right = answers_of(Generated(24, part=1))
    write_rows(folder, [(said[i] if i % 3 else "") or right[i] for i in range(24)])
    (folder / "zoo_drawn.yaml").write_text(TASK.replace("FOLDER", str(folder)))
    (folder / "drawn.py").write_text(PICTURES)


def answers_of(drawn):
    return [drawn.asked(number)[1] for number in range(24)]


def write_rows(folder, answers):
    rows, ours = [], []
    for number, answer in enumerate(answers):
        question = Generated(24, part=1).asked(number)[0]
        file = folder / f"{number}.png"
        rows.append(dict(question=question, answer=answer, picture=str(file)))
        said = {"human": f"<image>\n{question}", "gpt": answer}
        turns = [{"from": who, "value": text} for who, text in said.items()]
        ours.append(dict(id=str(number), image=file.name, conversations=turns))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "val.json").write_text(json.dumps(ours))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Write what an installation of the package would say of its entry points."""
    about = tmp_path / "site" / "zoo_lmms-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo-lmms\nVersion: 0\n")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"{name} = {place}" for name, place in points["lmms_eval.models"].items()]
    (about / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines, ""]))
    paths = [str(about.parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


@pytest.mark.long
def test_a_task_of_lmms_eval_scores_what_our_own_evaluation_does(tmp_path, installed):
    task, run = tmp_path, tmp_path / "run"
    main(
        f"distill --image-text generated:64 --tower resnet10t@32 --language llama_tiny/random "
        f"--batch 16 --steps 60 --optim.lr 3e-3 --eval-samples 4 --out {run}".split()
    )
    write_task(task, run)
    main(f"eval vlm:{run} --on vqa --data {task} --out {task}/ours.jsonl".split())
    ours = json.loads((task / "ours.jsonl").read_text())["values"]["vqa/exact"]
    command = (
        f"-m lmms_eval --model zoo_vlm --model_args pretrained={run} --tasks zoo_drawn "
        f"--include_path {task} --batch_size 4 --device cpu --output_path {task}/out"
    )
    done = subprocess.run(
        [sys.executable, *command.split()], text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (task / "out").rglob("*results.json")
    theirs = json.loads(found.read_text())["results"]["zoo_drawn"]["exact_match,none"]
    assert 0 < ours < 100
    assert theirs == pytest.approx(ours / 100)
