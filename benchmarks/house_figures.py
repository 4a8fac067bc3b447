"""Figures of the house: rooms, functions, training loops, import circles, the way of a config.

python benchmarks/house_figures.py                     # the checkout that this file stands in
python benchmarks/house_figures.py ../old --json old.json --walk zoo.pipeline.distill:config

It runs nothing of what it measures, so today's script measures an old commit too. A room is a
folder of modules; tests are left out, and `benchmarks/` stands beside the sum.
"""

import argparse
import ast
import json
import math
import statistics
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from house_code import KINDS, House, Module, Value, Walk, circles, floors, parameters

LONG_FUNCTION, LONG_FILE = 60, 500


def sizes(modules: Iterable[Module]) -> dict[str, Any]:
    """Count files, lines and statements (a docstring is none), and measure the functions."""
    modules = list(modules)
    nodes = [(module.path, node) for module in modules for node in ast.walk(module.tree)]
    functions = [
        (f"{path}:{node.lineno}:{node.name}", (node.end_lineno or 0) - node.lineno + 1)
        for path, node in nodes
        if isinstance(node, ast.FunctionDef)
    ]
    lengths = sorted(length for _, length in functions) or [0]
    lines = {module.path: len(module.source.splitlines()) for module in modules}
    return {
        "files": len(modules),
        "lines": sum(lines.values()),
        "statements": sum(isinstance(n, ast.stmt) and not is_docstring(n) for _, n in nodes),
        "functions": len(functions),
        "median": statistics.median(lengths),
        "p90": lengths[math.ceil(0.9 * len(lengths)) - 1],
        "long functions": {name: n for name, n in functions if n > LONG_FUNCTION},
        "long files": {name: n for name, n in lines.items() if n > LONG_FILE},
    }


def is_docstring(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def calls_of(node: ast.AST, method: str, receiver: str = "") -> int:
    """Count calls without arguments, such as `loss.backward()` and `self.optimizer.step()`.

    `solver.step(closure)` and `torch.autograd.backward(outputs)` are left out on purpose.
    """
    calls = [n.func for n in ast.walk(node) if isinstance(n, ast.Call) and not n.args]
    owners = [f.value for f in calls if isinstance(f, ast.Attribute) and f.attr == method]
    return sum(receiver in ast.unparse(owner).rpartition(".")[2] for owner in owners)


def training_loops(house: House) -> list[str]:
    """Find functions with a `for` or `while` that reaches a `.backward()` and an optimizer's step.

    Both stand in it or in what it calls, two calls deep at most; who calls a loop is none.
    """

    def called(module: Module, name: str, node: ast.AST) -> Iterator[tuple[Module, str]]:
        kinds = {a.arg: house.whole(module, a.annotation) for a in parameters(module.defs[name])}
        kinds["self"] = f"{module.name}.{name.rpartition('.')[0]}"
        for func in (n.func for n in ast.walk(node) if isinstance(n, ast.Call)):
            whole = house.whole(module, func)
            if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name):
                whole = whole or f"{kinds.get(func.value.id)}.{func.attr}"
            if found := house.find(whole):
                yield found

    def reached(module: Module, name: str, node: ast.AST, deep: int = 2) -> set[str]:
        found = {"backward"} if calls_of(node, "backward") else set()
        found |= {"step"} if calls_of(node, "step", "optim") else set()
        for other, its in called(module, name, node) if deep else ():
            found |= {f"{other.path}:{its}"} | reached(other, its, other.defs[its], deep - 1)
        return found

    loops: dict[str, set[str]] = {}
    for module, name, function in house.functions():
        for node in ast.walk(function):
            if isinstance(node, ast.For | ast.While):
                found = reached(module, name, node)
                if {"backward", "step"} <= found:
                    loops.setdefault(f"{module.path}:{name}", set()).update(found)
    return sorted(name for name, found in loops.items() if not (loops.keys() - {name}) & found)


def measure(root: Path, walk: str) -> dict[str, Any]:
    """Count everything, as plain data."""
    house = House.read(root)
    rooms: dict[str, list[Module]] = {}
    for module in house.values():
        rooms.setdefault(str(Path(module.path).parent), []).append(module)
    beside = sorted((root / "benchmarks").rglob("*.py"))
    scripts = [Module("", str(path.relative_to(root)), path.read_text()) for path in beside]
    backward = {module.path: calls_of(module.tree, "backward") for module in house.values()}
    return {
        "rooms": {room: sizes(rooms[room]) for room in sorted(rooms)},
        "in all": sizes(house.values()),
        "benchmarks": sizes(scripts),
        "training loops": training_loops(house),
        "backward calls": {path: count for path, count in backward.items() if count},
        "circles": {what: circles(house.graph(kind)) for kind, what in enumerate(KINDS)},
        "walks": walks(house, walk),
    }


def walks(house: House, start: str) -> dict[str, Any]:
    """Follow a parameter by itself, and with its fields; {} where it cannot be found."""
    function, _, parameter = start.partition(":")
    found, floor, results = house.find(function), floors(house.graph()), {}
    if found is None:
        return {}
    for what, fields in (("itself", False), ("with its fields", True)):
        walk = Walk(house, fields=fields)
        walk.enter(found, {parameter: Value(True)})
        stays = [a for a, b in zip(walk.entered, [*walk.entered[1:], ""], strict=True) if a != b]
        results[what] = {
            "rooms": [house[name].path for name in dict.fromkeys(stays)],
            "stays": len(stays),
            "climbs": sum(floor[a] < floor[b] for a, b in pairwise(stays)),
        }
    return results


def report(found: dict[str, Any], walk: str) -> Iterator[str]:
    """Yield the lines of the figures in Markdown."""
    columns = ("files", "lines", "statements", "functions", "median", "p90")
    yield f"| room | {' | '.join(columns)} | over {LONG_FUNCTION} lines |"
    yield "| --- |" + " --: |" * (len(columns) + 1)
    rows = {**found["rooms"], "**in all**": found["in all"], "benchmarks": found["benchmarks"]}
    for room, row in rows.items():
        cells = [f"{row[column]:g}" for column in columns]
        yield f"| {room} | {' | '.join(cells)} | {len(row['long functions'])} |"
    yield ""
    every = found["in all"]
    for what, limit in (("long functions", LONG_FUNCTION), ("long files", LONG_FILE)):
        names = ", ".join(f"{name} ({lines})" for name, lines in every[what].items())
        yield f"- {what} (over {limit} lines): {len(every[what])}. {names}"
    loops, backward = found["training loops"], found["backward calls"]
    files = {name.partition(":")[0] for name in loops}
    yield f"- training loops: {len(loops)} in {len(files)} files. {', '.join(loops)}"
    places = ", ".join(f"{path} ({count})" for path, count in backward.items())
    yield f"- calls of `.backward()`: {sum(backward.values())}. {places}"
    for what, groups in found["circles"].items():
        yield f"- import circles, {what}: {len(groups)}"
        yield from (f"  - {', '.join(group)}" for group in groups)
    for what, way in found["walks"].items():
        counts = f"{len(way['rooms'])} files, {way['climbs']} climbs in {way['stays']} stays"
        yield f"- `{walk}` {what} visits {counts}: {', '.join(way['rooms'])}"
    if not found["walks"]:
        yield f"- there is no `{walk}` to follow; name another with --walk"


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the figures of a checkout.")
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("root", nargs="?", type=Path, default=here, help="a checkout's root")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument(
        "--walk", default="zoo.commands.distill.run.distill:config", help="function:parameter"
    )
    args = parser.parse_args()
    found = measure(args.root, args.walk)
    print(*report(found, args.walk), sep="\n")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
