"""Run trainings of images and text one after another, from the first that is not finished."""

from functools import partial
from pathlib import Path

from zoo.commands.distill.image_text import check_complete, distill_image_text
from zoo.train.config import to_json
from zoo.train.distill.image_text_stages import STAGES, Stages
from zoo.train.mesh import by_first
from zoo.train.run import Run


def run_stages(stages: Stages, root: Path, *, resume: bool) -> Run:
    """Run every stage that is not finished yet; return the last one.

    Raises:
        ValueError: as `distill_image_text`.
        Interrupted: a signal came; `resume` continues with the stage that was interrupted.
    """
    for config in stages.values():
        check_complete(config)
    if "" in stages:
        return distill_image_text(stages[""], resume=resume)
    whole = run = Run(root)
    if not resume:
        by_first(partial(_begin, whole, stages))  # the other ranks would find it there
    with whole.discarded(unless=lambda: resume or any(root.glob("*/"))):
        for number, (name, config) in enumerate(stages.items(), 1):
            run = Run(config.out)
            if run.read_json("about.json"):
                continue
            print(f"stage {number} of {len(stages)}: {name}, in {config.out}", flush=True)
            run = distill_image_text(config, resume=(config.out / "config.json").is_file())
    return run


def _begin(whole: Run, stages: Stages) -> None:
    Run.refuse_existing(whole.path)
    whole.path.mkdir(parents=True, exist_ok=True)
    whole.write_json(STAGES, {name: to_json(config) for name, config in stages.items()})
