"""`zoo export`: a size of an elastic model, as a plain checkpoint."""

from collections.abc import Iterable
from pathlib import Path

from zoo.axes import Shapes, named_shapes
from zoo.commands.elastic.sizes import ABOUT
from zoo.commands.prune.run import write_child
from zoo.files import near, read_json
from zoo.students.prune.elastic import FULL, cut_to, parse_sizes
from zoo.students.prune.parent import open_parent
from zoo.students.prune.plan import Plan
from zoo.students.prune.prune import Child


def export(run: Path, size: str, out: Path) -> None:
    """Cut a size out of the model of a run, and write it.

    Raises:
        ValueError: the run is not elastic, has no such size, or was not trained for it.
        NotExpressible: the library cannot build it.
    """
    folder = run / "export" if (run / "export").is_dir() else run
    if not (folder / ABOUT).is_file():
        raise ValueError(
            f"{run} holds no elastic model: {ABOUT} is missing. zoo elastic makes one; other "
            f"runs have one size, in their export folder.{near(run)}"
        )
    about = read_json(folder / ABOUT)
    plans = parse_sizes(about["sizes"])
    if size not in (FULL, *plans) and "=" not in size:
        raise ValueError(
            f"{run} has no size {size!r}; it has {', '.join([*plans, FULL])}, and what "
            "lies between them in words, such as ffn=0.6."
        )
    parent = open_parent(str(folder))
    shapes = named_shapes(parent.model)
    if size == FULL:
        child = Child(parent, shapes, [], {}, None)
    else:
        plan = plans.get(size) or Plan.parse(size)
        check_between(shapes, plan, plans.values())
        child = cut_to(parent, shapes, plan, about["ranks"], form=about["form"])
    write_child(child, out, dict(model=str(run), size=size))
    print(f"model  {out}  {child.shapes.count():,} of {shapes.count():,} numbers")


def check_between(shapes: Shapes, plan: Plan, trained: Iterable[Plan]) -> None:
    """Refuse a size that is smaller along an axis than every size that was trained.

    Raises:
        ValueError: it is, or it cuts what no trained size does.
    """
    least = dict(shapes.sizes)
    layers = {entry.path: shapes.num_layers(entry.path) for entry in shapes.layers}
    for known in trained:
        for axis, size in known.sizes(shapes).items():
            least[axis] = min(least[axis], size)
        for path in layers:
            layers[path] = min(layers[path], known.num_layers(path, shapes.num_layers(path)))
    wanted = plan.sizes(shapes) | {
        path: plan.num_layers(path, shapes.num_layers(path)) for path in layers
    }
    for what, size in wanted.items():
        lowest = (least | layers)[what]
        if size < lowest:
            raise ValueError(
                f"{what} was trained with {lowest} units and more, not with {size}; a size of "
                "which nothing was trained would not work."
            )
