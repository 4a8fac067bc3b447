"""`zoo launch` and `zoo distill --processes`: torchrun takes what they write."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from zoo.cli import main
from zoo.commands.distill.args import on_processes, read_args

ROOT = Path(__file__).parents[2]
SMALL = shlex.split(
    "--teachers rule:colour@64 --student eradio_nano --size 64 --batch 8 --normalise none "
    "--device cpu --calibration 2 --eval-images 16 --probe-images 32 --every.log 1"
)


def printed(capsys, *words: str) -> str:
    main(["launch", *words, "--print"])
    return capsys.readouterr().out


def torchrun_words(script: str) -> list[str]:
    """Return what a shell hands to torchrun."""
    line = script.replace("\\\n", " ").partition("torchrun ")[2].partition("\n")[0]
    return shlex.split(line.removesuffix("&"))


@pytest.mark.parametrize(
    "where", ["", "--gpus 2", "--nodes 4 --gpus 8", "--nodes 4 --slurm", "--slurm --restarts 0"]
)
@pytest.mark.parametrize("what", ["c_radio_v4 --data 'MY PHOTOS'", "am_radio"])
def test_a_shell_and_torchrun_take_what_is_written(where, what, capsys):
    script = printed(capsys, *shlex.split(f"{where} {what}"))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    asked = get_args_parser().parse_args(torchrun_words(script))
    assert asked.module and asked.training_script == "zoo"
    nodes, gpus = (4 if "4" in where else 1), (2 if "2" in where else 8)
    assert (int(asked.nnodes.split(":")[-1]), int(asked.nproc_per_node)) == (nodes, gpus)
    assert asked.standalone == (not where or where == "--gpus 2")
    command, *words = asked.training_script_args
    assert command == "distill"
    for stage in read_args(words).stages.values():
        assert stage.num_slices == nodes * gpus == stage.batch // 32


@pytest.mark.parametrize("what", ["am_radio", "c_radio_v4 --steps 100", "quickstart --batch 64"])
def test_plain_torchrun_takes_what_launch_would_have_written_and_says_so(what, capsys):
    words = shlex.split(what)
    *_, written = printed(capsys, "--gpus", "16", *words).partition(" distill ")
    launched = read_args(shlex.split(written.replace("\\\n", " ")))
    plain = on_processes(read_args(words), words, 16)
    assert plain.stages == launched.stages
    said = capsys.readouterr().err
    told = "on 16 processes" in said and "--slices 16" in said and "--optim.lr" in said
    assert told == ("--batch" not in what)


def test_a_job_that_is_stopped_saves_and_is_queued_again(tmp_path):
    """SLURM's three commands are stood in for; the script is the printed one."""
    script = subprocess.run(
        [sys.executable, "-m", "zoo", "launch", "--slurm", "--print", "am_radio"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout  # fmt: skip
    (tmp_path / "job.sh").write_text(script)
    stand_ins = {
        "scontrol": 'echo "$@" >> told; echo node0',
        "scancel": 'echo scancel "$@" >> told; kill -TERM "$(cat step)"',
        "srun": "trap 'echo saved >> told; exit 1' TERM; echo $$ > step; "
        "while sleep 0.1; do :; done",
    }
    for name, text in stand_ins.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-3]"}
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=env)
    wait_for(tmp_path / "step")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 0
    told = (tmp_path / "told").read_text().splitlines()
    assert told == ["show hostnames node[0-3]", "scancel --signal=TERM 7", "saved", "requeue 7"]


def wait_for(path: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


def test_what_this_machine_cannot_start_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["launch", "--nodes", "2", "c_radio_v4"])
    assert "--print" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--gpus 8 c_radio_v4 --batch 1001", "does not split"),
        ("--gpus 64 c_radio_v4 --slices 32", "64 processes cannot share 32 slices"),
        ("--gpus 8 c_radio_v4 --resume runs/x", "leave out --resume"),
    ],
)
def test_what_the_gpus_cannot_share_is_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        main(["launch", *words.split(), "--print"])
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_the_words_say_stays(capsys):
    words = torchrun_words(printed(capsys, "c_radio_v4", "--steps", "100", "--optim.lr", "0.002"))
    (stage,) = read_args(words[words.index("distill") + 1 :]).stages.values()
    assert (stage.steps, stage.optim.lr, stage.batch) == (100, 0.002, 256)


@pytest.mark.long
def test_processes_that_die_begin_again_where_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = [*SMALL, "--steps", "12", "--every.checkpoint", "4", "--out", str(tmp_path / "run")]
    launch = [sys.executable, "-m", "zoo", "launch", "--gpus", "2", "--restarts", "1"]
    run = subprocess.Popen(
        [*launch, "custom", *words], cwd=tmp_path, text=True, stderr=subprocess.PIPE
    )
    wait_for(tmp_path / "run" / "checkpoints" / "step_00000004")
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err[-3000:]
    assert "started again" in err
    steps = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"step": 12' in steps
