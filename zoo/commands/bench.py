"""`zoo bench`: speed of models, and of a distillation step."""

from importlib import import_module

BENCHES = {
    "models": "zoo.commands.bench_models:main",
    "distill": "zoo.commands.bench_distill:main",
}


def main(args: list[str]) -> None:
    """Measure speed; `zoo bench models` says what of."""
    if args and args[0] in BENCHES:
        module, function = BENCHES[args[0]].split(":")
        getattr(import_module(module), function)(args[1:])
        return
    if args and args[0] not in ("-h", "--help"):
        raise ValueError(f"zoo bench knows no {args[0]!r}; it measures {', '.join(BENCHES)}.")
    print("\n".join(f"zoo bench {name} --help" for name in BENCHES))
