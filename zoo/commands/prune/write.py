"""What `zoo prune` writes: a plain checkpoint, and `prune.json` with what became of the parent."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zoo.axes import Shapes
from zoo.files import folder_written_whole, written_whole
from zoo.students.prune.library import save
from zoo.students.prune.prune import Child, ScoreUnits

ABOUT = "prune.json"
QUANTILES = 33
"""Numbers that a report keeps of the scores of an axis: its units in falling order, thinned."""


def write_child(
    child: Child, folder: Path, about: dict[str, Any], files: Mapping[str, bytes] = {}
) -> None:
    """Write checkpoint, tokenizer, and `prune.json` with what stayed; whole or not at all.

    Args:
        files: What else lies in the folder, by name.
    """
    with folder_written_whole(folder) as making:
        copy_tokenizer(child.built.folder, making)
        child.built.model.cpu()
        save(child.built, making)
        kept = {cut.axis: dict(kept=cut.kept.tolist(), by=cut.by) for cut in child.cuts}
        about |= dict(kept=kept, layers=child.layers, numbers=child.shapes.count())
        write_about(making, about)
        for name, content in files.items():
            (making / name).write_bytes(content)


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write `prune.json`."""
    with written_whole(folder / ABOUT) as path:
        path.write_text(json.dumps(about) + "\n")


def before_of(shapes: Shapes, child: Child) -> dict[str, Any]:
    """Describe the parent as far as the child differs from it: numbers, sizes, lengths of lists."""
    return dict(
        numbers=shapes.count(),
        sizes={cut.axis: shapes.sizes[cut.axis] for cut in child.cuts},
        layers={path: shapes.num_layers(path) for path in child.layers},
    )


def scores_of(child: Child, score: ScoreUnits) -> dict[str, list[float]]:
    """Return the scores of the units of each axis that was cut, in falling order, thinned."""
    found = {}
    for axis in (cut.axis for cut in child.cuts):
        values = score(axis)[0].double().flatten().sort(descending=True).values
        places = torch.linspace(0, len(values) - 1, min(QUANTILES, len(values))).round().long()
        found[axis] = values[places].tolist()
    return found


def copy_tokenizer(source: Path | None, target: Path) -> None:
    """Copy what a folder of transformers has for its inputs: tokenizer, processor."""
    names = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*processor*.json")
    found = [file for name in (*names, "*.jinja") for file in source.glob(name)] if source else []
    for file in found:
        shutil.copy(file, target)
