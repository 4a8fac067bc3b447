"""`zoo experiment`: experiments that make their own teachers."""

from zoo.commands.parse import parse


def _gathered(args: list[str], option: str) -> list[str]:
    """Bring the values of an option that was given several times behind one of it, at the end."""
    rest, values, inside = [], [], False
    for word in args:
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


def main(args: list[str]) -> None:
    """Run an experiment that makes its own teachers.

    Example: zoo experiment phi_s --tiny --out runs/phi_s
    """
    from zoo.experiments import EXPERIMENTS

    if not args or args[0] not in EXPERIMENTS:
        if args and args[0] not in ("-h", "--help"):
            known = ", ".join(EXPERIMENTS)
            raise ValueError(f"There is no experiment {args[0]!r}; there are {known}.")
        print("\n".join(f"zoo experiment {name} --help" for name in EXPERIMENTS))
        return
    chosen = EXPERIMENTS[args[0]]()
    start = chosen.tiny() if "--tiny" in args else chosen.full()
    words = _gathered(args[1:], "--data")
    asked = parse(type(start), words, f"experiment {args[0]}", chosen.__doc__ or "", default=start)
    if asked.dry_run:
        chosen.plan(asked)
    elif not chosen.main(asked):
        raise SystemExit(1)
