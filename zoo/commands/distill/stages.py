"""Run distillations one after another, and go on with the first that is not finished."""

import gc
from dataclasses import replace
from functools import partial
from pathlib import Path

from zoo.commands.distill.plan import print_plan
from zoo.commands.distill.run import distill
from zoo.eval.report.page import build_report
from zoo.eval.report.run_folder import STAGES
from zoo.files import read_json
from zoo.train.config import differences, to_json
from zoo.train.distill.config import Distill
from zoo.train.distill.plan_step import grids_of
from zoo.train.distill.setup import check_mosaics, meta_models, open_data
from zoo.train.distill.stages import Stages, folder_of, placed, plannable
from zoo.train.fields import built
from zoo.train.mesh import by_first
from zoo.train.run import Run


def distill_stages(stages: Stages, *, resume: bool = False) -> Run:
    """Run every stage that is not finished yet, each with its report; return the last one.

    Raises:
        ValueError: as `distill`; what later stages name is checked before the first begins, as far
            as that needs no weights.
        Interrupted: a signal came; `resume` continues with the stage that was interrupted.
    """
    if "" in stages:
        run = distill(stages[""], resume=resume)
        by_first(partial(build_report, run.path))
        return run
    run = whole = Run(folder_of(stages))
    if resume:
        refuse_other_settings(whole.path, stages)
    else:
        Run.refuse_existing(whole.path)
        check(stages)
        whole.path.mkdir(parents=True, exist_ok=True)
        whole.write_json(STAGES, {name: to_json(config) for name, config in stages.items()})
    with whole.discarded(unless=lambda: resume or any(whole.path.glob("*/"))):
        for number, (name, config) in enumerate(placed(stages).items(), 1):
            print(f"stage {number} of {len(stages)}: {name}, in {config.out}", flush=True)
            run = finish_stage(config)
            gc.collect()  # a compiled student refers to itself
    return run


def finish_stage(config: Distill) -> Run:
    """Begin a stage, go on with it, or leave it alone if it is finished."""
    run = Run(config.out)
    # asked once: a rank that asked later would see what another has begun
    done, begun = by_first(lambda: (finished(run), (config.out / "config.json").is_file()))
    if not done:
        if begun:  # its slices are settled, and the folder of the whole may be elsewhere by now
            config = replace(config, slices=run.config(Distill).slices)
            run.write_config(config)
        run = distill(config, resume=begun)
    elif (run.path / "report.html").is_file():
        return run
    by_first(partial(build_report, run.path))
    return run


def finished(run: Run) -> bool:
    """Tell whether a distillation came to its end, the export."""
    about = run.read_json("about.json")
    return bool(about) and about["seconds"] is not None


def has_begun(folder: Path) -> bool:
    """Tell whether a folder holds a run, in stages or not, that `--resume` can go on with."""
    return (folder / STAGES).is_file() or (folder / "config.json").is_file()


def check(stages: Stages) -> None:
    """Refuse what a stage cannot be, with models that have no weights yet.

    Raises:
        ValueError: the stage, and what is wrong with it.
    """
    for name, config in plannable(stages).items():
        try:
            meta_models(config)
            check_mosaics(config)
            grids_of(config)
            open_data(config)
        except ValueError as error:
            raise ValueError(f"In the stage {name}: {error}") from error


def read_stages(folder: Path) -> dict[str, Distill] | None:
    """Read what a run in stages was started with; `None` if the folder holds no such run.

    Raises:
        ValueError: its record is damaged.
    """
    path = folder / STAGES
    if not path.is_file():
        return None
    try:
        stages = {name: built(Distill, content) for name, content in read_json(path).items()}
    except ValueError as error:
        raise ValueError(f"{path} does not list the stages of a run: {error}") from error
    return {name: replace(config, out=folder) for name, config in stages.items()}


def refuse_other_settings(root: Path, stages: Stages) -> None:
    """Raise a ValueError if the run in `root` was started with other stages."""
    before = read_stages(root)
    if before is None or before.keys() != stages.keys():
        raise ValueError(f"There is no run of the stages {', '.join(stages)} in {root}.")
    for name, config in stages.items():
        if changed := differences(before[name], config):
            text = "; ".join(f"{k}: {old} there, {new} here" for k, (old, new) in changed.items())
            raise ValueError(
                f"The stage {name} in {root} cannot go on with other settings ({text}). Resume "
                "without them, or start a new run with another --out."
            )


def print_plans(stages: Stages) -> None:
    """Print the plan of each stage, before any has run."""
    for number, (name, config) in enumerate(plannable(stages).items(), 1):
        if name:
            print(f"\nstage {number} of {len(stages)}: {name}, in {config.out}")
        print_plan(config)
