"""`zoo bench`: speed of models, of a distillation step, of reading data, of links between GPUs."""

import os
from importlib import import_module

BENCHES = {
    "models": "zoo.commands.bench.models_args:main",
    "distill": "zoo.commands.bench.distill_args:main",
    "data": "zoo.commands.bench.data:main",
    "links": "zoo.commands.bench.links:main",
}


def main(argv: list[str]) -> None:
    """Measure speed; `zoo bench` alone lists what of."""
    if argv and argv[0] in BENCHES:
        if argv[0] != "links" and (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise ValueError(
                f"zoo bench {argv[0]} runs on one process, and torchrun has started {processes}; "
                "zoo bench links measures between several."
            )
        module, function = BENCHES[argv[0]].split(":")
        getattr(import_module(module), function)(argv[1:])
        return
    if argv and argv[0] not in ("-h", "--help"):
        raise ValueError(f"There is no benchmark {argv[0]!r}; there are {', '.join(BENCHES)}.")
    print("\n".join(f"zoo bench {name} --help" for name in BENCHES))
