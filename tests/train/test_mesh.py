"""Collectives on two gloo processes; on one they are the identity."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo.train import mesh
from zoo.train.distill.elastic_config import Elastic
from zoo.train.distill.token_config import DistillText

ROOT = Path(__file__).parents[2]


def test_alone_every_collective_is_the_identity():
    x = torch.rand(3)
    assert mesh.sum_over_ranks(x) is x
    assert mesh.gather("a") == ["a"]
    assert mesh.from_first("a") == "a"
    assert mesh.by_first(lambda: 3) == 3
    assert (mesh.any_rank(True), mesh.any_rank(False)) == (True, False)
    assert mesh.slices_of_rank(4) == (0, 1, 2, 3)
    with mesh.first_goes_first():
        pass


@pytest.mark.parametrize("slices", [1, 2, 6, 8, 12])
def test_a_number_of_ranks_that_cannot_share_the_slices_is_told_the_nearest_that_can(
    slices, monkeypatch
):
    can = [ranks for ranks in range(1, 13) if slices % ranks == 0]
    for ranks in range(1, 13):
        monkeypatch.setattr(mesh, "world", lambda ranks=ranks: ranks)
        if ranks in can:
            assert len(mesh.slices_of_rank(slices)) == slices // ranks
            continue
        with pytest.raises(ValueError) as error:
            mesh.slices_of_rank(slices)
        told = re.fullmatch(
            rf"{ranks} processes cannot share {slices} slices; the nearest number that can is "
            rf"(\d+), or start a new run with --slices {ranks} \(or a multiple\)\.",
            str(error.value),
        )
        assert told and int(told[1]) in can
        assert all(abs(int(told[1]) - ranks) <= abs(near - ranks) for near in can)


def launch(script: str, tmp_path: Path, processes: int = 2) -> subprocess.CompletedProcess:
    """Run a script on gloo processes under torchrun."""
    path = tmp_path / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(path)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment()
    )


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(paths))


SCRIPT = """
import torch
from zoo.train import mesh
from zoo.train.distill.elastic_config import Elastic
from zoo.train.distill.token_config import DistillText

with mesh.ranks(torch.device("cpu")):
    r = mesh.rank()
    assert mesh.world() == 2 and mesh.slices_of_rank(4) == ((0, 1), (2, 3))[r]
    assert mesh.sum_over_ranks(torch.tensor([1.0 + r])).item() == 3
    assert mesh.any_rank(r == 1) and not mesh.any_rank(False)
    assert mesh.gather(f"rank {r}") == ["rank 0", "rank 1"]
    assert mesh.from_first(r) == 0
    assert mesh.by_first(lambda: r) == 0
    assert mesh.same_on_all([torch.ones(3)]) and not mesh.same_on_all([torch.ones(3) * r])
    with mesh.first_goes_first():
        pass
    said = []
    for text in ("all", f"rank {r} alone"):
        mesh.say_once(text, lambda text=text: said.append(text))
    assert sorted(sum(mesh.gather(said), [])) == ["all", "rank 0 alone", "rank 1 alone"]

    def fails():
        raise OSError("disk full")

    def fails_alone():
        with mesh.first_goes_first():
            if r == 0:
                fails()

    for call in (lambda: mesh.by_first(fails), fails_alone):
        try:
            call()
        except (ValueError, OSError) as error:
            assert str(error) == "disk full", error
        else:
            raise AssertionError("no error")
    try:
        mesh.slices_of_rank(3)
    except ValueError as error:
        assert "nearest number that can is 1" in str(error) or "is 3" in str(error), error
    print(f"rank {r} is done")
"""


@pytest.mark.slow
def test_two_processes_agree_on_what_one_of_them_knows(tmp_path):
    done = launch(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rank 0 is done" in done.stdout
    assert "rank 1 is done" in done.stdout


def test_a_training_that_keeps_whole_weights_refuses_to_cut_them():
    with pytest.raises(ValueError, match="--ranks fsdp is for zoo distill"):
        mesh.with_slices(Elastic(ranks="fsdp"))
    with pytest.raises(ValueError, match="start them with torchrun"):
        mesh.with_slices(DistillText(ranks="hsdp"))


def test_whoever_joins_the_ranks_each_has_its_own_gpu(monkeypatch):
    """Ray joins them itself; streams without a device are then those of this one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for joined in (False, True):
        monkeypatch.setattr(mesh.dist, "is_initialized", lambda joined=joined: joined)
        with mesh.ranks(torch.device("cuda:1")), mesh.ranks(torch.device("cpu")):
            pass
    assert chosen == [torch.device("cuda:1")] * 2
