"""`zoo elastic` for images: sort a vision model to its sizes, which `zoo distill` then trains."""

from pathlib import Path
from typing import Any

from torch import nn

from zoo.axes import named_shapes
from zoo.commands.elastic.run import check_axes, check_names, ranked
from zoo.commands.elastic.sizes import write_about
from zoo.commands.prune.data import batches_of, read_samples
from zoo.commands.prune.write import write_child
from zoo.students.prune.elastic import checked_size, parse_sizes, sort_units
from zoo.students.prune.masked import Masked
from zoo.students.prune.parent import open_parent
from zoo.students.prune.prune import Child
from zoo.train.device import device_of
from zoo.train.distill.elastic_config import Elastic


def sort_model(config: Elastic) -> Path:
    """Write a vision model with its units sorted, and its sizes beside it.

    Raises:
        ValueError: a size is none of this model, or it has batch norms, whose statistics are of
            one size.
    """
    check_names(config)
    if config.router != "none":
        raise ValueError("A --router is for language models; name the sizes of a vision model.")
    if config.out.exists():
        raise ValueError(f"{config.out} is there already; choose another --out.")
    device, plans = device_of(config.device), parse_sizes(config.sizes)
    parent = open_parent(config.student)
    model: Any = parent.model.to(device)
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise ValueError(f"{config.student} has batch norms, whose statistics are of one size.")
    shapes = named_shapes(model)
    check_axes(shapes, plans)
    samples = read_samples(
        parent, Path(config.data), number=config.calibration, length=0, seed=config.seed
    )

    def batches():
        return batches_of(samples, config.batch, device)

    orders, ranks = ranked(model, shapes, plans, batches, config)
    model.load_state_dict(sort_units(shapes, model.state_dict(), orders))
    masked, probe = Masked(model, shapes), next(batches_of(samples, 2, device))
    for plan in plans.values():
        checked_size(parent, masked, plan, ranks, probe, form=config.form)
    write_child(Child(parent, shapes, [], {}, None), config.out, dict(model=config.student))
    write_about(
        config.out,
        dict(sizes=config.sizes, ranks=ranks, form=config.form, shares=config.shares),
    )
    return config.out
