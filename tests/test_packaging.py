"""What `make dist` builds: a wheel with its rooms, a sdist that makes the same wheel, one error."""

import os
import runpy
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(source: Path, out: Path, *what: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("hatchling", reason="packages are built with it; it is in [dev]")
    pytest.importorskip("build", reason="packages are built with it; it is in [dev]")
    # In a folder of its own: a name beside the tests would be imported in place of a module.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, *what, source]
    return subprocess.run(command, capture_output=True, text=True, cwd=out.parent, check=False)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """`make dist`: the sdist from the tree, the wheel from the sdist."""
    out = tmp_path_factory.mktemp("packages") / "dist"
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_the_wheel_made_from_the_sdist_is_the_one_made_from_the_tree(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    done = build(ROOT, tmp_path / "tree", "--wheel")
    assert done.returncode == 0, done.stderr
    ours, theirs = contents(wheel), contents(tmp_path / "tree" / wheel.name)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    tree = {
        "zoo/" + path.relative_to(ROOT / folder).as_posix() if folder == "zoo"
        else f"zoo/{path.relative_to(ROOT).as_posix()}"
        for folder in ("zoo", "teachers", "students", "train", "eval")
        for path in (ROOT / folder).rglob("*")
        if path.suffix == ".py" or path.parent.name == "tables"
    }  # fmt: skip
    assert tree <= ours.keys()


@pytest.mark.slow
def test_the_sdist_holds_folders_and_installs(dist, tmp_path):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        names = {member.name.partition("/")[2] for member in archive}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "zoo/train/config.py"} <= names
    pytest.importorskip("pip", reason="this environment was made without pip")
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
         "--no-build-isolation", "--target", site, sdist],
        check=True, capture_output=True,
    )  # fmt: skip
    code = "import zoo.train, zoo.eval.report; print(zoo.train.__file__)"
    environment = os.environ | {"PYTHONPATH": str(site)}
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True,
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert told.startswith(str(site))


@pytest.mark.slow
def test_the_wheel_finds_its_rooms_beside_files_of_the_same_names(dist, tmp_path):
    """A user's own train.py and eval.py must not stand in the way, nor ours in theirs."""
    (wheel,) = dist.glob("*.whl")
    tops = {name.split("/")[0] for name in contents(wheel)}
    assert tops == {"zoo", wheel.name.split("-py3")[0] + ".dist-info"}

    place = tmp_path / "env"
    venv.create(place, symlinks=True)
    (site,) = place.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    # the heavy dependencies come from here; our own checkout must not
    here = [p for p in sys.path if p.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(here))
    user = tmp_path / "user"
    user.mkdir()
    for name in ("train", "eval"):
        (user / f"{name}.py").write_text("raise SystemExit('the wrong file was imported')")
    code = (
        "import zoo.train, zoo.eval, zoo.eval.report; print(zoo.train.__file__, zoo.eval.__file__)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [place / "bin" / "python", "-c", code], cwd=user, env=environment, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert all(path.startswith(str(site)) for path in done.stdout.split())
    assert (site / "zoo" / "eval" / "report" / "page.html.j2").is_file()


@pytest.fixture
def without_links(tmp_path) -> Path:
    """The tree as git writes it with core.symlinks=false: a link is a text file."""
    clone = tmp_path / "clone"
    (clone / "zoo").mkdir(parents=True)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "zoo/rooms.py"):
        (clone / name).write_bytes((ROOT / name).read_bytes())
    (clone / "zoo" / "__init__.py").write_bytes((ROOT / "zoo" / "__init__.py").read_bytes())
    for room in ("teachers", "students", "train", "eval"):
        (clone / "zoo" / room).write_text(f"../{room}")
    return clone


def test_a_clone_without_links_is_told_so_and_what_to_do(without_links):
    with pytest.raises(ImportError, match=r"core\.symlinks true") as told:
        runpy.run_path(str(without_links / "zoo" / "rooms.py"))
    assert "zoo/teachers, zoo/students, zoo/train, zoo/eval" in str(told.value)
    assert "git checkout -- zoo/teachers zoo/students zoo/train zoo/eval" in str(told.value)


def test_the_package_looks_for_its_rooms_before_anything_else_of_ours():
    """Another of our modules may live in a room, and would fail with a worse message."""
    lines = (ROOT / "zoo" / "__init__.py").read_text().splitlines()
    ours = [line for line in lines if line.startswith(("import zoo", "from zoo"))]
    assert ours[0].startswith("import zoo.rooms")


@pytest.mark.slow
def test_a_clone_without_links_is_not_built(without_links, tmp_path):
    for what in ("--sdist", "--wheel"):
        done = build(without_links, tmp_path / "dist", what)
        assert done.returncode and "core.symlinks true" in done.stdout + done.stderr
    assert not list((tmp_path / "dist").glob("backbone_zoo*"))


def test_what_is_declared_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    sdist = project["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]
    assert [name for name in sdist if not (ROOT / name).exists()] == []
    extras = project["project"]["optional-dependencies"]
    assert set(extras) >= {"teachers", "train", "det", "seg", "llm", "parquet", "gpu", "all"}
