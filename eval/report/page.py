"""Build the report of one run: read its folder, draw, fill the template."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from zoo.eval.report import figures
from zoo.eval.report.figures import short_number
from zoo.eval.report.parts import (
    Cell,
    Gallery,
    PageImage,
    Row,
    Table,
    compared,
    course,
    map_rows,
    measure_text,
    template_of,
)
from zoo.eval.report.run_folder import (
    STUDENT,
    TEACHER,
    UNTRAINED,
    RunFolder,
    number,
    read_run,
    series,
)
from zoo.eval.report.scales import imposed_scales
from zoo.eval.report.verdict import verdicts
from zoo.files import written_whole

LOSSES = {"spatial": figures.STUDENT_COLOUR, "summary": figures.ARM_COLOURS[1]}


def build_report(run_dir: str | Path) -> Path:
    """Write `report.html` and `figures/*.png` into the folder of a run; return the page's path.

    The page needs no network and no other file: images are embedded. Where the run lacks a part,
    the page has a note.

    Raises:
        ValueError: the folder is missing, or has none of a run's files.
        OSError: the folder cannot be written to; an earlier report then stays complete.
    """
    run = read_run(run_dir)
    gallery = Gallery(run.path / "figures")
    page = template_of("page.html.j2").render(
        title=_title(run),
        status=status_of(run),
        earlier=[(name, f"../{folder.name}/report.html") for name, folder in run.stages[:-1]],
        stage=run.stages[-1][0] if run.stages else None,
        verdicts=verdicts(run),
        cards=_cards(run),
        facts=run_facts(run),
        teachers=_teacher_table(run),
        scales=imposed_scales(run.config),
        losses=_loss_pictures(run, gallery),
        normalise=_text(run.config.get("normalise")),
        races=_race_pictures(run, gallery),
        bars=_bar_pictures(run, gallery),
        fidelity=_fidelity_table(run),
        closeness=_closeness_table(run),
        benchmarks=benchmark_table(run),
        maps=map_rows(run, gallery),
        speed=_speed(run, gallery),
        command=_text(run.about.get("command")),
        load=_load_code(run),
        config=json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else None,
        skipped=_names(run.about.get("skipped")),
        notes=run.notes,
    )
    target = run.path / "report.html"
    with written_whole(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


# ---------------------------------------------------------------- words and facts


def _text(value: Any) -> str | None:
    """Return a scalar as text, anything else as JSON; `None` for `None` and the empty string."""
    if value is None or value == "":
        return None
    if isinstance(value, str | int | float):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def _names(value: Any) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list) else []


def _about_student(run: RunFolder) -> Mapping[str, Any]:
    student = run.about.get("student")
    return student if isinstance(student, dict) else {}


def _title(run: RunFolder) -> str:
    name = run.config.get("student")
    if not isinstance(name, str):
        name = _about_student(run).get("name")
    count = len(run.teachers)
    teachers = {0: "its teachers", 1: "one teacher"}.get(count, f"{count} teachers")
    return f"{_text(name) or 'A student'} from {teachers}"


def status_of(run: RunFolder, *, finished: bool = False) -> str | None:
    """Return a sentence on the progress of an unfinished run; `None` for a finished one."""
    if finished or number(run.about.get("seconds")) is not None:
        return None
    if not run.train:
        return "This run has not logged a training step."
    last, steps = run.train[-1]["step"], number(run.config.get("steps"))
    of = f" of {steps:,.0f}" if steps else ""
    return f"This run is not finished: its last logged step is {last:,}{of}."


def _cards(run: RunFolder) -> list[tuple[str, str, str]]:
    """Return the numbers in large letters: value, name, and the same number of other arms."""
    cards = []
    for key, name, unit in (
        ("fidelity/min", "lowest fidelity", ""),
        ("fidelity/geomean", "geometric mean fidelity", ""),
        ("knn/top1", "kNN", " %"),
        ("linear/top1", "linear probe", " %"),
    ):
        if key not in run.ours:
            continue
        against = [
            f"{_arm_name(arm)} {measure_text(key, run.arms[arm][key])}"
            for arm in run.baselines
            if key in run.arms[arm] and arm in (UNTRAINED, "none")
        ]
        cards.append((measure_text(key, run.ours[key]) + unit, name, ", ".join(against)))
    rate = _rate(run)
    if rate:
        cards.append((f"{rate:,.0f}", "images/s in training", ""))
    return cards


def run_facts(run: RunFolder) -> list[tuple[str, str]]:
    """Return what is known of a run's student, data, length, machine and code."""
    about, config, student = run.about, run.config, _about_student(run)
    size = [f"{_big(student[k])} {unit}" for k, unit in _SIZES if number(student.get(k))]
    steps, batch = number(config.get("steps")), number(config.get("batch"))
    length = f"{steps:,.0f} steps" if steps else None
    if steps and batch:
        length = f"{length} of {batch:,.0f} images"
    seconds = number(about.get("seconds"))
    code = [_text(about.get(key)) for key in ("version", "commit")]
    facts = (
        ("Student", ", ".join(filter(None, [_text(config.get("student")), *size]))),
        ("Normalisation", _text(config.get("normalise"))),
        ("Data", _text(config.get("data"))),
        ("Image side", f"{_text(config['size'])} px" if config.get("size") else None),
        ("Training", length),
        ("Seed", _text(config.get("seed"))),
        ("Started", (_text(about.get("started")) or "").replace("T", " ")),
        ("Took", None if seconds is None else _duration(seconds)),
        ("Machine", _text(about.get("machine"))),
        ("torch", _text(about.get("torch"))),
        ("zoo", " at commit ".join(filter(None, code))),
    )
    return [(name, value) for name, value in facts if value]


