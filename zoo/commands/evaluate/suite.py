"""`zoo eval --suite` and `--again`: many evaluations of a file, and one of a result line."""

import itertools
import shlex
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TARGETS, EVALS = "targets", "eval"


def read_suite(path: Path) -> list[list[str]]:
    """Return the words of each evaluation of a suite, as they would follow `zoo eval`.

    A suite is TOML: `targets`, a list, and tables `[[eval]]` whose keys are options (`on`, `data`,
    `"knn.k"`). A list under `seed`, `size`, `batch` or `precision` stands for one evaluation each;
    any other list for an option of several values.

    Raises:
        ValueError: there is no such file, or it says something else.
    """
    if not path.is_file():
        raise ValueError(f"There is no suite at {path}.")
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}.") from error
    targets, evals = content.pop(TARGETS, []), content.pop(EVALS, [])
    if content or not isinstance(evals, list) or not evals or not isinstance(targets, list):
        strange = ", ".join(content) or "no [[eval]]"
        raise ValueError(
            f'{path} has {strange}: a suite has targets = ["MODEL", ...] and tables [[eval]] with '
            "options of zoo eval."
        )
    found = []
    for options in evals:
        own = options.pop("target", None)
        for target in [own] if own else targets or [None]:
            for chosen in _each(options):
                found.append(([str(target)] if target else []) + _words(chosen, path))
    return found


SWEPT = ("seed", "size", "batch", "precision")
"""Options of which a list means one evaluation for each."""


def _each(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    swept = {n: v for n, v in options.items() if n in SWEPT and isinstance(v, list)}
    return [
        dict(options) | dict(zip(swept, values, strict=True))
        for values in itertools.product(*swept.values())
    ]


def _words(options: Mapping[str, Any], path: Path) -> list[str]:
    words = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, Mapping):
            raise ValueError(f'{path}: write {name} as options with dots: "{name}.KEY" = ...')
        if name == "data" and isinstance(value, list):
            words += [word for one in value for word in (option, str(one))]
        elif name == "on" and isinstance(value, list):
            words += [option, ",".join(map(str, value))]
        elif isinstance(value, bool):
            group, dot, own = option.removeprefix("--").rpartition(".")
            words.append(option if value else f"--{group}{dot}no-{own}")
        else:
            many = value if isinstance(value, list) else [value]
            words += [option, *map(str, many)]
    return words


def run_suite(path: Path, rest: list[str], run: Callable[..., Any]) -> None:
    """Carry out a suite; what is wrong with any of its evaluations is said before the first.

    Args:
        rest: Further words for each of them: `--out FILE.jsonl --resume`.
        run: Reads words, and carries them out unless `check` is true.

    Raises:
        ValueError: an evaluation is refused, before any work.
        Unfinished: some failed while they ran; the others were carried out.
    """
    from zoo.commands.evaluate.failures import Failures
    from zoo.train.mesh import world

    lines = [words + rest for words in read_suite(path)]
    for words in lines:
        run(words, check=True)
    failures = Failures(len(lines) if world() == 1 else 1, "evaluations")
    for number, words in enumerate(lines, 1):
        told = f"zoo eval {shlex.join(words)}"
        print(f"{number}/{len(lines)}  {told}", flush=True)
        with failures.noted(told):
            run(words)
    failures.tell()


def again(line: str, *, out: Path | None = None, device: str = "auto") -> None:
    """Measure what a line of a result file says again, and show both numbers.

    Args:
        line: `FILE.jsonl:NUMBER`, counted from 1; the last line without a number.

    Raises:
        ValueError: there is no such line, or what it names is not there any more.
    """
    from zoo.commands.evaluate.run import evaluate
    from zoo.eval.benchmarks import settings_of
    from zoo.eval.results import TRAINED, read
    from zoo.eval.subject import EvalRequest
    from zoo.train.fields import changed

    file, colon, number = line.rpartition(":")
    file, number = (file, number) if colon and number.lstrip("-").isdigit() else (line, "0")
    records = read(Path(file))
    place = int(number) - 1 if int(number) > 0 else int(number) or -1
    if not -len(records) <= place < len(records):
        raise ValueError(f"{file} has {len(records)} results, and no line {number}.")
    record = records[place]
    if record.benchmark == "run":
        evaluated = EvalRequest(out=out)
    else:
        settings = {k: v for k, v in record.settings.items() if k not in (TRAINED, "predictions")}
        name = record.benchmark
        evaluated = EvalRequest(
            on=(name,),
            data={name: (Path(record.data),)} if record.data else {},
            settings={name: changed(settings_of(name)(), settings)},
            features=Path(record.features) if record.features else None,
            size=None if Path(record.target).exists() or record.features else record.size,
            batch=record.batch or 64,
            precision="amp" if record.precision == "amp" else "float32",
            seed=record.seed,
            out=out,
            command=record.command,
        )
        if name in ("segment", "depth", "detect"):  # their size is the settings' own
            evaluated = replace(evaluated, size=None)
    evaluated = changed(evaluated, dict(device=device))
    (found,) = evaluate(None if record.features else record.target, evaluated, show=False)
    table = Table("measure", "recorded", "now", title=f"{record.target}: {record.benchmark}")
    for key in dict.fromkeys([*record.values, *found.values]):
        table.add_row(key, *(f"{x:,.4f}" if (x := r.values.get(key)) is not None else "-"
                             for r in (record, found)))  # fmt: skip
    Console().print(table)
    for what, one, other in (
        ("weights", record.weights_hash, found.weights_hash),
        ("data", record.data_hash, found.data_hash),
        ("versions", dict(record.versions), dict(found.versions)),
        ("machine", dict(record.machine), dict(found.machine)),
    ):
        if one != other:
            print(f"not the same {what}: {one} when it was recorded, {other} now")
