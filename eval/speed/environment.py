"""Describe the machine and the versions on which a measurement depends."""

import os
import platform
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch

import zoo


def environment(command: str | None = None) -> dict[str, Any]:
    """Return what a measurement depends on besides the models: machine, versions, threads."""
    gpu = torch.cuda.is_available()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"timm": timm.__version__, "zoo": zoo.__version__}
    if gpu:
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "gpu": torch.cuda.get_device_name() if gpu else None,
        },
        "threads": torch.get_num_threads(),
        # what else the machine did: processes that ran or waited, over the last minute
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_benchmark_limit": torch.backends.cudnn.benchmark_limit,
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