_SIZES = (("params", "parameters"), ("macs", "MACs per image"))


def _big(value: float) -> str:
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{short_number(value / unit)}{name}"
    return f"{value:g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _teacher_table(run: RunFolder) -> Table | None:
    if not run.described:
        return None
    head = ["teacher", "parameters", "image", "grid", "map width", "summary width", "licence"]
    rows = []
    for name, known in run.described.items():
        params = number(known.get("params"))
        texts = [
            _big(params) if params else None,
            _sides(known.get("size")),
            _sides(known.get("grid")),
            _text(known.get("spatial_dim")),
            _text(known.get("summary_dim")),
            _text(known.get("license")),
        ]
        rows.append(Row(name, [Cell(text or "–") for text in texts]))
    return Table(head, rows)


def _sides(value: Any) -> str | None:
    return " × ".join(map(str, value)) if isinstance(value, list) else _text(value)


# ---------------------------------------------------------------- numbers in tables


def _arm_columns(run: RunFolder) -> list[str]:
    return [arm for arm in (STUDENT, *run.baselines) if arm in run.arms]


def _arm_table(run: RunFolder, first: str, keys: Iterable[tuple[str, str]]) -> Table | None:
    """Return a table of all arms, with a row for each (key, name) that any of them has."""
    arms = _arm_columns(run)
    rows = [
        Row(name, compared(key, [run.arms[arm].get(key) for arm in arms]))
        for key, name in keys
        if any(key in run.arms[arm] for arm in arms)
    ]
    return Table([first, *map(_arm_name, arms)], rows) if rows else None


def _arm_name(arm: str) -> str:
    return {STUDENT: "this student", "none": "not normalised"}.get(arm, arm)


def _fidelity_table(run: RunFolder) -> Table | None:
    means = (("fidelity/min", "lowest"), ("fidelity/geomean", "geometric mean"))
    return _arm_table(run, "teacher", [*((f"fidelity/{t}", t) for t in run.teachers), *means])


def _closeness_table(run: RunFolder) -> Table | None:
    forms = (
        ("fidelity_own_grid/{}", "{}: fidelity on the teacher's own grid"),
        ("mse/{}", "{}: mean squared error"),
        ("cosine/{}/spatial", "{}: cosine of the maps"),
        ("cosine/{}/summary", "{}: cosine of the summaries"),
    )
    return _arm_table(
        run, "measure", [(k.format(t), name.format(t)) for t in run.teachers for k, name in forms]
    )


def likeness_table(run: RunFolder) -> Table | None:
    """Return the table of fidelities and cosines to each teacher, of all arms."""
    forms = (
        ("fidelity/{}", "fidelity to {}"),
        ("cosine/{}/spatial", "cosine to its map"),
        ("cosine/{}/summary", "cosine to its summary"),
    )
    return _arm_table(
        run, "held-out images", [(k.format(t), n.format(t)) for t in run.teachers for k, n in forms]
    )


def benchmark_table(run: RunFolder) -> Table | None:
    """Return a table of all numbers that are not about a teacher, so also of new benchmarks."""
    own = ("fidelity/", "fidelity_own_grid/", "mse/", "cosine/")
    keys = dict.fromkeys(k for n in run.arms.values() for k in n if not k.startswith(own))
    if not keys:
        return None
    students = _arm_columns(run)
    columns = [compared(key, [run.arms[arm].get(key) for arm in students]) for key in keys]
    rows = [
        Row(_arm_name(arm), [column[i] for column in columns], strong=arm == STUDENT)
        for i, arm in enumerate(students)
        if any(key in run.arms[arm] for key in keys)
    ]
    for arm in run.arms:
        if arm.startswith(TEACHER):
            cells = [Cell(measure_text(key, run.arms[arm].get(key))) for key in keys]
            rows.append(Row(f"teacher {arm.removeprefix(TEACHER)}", cells))
    names = {"knn/top1": "kNN, %", "linear/top1": "linear probe, %"}
    return Table(["features of", *(names.get(key, key) for key in keys)], rows)


