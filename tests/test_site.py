"""The web site of `make docs`: what a page links to must be there."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
needs_mkdocs = pytest.mark.skipif(
    not find_spec("mkdocstrings_handlers"), reason="the site is built with the extra [docs]"
)


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the pages beside the same code, to break things in."""
    pages = {"docs", *(path.name for path in ROOT.glob("*.md"))}
    for path in ROOT.iterdir():
        if path.name in pages:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
        elif path.name not in (".git", ".venv", "site"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def build(place: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)


@pytest.mark.slow
@needs_mkdocs
def test_the_site_builds_and_follows_links_out_of_its_folder(copy):
    done = build(copy)
    assert not done.returncode, done.stderr
    page = (copy / "site" / "experiments.html").read_text()
    (picture,) = re.findall(r'src="(files/[^"]*phi_s.png)"', page)
    assert (copy / "site" / picture).is_file()
    assert 'href="models.html"' in (copy / "site" / "index.html").read_text()
    assert "TeacherSpec" in (copy / "site" / "api" / "train.html").read_text()


@pytest.mark.slow
@needs_mkdocs
def test_what_leads_nowhere_fails(copy):
    planted = {
        "docs/models.md": "[a](nowhere.md) [b](house.md#nothing) [c](../train/nowhere.py)",
        "README.md": "[d](docs/missing.md)",
        "docs/orphan.md": "# A page that no menu shows",
    }
    for page, text in planted.items():
        with (copy / page).open("a") as file:
            file.write(f"\n{text}\n")
    done = build(copy)
    assert done.returncode
    for told in ("nowhere.md", "#nothing", "nowhere.py", "missing.md", "orphan.md"):
        assert told in done.stderr, told


@pytest.mark.slow
@needs_mkdocs
def test_a_name_that_is_not_in_the_code_fails(copy):
    (copy / "docs" / "api" / "train.md").write_text("# Training\n\n::: zoo.train.nowhere\n")
    done = build(copy)
    assert done.returncode and "zoo.train.nowhere" in done.stderr


def test_make_docs_counts_warnings():
    """With --quiet mkdocs drops a warning before it is counted, and --strict passes."""
    (command,) = re.findall(r"^MKDOCS := (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "--strict" in command and not re.search(r"--quiet|-q\b", command)


def test_the_pages_of_the_api_name_what_there_is():
    """Without mkdocs, and in no time: a module, or a module and what stands in it."""
    wrong = []
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            module, _, inside = name.rpartition(".")
            file = _file_of(module)
            if not _file_of(name) and not (file and re.search(rf"\b{inside}\b", file.read_text())):
                wrong.append(f"{page.name}: {name}")
    assert not wrong


def _file_of(module: str) -> Path | None:
    place = ROOT.joinpath(*module.split("."))
    return next(
        (path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file()), None
    )
