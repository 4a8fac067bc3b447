"""The report of a made-up run: whole, interrupted, malicious, and as a browser shows it."""

import base64
import io
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from zoo.eval.report.figures import fidelity_limits, short_number, shorten
from zoo.eval.report.maps import save_maps
from zoo.eval.report.page import build_report
from zoo.eval.report.run_folder import read_run
from zoo.eval.report.terminal import print_tables
from zoo.eval.report.verdict import verdicts

TEACHERS = ("classifier", "self_supervised", "dense")
SECTIONS = ("headline", "maps", "fidelity", "benchmarks", "losses", "speed", "run")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def training_lines(teachers, steps=60, scale=1.0):
    for step in range(0, steps * 10, 10):
        parts = {}
        for i, name in enumerate(teachers):
            parts[f"{name}/spatial"] = scale * (0.3 + 0.1 * i + math.exp(-step / (80 + 60 * i)))
            if i < 2:
                parts[f"{name}/summary"] = 0.1 + 0.6 * math.exp(-step / 90)
        yield {"kind": "train", "step": step, "loss": sum(parts.values()), "lr": 1e-3, **parts}


def evaluation_lines(teachers):
    levels = {"student": (3.1, 2.2, 1.7), "untrained": (0.97, 0.91, 0.88), "none": (0.4, 4.1, 1.2)}
    for arm, found in levels.items():
        numbers = {"fidelity/min": min(found), "fidelity/geomean": math.prod(found) ** (1 / 3)}
        for i, (name, value) in enumerate(zip(teachers, found, strict=False)):
            numbers |= {f"fidelity/{name}": value, f"mse/{name}": 1 / value}
            numbers[f"cosine/{name}/spatial"] = 1 - 0.2 / value
            if i < 2:
                numbers[f"cosine/{name}/summary"] = 1 - 0.1 / value
        numbers |= {"knn/top1": 60 + 11 * found[0], "linear/top1": 65 + 9 * found[0]}
        yield {"kind": "eval", "arm": arm, "step": 590, **numbers}
    for i, name in enumerate(teachers):
        found = {"knn/top1": 97.2 - 8 * i, "linear/top1": 98.1 - 5 * i}
        yield {"kind": "eval", "arm": f"teacher:{name}", "step": 590, **found}


def made_up_maps(teachers):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (2, 24, 24, 3), dtype=np.uint8)
    maps = {"images": images, "keys": np.array(["digit 1", "photo 2"])}
    for i, name in enumerate(teachers):
        theirs = rng.normal(size=(2, 4 + 2 * i, 4 + 2 * i, 8)).astype(np.float16)
        maps |= {f"theirs/{name}": theirs, f"ours/{name}": 0.7 * theirs[:, ::2, ::2]}
    return maps


