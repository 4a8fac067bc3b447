"""The house itself: who imports whom, what the wheel holds, how much `import zoo` costs."""

import ast
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("teachers", "students", "train", "eval")
LAYERS = "zoo.layers"
FAMILIES = ("zoo.eradio", "zoo.fastervit", "zoo.mambavision", "zoo.radio")
MODEL_PARTS = (
    LAYERS,
    "zoo.features",
    "zoo.axes",
    "zoo.checkpoint",
    "zoo.hierarchy",
    "zoo.build",
    "zoo.adaptors",
)

# Who may import whom among our own modules; the longest prefix that fits a module decides.
ARROWS: dict[str, tuple[str, ...]] = {
    "zoo.features": (),
    "zoo.axes": (),
    "zoo.cache": (),
    "zoo.safe_pickle": (),
    "zoo.checkpoint": ("zoo.safe_pickle",),
    "zoo.deploy": (),
    "zoo.compiled_blocks": (),
    "zoo.licence": (),
    "zoo.build": ("zoo.licence",),
    "zoo.hierarchy": (LAYERS, "zoo.checkpoint", "zoo.licence"),
    "zoo.adaptors": (LAYERS, "zoo.features"),
    "zoo.radio_weights": (LAYERS, "zoo.adaptors", "zoo.checkpoint"),
    LAYERS: (LAYERS,),
    **dict.fromkeys(FAMILIES, MODEL_PARTS),
    "zoo.radio": (*MODEL_PARTS, "zoo.radio_weights", "zoo.licence"),
    "zoo": ("zoo",),
    "zoo.teachers": ("zoo.features", "zoo.checkpoint", "zoo.teachers"),
    "zoo.teachers.from_zoo": ("zoo",),
    "zoo.students": (*MODEL_PARTS, *FAMILIES, "zoo.students"),
    "zoo.train.distill.losses": (),
    "zoo.train.distill.hadamard": (),
    "zoo.train.distill.phi_s": ("zoo.train.distill.hadamard",),
    "zoo.data.plan": (),
    "zoo.train": (
        "zoo.train",
        "zoo.students",
        "zoo.teachers",
        "zoo.features",
        "zoo.checkpoint",
        "zoo.cache",
        "zoo.compiled_blocks",
    ),
    "zoo.eval": ("zoo.eval", "zoo.students", "zoo.teachers", "zoo.features", "zoo.checkpoint"),
    "zoo.eval.detect": (
        "zoo.eval",
        "zoo.students",
        "zoo.features",
        "zoo.checkpoint",
        "zoo.detector_backbone",
    ),
    "zoo.eval.speed.models": ("zoo.compiled_blocks", "zoo.deploy", "zoo.eval"),
}
"""`zoo` itself, its pipeline and its command line may import everything."""


def modules() -> dict[str, Path]:
    found = {}
    for folder in ("zoo", *ROOMS):
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT)
            if folder == "zoo" and inside.parts[1] in ROOMS:
                continue  # the link: seen where it points
            parts = inside.with_suffix("").parts
            parts = parts if folder == "zoo" else ("zoo", *parts)
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def test_every_import_follows_an_arrow_of_the_house():
    known = modules()
    wrong = []
    for name, path in known.items():
        rule = max((r for r in ARROWS if below(name, r)), key=len)
        for target in imports(path) & set(known):
            if target == "zoo" and rule not in ("zoo", "zoo.teachers.from_zoo"):
                continue  # `from zoo import x` names x as well, which is what counts
            if not any(below(target, allowed) for allowed in ARROWS[rule]):
                wrong.append(f"{name} -> {target}")
    assert not wrong


def test_no_module_is_imported_by_its_folder_name():
    wrong = [
        f"{path}: {target}"
        for path in [*modules().values(), *(ROOT / "tests").rglob("*.py")]
        for target in imports(path)
        if target.split(".")[0] in ROOMS
    ]
    assert not wrong


def test_no_file_has_a_name_that_says_nothing():
    empty = {"utils", "helpers", "common", "misc", "base"}
    assert not [name for name in modules() if name.rpartition(".")[2] in empty]


def test_importing_the_package_imports_timm_and_nothing_heavy():
    heavy = "transformers open_clip matplotlib sklearn skimage torchdata tyro mmdet xformers triton"
    code = (
        "import sys, time, timm; had = set(sys.modules); before = time.perf_counter(); import zoo; "
        f"new = set(sys.modules) - had; seconds = time.perf_counter() - before; "
        f"print(seconds, *[m for m in '{heavy}'.split() if m in new])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *loaded = done.stdout.split()
    assert not loaded
    assert float(seconds) < 3  # 0.3 on an idle machine; the benchmark is in benchmarks/


@pytest.mark.slow
def test_the_wheel_finds_its_rooms_beside_files_of_the_same_names(tmp_path):
    """A user's own train.py and eval.py must not stand in the way, nor ours in theirs."""
    pytest.importorskip("hatchling", reason="the wheel is built with it; it is in [dev]")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
    ]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
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


def test_the_version_stands_in_one_place():
    import zoo

    assert re.fullmatch(r"\d+\.\d+\.\d+", zoo.__version__)
    assert f'"{zoo.__version__}"' not in (ROOT / "pyproject.toml").read_text()
