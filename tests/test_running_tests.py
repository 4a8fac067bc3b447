"""How the tests are run: beside other plugins, with our own warnings as errors, long ones apart."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PLUGIN = """
import warnings
import pytest

def pytest_configure(config):
    warnings.warn(pytest.PytestWarning("pytest_noisy is disabled under xdist"))
"""

TESTS = """
import warnings

def test_that_is_quiet():
    pass

def test_that_warns():
    warnings.warn("ours", UserWarning)
"""


def run(place: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the tests of a folder under this project's configuration."""
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", "."]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", *args, "test_two.py"],
        cwd=place, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow  # two processes of pytest and two of xdist
@pytest.mark.parametrize("how", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_a_plugin_may_warn_about_itself_and_our_own_warnings_stay_errors(tmp_path, how):
    """As pytest-benchmark 5.1 does under xdist, and pytest-asyncio 1 without a setting."""
    (tmp_path / "pytest_noisy.py").write_text(PLUGIN)
    (tmp_path / "test_two.py").write_text(TESTS)
    done = run(tmp_path, "-p", "pytest_noisy", *how)
    assert "INTERNALERROR" not in done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "UserWarning: ours" in done.stdout


def test_make_test_leaves_out_what_is_long_and_ci_runs_make():
    makefile = (ROOT / "Makefile").read_text()
    recipes = dict(re.findall(r"^(test[\w-]*):.*\n((?:\t.*\n)+)", makefile, re.MULTILINE))
    marks = {name: re.search(r'-m "?([\w ]+)', recipe) for name, recipe in recipes.items()}
    assert {name: mark and mark[1].strip() for name, mark in marks.items()} == {
        "test": "not long",
        "test-fast": "not slow and not long",
        "test-long": "long",
        "test-oldest": "not long",
    }
    commands = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"make [\w-]+", commands) == ["make check", "make test"]