def write_run(folder, teachers=TEACHERS):
    folder.mkdir()
    config = {"student": "eradio_tiny", "teachers": list(teachers), "normalise": "phi_s"}
    config |= {"steps": 600, "batch": 64, "size": 96, "seed": 0, "data": "builtin"}
    (folder / "config.json").write_text(json.dumps(config))
    known = {"params": 1_234_567, "summary_dim": 192, "spatial_dim": 64, "license": None}
    known |= {"grid": [6, 6], "size": [96, 96]}
    about = {"command": "zoo distill --out 'runs/first one'", "version": "0.1.0", "commit": None}
    about |= {"started": "2026-11-22T10:00:00", "seconds": 192.4, "machine": "2 cores"}
    about |= {"torch": "2.11.0", "teachers": dict.fromkeys(teachers, known)}
    about |= {"student": {"name": "eradio_tiny", "params": 890_000, "macs": 12_300_000}}
    (folder / "about.json").write_text(json.dumps(about | {"skipped": ["bad/one.jpg"]}))
    lines = [*training_lines(teachers), *evaluation_lines(teachers)]
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "compare/none/metrics.jsonl", training_lines(teachers, scale=40.0))
    timing = ({"step": s, "img_s": 900 + s % 70, "seconds": s / 10} for s in range(0, 600, 20))
    write_lines(folder / "timing.jsonl", timing)
    save_maps(made_up_maps(teachers), folder / "maps.npz")
    (folder / "export").mkdir()
    (folder / "export/model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("report") / "run")
    path = build_report(folder)
    return folder, path, path.read_text("utf-8")


def section(page, name):
    return re.search(rf'<section id="{name}">(.*?)</section>', page, re.S)[1]


def test_a_whole_run_fills_every_section(whole):
    folder, path, page = whole
    assert path == folder / "report.html"
    assert re.findall(r'<section id="(\w+)"', page) == list(SECTIONS)
    assert 'class="note"' not in page and "Not shown" not in page
    assert section(page, "fidelity").count("<img") == 4
    assert section(page, "losses").count("<img") == 4 + 3
    assert section(page, "maps").count("<img") == 2 * (1 + 2 * 3)
    run = section(page, "run")
    for text in ("runs/first one", "1 unreadable file left out", "bad/one.jpg", "890 k", "12.3 M"):
        assert text in run
    assert "local-dir:" in run and "/export" in run and "3 min 12 s" in run


def test_every_picture_is_embedded_decodes_and_stands_in_the_figures_folder(whole):
    folder, _, page = whole
    sources = re.findall(r'<img[^>]* src="([^"]*)"', page)
    assert len(sources) == page.count("<img") > 20
    kept = {file.read_bytes() for file in (folder / "figures").glob("*.png")}
    for source in sources:
        png = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert png in kept
        Image.open(io.BytesIO(png)).verify()
    assert len(kept) <= len(sources)


def test_nothing_on_the_page_comes_from_elsewhere(whole):
    page = whole[2]
    assert "http://" not in page and "https://" not in page
    assert not re.search(r"\burl\(|@import|<iframe|<object|<embed", page)
    for link in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert link.startswith(("data:", "#"))
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_the_headline_says_what_the_numbers_say(whole):
    found = {verdict.text: verdict.good for verdict in verdicts(read_run(whole[0]))}
    text = "\n".join(found)
    assert "lowest fidelity is 1.70, for dense" in text
    assert "the untrained student on every teacher (3 of 3)" in text
    assert "1.70 against 0.880" in text
    assert "without normalisation on 2 of 3 teachers, not on self_supervised, but a higher" in text
    assert "kNN 94.1 % against 70.7 %" in text
    assert set(found.values()) == {True}


def test_a_student_that_loses_is_told_so(tmp_path):
    worse = {"student": (0.8, 3.0), "untrained": (0.9, 0.9), "none": (0.9, 2.0)}
    write_lines(
        tmp_path / "metrics.jsonl",
        [
            {
                "kind": "eval",
                "arm": arm,
                "fidelity/a": a,
                "fidelity/b": b,
                "fidelity/min": min(a, b),
            }
            for arm, (a, b) in worse.items()
        ],
    )
    found = verdicts(read_run(tmp_path))
    assert [v.good for v in found] == [False, False, False]
    assert "For a the student's head is no better than the teacher's own mean" in found[0].text
    assert "1 of 2 teachers, not on a, and no higher minimum" in found[1].text


def test_an_interrupted_run_is_reported_as_far_as_it_came(tmp_path):
    folder = write_run(tmp_path / "run")
    about = json.loads((folder / "about.json").read_text()) | {"seconds": None}
    (folder / "about.json").write_text(json.dumps(about))
    half = [json.dumps(line) for line in list(training_lines(TEACHERS))[:20]]
    (folder / "metrics.jsonl").write_text("\n".join(half) + '\n{"kind": "train", "st')
    (folder / "maps.npz").write_bytes((folder / "maps.npz").read_bytes()[:500])
    shutil.rmtree(folder / "export")
    page = build_report(folder).read_text("utf-8")
    assert re.findall(r'<section id="(\w+)"', page) == list(SECTIONS)
    assert "its last logged step is 190 of 600" in section(page, "headline")
    assert "No evaluation" in section(page, "headline")
    assert "No fidelity" in section(page, "fidelity")
    assert "no feature maps" in section(page, "maps")
    run = section(page, "run")
    assert "one line that could not be read" in run and "maps.npz is not a readable" in run
    assert "has not been exported" in run


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[1, 2"),
        ("config.json", '{"teachers": {"a": 1}, "steps": "many", "student": 3}'),
        ("about.json", '{"teachers": [1], "student": "x", "seconds": "long", "skipped": 4}'),
        ("about.json", '{"teachers": {"a": null}}'),
        (
            "metrics.jsonl",
            '{"kind": "train"}\n7\n{"kind": "eval"}\n{"kind": "train", "step": null}',
        ),
        ("timing.jsonl", '{"step": 0, "img_s": null}'),
        ("about.json", "[" * 100_000),
        ("metrics.jsonl", "[" * 100_000 + "\n" + json.dumps(dict(kind="train", step=10**400))),
        ("metrics.jsonl", json.dumps(dict(kind="eval", step=1, x=10**400))),
    ],
)
def test_one_odd_file_alone_still_gives_a_page_with_every_section(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    page = build_report(tmp_path).read_text("utf-8")
    assert re.findall(r'<section id="(\w+)"', page) == list(SECTIONS)
    assert page.count('class="note"') >= 4


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path):
    with pytest.raises(ValueError, match="not the folder of a run"):
        build_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"none of config\.json"):
        build_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_malicious_or_strange_teacher_name_is_only_ever_text(tmp_path):
    evil, odd = "<script>alert(1)</script>", 'timm:a/b$x_1$"@224 ../../up'
    folder = write_run(tmp_path / "run", (evil, odd))
    page = build_report(folder).read_text("utf-8")
    assert evil not in page and "&lt;script&gt;alert(1)" in page
    assert page.count("<script") == 2  # the pages' own: pictures that are shown, and tables
    assert not re.search(r'alt="[^"]*"@224', page)
    inside = {file.resolve().parent for file in folder.rglob("*.png")}
    assert inside == {(folder / "figures").resolve()}
    assert len(list(tmp_path.rglob("*.png"))) == page.count("<img")


