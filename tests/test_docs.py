"""What the documentation shows must run: every block of every page, or the block says why not.

A page is run as a reader would: from the top, in an empty folder. `sh` and `python` blocks are run,
`text` blocks and bare ones hold no command. A block that begins with

    # Not run in the tests: needs a GPU.

is only read: its Python compiles, its `zoo` commands exist. Lines of `make`, `pip` and
`.venv/bin/` set up a machine; of them targets, extras, versions and files must be there. A python
block that begins with the name of a file is that file; below `zoo/`, `teachers/`, `students/`,
`train/` or `eval/` it is a module of the package for as long as the page runs.
"""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
}
NEEDS = {"a network", "a GPU", "your data", "an official file", "Optuna", "TRL", "lmms-eval"}
ROOMS = ("zoo", "teachers", "students", "train", "eval")


class Block(NamedTuple):
    where: str
    language: str
    text: str

    @property
    def needs(self) -> str | None:
        """What it says that it needs, and that a test has not."""
        found = re.match(r"# Not run in the tests: needs (.+)\.\n", self.text)
        return found and found[1]

    @property
    def file(self) -> str | None:
        found = self.language == "python" and re.match(r"# ([\w/]+\.py)\n", self.text)
        return found[1] if found else None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line of a shell block, without assignments in front of a command."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        for line in words:
            while line and re.match(r"\w+=", line[0]):
                line.pop(0)
        return [line for line in words if line]

    @property
    def runs(self) -> bool:
        if self.language not in ("sh", "python") or self.needs or self.file:
            return False
        return self.language == "python" or any(w[0] in ("zoo", "python") for w in self.commands)


def blocks(page: str) -> list[Block]:
    text = PAGES[page].read_text()
    found = re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [
        Block(f"{page}:{text.count(chr(10), 0, match.start()) + 1}", match[1], match[2])
        for match in found
    ]


# -- every block is of a kind that these tests know ----------------------------------------------


def check_zoo(words: list[str], where: str) -> None:
    from zoo.cli import COMMANDS

    first = words[0] if words else "--help"
    assert first in COMMANDS or first.startswith("--"), f"{where}: no `zoo {first}`"


def check_make(words: list[str], where: str) -> None:
    targets = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wrong = [word for word in words if "=" not in word and word not in targets]
    assert not wrong, f"{where}: no `make {wrong[0]}`"


def check_pip(words: list[str], where: str) -> None:
    import zoo

    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        for extras in re.findall(r"\[([\w,]+)\]$", word):
            assert set(extras.split(",")) <= set(known), f"{where}: {word}"
        version = re.search(r"backbone_zoo-([\d.]+)(?=-py3|\.tar)", word)
        assert not version or version[1] == zoo.__version__, f"{where}: {word}"


def check_python(words: list[str], where: str) -> None:
    for word in words:
        known = not word.startswith(("benchmarks/", "tests/")) or (ROOT / word).exists()
        assert known, f"{where}: no {word}"


def check_torchrun(words: list[str], where: str) -> None:
    check_zoo(words[words.index("zoo") + 1 :], where)


CHECKS: dict[str, Callable[[list[str], str], None]] = {
    "zoo": check_zoo,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "torchrun": check_torchrun,
    ".venv/bin/python": check_python,
    ".venv/bin/pre-commit": lambda words, where: None,
}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_it_is_not(page):
    for block in blocks(page):
        assert block.language in ("sh", "python", "text", ""), f"{block.where}: use sh or python"
        if block.language in ("text", ""):
            code = re.search(
                r"^\$ |^(zoo|python|pip|make|import|from) \S", block.text, re.MULTILINE
            )
            assert not code, f"{block.where}: `{code[0]}` in a block that is not sh or python"
            continue
        if block.needs:
            assert set(re.split(r", | and ", block.needs)) <= NEEDS, f"{block.where}: {block.needs}"
        if block.language == "python":
            compile(block.text, block.where, "exec")
            continue
        for first, *rest in block.commands:
            assert first in CHECKS, f"{block.where}: nobody runs `{first}`"
            CHECKS[first](rest, block.where)


# -- and runs ------------------------------------------------------------------------------------


