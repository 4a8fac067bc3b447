"""The code of a checkout, read with `ast`: modules, definitions, imports; and a walk through it.

Nothing is run. What is imported by a string (`importlib`, a table of commands) is not seen.
`house_figures.py` prints what is counted here.
"""

import ast
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = "zoo"
KINDS = ("at the top of a file", "with those for types only", "with those inside functions")
"""Where an import stands; each kind counts the ones before it too."""


Definition = ast.FunctionDef | ast.ClassDef


@dataclass(eq=False)
class Module:
    name: str  # zoo.train.loop
    path: str  # train/loop.py: where a link points
    source: str
    names: dict[str, str] = field(default_factory=dict)  # a name imported here -> its whole name
    imports: set[tuple[str, int]] = field(default_factory=set)  # whole name, index into KINDS
    defs: dict[str, Definition] = field(default_factory=dict)  # "Run.save" -> its node

    def __post_init__(self):
        self.tree = ast.parse(self.source)
        self._read_imports(self.tree, 0)
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.defs[node.name] = node
            if isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
                self.defs |= {f"{node.name}.{part.name}": part for part in methods}

    def _read_imports(self, node: ast.AST, kind: int) -> None:
        for part in ast.iter_child_nodes(node):
            for alias in part.names if isinstance(part, ast.Import | ast.ImportFrom) else ():
                before = f"{part.module}." if isinstance(part, ast.ImportFrom) else ""
                whole = before + alias.name
                self.imports.add((whole, kind))
                if before or alias.asname:
                    self.names[alias.asname or alias.name] = whole
                else:  # `import zoo.train` names zoo
                    self.names[whole.partition(".")[0]] = whole.partition(".")[0]
            typing = isinstance(part, ast.If) and "TYPE_CHECKING" in ast.unparse(part.test)
            inside = isinstance(part, ast.FunctionDef)
            self._read_imports(part, 2 if inside else max(kind, int(typing)))


class House(dict[str, Module]):
    """The modules of a checkout by name, whatever folders they stand in."""

    @classmethod
    def read(cls, root: Path) -> "House":
        house = cls()
        for folder, _, files in os.walk(root / PACKAGE, followlinks=True):
            for path in (Path(folder, file) for file in files if file.endswith(".py")):
                parts = path.relative_to(root).with_suffix("").parts
                name = ".".join(part for part in parts if part != "__init__")
                place = path.resolve().relative_to(root.resolve()).as_posix()
                house[name] = Module(name, place, path.read_text())
        return cls(sorted(house.items()))

    def split(self, whole: str) -> tuple[str, str]:
        """Split `zoo.train.run.Run.save` after its module, which is "" for a foreign name."""
        module, rest = whole, ""
        while module and module not in self:
            module, _, last = module.rpartition(".")
            rest = f"{last}.{rest}" if rest else last
        return module, rest

    def find(self, whole: str) -> tuple[Module, str] | None:
        """Find a definition, also one that a module hands on or a class inherits."""
        name, rest = self.split(whole)
        if not name:
            return None
        module, (top, _, last) = self[name], rest.partition(".")
        if rest in module.defs:
            return module, rest
        if module.names.get(top, name) != name:
            return self.find(f"{module.names[top]}.{last}".rstrip("."))
        holder = module.defs.get(top)
        bases = holder.bases if isinstance(holder, ast.ClassDef) and last else ()
        found = (self.find(f"{self.whole(module, base)}.{last}") for base in bases)
        return next(filter(None, found), None)

    def whole(self, module: Module, node: ast.AST | None) -> str:
        """Give the whole name of what an expression or an annotation names, or ""."""
        match node:
            case ast.Name(id=name):
                here = f"{module.name}.{name}" if name in module.defs else ""
                return here or module.names.get(name, "")
            case ast.Attribute(value=value, attr=attr):
                before = self.whole(module, value)
                return before and f"{before}.{attr}"
            case ast.Constant(value=str(text)):
                return self.whole(module, ast.Name(text))
            case ast.BinOp(left=left, right=right):  # Cache | None
                return self.whole(module, left) or self.whole(module, right)
        return ""

    def functions(self) -> Iterator[tuple[Module, str, ast.FunctionDef]]:
        """Yield the functions of the modules and the methods of their classes."""
        for module in self.values():
            for name, node in module.defs.items():
                if isinstance(node, ast.FunctionDef):
                    yield module, name, node

    def graph(self, kind: int = 2) -> dict[str, set[str]]:
        """Give who imports whom, by imports of this kind and the kinds before it."""
        found = {}
        for name, module in self.items():
            targets = {self.split(whole)[0] for whole, its in module.imports if its <= kind}
            found[name] = targets - {"", name}
        return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Give the groups of modules in which each reaches each."""
    reach: dict[str, set[str]] = {}
    for name in graph:
        reach[name], coming = set(), [*graph[name]]
        while coming:
            if (one := coming.pop()) not in reach[name]:
                reach[name].add(one)
                coming += graph[one]
    groups = {frozenset(one for one in reach[name] if name in reach[one]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def floors(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """Give each module's floor: one above the highest that it imports; a circle shares one."""
    together = {name: group for group in circles(graph) for name in group}
    found: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in found:
            group = together.get(name, [name])
            below = {target for one in group for target in graph[one]} - {*group}
            found.update(dict.fromkeys(group, 1 + max(map(floor, below), default=0)))
        return found[name]

    return {name: floor(name) for name in graph}


