"""`zoo launch`: the line or the script that starts a distillation on many GPUs."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from zoo.commands.cluster.words import read_stages, read_words
from zoo.commands.distill.on_gpus import stages_on_gpus
from zoo.commands.processes import FRESH_STORE, start
from zoo.train.ranges import COUNT, NOT_NEGATIVE, check_ranges

PORT = 29500


SCRIPT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@120
# Add your --partition, --account and --time.
set -u
export {fresh}=1  # processes that begin again do not look for the dead
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Preempted, or two minutes before the time limit: all ranks save and leave, and the job is queued
# again. A job that was queued again goes on by itself: zoo reads SLURM_RESTART_COUNT.
again() {{
    trap '' USR1 TERM
    scancel --signal=TERM "$SLURM_JOB_ID"
    wait "$STEP"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}}
trap again USR1 TERM

srun {line} &
STEP=$!
wait "$STEP"
"""


@dataclass(frozen=True, kw_only=True)
class LaunchArgs:
    nodes: Annotated[int, COUNT] = 1
    gpus: Annotated[int, COUNT] = 8
    """Of each node; a process for each."""
    restarts: Annotated[int, NOT_NEGATIVE] = 3
    """How often all processes begin again, from the last checkpoint, after one has died."""
    slurm: bool = False
    """A script for sbatch."""
    print: bool = False
    """Write it to stdout, and start nothing."""

    def __post_init__(self) -> None:
        check_ranges(self)


def main(argv: list[str]) -> None:
    """Write the torchrun line or the SLURM script of a recipe, or start it on this machine.

    Example: zoo launch --nodes 4 --gpus 8 --slurm c_radio_v4 --data PHOTOS --print > job.sh

    Everything else on the line is as `zoo distill` takes it. Without --batch, batch and rate grow
    with the GPUs, from the images for a GPU that the recipe states: the line says which they are.
    """
    flags = ("--slurm", "--no-slurm", "--print", "--no-print")
    args, words = read_words(LaunchArgs, argv, "launch", main.__doc__ or "", flags=flags)
    words = scaled_words(words, args.nodes * args.gpus)
    if args.print:
        print(written(args, words))
        return
    if args.slurm or args.nodes > 1:
        raise ValueError(
            "zoo launch starts processes on this machine alone; --print writes what the others, or "
            "sbatch, are to be given."
        )
    start(words, args.gpus, restarts=args.restarts)


def scaled_words(words: list[str], gpus: int) -> list[str]:
    """Return the words of `zoo distill` on so many GPUs, with batch and rate spelled out.

    Raises:
        ValueError: as `zoo distill`; or the GPUs cannot share the batch.
    """
    _, options = stages_on_gpus(read_stages(words, "launch"), words, gpus)
    return ["distill", *words, *options]


def written(args: LaunchArgs, words: Sequence[str]) -> str:
    """Return what is to be run, as a shell reads it."""
    name = next((word for word in words[1:2] if not word.startswith("-")), "distill")
    if args.slurm:
        line = torchrun(args, '"$SLURM_JOB_ID"', words)
        return SCRIPT.format(
            name=name, nodes=args.nodes, gpus=args.gpus, line=line, fresh=FRESH_STORE
        ).rstrip()
    if args.nodes == 1:
        return f"{FRESH_STORE}=1 {torchrun(args, name, words)}"
    return (
        f"# On each of the {args.nodes} nodes; HEAD is the name of one of them, everywhere the "
        f"same.\n{FRESH_STORE}=1 {torchrun(args, name, words)}"
    )


def torchrun(args: LaunchArgs, run: str, words: Sequence[str]) -> str:
    """Return the torchrun line of a node, a few words a line."""
    meet = ["--standalone"]
    if args.nodes > 1 or args.slurm:
        meet = [f"--nnodes={args.nodes}", "--rdzv-backend=c10d", f'--rdzv-endpoint="$HEAD:{PORT}"']
        meet += [f"--rdzv-id={run}", "--signals-to-handle=SIGTERM,SIGINT"]
    meet += [f"--nproc-per-node={args.gpus}", f"--max-restarts={args.restarts}"]
    lines, line = [], "-m zoo"
    for word in map(shlex.quote, words):
        if word.startswith("-"):
            lines, line = [*lines, line], word
        else:
            line += f" {word}"
    return " \\\n    ".join(["torchrun " + " ".join(meet), *lines, line])
