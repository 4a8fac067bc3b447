"""`zoo experiment`: experiments that train their own teachers."""

from importlib import import_module

from zoo.commands.parse import parse
from zoo.experiments import EXPERIMENTS


def _gathered(argv: list[str], option: str) -> list[str]:
    """Move the values of an option that is given several times behind one of it, at the end."""
    rest, values, inside = [], [], False
    for word in argv:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            inside = name == option
            if inside and value:
                values.append(value)
        elif inside:
            values.append(word)
            continue
        if not inside:
            rest.append(word)
    return [*rest, option, *values] if values else rest


def main(argv: list[str]) -> None:
    """Run an experiment that trains its own teachers.

    Example: zoo experiment phi_s --tiny --out runs/phi_s
    """
    if not argv or argv[0] not in EXPERIMENTS:
        if argv and argv[0] not in ("-h", "--help"):
            known = ", ".join(EXPERIMENTS)
            raise ValueError(f"There is no experiment {argv[0]!r}; there are {known}.")
        for name in EXPERIMENTS:
            about = import_module(f"zoo.experiments.{name}.config").__doc__ or ""
            print(about.partition("\n")[0].replace("`", ""))
        print("\nEach explains itself: zoo experiment phi_s --help")
        return
    name, *options = argv
    about = import_module(f"zoo.experiments.{name}.config")
    start = about.tiny() if "--tiny" in options else about.full()
    options = _gathered(options, "--data")
    args = parse(type(start), options, f"experiment {name}", about.__doc__ or "", default=start)
    experiment = import_module(f"zoo.experiments.{name}.run")
    if args.dry_run:
        experiment.plan(args)
    elif not experiment.main(args):
        raise SystemExit(1)
