"""The table that `zoo list` shows: parameters, image size, weights and licences by model.

Building every model takes half a minute, so the facts stand in `zoo/models.json`. A test compares
them with the built models. After a change of a family:

    make models.json        (python -m zoo.commands.model_table)
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).parent.parent / "models.json"


class ModelFacts(NamedTuple):
    """The facts about a registered model that need no weights."""

    parameters: int
    size: tuple[int, int]
    """Rows and columns of its images."""
    weights: Mapping[str, str]
    """Tag of released weights -> licence; "-" where none is stated."""


def read_table() -> dict[str, ModelFacts]:
    """Read the facts about all models of zoo's own families, by name."""
    rows: dict[str, Any] = json.loads(FILE.read_text())
    return {
        name: ModelFacts(row["parameters"], tuple(row["size"]), row["weights"])
        for name, row in rows.items()
    }


def build_facts(name: str) -> ModelFacts:
    """Build one model without memory for its weights, and count."""
    import timm
    import torch

    with torch.device("meta"):
        model: Any = timm.create_model(name)
    rows, cols = model.pretrained_cfg["input_size"][1:]
    configs: list[Any] = [timm.get_pretrained_cfg(w) for w in timm.list_pretrained(f"{name}.*")]
    return ModelFacts(
        sum(p.numel() for p in model.parameters()),
        (rows, cols),
        {config.tag: config.license or "-" for config in configs},
    )


def write_table() -> None:
    """Build every model and write the file."""
    import zoo

    rows = {name: build_facts(name)._asdict() for name in zoo.list_models()}
    lines = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write_table()
