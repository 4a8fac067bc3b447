"""A process near its GPU: on the cores of the NUMA node that the GPU hangs on.

A machine with two processors has two memories. A loader that decodes images in the far one sends
each batch across the link between them, beside those of all other ranks. Linux says in /sys where a
GPU is; where it does not (one node, a container, another system) nothing is changed. `torchrun
--numa-binding` does the same, and more, but ends where the program numactl is missing.
"""

import os
from collections.abc import Set
from pathlib import Path

import torch

SYS = Path("/sys")


def bind_to_node(device: torch.device, *, sys: Path = SYS) -> int | None:
    """Keep this process, and the loaders it starts, on the cores beside its GPU.

    Only for a rank among several on one machine: a process alone may want all cores.

    Returns:
        The number of the NUMA node; `None` if nothing was changed.
    """
    affinity = getattr(os, "sched_setaffinity", None)  # Linux alone has it
    if device.type != "cuda" or affinity is None or int(os.environ.get("LOCAL_WORLD_SIZE", 1)) < 2:
        return None
    node = node_of(pci_address(device), sys=sys)
    near = None if node is None else near_cores(node, os.sched_getaffinity(0), sys=sys)
    if not near:
        return None
    affinity(0, near)
    return node


def pci_address(device: torch.device) -> str:
    """Name a GPU as Linux does: domain, bus, device, function."""
    found = torch.cuda.get_device_properties(device)
    numbers = (getattr(found, f"pci_{name}_id", 0) for name in ("domain", "bus", "device"))
    domain, bus, slot = numbers
    return f"{domain:04x}:{bus:02x}:{slot:02x}.0"


def node_of(address: str, *, sys: Path = SYS) -> int | None:
    """Return the NUMA node of a PCI device; `None` where there is one node, or none is known."""
    nodes = list((sys / "devices/system/node").glob("node[0-9]*"))
    text = _read(sys / "bus/pci/devices" / address / "numa_node")
    number = int(text) if text.removeprefix("-").isdigit() else -1
    return number if number >= 0 and len(nodes) > 1 else None


def near_cores(node: int, allowed: Set[int], *, sys: Path = SYS) -> set[int]:
    """Return the cores of a node that this process may use; all nodes' lists are like 0-3,8-11."""
    cores = set[int]()
    for part in filter(None, _read(sys / f"devices/system/node/node{node}/cpulist").split(",")):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores & allowed


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
