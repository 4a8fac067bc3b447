"""The house itself: who imports whom, how much `import zoo` costs."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("teachers", "students", "train", "eval")
FAMILIES = ("zoo.eradio", "zoo.fastervit", "zoo.mambavision", "zoo.radio")
FOUNDATION = (
    "zoo.features",
    "zoo.axes",
    "zoo.files",
    "zoo.weights",
    "zoo.wheels",
    "zoo.licence",
    "zoo.cut_format",
    "zoo.flops",
)
MODELS = (
    *FAMILIES,
    *FOUNDATION,
    "zoo.layers",
    "zoo.hierarchy",
    "zoo.build",
    "zoo.adaptors",
    "zoo.compiled_blocks",
    "zoo.deploy",
)
CORE = tuple(
    f"zoo.train.{part}"
    for part in (
        "config", "device", "interrupt", "loop", "optim", "progress", "run", "state", "task",
        "damp", "slices", "prefetch", "fields", "freeze", "numa",
        "average", "ranges", "mesh", "step", "shard", "checkpoint", "skew", "graphs", "waiting",
        "profiling", "trackers", "planner", "garbage", "turns", "staging", "saved_tensor",
    )
)  # fmt: skip
"""The training loop and what every task shares: no images, no teachers, no method."""

ROOT_ONLY = "zoo (itself)"
"""`import zoo`, for its `create_model`, `list_models` and version; not what lies below it."""

# Who may import whom among our own modules; the longest prefix that fits a module decides.
ARROWS: dict[str, tuple[str, ...]] = {
    "zoo": (
        "zoo.rooms", "zoo.library", "zoo.moved", "zoo.registration", "zoo.compiled_blocks",
        "zoo.safe_pickle", "zoo.wheels", "zoo.cut_format", "zoo.language.towers",
    ),
    "zoo.rooms": (),
    "zoo.library": ("zoo.train.run", "zoo.train.distill.config", "zoo.eval.results"),
    "zoo.moved": ("zoo.import_hook",),
    "zoo.registration": ("zoo.import_hook",),
    "zoo.import_hook": (),
    "zoo.__main__": ("zoo.cli",),
    "zoo.cli": ("zoo.train.interrupt", "zoo.train.device", "zoo.train.mesh", ROOT_ONLY),
    "zoo.features": (),
    "zoo.axes": ("zoo.shape_tables",),
    "zoo.shape_tables": (),
    "zoo.cut_format": ("zoo.axes", "zoo.files", "zoo.language"),
    "zoo.safe_pickle": (),
    "zoo.files": (),
    "zoo.flops": (),
    "zoo.weights": ("zoo.safe_pickle", "zoo.files"),
    "zoo.wheels": ("zoo.weights",),
    "zoo.licence": (),
    "zoo.deploy": (),
    "zoo.compiled_blocks": (),
    "zoo.build": ("zoo.licence",),
    "zoo.hierarchy": ("zoo.layers", "zoo.weights", "zoo.licence"),
    "zoo.adaptors": ("zoo.layers", "zoo.features"),
    "zoo.convert": ("zoo.files", "zoo.weights", ROOT_ONLY),
    "zoo.detector_backbone": (ROOT_ONLY,),
    "zoo.kernels": ("zoo.kernels",),
    "zoo.layers": ("zoo.layers", "zoo.kernels"),
    "zoo.radio_weights": ("zoo.layers", "zoo.adaptors", "zoo.weights"),
    **dict.fromkeys(
        FAMILIES,
        (
            "zoo.layers", "zoo.features", "zoo.axes", "zoo.weights", "zoo.hierarchy",
            "zoo.build",
        ),
    ),
    "zoo.radio": (
        "zoo.layers", "zoo.features", "zoo.axes", "zoo.weights", "zoo.build", "zoo.adaptors",
        "zoo.radio_weights", "zoo.licence",
    ),
    "zoo.language": (
        "zoo.language", "zoo.layers", "zoo.axes", "zoo.weights", "zoo.kernels", "zoo.import_hook",
    ),
    "zoo.language.towers": ("zoo.language", "zoo.licence", "zoo.files"),
    "zoo.language.gguf": ("zoo.files",),
    "zoo.multimodal": (
        "zoo.multimodal", "zoo.language", "zoo.features", "zoo.files", "zoo.import_hook",
        "zoo.students", "zoo.wheels", "zoo.layers",
    ),
    "zoo.data": ("zoo.data", "zoo.features", "zoo.files"),
    "zoo.data.text": ("zoo.data", "zoo.files", "zoo.language"),
    "zoo.data.text_mixture": ("zoo.data", "zoo.language"),
    "zoo.data.image_text": ("zoo.data", "zoo.language", "zoo.multimodal"),
    "zoo.teachers": (
        "zoo.teachers", "zoo.features", "zoo.weights", "zoo.wheels", "zoo.files", "zoo.kernels",
    ),
    "zoo.teachers.from_zoo": ("zoo.teachers", ROOT_ONLY),
    "zoo.teachers.from_language": ("zoo.language",),
    "zoo.students": ("zoo.students", *MODELS),
    "zoo.students.prune": (
        "zoo.students.prune", "zoo.axes", "zoo.cut_format", "zoo.features", "zoo.files",
        "zoo.language", "zoo.weights", "zoo.wheels",
    ),
    "zoo.train": (*CORE, "zoo.data", "zoo.files"),
    "zoo.train.average": ("zoo.layers", "zoo.train.shard"),
    "zoo.train.shard": ("zoo.layers", "zoo.compiled_blocks", "zoo.train.mesh"),
    "zoo.train.cost": (),
    "zoo.train.cluster": ("zoo.train.cost", "zoo.files"),
    "zoo.train.pretext": (*CORE, "zoo.data", "zoo.features", "zoo.files", "zoo.teachers"),
    "zoo.train.masks": (*CORE, "zoo.students.prune"),
    "zoo.train.elastic": (*CORE, "zoo.students.prune", "zoo.data"),
    "zoo.train.elastic_router": (
        *CORE, "zoo.students.prune", "zoo.train.elastic", "zoo.axes", "zoo.files",
    ),
    "zoo.train.distill": (
        "zoo.train.distill", *CORE, "zoo.data", "zoo.students", "zoo.teachers", "zoo.features",
        "zoo.files", "zoo.flops", "zoo.compiled_blocks", "zoo.train.pretext", "zoo.language",
        "zoo.multimodal", ROOT_ONLY,
    ),
    "zoo.eval": (
        "zoo.eval", *CORE, "zoo.data", "zoo.students", "zoo.teachers", *MODELS,
        "zoo.detector_backbone", "zoo.language", "zoo.multimodal", ROOT_ONLY,
    ),
    "zoo.commands": (
        "zoo.commands", "zoo.experiments", "zoo.eval", "zoo.train", "zoo.data", "zoo.students",
        "zoo.teachers", *MODELS, "zoo.convert", "zoo.language", "zoo.multimodal", ROOT_ONLY,
    ),
    "zoo.experiments": (
        "zoo.experiments", "zoo.eval", "zoo.train", "zoo.data", "zoo.students", "zoo.teachers",
        *MODELS, "zoo.language", "zoo.library",  # some students are runs of `zoo distill`
    ),
}  # fmt: skip


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


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def targets(path: Path, known: dict[str, Path]) -> set[str]:
    """Our own modules that a file imports: at its top, inside functions, for the types alone."""
    names = imports(path)
    # `from zoo import x` means the module zoo.x where there is one, and zoo/__init__.py otherwise
    own = {name for name in names & set(known) if name != "zoo"}
    return own | ({"zoo"} if uses_root(path, frozenset(known)) else set())


@cache
def uses_root(path: Path, known: frozenset[str]) -> bool:
    """Whether a file imports something that `zoo/__init__.py` itself defines."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import) and any(alias.name == "zoo" for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "zoo":
            return any(f"zoo.{alias.name}" not in known for alias in node.names)
    return False


