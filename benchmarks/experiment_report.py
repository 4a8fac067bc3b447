"""Write the report of an experiment again from its committed rows: tables, intervals, figure.

    python benchmarks/experiment_report.py benchmarks/results/phi-s-h200-2026-11-22
    python benchmarks/experiment_report.py benchmarks/results/students-h200-2026-11-22

The folder holds `rows.jsonl` and `about.json` (the config, the steps, the device).
"""

import json
import sys
from pathlib import Path

from zoo.experiments.compression import result as compression
from zoo.experiments.phi_s import result as phi_s
from zoo.experiments.students import result as students


def main(folder: Path) -> None:
    """Replace `result.md` and the figure in `folder`."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    about = json.loads((folder / "about.json").read_text())
    kinds = {"families": students, "scale": compression}
    module = next((kinds[key] for key in kinds if key in about["config"]), phi_s)
    module.report(rows, about, folder)
    (folder / "result.json").unlink()  # the rows and the config stand beside it
    for drawing in folder.glob("*.svg"):
        drawing.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
