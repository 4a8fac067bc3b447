"""Whatever happens to a run on two processes, it ends as an undisturbed one, or names its skips."""

import json
import os
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from zoo.cli import main
from zoo.train.checkpoint import checkpoints

pytestmark = pytest.mark.long


def test_ranks_that_are_killed_begin_again_and_end_with_the_same_bits(soak, twin):
    """Five kills, one of them while a checkpoint is being written."""
    out = soak.place / "run"
    at = soak.steps(4)
    saving = soak.draw.choice([s for s in twin.saves if s not in at])
    kills = [("kill", soak.draw.randrange(2), step) for step in at]
    kills.append(("kill_saving", soak.draw.randrange(2), saving))
    print("    " + ", ".join(f"{what} rank {rank} at {step}" for what, rank, step in kills))
    run = soak.run(*twin.words, out=out, faults=kills, restarts=5)
    marks = {path.name for path in run.log.parent.glob("kill*")}
    assert marks == {f"{what}-{rank}-{step}" for what, rank, step in kills}
    twin.assert_same_end(out)
    assert not soak.written_elsewhere(out)
    soak.close(f"5 kills, {run.said().count('started again') // 2} starts, the same sha256")


def test_a_truncated_shard_of_the_newest_checkpoint_costs_the_steps_since_the_one_before(
    soak, twin
):
    out = soak.place / "run"
    (step,) = soak.steps(1)
    stopped = soak.start(*twin.words, "--out", str(out), out=out, faults=[("stop", 1, step)])
    assert stopped.end() != 0
    shard = soak.draw.choice(sorted(checkpoints(out / "checkpoints")[-1].glob("*.distcp")))
    os.truncate(shard, soak.draw.randrange(shard.stat().st_size))
    resumed = soak.resume(out)
    assert f"{shard.parent} is damaged" in resumed.said()
    twin.assert_same_end(out)
    soak.close(f"{shard.parent.name}/{shard.name} cut, the one before taken, the same sha256")


@pytest.mark.parametrize("who", ["stop", "stop_agent"])
def test_a_sigterm_saves_and_the_run_goes_on(soak, twin, who):
    """To one worker, and to torchrun, which passes it on."""
    out = soak.place / "run"
    (step,) = soak.steps(1)
    rank = soak.draw.randrange(2)
    stopped = soak.start(*twin.words, "--out", str(out), out=out, faults=[(who, rank, step)])
    assert stopped.end() != 0
    (saved,) = {line.partition("(")[0] for line in stopped.own_lines()}
    assert "which is saved" in saved
    soak.resume(out)
    twin.assert_same_end(out)
    assert not soak.written_elsewhere(out)
    soak.close(f"rank {rank}, step {step}: {saved.removeprefix('zoo: ')}; the same sha256")


def test_a_loss_that_is_nan_on_rank_1_alone_stops_both_and_names_the_batch(soak, twin):
    out = soak.place / "run"
    (step,) = soak.steps(1)
    stopped = soak.start(*twin.words, "--out", str(out), out=out, faults=[("nan", 1, step)])
    stopped.reach(step)
    began = time.monotonic()
    assert stopped.end(60) != 0  # a rank that waited for another would wait half an hour
    seconds = time.monotonic() - began
    told = json.loads((out / "nan_batch.json").read_text())
    assert (told["step"], told["keys"]) == (step, twin.keys(step))
    assert [path.name for path in out.rglob("nan*")] == ["nan_batch.json"]
    soak.resume(out)
    twin.assert_same_end(out, more=["nan_batch.json"])
    assert not soak.written_elsewhere(out)
    soak.close(f"step {step}: both left in {seconds:.1f} s; the same sha256 without the fault")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, with room for one checkpoint and not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_in_one_line_and_the_checkpoint_before_goes_on(soak, twin, small_disk):
    out = small_disk / "run"
    stopped = soak.start(*twin.words, "--out", str(out), out=out)
    assert stopped.end() != 0
    (line,) = stopped.own_lines()
    (kept,) = checkpoints(out / "checkpoints")
    assert "No space left on device" in line and f"{kept} survives" in line
    assert "exitcode  : 2" in stopped.said()  # torchrun stops the other rank when one has left
    traces = stopped.said().split("Traceback")[1:]
    ours = [trace for trace in traces if "tensorboard/summary" not in trace]  # its own thread's
    assert len(ours) == 1  # torchrun's, of its own
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    soak.resume(out)
    twin.assert_same_end(out)
    soak.close(f"{kept.name} survived; with more room the same sha256")


@pytest.fixture
def shards(tmp_path):
    """Sixty images in three shards."""
    draw = np.random.default_rng(0)
    for index in range(60):
        folder = tmp_path / "images" / "train" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((320, 320))
        image.save(folder / f"{index:02}.png")
    main(["data", "pack", str(tmp_path / "images"), str(tmp_path / "shards"), "--shard-mb", "1"])
    return tmp_path / "shards"


def test_a_shard_of_images_that_is_cut_is_skipped_by_name_and_two_ranks_skip_as_one(
    soak, twin, shards, gap
):
    (step,) = soak.steps(1)
    outs = []
    for processes in (1, 2):
        copy = soak.place / f"shards-{processes}"
        subprocess.run(["cp", "-r", str(shards), str(copy)], check=True)
        cut = sorted(copy.rglob("*.tar"))[1]
        outs.append(soak.place / f"run-{processes}")
        words = [*twin.words, "--slices", "2", "--data", str(copy)]
        run = soak.run(
            *words, out=outs[-1], faults=[("truncate", str(cut), step)], processes=processes
        )
        assert "skipped an unreadable sample" in run.said()
    one, two = (json.loads((out / "skipped.json").read_text()) for out in outs)
    assert one == two and one
    assert gap(*outs) < 1e-4
    soak.close(f"{len(one)} images skipped by name on one process and on two")