def wrong_arrows(known: dict[str, Path]) -> list[str]:
    wrong = []
    for name, path in known.items():
        rule = "zoo" if name == "zoo" else max((r for r in ARROWS if is_below(name, r)), key=len)
        assert rule != "zoo" or name == "zoo", f"{name} has no row in ARROWS"
        for target in targets(path, known):
            if target == "zoo":
                allowed = ROOT_ONLY in ARROWS[rule]
            else:
                allowed = any(is_below(target, other) for other in ARROWS[rule])
            if not allowed:
                wrong.append(f"{name} -> {target}")
    return wrong


def circles(known: dict[str, Path]) -> list[list[str]]:
    """Sets of modules that import each other, by whatever way."""
    ways = {name: targets(path, known) - {name} for name, path in known.items()}
    reach: dict[str, set[str]] = {}
    for start in ways:
        seen, todo = set(), list(ways[start])
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += ways[name]
        reach[start] = seen
    found = {
        tuple(sorted({start, *(n for n in reach[start] if start in reach[n])}))
        for start in ways
        if start in reach[start]
    }
    return [list(circle) for circle in sorted(found)]


def test_every_import_follows_an_arrow_of_the_house():
    assert not wrong_arrows(modules())


def test_no_two_modules_import_each_other():
    found = circles(modules())
    assert not found, "\n".join(" <-> ".join(circle) for circle in found)


