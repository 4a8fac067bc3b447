"""A recipe on another number of GPUs, as far as the command line leaves that open."""

from collections.abc import Mapping
from dataclasses import replace

from zoo.train.distill.config import Distill
from zoo.train.distill.scaling import changes, scaled_to, shared_out


def stages_on_gpus(
    stages: Mapping[str, Distill], words: list[str], gpus: int
) -> tuple[dict[str, Distill], list[str]]:
    """Return the stages of a run on so many GPUs, and the options that say what changed.

    Raises:
        ValueError: as `on_gpus`.
    """
    found, options = {}, []
    for name, config in stages.items():
        found[name] = on_gpus(config, words, gpus)
        if more := changes(config, found[name]):
            options += [*(["--stage", name] if name else []), *more]
    return found, options


def on_gpus(config: Distill, words: list[str], gpus: int) -> Distill:
    """Return the run on so many GPUs: with its own --batch, or with one that grows with them.

    What the words say themselves stays.

    Raises:
        ValueError: the GPUs cannot share the batch, or the --slices.
    """
    given = {word.partition("=")[0] for word in words}
    if "--slices" in given and config.slices != "auto" and config.num_slices % gpus:
        near = max(1, round(config.num_slices / gpus)) * gpus
        raise ValueError(
            f"{gpus} processes cannot share {config.num_slices} slices; {near} would do, or leave "
            "out --slices."
        )
    if given & {"--batch", "--batches", "--slices"}:
        return shared_out(config, gpus)
    run = scaled_to(config, gpus)
    if "--steps" in given:
        run = replace(run, steps=config.steps)
    if "--every.evaluate" in given:
        run = replace(run, every=config.every)
    if given & {"--optim.lr", "--optim.min-lr"}:
        run = replace(run, optim=config.optim)
    return run
