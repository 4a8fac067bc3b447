"""The command line: what it shows, and what it says to wrong input."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from zoo.cli import COMMANDS, main
from zoo.experiments import EXPERIMENTS


@pytest.fixture
def images(tmp_path):
    for split, each in (("train", 6), ("val", 4)):
        for number, name in enumerate(("a", "b")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                pixels = np.full((32, 32, 3), 90 * number + 5 * i, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_help_names_every_command_and_every_experiment(capsys):
    main([])
    told = capsys.readouterr().out
    for name in [*COMMANDS, *(f"experiment {name}" for name in EXPERIMENTS)]:
        assert f"\n  zoo {name} " in told
    main(["experiment", "--help"])
    told = capsys.readouterr().out
    for name in EXPERIMENTS:
        assert f"zoo experiment {name}: " in told


NOTICE = "The quickstart's ImageNet networks are not installed"


def refusal(capsys, *args: str) -> str:
    """Run a command that must be refused; give its one line."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(NOTICE)]
    assert len(told) == 1 and told[0].startswith("zoo: ")
    return told[0]


TEACHER = ["--teachers", "timm:resnet18/random"]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["distil"], "Did you mean zoo distill"),
        (["distill", "quikstart"], "Did you mean quickstart"),
        (["distill", "--data", "IMAGES"], "There is no teacher"),
        (["distill", "--teachers", "timm:resnet81/random"], "Did you mean resnet"),
        (["distill", *TEACHER, "--student", "eradio_nan"], "eradio_nano"),
        (["distill", *TEACHER, "--data", "NOWHERE"], "There is no data at"),
        (["distill", *TEACHER, "--data", "EMPTY"], "There is no image in"),
        (["distill", *TEACHER, "--out", "IMAGES"], "exists"),
        (["distill", "--resume", "NOWHERE"], "There is no run in"),
        (["distill", "--views", "2"], "--views is called --view-epochs now"),
        (["distill", "--heads.inner=2"], "--heads.inner is called --heads.num-inner now"),
        (["eval", "resnet18"], "--data"),
        (["eval", "resnet81", "--data", "IMAGES"], "Did you mean"),
        (["eval", "resnet18", "--data", "IMAGES", "--on", "kn"], "Did you mean knn?"),
        (["eval", "resnet18", "--data", "lineer=IMAGES"], "Did you mean linear?"),
        (["eval", "resnet18", "--on", "knn", "--data", "linear=IMAGES"], "not among --on knn"),
        (["eval", "resnet18", "--data", "NOWHERE", "--dry-run"], "There is no data at NOWHERE"),
        (["eval", "--on", "knn"], "Name what to measure"),
        (["eval", "--features", "EMPTY"], "zoo embed writes one"),
        (["eval", "--features", "EMPTY", "--on", "speed"], "serves knn, linear and fewshot"),
        (["eval", "--compare", "resnet18", "resnet34"], "needs data"),
        (["embed", "IMAGES", "IMAGES", "--model", "resnet18"], "is not empty"),
        (["report"], "Name at least one"),
        (["distill", "--resume=NOWHERE"], "There is no run in NOWHERE"),
        (["distill", "--resume="], "There is no run in ."),
        (["distill", "--out", "a", "--out=b"], "--out is given twice"),
        (["distill", "--compile-teachers", "--no-compile_teachers"], "is given twice"),
        (["detect", "--resume=NOWHERE"], "There is no run in NOWHERE"),
        (["eval", "resnet18", "--on", "speed", "--on", "knn"], "--on is given twice"),
        (["eval", "resnet18", "--on", "speed", "--out", "notes.md"], "ends in .jsonl"),
        (["eval", "resnet18", "--on", "speed", "--out", "/proc/a.jsonl"], "Cannot write to /proc"),
        (["eval", "resnet18", "--on", "speed", "--out", "NOTES.jsonl"], "Line 1 of NOTES.jsonl"),
        (["eval", "test_vit", "--on", "speed", "--size", "1"], "cannot look at 1 px"),
        (["eval", "test_vit", "--on", "speed", "--size", "63"], "cannot look at 63 px"),
        (
            [
                "bench",
                "models",
                "test_vit",
                "--peer",
                "test_vit",
                "--size",
                "63",
                "--device",
                "cpu",
            ],
            "No case could be measured",
        ),
        (["report", "NOWHERE", "EMPTY"], "NOWHERE"),
        (["report", "NOWHERE"], "NOWHERE"),
        (["list", "nothing*"], "No model matches"),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(
    args, told, images, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "NOTES.jsonl").write_text('{"note": "do not lose me"}\n')
    args = [str(images) if arg == "IMAGES" else arg for arg in args]
    assert told in refusal(capsys, *args)