def photos(place: Path) -> None:
    """Forty plain images in two classes."""
    for number in range(40):
        folder = place / "photos" / ("dark", "light")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.full((40, 40, 3), 100 * (number % 2) + number, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def streets(place: Path) -> None:
    """Eight images of blocks with their masks; `photos` are the images alone."""
    streets, draws = place / "streets", np.random.default_rng(0)
    for name in ("images/train", "images/val", "masks/train", "masks/val"):
        (streets / name).mkdir(parents=True)
    for number in range(8):
        truth = draws.integers(2, size=(4, 5), dtype=np.uint8).repeat(20, axis=0).repeat(20, axis=1)
        part = ("train", "val")[number % 2]
        Image.fromarray(truth * 200).save(streets / "images" / part / f"{number}.png")
        Image.fromarray(truth).save(streets / "masks" / part / f"{number}.png")
    (streets / "classes.json").write_text(json.dumps(["road", "sky"]))
    (place / "photos").symlink_to(streets / "images")


class Page(NamedTuple):
    """What a page needs before it is run, and what is seen afterwards."""

    prepare: Callable[[Path], None] = lambda place: None
    extra: str = ""
    """A library of an extra."""
    prints: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


HOW = {
    "README.md": Page(prints=("eradio_nano",)),
    "CONTRIBUTING.md": Page(
        photos, prints=("uniformity/log_potential",), writes=("runs/torchvision/report.html",)
    ),
    "docs/models.md": Page(extra="onnxruntime", writes=("nano.onnx",)),
    "docs/distillation.md": Page(
        extra="open_clip",
        prints=("'edges': (1, 4, 4, 8)",),
        writes=tuple(f"runs/{name}/report.html" for name in ("mine", "own", "unic_angle")),
    ),
    "docs/compression.md": Page(
        extra="transformers",
        writes=("small/model.safetensors", "small/report.html", "smaller/report.html"),
    ),
    "docs/detectors.md": Page(extra="transformers"),
    "docs/detection.md": Page(extra="faster_coco_eval", writes=("runs/shapes/predictions.json",)),
    "docs/evaluation.md": Page(
        photos,
        prints=("test_convnext against",),
        writes=("all.html", "features/vit/index.json"),
    ),
    "docs/dense.md": Page(streets, prints=("segment/class/road", "correspondence/pck0.1")),
}

LONG = ("docs/experiments.md", "CONTRIBUTING.md")
"""Pages that take longer than CI may wait for."""

RUN_BY = {
    "docs/mmdet.md": "tests/eval/openmmlab/test_mmdet.py",
    "docs/mmseg.md": "tests/eval/openmmlab/test_mmseg.py",
}
"""Pages whose tests stand beside the fixtures that they need, and run every block of theirs."""

RUN_HERE = [page for page in PAGES if page not in RUN_BY and any(b.runs for b in blocks(page))]


def pages_to_run():
    for page in RUN_HERE:
        mark = pytest.mark.long if page in LONG else pytest.mark.slow
        # exporters, detectors and their dependencies warn about themselves
        yield pytest.param(page, marks=[mark, pytest.mark.filterwarnings("ignore")])


@pytest.fixture
def _as_before():
    """Lines and modules that a page adds are gone again after it."""
    from zoo.eval.benchmarks import BENCHMARKS
    from zoo.teachers.name import KINDS

    tables = [(table, dict(table)) for table in (BENCHMARKS, KINDS)]
    modules = set(sys.modules)
    yield
    for table, before in tables:
        table.clear()
        table.update(before)
    for name in set(sys.modules) - modules:
        if name.startswith("zoo.") and not str(sys.modules[name].__file__).startswith(str(ROOT)):
            del sys.modules[name]


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("page", list(pages_to_run()))
def test_the_page_runs(page, tmp_path, monkeypatch, capfd):
    how = HOW.get(page, Page())
    if how.extra:
        pytest.importorskip(how.extra, reason=f"{how.extra} is in an extra that is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    how.prepare(tmp_path)
    scope = {"__name__": "page"}
    for block in blocks(page):
        if block.file:
            write_module(block, tmp_path, monkeypatch)
        elif block.runs:
            run(block, scope)
    told = capfd.readouterr().out.replace("\n", " ")
    for words in how.prints:
        assert words in told
    for name in how.writes:
        assert (tmp_path / name).is_file(), name


def run(block: Block, scope: dict) -> None:
    from zoo.cli import main

    if block.language == "python":
        exec(compile(block.text, block.where, "exec"), scope)
        return
    for first, *rest in block.commands:
        if first == "zoo":
            main(rest)
        elif first == "python":
            subprocess.run([sys.executable, "-W", "ignore", *rest], check=True)


def write_module(block: Block, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the file that a block is; one of our rooms' is found where our own modules are."""
    path = place / block.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text)
    room = path.relative_to(place).parts[0]
    if room not in ROOMS or path.parent == place:
        return
    parts = path.parent.relative_to(place).parts
    package = import_module(".".join(parts if room == "zoo" else ("zoo", *parts)))
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(path.parent)])


def test_the_pages_that_are_run_elsewhere_are():
    for page, test in RUN_BY.items():
        assert f'run_page("{Path(page).name}"' in (ROOT / test).read_text()


def test_every_page_in_the_tables_is_there():
    assert {*HOW, *LONG, *RUN_BY} <= PAGES.keys()
    assert set(HOW) | set(LONG) <= set(RUN_HERE)


# -- the tables of the pages are whole -----------------------------------------------------------


def test_the_table_of_models_has_every_name_and_tag():
    import timm

    import zoo

    text = PAGES["docs/models.md"].read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)", text, re.MULTILINE))
    ours = [
        n for n in zoo.list_models() if not re.match(r"faster_vit|mamba_vision|eradio(_large|$)", n)
    ]
    assert sorted(n for n in rows if n in zoo.list_models()) == ours
    for name in ours:
        for tagged in timm.list_pretrained(f"{name}.*"):
            assert f"`{tagged.partition('.')[2]}`" in rows[name], tagged


def test_the_page_of_distillation_has_every_recipe():
    from zoo.train.distill.recipes import RECIPES

    named = set(re.findall(r"`(\w+)`", PAGES["docs/distillation.md"].read_text()))
    assert set(RECIPES) - {"custom", "quickstart", "pretext"} <= named
