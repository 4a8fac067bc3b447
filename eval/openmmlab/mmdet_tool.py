"""Run mmdet's own tools, which its wheel contains, with mmcv's missing operations supplied.

python -m zoo.eval.openmmlab.mmdet_tool train detector.py --resume
torchrun --nproc_per_node 8 -m zoo.eval.openmmlab.mmdet_tool train detector.py --launcher pytorch
python -m zoo.eval.openmmlab.mmdet_tool test detector.py runs/detector/epoch_12.pth
"""

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from zoo.eval.openmmlab.mmcv_ops import supply_ops


def run_tool(package: str, args: Sequence[str]) -> None:
    """Run a tool of mmdet or mmseg: its name, then its arguments.

    Raises:
        ValueError: the package is not installed, or has no such tool.
    """
    supply_ops()  # some tools need them before they read the configuration
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(f"{package} is not installed: pip install 'backbone-zoo[det,seg]'.")
    tools = Path(found.origin).parent / ".mim/tools"
    known = sorted(path.stem for path in tools.glob("*.py"))
    if not args or args[0] not in known:
        raise ValueError(f"Name one of {package}'s tools first: {', '.join(known)}.")
    tool = str(tools / f"{args[0]}.py")
    sys.argv = [tool, *args[1:]]
    runpy.run_path(tool, run_name="__main__")


if __name__ == "__main__":
    run_tool("mmdet", sys.argv[1:])