def test_a_mistyped_teacher_kind_is_refused_by_the_parser(images, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--teachers", "timn:resnet18", "--data", str(images)])
    assert stop.value.code == 2
    assert "timn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        ("timm:vit_base_patch16_224.dino", "Then give timm:vit_base_patch16_224.dino/FOLDER/model"),
        ("hf:nobody/nothing", "hf:FOLDER; it must hold config.json"),
        ("zoo:local-dir:NOWHERE", "NOWHERE holds no timm checkpoint"),
        ("timm:test_vit/nowhere.pth", "There is no weight file nowhere.pth"),
        ("timm:test_vit/random@100", "take @96 or @112"),
        ("rule:edges@50", "take @48 or @64"),
        ("torch:os.getcwd", "torch:os.getcwd returns a str; a teacher is an nn.Module"),
        ("torch:os.mkdir", "torch:os.mkdir could not be called without arguments"),
        ("torch:flat_teacher.train", "does not point at a function"),
        ("timm:test_vit/damaged.safetensors", "weights of timm:test_vit could not be loaded"),
        ("zoo:local-dir:damaged", "damaged could not be loaded"),
        ("hf:export", "a student's export, in timm's form; write zoo:local-dir:export"),
        ("cache:EMPTY", "give their features by --cache FOLDER"),
        (
            "torch:flat_teacher.make@32",
            "has no spatial output, and its spatial loss has the weight",
        ),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_written(
    teacher, told, images, tmp_path, capsys, monkeypatch
):
    if teacher.startswith("hf:"):
        pytest.importorskip("transformers", reason="transformers is in the extra [teachers]")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flat = "from torch import nn\n\ndef make():\n    return nn.Flatten()\n"
    (tmp_path / "flat_teacher.py").write_text(flat)
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 100)
    for name in ("damaged", "export"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"architecture": "test_vit"}')
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "export" / "heads.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    args = ("--teachers", teacher, "--data", str(images), "--device", "cpu", "--size", "64")
    assert told in refusal(capsys, "distill", *args, "--out", "run")
    assert not (tmp_path / "run").exists()


def test_the_recipes_are_listed_with_a_line_each(capsys):
    from zoo.train.distill.recipes import RECIPES, summary_of

    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    told = capsys.readouterr().out
    assert all(f"{name}: {summary_of(recipe)}" in told for name, recipe in RECIPES.items())
    main(["list", "recipes"])
    told = capsys.readouterr().out
    assert all(name in told for name in RECIPES)
    assert "3 multi" in told and "653 M images" in told and "paper 614 M" in told  # AM-RADIO


@pytest.mark.slow
def test_a_papers_recipe_runs_on_a_laptop(tmp_path, capsys, monkeypatch):
    pytest.importorskip("open_clip", reason="open_clip is in the extra [teachers]")
    monkeypatch.chdir(tmp_path)
    main(["distill", "am_radio", "--tiny", "--steps", "10", "--device", "cpu"])
    assert "runs/am_radio_tiny/2-high/export" in capsys.readouterr().out
    for stage in ("1-low", "2-high"):
        run = json.loads((tmp_path / "runs" / "am_radio_tiny" / stage / "config.json").read_text())
        assert run["steps"] == 10 and run["losses"]["spatial"] == "hybrid"


