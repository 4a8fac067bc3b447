"""What a run of images and text would be: its parts, tokens, bytes; nothing is trained."""

from rich.console import Console
from rich.table import Table

from zoo.commands.distill.image_text import check_complete, prepare
from zoo.commands.distill.plan import size_text
from zoo.multimodal.open import parts_of, tower_of
from zoo.train.device import device_of
from zoo.train.distill.image_text_config import DistillImageText
from zoo.train.distill.image_text_stages import Stages
from zoo.train.distill.plan_cost import count_parameters
from zoo.train.run import Run

LOOKED_AT = 1000
"""Conversations, spread over the data, whose tokens a plan counts."""


def print_image_text_plan(config: DistillImageText, stages: Stages) -> None:
    """Print the parts of the model that a run trains, and what of it learns in which stage."""
    Run.refuse_existing(config.out)
    device_of(config.device)  # refuses one that is not there
    for stage in stages.values():
        check_complete(stage)
    setup = prepare(config, meta=True)
    table = Table("part", "what", "parameters", title="Model")
    parts = parts_of(setup.model)
    tower = tower_of(setup.model)
    names = dict(
        tower=", ".join(config.tower) or type(tower).__name__,
        projector=f"{tower.config.hidden_size} to {setup.model.config.text_config.hidden_size}",
        language=config.language or str(config.start),
    )
    for name, part in parts.items():
        table.add_row(name, names[name], f"{count_parameters(part) / 1e6:,.2f} M")
    for label, teacher in setup.teachers.items():
        table.add_row("teacher", label, f"{count_parameters(teacher) / 1e6:,.2f} M")
    console = Console()
    console.print(table)
    lines = []
    for name, stage in stages.items():
        trained = sum(count_parameters(parts[part]) for part in stage.learn)
        total = sum(map(count_parameters, parts.values()))
        held = 4 * (total + trained * (3 + bool(stage.optim.ema)))
        shown = f"stage {name}: " if name else ""
        lines.append(
            f"{shown}{', '.join(stage.learn)} learn for {stage.steps:,} steps of {stage.batch}; "
            f"{size_text(held)} of weights, gradients and the optimizer's state"
        )
    looked_at = range(0, len(setup.train), -(-len(setup.train) // LOOKED_AT))
    longest = max(len(setup.train.encoded(i).ids) for i in looked_at)
    lines += [
        f"data: {len(setup.train):,} conversations, {len(setup.val):,} questions held out",
        f"images: {setup.model.config.image_seq_length} tokens of a square one, at most "
        f"{tower.config.max_tokens}; the longest of {len(looked_at):,} conversations has "
        f"{longest:,} tokens",
        "Nothing was written.",
    ]
    for line in lines:
        console.print(line, highlight=False)
