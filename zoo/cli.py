"""The command line: a table from a command's name to the function that carries it out.

What parses a command imports no torch, so that `--help` and a mistyped word are answered at once.
"""

import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path

COMMANDS = {
    "list": "zoo.commands.list:main",
    "convert": "zoo.commands.convert:main",
    "data": "zoo.commands.data:main",
    "distill": "zoo.commands.distill.args:main",
    "train-lm": "zoo.commands.distill.train_lm_args:main",
    "plan": "zoo.commands.cluster.plan_args:main",
    "launch": "zoo.commands.cluster.launch:main",
    "mask": "zoo.commands.mask.args:main",
    "elastic": "zoo.commands.elastic.args:main",
    "export": "zoo.commands.export.args:main",
    "eval": "zoo.commands.evaluate.args:main",
    "prune": "zoo.commands.prune.args:main",
    "upcycle": "zoo.commands.upcycle_args:main",
    "embed": "zoo.commands.embed_args:main",
    "report": "zoo.commands.report:main",
    "detect": "zoo.commands.detect_args:main",
    "detect-config": "zoo.commands.openmmlab:main_detect_config",
    "segment-config": "zoo.commands.openmmlab:main_segment_config",
    "bench": "zoo.commands.bench.args:main",
    "experiment": "zoo.commands.experiment:main",
}
"""Name -> module:function; a module is imported when its command is called."""

ON_RANKS = ("distill", "train-lm", "mask", "elastic", "detect", "eval", "bench")
"""Commands that run on several processes: torchrun --nproc-per-node 8 -m zoo distill ...;
of `bench` it is `bench links`."""

USAGE = """zoo: vision backbones, and the distillation of many frozen teachers into one student.

  zoo list [PATTERN]        the models of zoo's own families; `zoo list recipes`: the recipes;
                            `zoo list --kind language`: language models
  zoo convert SRC NAME OUT  an official checkpoint as safetensors and timm's config
  zoo data pack DIR SHARDS  a folder of images as webdataset's shards, with their index
  zoo data index PATH       where each image of many shards lies: a million open at once
  zoo data check PATH       what is wrong with shards and images, listed
  zoo distill [RECIPE] ...  train a student from teachers, to an export and a report
  zoo distill --image-text  train a vision tower, a projector and a language model on questions
  zoo train-lm --text ...   a causal language model from random weights, or trained on
  zoo plan RECIPE ...       its speed, memory, traffic and cost on 8 to 2,048 GPUs
  zoo launch RECIPE ...     the torchrun line or SLURM script that starts it on many GPUs
  zoo prune MODEL ...       a smaller model of the same class, cut along its named axes
  zoo upcycle MODEL ...     a dense language model as a mixture of experts, and back
  zoo mask MODEL ...        N of each M weights of a model stay, chosen or learnt
  zoo elastic MODEL ...     train one model whose first units are smaller ones
  zoo export RUN ...        a run's newest checkpoint, or one size of an elastic model
  zoo eval TARGET ...       measure a run, an export or a model: --on knn,linear,detect,...
  zoo embed DATA OUT ...    write features of many images, in shards that kNN and probes read
  zoo report RUN ...        write RUN/report.html again, or join many into one page
  zoo detect BACKBONE ...   train a detector on COCO annotations
  zoo detect-config ...     an mmdet configuration over one of our backbones
  zoo segment-config ...    an mmseg configuration (UPerNet) over one of our backbones
  zoo bench models ...      images/s, memory and multiply-adds beside timm's models
  zoo bench distill ...     a distillation step, part by part, beside the cost model
  zoo bench links ...       collectives between GPUs, for zoo plan; under torchrun
  zoo experiment phi_s      nine normalisations of three teachers, with paired intervals
  zoo experiment students   one student of each family against its teachers and itself alone
  zoo experiment compression  a small hybrid, cut: by width, heads, channels and to 2:4
  zoo experiment mixers     attention, Mamba-2, both, and StripedHyena 2, of equal size
  zoo experiment planning   what teachers that are rules add to imitating a driver
  zoo experiment real       students of published networks against teachers and controls

Examples:
  zoo distill                                   the embedded run: no data, no download
  zoo distill --data PATH --teachers timm:vit_small_patch14_dinov2.lvd142m \\
      timm:vit_base_patch16_siglip_224 --student eradio_xxxtiny --size 224 --batch 32 \\
      --steps 1000 --out runs/mine
  zoo distill quickstart --optim.lr 3e-4 --dry-run
  zoo distill am_radio --tiny                   a paper's recipe, small enough for a laptop
  zoo distill --resume runs/mine

Each command explains itself: zoo distill --help"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; wrong input ends with one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return
    if words[0] == "--version":
        import zoo

        print(zoo.__version__)
        return
    from zoo.train.interrupt import Interrupted

    try:
        call = _command(words[0])
        with _on_ranks(words[0]):
            call(words[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("ZOO_TRACEBACK"):
            raise
        _tell(error)
        raise SystemExit(2) from None
    except Interrupted as stop:
        _tell(stop)
        raise SystemExit(stop.exit_code) from None
    except KeyboardInterrupt:
        print("zoo: stopped.", file=sys.stderr)
        raise SystemExit(130) from None


def _tell(error: Exception) -> None:
    """Say in one line what stops a command."""
    message = " ".join(str(error).split())
    where = " (ZOO_TRACEBACK=1 shows where)" if isinstance(error, (ValueError, OSError)) else ""
    print(f"zoo: {message}{where}", file=sys.stderr, flush=True)


@contextmanager
def _on_ranks(command: str) -> Iterator[None]:
    """Join the processes that torchrun has started; rank 0 alone speaks on stdout.

    Raises:
        ValueError: the command runs on one process.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    alone = processes == 1 and (command not in ON_RANKS or "TORCHELASTIC_RUN_ID" not in os.environ)
    if alone:
        yield
        return
    if command not in ON_RANKS:
        raise ValueError(
            f"zoo {command} runs on one process, and torchrun has started {processes}; those that "
            f"run on several are {', '.join(ON_RANKS)}."
        )
    from zoo.train.device import device_of
    from zoo.train.interrupt import Interrupted
    from zoo.train.mesh import is_first, ranks, say_once

    with ExitStack() as stack:
        stack.enter_context(ranks(device_of("auto")))
        if not is_first():
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(redirect_stdout(nowhere))
        try:
            yield
        except (ValueError, OSError, Interrupted) as error:
            if os.environ.get("ZOO_TRACEBACK"):
                raise
            say_once(str(error), partial(_tell, error))
            raise SystemExit(getattr(error, "exit_code", 2)) from None


def _command(name: str) -> Callable[[list[str]], None]:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean zoo {near[0]}?" if near else ""
        raise ValueError(f"There is no command {name!r}; there are {', '.join(COMMANDS)}.{hint}")
    module, function = COMMANDS[name].split(":")
    return getattr(import_module(module), function)