# ---------------------------------------------------------------- pictures


def _loss_pictures(run: RunFolder, gallery: Gallery) -> list[PageImage]:
    pictures = []
    steps, values = series(run.train, "loss")
    if steps:
        png = figures.curves("weighted sum", [("loss", steps, values, figures.INK)])
        pictures.append(gallery.add(png, "loss", course("The weighted sum of losses", values)))
    for i, teacher in enumerate(run.teachers):
        lines = []
        for part, paint in LOSSES.items():
            steps, values = series(run.train, f"{teacher}/{part}")
            if steps:
                lines.append((part, steps, values, paint))
        if lines:
            summary = "; ".join(course(f"{part} loss", values) for part, _, values, _ in lines)
            png = figures.curves(teacher, lines)
            pictures.append(gallery.add(png, f"loss-{i}-{teacher}", f"{teacher}: {summary}"))
    return pictures


def _race_pictures(run: RunFolder, gallery: Gallery) -> list[PageImage]:
    """Draw the spatial losses of this run and the other arms, each relative to its first value."""
    pictures = []
    if not any(run.compare.values()):
        return pictures
    for i, teacher in enumerate(run.teachers):
        lines = []
        for arm, logged in ((STUDENT, run.train), *run.compare.items()):
            steps, values = series(logged, f"{teacher}/spatial")
            if values and values[0] > 0:
                relative = [value / values[0] for value in values]
                lines.append((_arm_name(arm), steps, relative, _paint(run, arm)))
        if len(lines) > 1:
            png = figures.curves(teacher, lines, ylabel="share of the first value")
            summary = "; ".join(f"{name} ends at {short_number(y[-1])}" for name, _, y, _ in lines)
            alt = f"{teacher}, spatial loss as a share of its first value: {summary}"
            pictures.append(gallery.add(png, f"race-{i}-{teacher}", alt))
    return pictures


def _paint(run: RunFolder, arm: str) -> str:
    """Return the colour of an arm, the same in all plots."""
    if arm == STUDENT:
        return figures.STUDENT_COLOUR
    if arm == UNTRAINED:
        return figures.ARM_COLOURS[0]
    rest = [a for a in dict.fromkeys([*run.baselines, *run.compare]) if a != UNTRAINED]
    colours = figures.ARM_COLOURS[1:]
    return colours[rest.index(arm) % len(colours)]


def _bar_pictures(run: RunFolder, gallery: Gallery) -> list[PageImage]:
    arms = _arm_columns(run)
    wanted = [(f"fidelity/{t}", t) for t in run.teachers]
    wanted += [("fidelity/min", "lowest of the teachers")] if len(wanted) > 1 else []
    panels = []
    for key, title in wanted:
        bars = [
            (_arm_name(arm), run.arms[arm][key], _paint(run, arm))
            for arm in arms
            if key in run.arms[arm]
        ]
        if bars:
            panels.append((title, bars))
    limits = figures.fidelity_limits([value for _, bars in panels for _, value, _ in bars])
    pictures = []
    for i, (title, bars) in enumerate(panels):
        summary = ", ".join(f"{name} {short_number(value)}" for name, value, _ in bars)
        png = figures.fidelity_bars(title, bars, limits)
        pictures.append(gallery.add(png, f"fidelity-{i}-{title}", f"Fidelity, {title}: {summary}"))
    return pictures


class SpeedPanel(NamedTuple):
    """The plot of the training speed, and a sentence about it."""

    picture: PageImage
    text: str


def _rate(run: RunFolder) -> float | None:
    """Return the median of images per second, without the first line, which has the warm-up."""
    _, rates = series(run.timing, "img_s")
    return median(rates[1:] or rates) if rates else None


def _speed(run: RunFolder, gallery: Gallery) -> SpeedPanel | None:
    rate = _rate(run)
    if rate is None:
        return None
    steps, rates = series(run.timing, "img_s")
    png = figures.curves(
        "images per second", [("images/s", steps, rates, figures.STUDENT_COLOUR)], log=False
    )
    text = f"Median {rate:,.0f} images per second"
    seconds = number(run.about.get("seconds"))
    if seconds is not None:
        text += f"; the whole command took {_duration(seconds)}"
    return SpeedPanel(gallery.add(png, "speed", f"{text}."), f"{text}.")


# ---------------------------------------------------------------- loading the student


def _load_code(run: RunFolder) -> str | None:
    """Return code that loads the exported student; `None` if it has not been exported."""
    export = run.path / "export"
    if not (export / "model.safetensors").is_file():
        return None
    folder = json.dumps(f"local-dir:{export}", ensure_ascii=False)
    return f"import timm, zoo\n\nmodel = timm.create_model({folder}, pretrained=True)"