def test_no_row_of_the_arrows_allows_everything():
    assert not [rule for rule, allowed in ARROWS.items() if "zoo" in allowed]


@pytest.mark.parametrize("room", ["teachers", "students", "train.distill", "commands"])
def test_a_planted_import_in_the_core_of_training_is_found(room, tmp_path):
    known = modules()
    planted = tmp_path / "loop.py"
    target = next(name for name in known if is_below(name, f"zoo.{room}") and name.count(".") > 1)
    planted.write_text(f"def f():\n    import {target}\n")
    assert f"zoo.train.loop -> {target}" in wrong_arrows({**known, "zoo.train.loop": planted})


def test_two_files_that_import_each_other_are_found(tmp_path):
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import zoo.b\n")
    second.write_text("def f():\n    from zoo.a import x\n")
    assert circles({"zoo.a": first, "zoo.b": second}) == [["zoo.a", "zoo.b"]]


MOST_LINES, MOST_OF_A_FAMILY, MOST_OF_A_FUNCTION = 500, 800, 60
LONG = {
    "zoo.kernels.scan_triton": "the scan's kernels, forward and back, beside each other",
    "zoo.kernels.scan_triton:_scan_backward": "one Triton kernel, which calls no Python",
}
"""What is longer than a reader wants, and why."""
BACKWARD = {
    "zoo.train.loop": "the loop of every task",
    "zoo.train.step": "of one slice, for the loop",
    "zoo.experiments.stack": "students that are trained in a stack (PHI-S)",
    "zoo.eval.linear": "a probe on features that are stored",
    "zoo.eval.speed.models": "timed, nothing is trained",
    "zoo.commands.bench.step_parts": "timed, nothing is trained",
    "zoo.train.distill.launching": "counted, nothing is computed",
}
"""Who may take a backward pass: a second training loop would be one more."""


def long_ones(known: dict[str, Path]) -> set[str]:
    """Name the files and functions that are longer than they may be."""
    found = set()
    for name, path in known.items():
        family = name in (*FAMILIES, "zoo.language.hyena")
        if len(path.read_text().splitlines()) > (MOST_OF_A_FAMILY if family else MOST_LINES):
            found.add(name)
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno >= MOST_OF_A_FUNCTION:
                    found.add(f"{name}:{node.name}")
    return found


def who_calls(known: dict[str, Path], method: str) -> set[str]:
    return {
        name
        for name, path in known.items()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == method
    }


def room_of(name: str) -> str:
    """Name the room of a module: a folder, a part of training or of pruning, or a file beside."""
    apart = ("zoo.train.distill", "zoo.students.prune")
    return next((r for r in apart if is_below(name, r)), ".".join(name.split(".")[:2]))


