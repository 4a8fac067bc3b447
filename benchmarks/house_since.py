"""How many statements stand today for what a former tree had: found again by name or by likeness.

git archive 13a6030 | tar -x -C ../then && python benchmarks/house_since.py ../then

A part is a function, a method, the rest of a class, or an assignment of a module. A part of the
former tree is found again under its own name, or under the one that `zoo/moved.py` has for it;
among several the most alike is taken, and of what has no such name the most alike in at least
four lines of ten. Imports and docstrings do not count. What was split counts with the piece that
kept the name, its other pieces as new.
"""

import argparse
import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

from house_code import House
from house_figures import is_docstring

ALIKE = 0.4


class Part(NamedTuple):
    name: str
    path: str
    statements: int
    lines: tuple[str, ...]

    @classmethod
    def of(cls, name: str, path: str, nodes: list[ast.stmt], own: int = 0) -> "Part":
        inside = [n for node in nodes for n in ast.walk(node) if isinstance(n, ast.stmt)]
        counted = (n for n in inside if not isinstance(n, ast.Import | ast.ImportFrom))
        text = "\n".join(ast.unparse(node) for node in nodes)
        count = own + sum(not is_docstring(n) for n in counted)
        return cls(name, path, count, tuple(line.strip() for line in text.splitlines()))

    def like(self, other: "Part") -> float:
        return SequenceMatcher(None, self.lines, other.lines, autojunk=False).ratio()


def parts_of(root: Path) -> list[Part]:
    return [part for module in House.read(root).values() for part in _parts(module)]


def _parts(module) -> Iterator[Part]:
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            yield from (Part.of(f"{node.name}.{n.name}", module.path, [n]) for n in methods)
            rest = [n for n in node.body if n not in methods]
            yield Part.of(node.name, module.path, rest, own=1)
        elif isinstance(node, ast.FunctionDef):
            yield Part.of(node.name, module.path, [node])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            yield Part.of(ast.unparse(target), module.path, [node])
        elif not is_docstring(node) and not isinstance(node, ast.Import | ast.ImportFrom):
            yield Part.of("", module.path, [node])


def found_again(
    then: list[Part], today: list[Part], renamed: dict[str, str]
) -> tuple[list[tuple[Part, Part]], list[Part]]:
    """Return the pairs of what was and what it is today, and what is gone."""
    by_name, by_line = defaultdict(list), defaultdict(list)
    for i, part in enumerate(today):
        by_name[part.name].append(i)
        for line in {line for line in part.lines if len(line) > 15}:
            by_line[line].append(i)
    pairs, left, taken = [], [], set[int]()

    def take(part: Part, places: list[int], least: float = 0.0) -> bool:
        free = [i for i in places if i not in taken]
        best = max(free, key=lambda i: part.like(today[i]), default=None)
        if best is None or part.like(today[best]) < least:
            return False
        taken.add(best)
        pairs.append((part, today[best]))
        return True

    for part in then:
        head, dot, method = part.name.partition(".")
        names = {part.name, renamed.get(head, head) + dot + method}
        if not take(part, [i for name in names for i in by_name[name]]):
            left.append(part)
    gone = []
    for part in left:
        shared = Counter(i for line in part.lines for i in by_line[line])
        if not take(part, [i for i, _ in shared.most_common(5)], ALIKE):
            gone.append(part)
    return pairs, gone


def renames(root: Path) -> dict[str, str]:
    """Read the names that `zoo/moved.py` has for former ones: rows of (module, module, names)."""
    tree = ast.parse((root / "zoo" / "moved.py").read_text())
    values = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    rows = ast.literal_eval(values["NAMES"])
    pairs = (pair.partition("=") for _, _, names in rows for pair in names.split())
    return {former: today for former, _, today in pairs if today}


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what became of a former tree's statements.")
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("then", type=Path, help="the former checkout's root")
    parser.add_argument("today", nargs="?", type=Path, default=here, help="today's root")
    args = parser.parse_args()
    then, today = parts_of(args.then), parts_of(args.today)
    pairs, gone = found_again(then, today, renames(args.today))
    before, after = (sum(pair[side].statements for pair in pairs) for side in (0, 1))
    print(f"then: {sum(p.statements for p in then):,} statements in {len(then):,} parts")
    print(f"- found again: {before:,} in {len(pairs):,} parts, today {after:,}")
    print(f"- gone: {sum(p.statements for p in gone):,} in {len(gone):,} parts")
    new = sum(p.statements for p in today) - after
    print(f"today: {after + new:,} statements, of which {new:,} are in parts that are new")


if __name__ == "__main__":
    main()
