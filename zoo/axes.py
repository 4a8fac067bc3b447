"""Named shapes: what each dim of each parameter of a model is made of.

    q_proj.weight    k q d, C           k groups of q heads of d channels read the stream C
    qkv.weight       3 h d, C           three stacked blocks

Counts, who writes and reads an axis, cuts, permutations and fields of the configuration follow from
them. They come from tables (`zoo.shape_tables` explains how those are written) by class of module;
a tensor without a line is an error, so that no model is cut by a guess.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from zoo.shape_tables import Block, Line, fits, parse_tables, register
from zoo.shape_tables import tables as table_blocks

__all__ = [
    "Axis",
    "Field",
    "Layers",
    "Part",
    "Shape",
    "Shapes",
    "Slot",
    "State",
    "dim_size",
    "named_shapes",
    "numbered",
    "parse_tables",
    "part_size",
    "register",
]

Axis = str
"""`C`, `C2` (a stage's), `model.vision_tower:C`, `model.layers.3.mlp.f`."""
Part = tuple[Axis | int, ...]
"""One stacked part of a dim: the product of its axes and numbers."""
State = dict[str, Tensor]

FOLLOWERS = re.compile(r"\.?(bias|running_mean|running_var)$")
LIBRARIES = {"timm": "timm", "transformers": "hf", "torch": "nn", "zoo": "zoo"}


class Shape(NamedTuple):
    """The dims of one tensor, and which of them is summed over when the tensor is used."""

    dims: tuple[tuple[Part, ...], ...]
    read: int | None = None

    def __str__(self) -> str:
        return ", ".join(
            " | ".join(" ".join(str(unit) for unit in part) for part in dim) for dim in self.dims
        )


class Slot(NamedTuple):
    """A place where an axis stands: tensor, dim, which stacked part, which factor of it."""

    param: str
    dim: int
    part: int
    place: int


class Field(NamedTuple):
    """A field of the constructor, or an attribute, that follows from axes, for one module."""

    scope: str
    terms: tuple[Part, ...]
    """A sum of products."""
    over: tuple[Axis, ...]
    names: tuple[str, ...]
    stage: int | None
    config: str


class Layers(NamedTuple):
    """A list of layers, and the field of the constructor that says how many there are."""

    path: str
    names: tuple[str, ...]
    stage: int | None
    config: str


@dataclass(frozen=True)
class Shapes:
    """The named shapes of one model; see the head of this module."""

    tensors: Mapping[str, Shape]
    sizes: Mapping[Axis, int]
    fields: tuple[Field, ...] = ()
    attributes: tuple[Field, ...] = ()
    layers: tuple[Layers, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[Axis, str] = field(default_factory=dict)
    """Axes that keep their size, and why."""
    rigid: frozenset[Axis] = frozenset()
    """Those among them whose units keep their places too."""

    follows: Mapping[Axis, Axis] = field(default_factory=dict)
    """Axes that are cut by another's share, if nothing else is said."""

    def count(self, sizes: Mapping[Axis, int] = {}) -> int:
        """Count the numbers in the tensors if axes had these sizes; tied tensors count once."""
        sizes = {**self.sizes, **sizes}
        return sum(
            math.prod(dim_size(dim, sizes) for dim in shape.dims)
            for name, shape in self.tensors.items()
            if name not in self.tied
        )

    def slots(self, axis: Axis) -> list[Slot]:
        """List the places where an axis stands."""
        return [
            Slot(name, i, j, k)
            for name, shape in self.tensors.items()
            for i, dim in enumerate(shape.dims)
            for j, part in enumerate(dim)
            for k, unit in enumerate(part)
            if unit == axis
        ]

    def num_layers(self, path: str) -> int:
        """Count the layers of the list at `path`."""
        prefix = f"{path}."
        words = (n[len(prefix) :].split(".")[0] for n in self.tensors if n.startswith(prefix))
        return len({word for word in words if word.isdigit()})

    def readers(self, axis: Axis) -> list[Slot]:
        """List the places where a weight multiplies by the units of an axis and sums over them."""
        return [slot for slot in self.slots(axis) if self.tensors[slot.param].read == slot.dim]


def dim_size(dim: tuple[Part, ...], sizes: Mapping[Axis, int]) -> int:
    """Compute the length of a dim."""
    return sum(part_size(part, sizes) for part in dim)


def part_size(part: Part, sizes: Mapping[Axis, int]) -> int:
    """Compute the length of one stacked part."""
    return math.prod(unit if isinstance(unit, int) else sizes[unit] for unit in part)


def numbered(name: str) -> str:
    """Write `#` for the numbers of layers in the name of a tensor or an axis."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


# From tables and a model to named shapes


def named_shapes(model: nn.Module, tables: Mapping[str, Block] | None = None) -> Shapes:
    """Name the dims of every tensor in a model's state dict.

    Args:
        tables: What to read instead of the tables that came with zoo (`parse_tables`).

    Raises:
        ValueError: a tensor has no line, or a dim's length does not fit its letters.
    """
    return _Reader(model, table_blocks() if tables is None else tables).read()


class _Reader:
    def __init__(self, model: nn.Module, tables: Mapping[str, Block]):
        self.model = model
        self.modules = dict(model.named_modules())
        self.blocks = {
            path: block
            for path, module in self.modules.items()
            if (block := _block_of(module, tables)) is not None
        }
        self.scopes = ["", *(p for p, b in self.blocks.items() if p and "stream" in b.words)]
        self.stages = {scope: self._stage_numbers(scope) for scope in self.scopes}
        self.same: dict[Axis, Axis] = {}
        self.tensors: dict[str, Shape] = {}

    def read(self) -> Shapes:
        for path, block in self.blocks.items():
            for one, other, condition in block.ties:
                if _holds(condition, self.modules[path]):
                    self._unite(self._axis(one, path), self._axis(other, path))
        state = self.model.state_dict(keep_vars=True)
        for path, module in self.modules.items():
            for one, other in getattr(module, "same_axes", ()):
                self._unite(self._axis(one, path), self._axis(other, path))
        self._unite_shared(state)
        owners, missing, tied, first = set(), [], {}, {}
        for name, tensor in state.items():
            found = self._find(name, tensor.shape)
            if found is None:
                missing.append(name)
                continue
            owner, line = found
            owners.add(owner)
            self.tensors[name] = self._shape(name, tensor, owner, line)
            if tensor.numel() and first.setdefault(_storage(tensor), name) != name:
                tied[name] = first[_storage(tensor)]
        if missing:
            self._refuse(missing)
        lengths = {name: tuple(tensor.shape) for name, tensor in state.items()}
        sizes = self._solve(lengths, owners)
        fixed = {
            axis: reason
            for path in sorted(owners)
            for letter, reason in self.blocks[path].fixed.items()
            if (axis := self._axis(letter, path)) in sizes
        }
        return Shapes(
            tensors=self.tensors,
            sizes=sizes,
            fields=tuple(self._declared(owners, sizes, "fields")),
            attributes=tuple(self._declared(owners, sizes, "reads")),
            layers=tuple(self._layers()),
            tied=tied,
            fixed=fixed,
            rigid=frozenset(
                self._axis(letter, path) for path in owners for letter in self.blocks[path].rigid
            )
            & fixed.keys(),
            follows={
                axis: self._axis(first, path)
                for path in sorted(owners)
                for first, *others in self.blocks[path].follows
                for letter in others
                if (axis := self._axis(letter, path)) in sizes
            },
        )

    def _unite_shared(self, state: Mapping[str, Tensor]) -> None:
        """Let modules that share a tensor share their letters: one block in several layers."""
        first: dict[Any, str] = {}
        for name, tensor in state.items():
            other = first.setdefault(_storage(tensor), name) if tensor.numel() else name
            if other == name:
                continue
            one, two = self._find(other, tensor.shape), self._find(name, tensor.shape)
            if one is None or two is None or _letters(one[1]) != _letters(two[1]):
                continue  # refused later, or tied as an embedding and a head are
            for letter in _letters(one[1]):
                self._unite(self._axis(letter, one[0]), self._axis(letter, two[0]))

    def _find(self, name: str, lengths: tuple[int, ...] | None) -> tuple[str, Line] | None:
        """Find the outermost module with a line for a tensor; any line if there are no lengths."""
        if name.endswith("num_batches_tracked"):
            return "", Line(re.compile(""), (), None)
        for path, block in self._around(name):
            inside = name[len(path) + 1 :] if path else name
            for line in block.lines:
                if (match := line.name.fullmatch(inside)) and fits(line.dims, lengths):
                    return path, line.numbered(match.groups())
        if FOLLOWERS.search(name):
            found = self._find(FOLLOWERS.sub(".weight", name), None)
            if found is not None:
                return found[0], Line(found[1].name, found[1].dims[:1], None)
        return None

    def _around(self, name: str) -> Iterator[tuple[str, Block]]:
        words = name.split(".")
        for i in range(len(words)):
            path = ".".join(words[:i])
            if path in self.blocks:
                yield path, self.blocks[path]

    def _shape(self, name: str, tensor: Tensor, owner: str, line: Line) -> Shape:
        dims = []
        for dim, length in zip(line.dims, tensor.shape, strict=True):
            if dim == (("_",),):
                dims.append(((length,),))
                continue
            dims.append(
                tuple(
                    tuple(int(u) if u.isdigit() else self._axis(u, owner) for u in part)
                    for part in self._given(dim, owner)
                )
            )
        module = self.modules[name.rpartition(".")[0]]
        read = line.read
        if (
            read is None
            and tensor.ndim > 1
            and isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        ):
            read = 0 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1
        return Shape(tuple(dims), read)

    def _given(self, dim: tuple[tuple[str, ...], ...], owner: str) -> tuple[tuple[str, ...], ...]:
        """Put what a module says of its output, `{path}`, or of itself, `{.name}`, in its place."""
        match = re.fullmatch(r"\{(\.?)(\w+)\}", dim[0][0]) if len(dim) == len(dim[0]) == 1 else None
        if match is None:
            return dim
        own, at = match.groups()
        if own:
            return tuple(tuple(p.split()) for p in getattr(self.modules[owner], at).split(" | "))
        shape = getattr(self.modules[f"{owner}.{at}".strip(".")], "output_shape", "")
        return tuple((f"{at}.{axis}",) for axis in shape.split(" | ") if axis) or ((f"{at}:C",),)

    def _axis(self, token: str, owner: str) -> Axis:
        path, _, letter = token.rpartition(":")
        if not letter.startswith("C"):
            return self._named(f"{owner}.{letter}" if owner else letter)
        inside = f"{owner}.{path}".strip(".") if path else owner
        scope = max((s for s in self.scopes if _is_inside(inside, s)), key=len)
        numbers = self.stages[scope]
        name = f"{scope}:C" if scope else "C"
        if not numbers:
            return self._named(name)
        if letter[1:].isdigit():
            return self._named(f"{name}{min(int(letter[1:]), max(numbers.values()))}")
        stage, block = self._place(inside, scope)
        step = {"C": 0, "C-": -1, "C+": 1, "C<": -1 if block == 0 else 0}[letter]
        return self._named(f"{name}{stage + step}")

    def _named(self, axis: Axis) -> Axis:
        while axis in self.same:
            axis = self.same[axis]
        return axis

    def _unite(self, one: Axis, other: Axis) -> None:
        if one != other:  # a stream keeps its name
            first, second = sorted((one, other), key=lambda axis: (not _is_stream(axis), axis))
            self.same[second] = first

    def _stage_numbers(self, scope: str) -> dict[str, int]:
        block = self.blocks.get(scope)
        if block is not None and block.words.get("stream"):  # the stages of what lies inside
            scope += f".{block.words['stream']}"
            block = self.blocks.get(scope)
        if block is None or "stage" not in block.words:
            return {}
        pattern, _, shift = block.words["stage"].partition("+")
        regex = re.compile(
            re.escape(scope + "." * bool(scope)) + re.escape(pattern).replace(r"\#", r"(\d+)")
        )
        return {
            path: int(match[1]) + int(shift or 0)
            for path in self.modules
            if (match := regex.fullmatch(path))
        }

    def _place(self, path: str, scope: str) -> tuple[int, int | None]:
        """Return the stage that a module is in, and its block's number there."""
        for stage, number in self.stages[scope].items():
            if _is_inside(path, stage):
                match = re.match(r"\.(?:blocks\.)?(\d+)", path[len(stage) :])
                return number, int(match[1]) if match else None
        raise ValueError(f"{path or 'the model'} is in no stage; its lines need C0 or C9, not C.")

    def _stage_of(self, path: str) -> int | None:
        scope = max((s for s in self.scopes if _is_inside(path, s)), key=len)
        stages = list(self.stages[scope])
        return next((i for i, stage in enumerate(stages) if _is_inside(path, stage)), None)

    def _solve(self, lengths: Mapping[str, tuple[int, ...]], owners: set[str]) -> dict[Axis, int]:
        sizes = {
            self._axis(terms[0][0], path): value
            for path in owners
            for terms, over, names in self.blocks[path].reads
            if len(terms) == len(terms[0]) == 1 and not over
            if isinstance(value := _attribute(self.modules[path], names[0]), int)
        }
        todo = [
            (name, i, dim, length)
            for name, shape in self.tensors.items()
            for i, (dim, length) in enumerate(zip(shape.dims, lengths[name], strict=True))
        ]
        while todo:
            left = [equation for equation in todo if not _settle(*equation, sizes)]
            if len(left) == len(todo):
                name, i, dim, length = left[0]
                letters = Shape((dim,))
                raise ValueError(
                    f"{name}: dim {i} of length {length} = {letters} leaves more than one letter "
                    "open; give one the attribute that holds its size."
                )
            todo = left
        return {axis: sizes[axis] for axis in self._used() if axis in sizes}

    def _used(self) -> list[Axis]:
        units = (u for shape in self.tensors.values() for d in shape.dims for p in d for u in p)
        return list(dict.fromkeys(u for u in units if isinstance(u, str)))

    def _declared(self, owners: set[str], sizes: Mapping[Axis, int], kind: str) -> Iterator[Field]:
        seen = set()
        for path, block in self.blocks.items():
            for written, over, names in getattr(block, kind) if path in owners else ():
                terms = tuple(
                    tuple(int(a) if a.isdigit() else self._axis(a, path) for a in term)
                    for term in written
                )
                below = tuple(self._axis(a, path) for a in over)
                axes = [a for term in terms for a in term if isinstance(a, str)]
                used = (names, *axes)
                if (kind == "reads" or used not in seen) and all(
                    a in sizes for a in (*axes, *below)
                ):
                    seen.add(used)  # of several modules that name a field, the outermost counts
                    yield Field(
                        path, terms, below, names, self._stage_of(path), self._config_of(path)
                    )

    def _layers(self) -> Iterator[Layers]:
        for path, block in self.blocks.items():
            for pattern, names in block.layers:
                prefix = re.escape(path + "." * bool(path))
                regex = re.compile(prefix + re.escape(pattern).replace(r"\#", r"\d+"))
                for inside in filter(regex.fullmatch, self.modules):
                    yield Layers(inside, names, self._stage_of(inside), self._config_of(path))

    def _config_of(self, path: str) -> str:
        config = getattr(self.model, "config", None)
        for outer, block in reversed(list(self._around(f"{path}.x" if path else "x"))):
            del outer
            for name in block.words.get("config", "").split(","):
                if name and hasattr(config, name):
                    return name
        return ""

    def _refuse(self, missing: list[str]) -> None:
        classes = dict.fromkeys(
            f"{type(m).__module__.partition('.')[0]}'s {type(m).__name__}"
            for name in missing
            for m in [self.modules[name.rpartition(".")[0]], self._above(name)]
        )
        raise ValueError(
            f"{len(missing)} tensors of {type(self.model).__name__} have no named shape, for one "
            f"{', '.join(missing[:4])} (classes {', '.join(list(classes)[:6])}). Add their lines "
            "to a table in zoo/tables, or to the family's SHAPES; zoo/axes.py explains them."
        )

    def _above(self, name: str) -> nn.Module:
        return self.modules[name.rpartition(".")[0].rpartition(".")[0]]


def _is_stream(axis: Axis) -> bool:
    return re.fullmatch(r"(.*[.:])?C\d*", axis) is not None


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape


def _letters(line: Line) -> list[str]:
    units = (u for dim in line.dims for part in dim for u in part)
    return [u for u in units if u != "_" and not u.isdigit() and not u.startswith("{")]


def _block_of(module: nn.Module, tables: Mapping[str, Block]) -> Block | None:
    kind = type(module)
    words = kind.__module__.split(".")
    library = LIBRARIES.get(words[0])
    qualified = tables.get(f"{library}.{words[-1]}.{kind.__name__}")
    return qualified or tables.get(f"{library}.{kind.__name__}")


def _is_inside(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(outer + ".")


def _attribute(module: Any, path: str) -> Any:
    for word in path.split("."):
        module = module[int(word)] if word.isdigit() else getattr(module, word, None)
    return module


def _holds(condition: str, module: nn.Module) -> bool:
    path, equals, value = condition.lstrip("!").partition("=")
    found = _attribute(module, path)
    return str(found) == value if equals else bool(found) != condition.startswith("!")


def _settle(name: str, i: int, dim: tuple[Part, ...], length: int, sizes: dict[Axis, int]) -> bool:
    """Check a dim against its length, or find the one size in it that is not known yet."""
    known, slope, unknown = 0, 0, set()
    for part in dim:
        open_ = [u for u in part if isinstance(u, str) and u not in sizes]
        factor = math.prod(u if isinstance(u, int) else sizes.get(u, 1) for u in part)
        if len(open_) > 1:
            return False
        unknown.update(open_)
        known, slope = (known, slope + factor) if open_ else (known + factor, slope)
    if len(unknown) > 1:
        return False
    if unknown and (length - known) % slope == 0 and length > known:
        sizes[unknown.pop()] = (length - known) // slope
        return True
    if unknown or known != length:
        values = ", ".join(f"{u} = {sizes[u]}" for p in dim for u in p if u in sizes)
        raise ValueError(
            f"{name}: dim {i} has length {length}, which {Shape((dim,))} cannot have ({values})."
        )
    return True