def room_circles(known: dict[str, Path]) -> set[str]:
    """Name the rooms that need each other; `import zoo` itself, which opens doors, is none."""
    doors = {"zoo", "zoo.library", "zoo.cli", "zoo.__main__"}
    ways: dict[str, set[str]] = {}
    for name, path in known.items():
        rooms = {room_of(target) for target in targets(path, known)} - doors
        ways.setdefault(room_of(name), set()).update(rooms - {room_of(name)})
    found = set()
    for start in ways.keys() - doors:
        seen, todo = set(), list(ways[start])
        while todo:
            if (room := todo.pop()) not in seen:
                seen.add(room)
                todo += ways[room]
        found |= {start} & seen
    return found


def test_no_function_and_no_file_is_longer_than_a_reader_wants():
    assert long_ones(modules()) == LONG.keys()


def test_a_long_function_and_a_long_file_are_found(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("def f():\n" + "    x = 1\n" * 59)
    assert long_ones({"zoo.a": file}) == set()
    file = tmp_path / "b.py"
    file.write_text("def f():\n" + "    x = 1\n" * 60 + "\n" * 440)
    assert long_ones({"zoo.b": file}) == {"zoo.b", "zoo.b:f"}


def test_there_is_one_training_loop():
    known = {n: p for n, p in modules().items() if not is_below(n, "zoo.kernels")}
    assert who_calls(known, "backward") == BACKWARD.keys()


def test_no_two_rooms_need_each_other():
    assert not room_circles(modules())


def test_two_rooms_that_need_each_other_are_found(tmp_path):
    known = modules()
    planted = tmp_path / "x.py"
    planted.write_text("from zoo.commands.parse import parse\n")
    assert {"zoo.data", "zoo.commands"} <= room_circles({**known, "zoo.data.x": planted})


def test_triton_is_imported_by_files_that_say_so():
    known = modules()
    users = {
        name for name, path in known.items() if any(is_below(i, "triton") for i in imports(path))
    }
    assert users == {name for name in known if name.endswith("_triton")}


def test_every_import_of_our_own_names_a_module_of_today():
    """A former name works for others, with a warning; here it would hide where things are."""
    known, lost = modules(), []
    own = [*known.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    for path in own:
        for node in ast.walk(parsed(path)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            lost += [f"{path}: {n}" for n in names if n and is_below(n, "zoo") and n not in known]
    assert not lost


def test_no_module_takes_a_private_name_from_another():
    taken = [
        f"{name}: {node.module}.{alias.name}"
        for name, path in modules().items()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and is_below(node.module or "", "zoo")
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not taken


def test_the_tests_mirror_the_tree():
    others = {"benchmarks", "fuzz", "golden", "soak"}
    folders = {
        path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")
    }
    there = {path.parent for path in modules().values()}
    strange = [
        folder
        for folder in folders
        if not {ROOT / folder, ROOT / "zoo" / folder} & there
        and folder.parts
        and folder.parts[0] not in others
    ]
    assert not strange


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


def test_the_page_of_the_house_names_every_room_and_only_files_that_are_there():
    page = (ROOT / "docs" / "house.md").read_text()
    rooms = {room: ROOT / room for room in re.findall(r"`([\w/]+)/`", page)}
    there = {str(path.parent.relative_to(ROOT)) for path in modules().values()}
    together = re.compile(r"zoo/(commands|experiments|language)/\w+")
    assert {room for room in there if not together.fullmatch(room)} <= rooms.keys()
    lost = []
    for line in page.splitlines():
        own = [rooms[room] for room in re.findall(r"`([\w/]+)/`", line)] or [ROOT / "zoo"]
        places = {ROOT, *own, *(room.parent for room in own)}
        names = re.findall(r"`([a-z.][a-z_./]+\.py)`", line)  # not `NAME_args.py`
        lost += [name for name in names if not any((p / name).is_file() for p in places)]
    assert not lost


def test_importing_the_package_and_listing_language_models_import_no_library():
    code = "import sys, zoo; zoo.list_models(kind='language'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    outside = {name.partition(".")[0] for name in done.stdout.split()}
    heavy = {"torch", "timm", "transformers", "numpy", "PIL", "rich", "tyro", "jaxtyping"}
    assert not outside & heavy


def test_the_version_stands_in_one_place():
    import zoo

    assert re.fullmatch(r"\d+\.\d+\.\d+", zoo.__version__)
    assert f'"{zoo.__version__}"' not in (ROOT / "pyproject.toml").read_text()