def parameters(node: ast.AST) -> list[ast.arg]:
    args = node.args if isinstance(node, ast.FunctionDef) else None
    return [*args.posonlyargs, *args.args, *args.kwonlyargs] if args else []


class Value(NamedTuple):
    followed: bool = False
    kind: str = ""  # the whole name of its class, where known


class Frame(NamedTuple):
    module: Module
    values: dict[str, Value]
    returned: list[Value]


HOLDERS = (
    ast.IfExp | ast.BoolOp | ast.Starred | ast.Subscript | ast.Tuple | ast.List | ast.Dict
    | ast.ListComp | ast.GeneratorExp | ast.DictComp
)  # fmt: skip
"""Expressions that hold what stands in them; a sum or a comparison does not."""


def followed(values: Iterable[Value]) -> Value:
    return next((value for value in values if value.followed), Value())


class Walk:
    """Be one parameter and follow the calls that pass it on, branch after branch as written.

    Followed is the object under any name, and what holds it: an object of ours made with it, a
    tuple, a result that gives it back. With `fields`, so is `config.size`, but not what is
    computed from it. A partial is a call where it is made. A method is found where annotations
    or what was passed tell its receiver's class.
    """

    def __init__(self, house: House, *, fields: bool):
        self.house, self.fields = house, fields
        self.entered: list[str] = []  # the module of each function, in the order of the calls
        self.done: dict[Any, Value] = {}
        self.held: dict[tuple[str, str], Value] = {}  # what the fields of our classes hold

    def enter(self, found: tuple[Module, str], given: Mapping[str, Value]) -> Value:
        """Walk through a function, once for what it is given; return what it gives back."""
        module, name = found
        self.entered.append(module.name)
        key = (module.name, name, frozenset(item for item in given.items() if item[1].followed))
        if key not in self.done:
            node = module.defs[name]
            assert isinstance(node, ast.FunctionDef)
            kind = self.house.whole(module, node.returns)
            self.done[key] = Value(kind=kind)
            frame = Frame(module, dict(given), [])
            for arg in parameters(node):
                value = given.get(arg.arg, Value())
                known = value.kind or self.house.whole(module, arg.annotation)
                frame.values[arg.arg] = Value(value.followed, known)
            for statement in node.body:
                self.run(statement, frame)
            result = followed(frame.returned)
            self.done[key] = Value(result.followed, result.kind or kind)
        return self.done[key]

    def run(self, node: ast.AST, frame: Frame) -> None:
        match node:
            case (
                ast.Assign(targets=[target], value=source)
                | ast.AnnAssign(target=target, value=ast.expr() as source)
                | ast.withitem(optional_vars=ast.expr() as target, context_expr=source)
            ):
                self.bind(target, self.see(source, frame), frame)
            case (
                ast.For(target=target, iter=source) | ast.comprehension(target=target, iter=source)
            ):
                self.bind(target, self.see(source, frame), frame)
                for part in node.body if isinstance(node, ast.For) else node.ifs:
                    self.run(part, frame)
            case ast.Return(value=ast.expr() as source):
                frame.returned.append(self.see(source, frame))
            case ast.FunctionDef(name=name, body=body):  # inner functions: where they stand
                frame.values[name] = Value()
                own = {arg.arg: Value() for arg in parameters(node)}
                for part in body:
                    self.run(part, Frame(frame.module, {**frame.values, **own}, []))
            case ast.expr():
                self.see(node, frame)
            case _:
                for part in ast.iter_child_nodes(node):
                    self.run(part, frame)

    def bind(self, target: ast.expr, value: Value, frame: Frame) -> None:
        match target:
            case ast.Name(id=name):
                frame.values[name] = value
            case ast.Tuple(elts=parts):
                for part in parts:
                    self.bind(part, Value(value.followed), frame)
            case ast.Attribute(value=owner, attr=attr) if value.followed:
                self.held[self.see(owner, frame).kind, attr] = value

    def see(self, node: ast.AST, frame: Frame) -> Value:
        match node:
            case ast.Name(id=name):
                return frame.values.get(name, Value())
            case ast.Call():
                return self.call(node, frame)
            case ast.Attribute(value=owner, attr=attr):
                value = self.see(owner, frame)
                part = Value(value.followed and self.fields)
                return self.held.get((value.kind, attr), part) if value.followed else part
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp() | ast.DictComp():
                for part in node.generators:
                    self.run(part, frame)
        children = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr)]
        value = followed([self.see(child, frame) for child in children])
        return value if isinstance(node, HOLDERS) else Value()

    def call(self, node: ast.Call, frame: Frame) -> Value:
        func, args, word = node.func, node.args, ast.unparse(node.func).rpartition(".")[2]
        if word == "partial" and args:
            func, args = args[0], args[1:]
        owner = self.see(func.value, frame) if isinstance(func, ast.Attribute) else Value()
        values = [self.see(arg, frame) for arg in args]
        named = {key.arg or "": self.see(key.value, frame) for key in node.keywords}
        passed = followed([owner, *values, *named.values()])
        found = self.target(func, owner, frame)
        if not found:
            return passed if word == "replace" else Value()
        module, name = found
        definition, whole = module.defs[name], f"{module.name}.{name}"
        result = Value(kind=self.house.whole(module, getattr(definition, "returns", None)))
        if isinstance(definition, ast.ClassDef):
            fields = [
                ast.unparse(n.target) for n in definition.body if isinstance(n, ast.AnnAssign)
            ]
            held = {**dict(zip(fields, values, strict=False)), **named}
            self.held |= {(whole, key): value for key, value in held.items() if value.followed}
            result = Value(passed.followed, whole)
            values.insert(0, result)
            found = self.house.find(f"{whole}.__init__")
        elif "." in name:
            how = [ast.unparse(decorator) for decorator in definition.decorator_list]
            cls = Value(kind=whole.rpartition(".")[0])
            values[:0] = [] if "staticmethod" in how else [cls if "classmethod" in how else owner]
        if found and passed.followed:
            names = [arg.arg for arg in parameters(found[0].defs[found[1]])]
            back = self.enter(found, {**dict(zip(names, values, strict=False)), **named})
            result = result if result.followed else back
        return Value() if word == "partial" else result

    def target(self, func: ast.expr, owner: Value, frame: Frame) -> tuple[Module, str] | None:
        """Find the function or class that is called."""
        if isinstance(func, ast.Attribute) and owner.kind:
            return self.house.find(f"{owner.kind}.{func.attr}")
        if isinstance(func, ast.Name) and func.id in frame.values:  # hides what is named so
            return self.house.find(frame.values["cls"].kind) if func.id == "cls" else None
        return self.house.find(self.house.whole(frame.module, func))
