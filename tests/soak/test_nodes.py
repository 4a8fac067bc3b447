"""Two nodes: two agents of torchrun that meet on this machine and share the folder of a run."""

import os
import shlex
import signal
import socket
import time
from pathlib import Path

import pytest

from zoo.train.checkpoint import checkpoints

pytestmark = pytest.mark.long


@pytest.fixture
def meet():
    """What two agents are told; the place where they meet is the first one's."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return (
        "--nnodes=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{port}",
        "--rdzv-id=soak",
        "--rdzv-conf=keep_alive_interval=1,last_call_timeout=1",
    )


def start_nodes(soak, words, out, meet, restarts=0):
    """Start both, each with a cache of its own; the first one keeps the store where they meet."""
    nodes = []
    for node in range(2):
        nodes.append(
            soak.start(
                *words, "--out", str(out), out=out, processes=1, agent=meet, restarts=restarts,
                cache=soak.place / f"cache-{node}",
            )
        )  # fmt: skip
        wait_for_store(meet)
    return nodes


def wait_for_store(meet):
    """Whoever listens first keeps the store, and the others are lost with it."""
    (endpoint,) = (word.rpartition(":")[2] for word in meet if "endpoint" in word)
    for _ in range(600):
        with socket.socket() as store:
            if store.connect_ex(("localhost", int(endpoint))) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"no store at port {endpoint} within a minute")


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_two_nodes_learn_what_one_process_does(soak, twin, meet, gap):
    words = [*twin.words, "--slices", "2", "--precision", "float64"]
    words[words.index("--steps") + 1] = "6"
    one, two = soak.place / "one", soak.place / "two"
    soak.run(*words, out=one, processes=1)
    for node in start_nodes(soak, words, two, meet):
        assert node.end() == 0, node.said()[-3000:]
    assert gap(one, two) < 1e-12
    soak.close(f"largest difference {gap(one, two):.1e}")


@pytest.mark.parametrize("what", ["node", "agent"])
def test_a_node_that_is_lost_and_replaced_costs_the_steps_since_the_checkpoint(
    soak, twin, meet, what
):
    """The agent and its process; or the agent alone, whose process is left to itself."""
    out = soak.place / "run"
    staying, lost = start_nodes(soak, twin.words, out, meet, restarts=3)
    (step,) = soak.steps(1)
    lost.reach(step)
    workers = children(lost.process.pid)
    lost.process.kill()
    for worker in workers if what == "node" else ():
        os.kill(worker, signal.SIGKILL)
    found = checkpoints(out / "checkpoints")[-1].name
    new = soak.start(
        *twin.words, "--out", str(out), out=out, processes=1, agent=meet, restarts=3,
        cache=soak.place / "cache-1",
    )  # fmt: skip
    for node in (staying, new):
        assert node.end() == 0, node.said()[-3000:]
    assert "started again" in staying.said() and "started again" in new.said()
    twin.assert_same_end(out)
    soak.close(f"lost at step {step} behind {found}, replaced; the same sha256")


SHAPES = shlex.split(
    "detect eradio_nano --tiny --detector faster_rcnn --width 16 --size 64 --batch 4 --slices 2 "
    "--steps 6 --log 2 --checkpoint 2 --device cpu"
)


def test_a_detector_learns_on_two_ranks_what_it_learns_on_one(soak, gap):
    """One of the two is killed, and both go on from the checkpoint."""
    pytest.importorskip(
        "faster_coco_eval", reason="faster-coco-eval is not installed; it is in [det]"
    )
    one, two = soak.place / "one", soak.place / "two"
    soak.run(*SHAPES, out=one, processes=1)
    run = soak.run(*SHAPES, out=two, faults=[("kill", 1, 4)], restarts=1)
    assert "started again" in run.said()
    assert gap(one, two) < 1e-5
    a, b = ((out / "results.json").read_text() for out in (one, two))
    assert a == b
    soak.close(f"largest difference {gap(one, two):.1e}, the same measures")