def test_infinite_missing_and_undefined_numbers_are_written_as_such(tmp_path):
    text = (
        '{"kind": "eval", "arm": "student", "fidelity/a": Infinity, "fidelity/b": NaN, '
        '"fidelity/c": 0.0, "fidelity/d": null, "fidelity/min": NaN, "knn/top1": null}\n'
        '{"kind": "eval", "arm": "untrained", "fidelity/a": 1e-9, "fidelity/d": 2.0}\n'
    )
    (tmp_path / "metrics.jsonl").write_text(text)
    page = section(build_report(tmp_path).read_text("utf-8"), "fidelity")
    assert "∞" in page and "not a number" in page and "–" in page
    assert page.count("<img") == 5


def test_the_later_line_of_a_step_counts_after_a_resume(tmp_path):
    steps = [(0, 5.0), (10, 4.0), (20, 3.0), (10, 4.5), (20, 3.5), (30, 2.0)]
    lines = [{"kind": "train", "step": s, "loss": v} for s, v in steps]
    lines += [{"kind": "eval", "arm": "student", "step": s, "knn/top1": v} for s, v in steps]
    write_lines(tmp_path / "metrics.jsonl", lines)
    run = read_run(tmp_path)
    assert [line["loss"] for line in run.train] == [5.0, 4.5, 3.5, 2.0]
    assert run.ours["knn/top1"] == 2.0


def test_a_teacher_that_the_config_spells_otherwise_is_counted_once(tmp_path):
    folder = write_run(tmp_path / "run", ("resnet18", "sam"))
    config = json.loads((folder / "config.json").read_text())
    config["teachers"] = ["timm:resnet18@224", "zoo:sam"]
    (folder / "config.json").write_text(json.dumps(config))
    assert read_run(folder).teachers == ["resnet18", "sam"]
    (folder / "metrics.jsonl").unlink()
    assert read_run(folder).teachers == ["resnet18", "sam"]
    (folder / "about.json").unlink()
    assert read_run(folder).teachers == config["teachers"]


def test_numbers_and_names_are_written_short():
    written = {0: "0", 1: "1.00", 12.345: "12.3", 0.01234: "0.0123", 1234.5: "1,234", -2.5: "−2.50"}
    written |= {1e-7: "1e−07", math.inf: "∞", None: "–"}
    for value, text in written.items():
        assert short_number(value) == text
    assert shorten("short", 5) == "short"
    assert shorten("a" * 30 + "b" * 30, 21) == "a" * 10 + "…" + "b" * 10
    low, high = fidelity_limits([0.5, 4.0, math.inf, math.nan])
    assert low < 0.5 and high > 4
    assert fidelity_limits([])[0] < 1 < fidelity_limits([])[1]


def browse(page, folder):
    """Open a page from file:// without a network; give the DOM after scripts, and the log."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --enable-logging=stderr"
    command = [CHROMIUM, *flags.split(), "--v=0", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={folder}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium or google-chrome on the PATH")
def test_chromium_shows_every_picture_from_file_without_network_or_console_errors(whole, tmp_path):
    _, path, page = whole
    dom, console = browse(path, tmp_path / "profile")
    shown = re.search(r'data-pictures="(\d+)/(\d+)"', dom)
    assert shown and shown[1] == shown[2] == str(page.count("<img"))
    assert console == []
    # The same look at a page that is broken in both ways must see it.
    broken = page.replace("data:image/png;base64,", "data:image/png;base64,AAAA", 1)
    broken = broken.replace("<main>", '<main><img src="https://example.org/x.png">')
    (tmp_path / "broken.html").write_text(broken, "utf-8")
    dom, console = browse(tmp_path / "broken.html", tmp_path / "profile")
    shown = re.search(r'data-pictures="(\d+)/(\d+)"', dom)
    assert int(shown[1]) == int(shown[2]) - 2
    assert any("Content Security Policy" in line for line in console)


def test_the_terminal_has_each_number_of_each_model_also_where_it_is_piped(whole, capsys):
    print_tables(whole[0])
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "fidelity to dense" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][1:] == ["1.70", "0.880", "1.20"]
    row = next(line for line in lines if "teacher classifier" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][1:] == ["97.2", "98.1"]
    assert sum("cosine to its summary" in line for line in lines) == 2
    assert max(map(len, lines)) <= 120
