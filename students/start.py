"""Where an earlier student lies, and what it is; read without torch."""

import json
from pathlib import Path
from typing import Any


def export_of(folder: Path) -> Path:
    """Return the folder of the exported student: `folder` itself, or the export of that run."""
    inner = folder / "export"
    return inner if (inner / "heads.json").is_file() else folder


def read_heads(folder: Path) -> dict[str, Any]:
    """Read what an export says of its student: name, options, size, heads.

    Raises:
        ValueError: there is no export in the folder.
    """
    path = export_of(folder) / "heads.json"
    if not path.is_file():
        raise ValueError(f"There is no exported student in {folder}: heads.json is missing.")
    return json.loads(path.read_text())
