"""Eagle's pre-alignment as stages: trainings one after another, each on what came before.

2408.15998, section 2.5: encoders that never saw text are first aligned one by one, each with a
projector of its own against the same frozen language model; then the projector behind all of them
is trained; then everything. A stage is a `DistillImageText`, with its folder inside of the whole's.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from zoo.files import read_json
from zoo.train.distill.image_text_config import DistillImageText
from zoo.train.fields import built

STAGES = "image_text_stages.json"
Stages = Mapping[str, DistillImageText]


def prealigned(
    config: DistillImageText, align_steps: int, project_steps: int
) -> dict[str, DistillImageText]:
    """Return the stages of a mixture's training: one for each encoder, `project`, and `tune`.

    Args:
        config: Of the last stage.
        align_steps: Steps of each encoder's stage.
        project_steps: Steps of the projector's.

    Raises:
        ValueError: there are fewer than two encoders, or the frozen language model would be a
            random one.
    """
    if len(config.tower) < 2 or config.start:
        raise ValueError(
            "--stages prealign is for a mixture: name two --tower or more, and --language."
        )
    if config.language.endswith("/random"):
        raise ValueError(
            f"--stages prealign trains encoders against the frozen language model, and "
            f"{config.language} has no weights; train one first (zoo distill --text ... "
            "--losses.kl 0 --losses.ce 1), and give --language lm:RUN/export."
        )
    found, names = dict[str, DistillImageText](), list[str]()
    for number, tower in enumerate(config.tower, 1):
        name = f"align_{number}_{re.sub(r'[^A-Za-z0-9]+', '_', tower.partition('@')[0])[-24:]}"
        names.append(name)
        found[name] = replace(
            config, tower=(tower,), learn=("tower", "projector"), steps=align_steps, teachers=(),
            vision=0.0, losses=replace(config.losses, kl=0.0, ce=1.0), native=config.native,
        )  # fmt: skip
    aligned = tuple(_place(config.out, n, name) for n, name in enumerate(names, 1))
    found["project"] = replace(
        config, tower=tuple(f"vlm:{folder}" for folder in aligned), learn=("projector",),
        steps=project_steps, teachers=(), vision=0.0,
        losses=replace(config.losses, kl=0.0, ce=1.0),
    )  # fmt: skip
    start = _place(config.out, len(names) + 1, "project")
    found["tune"] = replace(config, tower=(), language="", start=start)
    return {
        name: replace(stage, out=_place(config.out, number, name))
        for number, (name, stage) in enumerate(found.items(), 1)
    }


def _place(root: Path, number: int, name: str) -> Path:
    return root / f"{number}-{name}"


def read_stages(folder: Path) -> dict[str, DistillImageText] | None:
    """Read what a run in stages was started with; `None` if the folder holds no such run."""
    path = folder / STAGES
    if not path.is_file():
        return None
    return {name: built(DistillImageText, content) for name, content in read_json(path).items()}
