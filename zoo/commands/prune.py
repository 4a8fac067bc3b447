"""Make a smaller model of a trained one: where words, a parent, scores and cuts meet."""

import re

from rich.console import Console
from rich.table import Table

from zoo.axes import Shapes, named_shapes
from zoo.students.prune.parent import open_parent


def print_shapes(name: str) -> None:
    """Print a model's tensors with their named dims, and its axes with their sizes."""
    model = open_parent(name).model
    shapes = named_shapes(model)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file has no width that names should be cut to
    console.print(_tensors(shapes, model.state_dict()))
    console.print(_axes(shapes))
    console.print(f"{shapes.count():,} numbers in {len(shapes.tensors) - len(shapes.tied)} tensors")


def _tensors(shapes: Shapes, state: dict) -> Table:
    table = Table("tensor", "length", "named shape")
    rows: dict[tuple[str, ...], int] = {}
    for name, shape in shapes.tensors.items():
        scope = _scope(str(shape))
        row = (_numbered(name), " ".join(map(str, state[name].shape)), _numbered(scope))
        rows[row] = rows.get(row, 0) + 1
    for (name, lengths, shape), times in rows.items():
        table.add_row(name + (f"  x{times}" if times > 1 else ""), lengths, shape)
    return table


def _axes(shapes: Shapes) -> Table:
    table = Table("axis", "units", "tensors", "may be cut")
    rows: dict[tuple[str, str, str, str], int] = {}
    for axis, size in shapes.sizes.items():
        slots = len({slot.param for slot in shapes.slots(axis)})
        reason = f"no: {shapes.fixed[axis]}" if axis in shapes.fixed else "yes"
        row = (_numbered(axis), str(size), str(slots), reason)
        rows[row] = rows.get(row, 0) + 1
    for (axis, size, slots, reason), times in rows.items():
        table.add_row(axis + (f"  x{times}" if times > 1 else ""), size, slots, reason)
    return table


def _scope(shape: str) -> str:
    """Leave out of a shape the module that its letters belong to."""
    return re.sub(r"[\w.]+\.(?=[\w#]+)", "", shape)


def _numbered(name: str) -> str:
    """Write `#` for the numbers of layers, so that layers of one form take one row."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
