"""Former names of modules, classes and functions are found, and say what they are called today."""

import ast
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest

import zoo
from zoo.moved import MODULES, NAMES, find_name

ROOT = Path(zoo.__file__).parent


def file_of(module: str) -> Path:
    place = ROOT.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def defined_in(module: str) -> set[str]:
    found = set()
    for node in ast.parse(file_of(module).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign):
            found.add(node.target.id)
    return found


def test_every_former_module_is_gone_or_a_package_and_leads_to_a_module():
    assert not [today for today in MODULES.values() if not file_of(today).is_file()]
    there = [former for former in MODULES if file_of(former).is_file()]
    assert not [former for former in there if file_of(former).name != "__init__.py"]


def test_every_former_name_leads_to_one_that_is_defined():
    wrong = [
        f"{former}.{pair} -> {today}"
        for former, today, names in NAMES
        for pair in names.split()
        if (pair.partition("=")[2] or pair) not in defined_in(today)
        or (file_of(former).is_file() and pair.partition("=")[0] in defined_in(former))
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("module", "name", "today"),
    [
        ("zoo.pipeline", "distill", "zoo.commands.distill.run.distill"),
        ("zoo.train.config", "TeacherSpec", "zoo.train.distill.config.TeacherSpec"),
        ("zoo.train.recipes", "RECIPES", "zoo.train.distill.recipes.RECIPES"),
        ("zoo.train.distill", "distill_step", "zoo.train.distill.step.distill_step"),
        ("zoo.train.turn", "Turn", "zoo.train.distill.plan_step.StepPlan"),
        ("zoo.checkpoint", "read_state", "zoo.weights.read_state"),
        ("zoo.eval.segment", "Segment", "zoo.eval.settings.SegmentSettings"),
        ("zoo.eval.speed", "Case", "zoo.eval.speed.models.Case"),
        ("zoo.teachers", "open_teacher", "zoo.teachers.open.open_teacher"),
        ("zoo.layers.scan_op", "scan", "zoo.kernels.scan.scan"),
    ],
)
def test_a_former_name_is_found_with_a_warning_at_the_line_that_says_it(
    module, name, today, monkeypatch
):
    if not file_of(module).is_file():
        monkeypatch.delitem(sys.modules, module, raising=False)  # as if nobody had named it yet
    with pytest.warns(DeprecationWarning) as seen:
        found = getattr(import_module(module), name)
    place, _, own = today.rpartition(".")
    assert found is getattr(import_module(place), own)
    assert f"{module}.{name} is called {today} now." in [str(w.message) for w in seen]
    assert {w.filename for w in seen} == {__file__}


def test_a_name_that_never_was_is_refused_as_for_any_module():
    config = import_module("zoo.train.config")
    with warnings.catch_warnings():
        with pytest.raises(AttributeError, match=r"'zoo\.train\.config' has no attribute 'Distil'"):
            config.Distil  # noqa: B018
        with pytest.raises(ModuleNotFoundError, match=r"No module named 'zoo\.pipelines'"):
            import_module("zoo.pipelines")
    assert find_name("zoo.train.config", "Distil") is None


@pytest.mark.slow
def test_a_tool_is_run_under_its_former_name():
    command = [sys.executable, "-m", "zoo.eval.mmseg_tool", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "zoo.eval.mmseg_tool is called zoo.eval.openmmlab.mmseg_tool now" in done.stderr
    assert "Name one of mmseg's tools" in done.stderr  # the tool itself
