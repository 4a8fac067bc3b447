"""What the documentation shows must run."""

import re
import shlex
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
MODELS, DISTILLATION = DOCS / "models.md", DOCS / "distillation.md"


def test_the_table_of_models_has_every_name_and_tag():
    import timm

    import zoo

    text = MODELS.read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)", text, re.MULTILINE))
    ours = [
        n for n in zoo.list_models() if not re.match(r"faster_vit|mamba_vision|eradio(_large|$)", n)
    ]
    assert sorted(n for n in rows if n in zoo.list_models()) == ours
    for name in ours:
        for tagged in timm.list_pretrained(f"{name}.*"):
            assert f"`{tagged.partition('.')[2]}`" in rows[name], tagged


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter and its dependencies warn about themselves
def test_the_code_in_the_page_of_models_runs(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", MODELS.read_text(), re.DOTALL | re.MULTILINE)
    runnable = [block for block in blocks if ".pth.tar" not in block]  # those need official files
    assert len(runnable) == len(blocks) - 1 == 2
    scope = {}
    for block in runnable:
        exec(compile(block, str(MODELS), "exec"), scope)
    assert (tmp_path / "nano.onnx").exists()


def commands(page: Path) -> list[list[str]]:
    """Return the `zoo` commands of a page's `sh` blocks; `console` is for those that need a GPU."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    words = (shlex.split(line) for line in lines)
    return [line[line.index("zoo") + 1 :] for line in words if "zoo" in line]


def test_the_page_of_distillation_has_every_recipe():
    from zoo.train.distill.recipes import RECIPES

    named = set(re.findall(r"`(\w+)`", DISTILLATION.read_text()))
    assert set(RECIPES) - {"custom", "quickstart"} <= named


@pytest.mark.slow  # nine small runs
def test_the_commands_of_the_page_of_distillation_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("open_clip", reason="open_clip is in the extra [teachers]")
    from zoo.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    code = re.findall(r"^```python\n(.*?)^```", DISTILLATION.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "my_teacher.py").write_text(code[0])
    for args in commands(DISTILLATION):
        main(args)
    exec(compile(code[1], str(DISTILLATION), "exec"), {})
    told = capsys.readouterr().out
    assert "'edges': (1, 4, 4, 8)" in told and told.count("report.html") == 8


@pytest.mark.slow  # nine commands, each a little
def test_the_commands_of_the_page_of_evaluation_run(tmp_path, monkeypatch, capsys):
    import numpy as np
    from PIL import Image

    from zoo.cli import main

    monkeypatch.chdir(tmp_path)
    for number in range(40):
        folder = tmp_path / "photos" / ("dark", "light")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.full((40, 40, 3), 100 * (number % 2) + number, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    for args in commands(DOCS / "evaluation.md"):
        main(args)
    told = capsys.readouterr().out
    assert "test_convnext against" in told.replace("\n", " ") and "all.html" in told
    assert (tmp_path / "features" / "vit" / "index.json").is_file()


@pytest.mark.slow
def test_the_commands_of_the_page_of_dense_tasks_run(tmp_path, monkeypatch, capsys):
    import json

    import numpy as np
    from PIL import Image

    from zoo.cli import main

    monkeypatch.chdir(tmp_path)
    streets, draws = tmp_path / "streets", np.random.default_rng(0)
    for name in ("images/train", "images/val", "masks/train", "masks/val"):
        (streets / name).mkdir(parents=True)
    for number in range(8):
        truth = draws.integers(2, size=(4, 5), dtype=np.uint8).repeat(20, axis=0).repeat(20, axis=1)
        part = ("train", "val")[number % 2]
        Image.fromarray(truth * 200).save(streets / "images" / part / f"{number}.png")
        Image.fromarray(truth).save(streets / "masks" / part / f"{number}.png")
    (streets / "classes.json").write_text(json.dumps(["road", "sky"]))
    (tmp_path / "photos").symlink_to(streets / "images")
    for args in commands(DOCS / "dense.md"):
        main(args)
    told = capsys.readouterr().out
    assert "segment/class/road" in told and "correspondence/pck0.1" in told