@pytest.mark.parametrize("command", [[], ["distill"], ["eval"], ["embed"], ["report"], ["list"]])
def test_help_shows_an_example(command, capsys):
    if command:
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        assert stop.value.code == 0
    else:
        main(["--help"])
    assert f"zoo {' '.join(command)}".strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("distill --text", "--losses.kl"),
        ("distill --image-text", "--tower"),
        ("mask --text", "--length"),
        ("distill --text=wiki.txt", "--losses.kl"),
    ],
)
def test_a_kind_of_run_without_a_value_shows_its_own_help(words, option, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*words.split(), "--help"])
    assert stop.value.code == 0
    assert option in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    ["--help", "--version", "distil", "list", "list recipes"]
    + [f"{name} --help" for name in COMMANDS]
    + ["bench models --help", "bench distill --help", "eval --on segment,depth,detect --help"]
    + ["experiment phi_s --help", "experiment students --tiny --help"]
    + ["distill am_radio --tiny --help", "distill --teachers timn:x"],
)
def test_what_needs_no_model_is_answered_without_torch(command):
    code = (
        "import sys\nfrom zoo.cli import main\ntry:\n    main(sys.argv[1:])\n"
        "except SystemExit:\n    pass\nprint(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "zoo" in loaded and not loaded & {"torch", "timm", "numpy", "PIL"}


def test_the_list_names_each_family_with_parameters(capsys):
    main(["list", "eradio_nano"])
    assert "0.75 M" in capsys.readouterr().out


def test_a_dry_run_of_three_large_teachers_allocates_nothing(images, tmp_path, capsys):
    teachers = ["vit_large_patch16_224", "vit_large_patch14_dinov2", "vit_large_patch16_siglip_256"]
    named = " ".join(f"timm:{name}" for name in teachers)
    command = (
        f"distill --data {images} --teachers {named} --student vit_large_patch16_224 --dry-run"
    )
    main([*command.split(), "--out", str(tmp_path / "run"), "--device", "cpu"])
    told = capsys.readouterr().out
    assert all(f"teacher {name}" in told for name in teachers)
    assert "303.30 M" in told and "37x37" in told and "steps/s" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_from_the_command_line_ends_with_a_report_and_can_be_evaluated(
    images, tmp_path, capsys
):
    run = tmp_path / "run"
    command = (
        f"distill --data {images} --teachers timm:test_vit/random@64,summary=0.5 "
        "timm:test_convnext/random@64 --student test_efficientnet --size 64 --batch 4 --steps 6 "
        f"--calibration 2 --out {run} --optim.lr 1e-3 --every.log 2 --every.checkpoint 4 "
        "--device cpu"
    )
    main(command.split())
    told = capsys.readouterr().out
    assert str(run / "report.html") in told and "local-dir:" in told
    assert (run / "report.html").stat().st_size > 10_000
    main(["eval", str(run), "--out", str(tmp_path / "numbers.jsonl")])
    main(["eval", str(run / "export"), "--data", str(images)])
    main(["report", str(run)])
    numbers = json.loads((tmp_path / "numbers.jsonl").read_text())["values"]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (last,) = [row for row in logged if row.get("arm") == "student" and row["step"] == 6]
    for name in ("fidelity/test_vit", "fidelity/min", "knn/top1"):
        assert numbers[name] == pytest.approx(last[name], rel=1e-5)
    # from the last checkpoint the same files come, and from an earlier one others
    form = json.loads((run / "about.json").read_text())["student"]["weights"]
    assert exported(run, "again", form) == (run / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    assert exported(run, "earlier", form) != (run / "export" / "model.safetensors").read_bytes()


def exported(run, name: str, form: str) -> bytes:
    main(["export", str(run), "--out", str(run.parent / name), "--form", form])
    return (run.parent / name / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        "prune vlm:made/vqq --to params=0.5 --score random --dry-run",
        "prune lm:made/vqq --to params=0.5 --score random --dry-run",
        "distill --image-text generated:8 --language llama/random --tower vlm:made/vqq --dry-run",
        "distill --image-text generated:8 --language llama/random --tower adaptors:made/vqq "
        "--dry-run",
        "distill --text made/vqq --student llama_tiny/random --losses.kl 0 --losses.ce 1 --dry-run",
        "distill --text README --student lm:made/vqq --losses.kl 0 --losses.ce 1 --dry-run",
        "distill --data made/vqq --teachers timm:test_vit/random --student test_vit --out out",
        "eval timm:test_vit/random --on knn --data made/vqq",
        "eval vlm:made/vqq --on sight",
        "export made/vqq --size half --out out",
        "report made/vqq",
    ],
)
def test_commands_name_what_lies_beside_a_folder_that_is_not_there(
    words, tmp_path, monkeypatch, capsys
):
    (tmp_path / "made" / "vqa").mkdir(parents=True)
    (tmp_path / "README").write_text("a text " * 1000)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(words.split())
    assert "Did you mean made/vqa?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_that_data_are_not_here(tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    words = "distill --teachers timm:test_vit/random --student test_vit --size 32 --dry-run --data"
    main([*words.split(), "photoz"])
    assert "data: there is nothing at photoz here. Did you mean photos?" in capsys.readouterr().out
    main([*words.split(), "embedded"])
    assert "there is nothing at" not in capsys.readouterr().out
