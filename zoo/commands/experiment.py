"""`zoo experiment`: experiments that make their own teachers."""

from zoo.commands.parse import parse


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
    """Run an experiment that makes its own teachers.

    Example: zoo experiment phi_s --tiny --out runs/phi_s
    """
    from zoo.experiments import EXPERIMENTS

    if not argv or argv[0] not in EXPERIMENTS:
        if argv and argv[0] not in ("-h", "--help"):
            known = ", ".join(EXPERIMENTS)
            raise ValueError(f"There is no experiment {argv[0]!r}; there are {known}.")
        print("\n".join(f"zoo experiment {name} --help" for name in EXPERIMENTS))
        return
    name, *options = argv
    chosen = EXPERIMENTS[name]()
    start = chosen.tiny() if "--tiny" in options else chosen.full()
    options = _gathered(options, "--data")
    args = parse(type(start), options, f"experiment {name}", chosen.__doc__ or "", default=start)
    if args.dry_run:
        chosen.plan(args)
    elif not chosen.main(args):
        raise SystemExit(1)
