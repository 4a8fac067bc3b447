"""A rank stays on the cores beside its GPU, where Linux says which these are."""

import os
from types import SimpleNamespace

import pytest
import torch

from zoo.train.numa import bind_to_node, near_cores, node_of, pci_address

GPU = "0000:3b:00.0"


@pytest.fixture
def machine(tmp_path):
    """A machine of two nodes, whose second one has a GPU."""
    for node, cores in enumerate(("0-3,8", "4-7,9-11")):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cores + "\n")
    gpu = tmp_path / "bus/pci/devices" / GPU
    gpu.mkdir(parents=True)
    (gpu / "numa_node").write_text("1\n")
    return tmp_path


@pytest.fixture
def cores(monkeypatch):
    """The cores that this process may use, and those that it is given."""
    given = []
    found = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5, 11}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, x: given.append(x), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return given


def test_a_rank_gets_the_cores_of_its_gpus_node_that_it_may_use(machine, cores):
    assert pci_address(torch.device("cuda")) == GPU
    assert bind_to_node(torch.device("cuda"), sys=machine) == 1
    assert cores == [{4, 5, 11}]


def test_where_nothing_is_known_nothing_changes(machine, cores, monkeypatch):
    cuda = torch.device("cuda")
    assert bind_to_node(torch.device("cpu"), sys=machine) is None
    (machine / "bus/pci/devices" / GPU / "numa_node").write_text("-1\n")
    assert bind_to_node(cuda, sys=machine) is None  # a virtual machine says so
    assert node_of("0000:00:00.0", sys=machine) is None
    (machine / "bus/pci/devices" / GPU / "numa_node").write_text("1\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert bind_to_node(cuda, sys=machine) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (machine / "devices/system/node/node0/cpulist").unlink()
    (machine / "devices/system/node/node0").rmdir()
    assert bind_to_node(cuda, sys=machine) is None  # one node
    assert cores == []


def test_no_core_of_the_node_may_be_used(machine, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert near_cores(1, {0, 1}, sys=machine) == set()
    assert bind_to_node(torch.device("cuda"), sys=machine) is None
    assert cores == []
