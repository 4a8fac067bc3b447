"""The page about many: every section, escaping, and a browser's view of it."""

import base64
import itertools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from zoo.eval.examples import Example
from zoo.eval.registry import Picture, Scores
from zoo.eval.report import svg
from zoo.eval.report.gathered import Measure, gather, headline_columns
from zoo.eval.report.joined import build_joined
from zoo.eval.report.maps import collect_maps, save_maps
from zoo.eval.report.parts import compared
from zoo.eval.results import Record, write
from zoo.features import Batch, Features

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
KEYS = [f"{i}.png" for i in range(200)]
SECTIONS = ("headline", "radar", "pareto", "differences", "same", "pictures", "maps", "numbers",
            "published", "rerun")  # fmt: skip


def fill(out, target, share, seed, model="mambavision_t", rate=100.0):
    about = dict(name=model, size=224, parameters=int(3e7 * share), macs=4e9 * share)
    common = dict(
        target=target,
        model=about,
        weights_hash=f"hash-{seed}",
        data="photos/birds",
        data_hash="d",
        command=f"zoo eval {target}",
        date="2026-01-01T00:00:00",
        versions={"torch": "2"},
        machine={"processor": "one"},
        seed=seed,
    )
    draws = np.random.default_rng(seed)
    for name in ("knn", "linear", "fewshot"):
        key = "fewshot/5/top1" if name == "fewshot" else f"{name}/top1"
        scores = Scores(KEYS, (draws.random(200) < share).astype(np.uint8))
        record = Record(benchmark=name, values={key: scores.value}, **common)
        words = [
            Example("a/7.png", np.zeros((8, 8, 3), np.uint8), "dog", target, right=share > 0.6)
        ]
        write(out, record, {key: scores}, {}, words if name == "knn" else [])
    values = {"segment/miou": 60 * share, "segment/odd": float("nan")}
    pixels = draws.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    pictures = {"1.png": Picture(pixels, "masks <b>drawn</b>")}
    legend = [("tree & bush", (1, 2, 3))]
    examples = [Example("val/1.png", pixels, pixels, pixels, "71 % of pixels", legend=legend)]
    write(out, Record(benchmark="segment", values=values, **common), {}, pictures, examples)
    common |= dict(data=None, data_hash=None)
    write(out, Record(benchmark="speed", values={"speed/img_s": rate}, **common), {}, {})


def make_run(folder):
    folder.mkdir(parents=True)
    config = dict(student="eradio_nano", data="photos/birds", size=64, steps=10)
    (folder / "config.json").write_text(json.dumps(config))
    about = dict(student=dict(name="eradio_nano", params=748_000), command="zoo distill ...")
    (folder / "about.json").write_text(json.dumps(about))
    values = {"knn/top1": 61.0, "linear/top1": 70.0, "fidelity/dino": 1.7, "fidelity/min": 1.7}
    lines = [dict(kind="eval", step=10, arm="student", **values)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    torch.manual_seed(0)
    batch = Batch(torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8), ["a", "b"])
    maps = [Features(None, torch.randn(2, 4, 4, 6)) for _ in range(2)]
    save_maps(
        collect_maps(lambda _: {"dino": maps[0]}, {"dino": lambda _: maps[1]}, batch),
        folder / "maps.npz",
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("joined")
    out = place / "results.jsonl"
    fill(out, "runs/ours/export", 0.8, 0)
    fill(out, "resnet50", 0.5, 1, model="swin_tiny_patch4_window7_224", rate=300.0)
    fill(out, "<script>alert(1)</script>", 0.55, 2, model="resnet18", rate=400.0)
    make_run(place / "mine")
    page = build_joined([out, place / "mine"], place / "all" / "page.html")
    return page, page.read_text("utf-8")


def section(page, name):
    return re.search(rf'<section id="{name}">(.*?)</section>', page, re.S)[1]


def test_every_section_is_filled(whole):
    _, page = whole
    for name in SECTIONS:
        assert '<p class="note">' not in section(page, name), name
    assert page.count("<img") == page.count("data:image/")
    assert section(page, "pareto").count("<svg") == 12  # four qualities, three costs
    assert section(page, "pictures").count("<img") == 3
    assert (
        section(page, "maps").count("<img") == 2 * 3
    )  # an image, the teacher's map, the student's


def test_the_best_of_a_column_is_bold_and_differences_carry_their_intervals(whole):
    _, page = whole
    table = section(page, "headline")
    ours = re.search(r"<th scope=\"row\">export</th>(.*?)</tr>", table, re.S)
    named = ours or re.search(r"<th scope=\"row\">[^<]*ours</th>(.*?)</tr>", table, re.S)
    assert named[1].count('class="best"') == 4
    rows = section(page, "differences")
    assert rows.count("over 200 images") == 6
    assert re.search(r'class="best">\[−?-?\d', rows)


def test_all_models_stand_side_by_side_on_one_image_with_a_legend(whole):
    _, page = whole
    same = section(page, "same")
    rows = re.findall(r'<div class="same">(.*?)</div>', same, re.S)
    assert len(rows) == 2  # one image of knn, one of segment
    words, painted = rows
    assert words.count("<img") == 1 and words.count("<li") == 3
    assert words.count('class="good"') == 1  # the others are wrong
    assert painted.count("<img") == 2 + 3 and painted.count("71 % of pixels") == 3
    assert "tree &amp; bush" in same and "#010203" in same and "evenly spread" in same


def test_of_several_seeds_the_lowest_is_shown_beside_the_other_models(tmp_path):
    out = tmp_path / "r.jsonl"
    fill(out, "ours", 0.8, 3)
    fill(out, "ours", 0.8, 1)
    fill(out, "theirs", 0.5, 2)
    same = section(build_joined([out], tmp_path / "p.html").read_text("utf-8"), "same")
    assert same.count("71 % of pixels") == 2 and "the first of the lowest seed" in same


def test_of_errors_and_costs_the_lowest_is_best():
    for name in ("mse/dino", "depth/rmse", "speed/gmacs"):
        assert [cell.best for cell in compared(name, [1.0, 2.0, None])] == [True, False, False]
    assert [cell.best for cell in compared("speed/img_s", [1.0, 2.0])] == [False, True]


def test_published_figures_are_marked_as_published(whole):
    _, page = whole
    part = section(page, "published")
    assert "82.3 (published)" in part and "MambaVision (2407.08083)" in part
    assert "81.3 (published)" in part and "not measured here" in part


def test_the_page_says_where_each_number_came_from(whole):
    _, page = whole
    part = section(page, "rerun")
    assert "hash-1" in part and "zoo eval resnet50" in part and "torch 2" in part


def test_a_name_that_is_markup_is_only_ever_text(whole):
    _, page = whole
    assert "<script>alert" not in page and "<b>drawn" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_nothing_on_the_page_comes_from_elsewhere(whole):
    _, page = whole
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    for picture in re.findall(r"data:image/png;base64,([^\"]+)", page):
        assert base64.b64decode(picture)[:4] == b"\x89PNG"


def test_a_run_and_the_results_of_its_export_are_one_model(tmp_path):
    make_run(tmp_path / "mine")
    (tmp_path / "mine" / "export").mkdir()
    fill(tmp_path / "r.jsonl", str(tmp_path / "mine" / "export"), 0.9, 0)
    models, _ = gather([tmp_path / "mine", tmp_path / "r.jsonl"])
    (model,) = models
    assert model.name == "mine" and model.rates == {(224, "one, float32"): 100}
    assert model.values[Measure("fidelity/min", "birds")] == 1.7
    columns = [measure for measure, _ in headline_columns(models)]
    assert list(dict.fromkeys(measure.name for measure in columns)) == [
        "knn/top1",
        "linear/top1",
        "fewshot/5/top1",
        "segment/miou",
        "speed/img_s",
    ]
    assert model.values[Measure("knn/top1", "birds", "64 px, in training")] == 61
    assert model.values[Measure("knn/top1", "birds", "224 px")] != 61


def one(value, out, target="a", key="knn/top1", **changes):
    own = dict(benchmark="knn", settings=dict(k=20), data="x/birds", data_hash="d")
    own |= dict(model=dict(name="m", size=224, parameters=1e6, macs=4e9), weights_hash="w")
    record = Record(target=target, values={key: value}, **own | changes)
    write(out, record, {}, {})


def small(macs=1e9, size=96):
    return dict(name="m", size=size, parameters=1e6, macs=macs)


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (dict(settings=dict(k=5)), "k=5"),
        (dict(model=small()), "96 px"),
        (dict(precision="amp"), "amp"),
    ],
)
def test_measurements_that_differ_are_columns_of_their_own(tmp_path, change, how):
    one(50.0, tmp_path / "r.jsonl")
    one(60.0, tmp_path / "r.jsonl", **change)
    ((model,), _) = gather([tmp_path / "r.jsonl"])
    assert sorted(model.values.values()) == [50, 60]
    assert model.values[Measure("knn/top1", "birds", how)] == 60


def test_folders_of_one_name_are_two_data_sets(tmp_path):
    one(50.0, tmp_path / "r.jsonl")
    one(60.0, tmp_path / "r.jsonl", data="y/birds", data_hash="e")
    ((model,), _) = gather([tmp_path / "r.jsonl"])
    assert model.values == {Measure("knn/top1", "x/birds"): 50, Measure("knn/top1", "y/birds"): 60}


def test_seeds_become_a_mean_and_a_standard_deviation(tmp_path):
    for seed, value in enumerate((50.0, 60.0, 70.0)):
        one(value, tmp_path / "r.jsonl", seed=seed, weights_hash=f"w{seed}")
    ((model,), _) = gather([tmp_path / "r.jsonl"])
    (value,) = model.found.values()
    assert (value.mean, value.deviation, value.seeds) == (60, 10, 3)
    page = build_joined([tmp_path / "r.jsonl"], tmp_path / "page.html").read_text("utf-8")
    assert "60.0\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}10" in section(page, "headline")


def test_other_weights_of_one_name_are_another_model(tmp_path):
    one(50.0, tmp_path / "r.jsonl")
    one(60.0, tmp_path / "r.jsonl", weights_hash="v")
    models, _ = gather([tmp_path / "r.jsonl"])
    assert [list(model.values.values()) for model in models] == [[50], [60]]


def test_two_sources_with_other_numbers_of_one_measurement_are_refused(tmp_path):
    one(50.0, tmp_path / "r.jsonl")
    one(50.0, tmp_path / "same.jsonl")
    one(60.0, tmp_path / "other.jsonl")
    assert len(gather([tmp_path / "r.jsonl", tmp_path / "same.jsonl"])[0]) == 1
    with pytest.raises(ValueError, match=r"measured twice.*50\.0.*60\.0.*other\.jsonl"):
        gather([tmp_path / "r.jsonl", tmp_path / "other.jsonl"])


def test_two_numbers_of_one_measurement_in_one_file_are_refused(tmp_path):
    one(50.0, tmp_path / "r.jsonl", date="2026-02-02")
    one(50.0, tmp_path / "r.jsonl", date="2026-02-03")
    ((model,), _) = gather([tmp_path / "r.jsonl"])
    assert list(model.values.values()) == [50] and len(model.records) == 1
    one(60.0, tmp_path / "r.jsonl", date="2026-02-04")
    with pytest.raises(ValueError, match=r"r\.jsonl.*twice.*50\.0.*02-02.*60\.0.*02-04"):
        gather([tmp_path / "r.jsonl"])


def test_of_several_timings_the_fastest_is_shown_in_one_file_and_in_two(tmp_path):
    for value, file in ((70.0, "r"), (90.0, "r"), (80.0, "r"), (85.0, "s")):
        one(value, tmp_path / f"{file}.jsonl", "m", "speed/img_s", benchmark="speed")
    ((model,), _) = gather([tmp_path / "r.jsonl", tmp_path / "s.jsonl"])
    assert list(model.values.values()) == [90] == list(model.rates.values())


def test_cost_is_that_of_the_size_at_which_quality_was_measured(tmp_path):
    out = tmp_path / "r.jsonl"
    for target, scale in (("a", 1), ("b", 2)):
        one(50.0 * scale, out, target, model=small(1e9 * scale))
        large = dict(benchmark="detect", model=small(28e9 * scale, 512))
        one(5.0, out, target, "detect/box/AP50", **large)
    models, _ = gather([out])
    assert models[0].macs == {96: 1e9, 512: 28e9}
    page = build_joined([out], tmp_path / "page.html").read_text("utf-8")
    head = section(page, "headline")
    assert "GMACs · 96 px" in head and "GMACs · 512 px" in head
    (alt,) = re.findall(r'aria-label="(kNN birds against GMACs[^"]*)"', page)
    assert "a 50.0 at 1.00;" in alt


def test_a_plot_of_models_of_several_sizes_names_each_points_own(tmp_path):
    out = tmp_path / "r.jsonl"
    one(50.0, out, "a", model=small())
    one(60.0, out, "b")
    page = build_joined([out], tmp_path / "page.html").read_text("utf-8")
    (alt,) = re.findall(r'aria-label="(kNN birds against GMACs[^"]*)"', page)
    assert "a @96 50.0 at 1.00" in alt and "b @224 60.0 at 4.00" in alt


def test_dots_that_would_cover_each_other_are_moved_apart_inside_the_plot():
    import math

    places = svg.apart([(100.0, 100.0)] * 4 + [(101.0, 100.0), (200.0, 50.0)])
    gaps = [math.dist(a, b) for i, a in enumerate(places) for b in places[:i]]
    assert min(gaps) > 1.9 * svg.DOT and places[-1] == (200, 50)
    assert all(svg.LEFT < x < svg.WIDTH and 0 < y < svg.HEIGHT for x, y in places)
    assert len(set(svg.colours(12))) == 12
    for colour in svg.colours(12):
        light = svg.luminance_of(colour)
        page, dark, ink = (svg.luminance_of(c) for c in ("#ffffff", "#191919", svg.ink_on(colour)))
        contrast = [(max(light, x) + 0.05) / (min(light, x) + 0.05) for x in (page, dark, ink)]
        assert min(contrast) > 3 and contrast[2] > 4.5
    assert svg.luminance_of("#777777") == pytest.approx(0.1845, abs=1e-3)  # 4.48 against white
    assert svg.ticks(12.3, 61.0) == [20, 30, 40, 50, 60]
    assert svg.log_ticks(0.5, 300) == [1, 3, 10, 30, 100, 300]


def test_one_result_alone_has_no_empty_section_and_says_at_its_end_what_is_missing(tmp_path):
    values = {"knn/top1": 50.0}
    write(tmp_path / "r.jsonl", Record(target="a", benchmark="knn", values=values), {}, {})
    page = build_joined([tmp_path / "r.jsonl"], tmp_path / "page.html").read_text("utf-8")
    for name in ("radar", "pareto", "differences", "same", "pictures", "maps", "published"):
        assert f'id="{name}"' not in page and f'href="#{name}"' not in page
    assert '<p class="note">' not in page and page.count("<section") == 3
    for i, name in enumerate(("linear", "similar")):
        key = ("linear/top1", "similar/map")[i]
        write(tmp_path / "r.jsonl", Record(target="a", benchmark=name, values={key: 40.0}), {}, {})
    whole = build_joined([tmp_path / "r.jsonl"], tmp_path / "page.html").read_text("utf-8")
    assert "from 0 to 50 %, where 100 % would be" in section(whole, "radar")
    assert "50.0" in section(page, "headline")
    assert section(page, "rerun").count("<li>") == 7
    assert "Capabilities: a radar needs three" in section(page, "rerun")


def test_a_radar_has_no_axis_that_one_model_has_alone(tmp_path):
    kinds = dict(
        knn="knn/top1", linear="linear/top1", similar="similar/map", segment="segment/miou"
    )
    for target, missing in (("a", ""), ("b", "segment")):
        for name, key in kinds.items():
            if name != missing:
                record = Record(target=target, benchmark=name, values={key: 40.0})
                write(tmp_path / "r.jsonl", record, {}, {})
    page = build_joined([tmp_path / "r.jsonl"], tmp_path / "page.html").read_text("utf-8")
    assert "segmentation" in section(page, "headline")
    assert "segmentation" not in section(page, "radar") and "kNN" in section(page, "radar")


def test_speeds_of_two_machines_are_not_in_one_plot(tmp_path):
    for i, target in enumerate(("a", "b")):
        one(50.0 + i, tmp_path / "r.jsonl", target, model=small(1e9))
        for gpu in ("H200", "A100"):
            about = dict(benchmark="speed", model=small(1e9), machine={"gpu": gpu})
            one(100.0 * (1 + i) + len(gpu), tmp_path / "r.jsonl", target, "speed/img_s", **about)
    one(52.0, tmp_path / "r.jsonl", "c", model=small(1e9))
    about = dict(benchmark="speed", model=small(1e9), machine={"gpu": "H200"})
    one(500.0, tmp_path / "r.jsonl", "c", "speed/img_s", **about)
    page = build_joined([tmp_path / "r.jsonl"], tmp_path / "page.html").read_text("utf-8")
    found = re.findall(r'aria-label="kNN birds against images/s \(([^)]*)\): ([^"]*)"', page)
    assert [(where, told.count(" at ")) for where, told in found] == [
        ("H200, float32", 3),
        ("A100, float32", 2),
    ]


def test_pictures_and_scores_that_are_gone_are_noted(tmp_path):
    for place, target in enumerate(("a", "b")):
        fill(tmp_path / "r.jsonl", target, 0.5, place)
    shutil.rmtree(tmp_path / "r_files")
    page = build_joined([tmp_path / "r.jsonl"], tmp_path / "page.html").read_text("utf-8")
    assert "could not be read" in section(page, "rerun")
    assert "cannot be read" in section(page, "rerun")


def test_a_source_that_is_neither_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not the folder of a run"):
        build_joined([tmp_path], tmp_path / "page.html")
    (tmp_path / "x.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="not a result of zoo eval"):
        build_joined([tmp_path / "x.jsonl"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium or google-chrome on the PATH")
def test_chromium_shows_every_picture_without_network_or_console_errors(whole, tmp_path):
    path, page = whole
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --enable-logging=stderr"
    command = [CHROMIUM, *flags.split(), "--v=0", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert f'data-pictures="{page.count("<img")}/{page.count("<img")}"' in done.stdout
    assert not [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium or google-chrome on the PATH")
def test_no_table_is_wider_than_its_card_and_a_narrow_one_is_stacked(whole, tmp_path):
    probe = """<script>addEventListener("load", function () {
      var found = [1240, 400].map(function (width) {
        document.body.style.width = width + "px"; fitTables();
        return Array.prototype.map.call(document.querySelectorAll("table"), function (table) {
          var card = table.closest("section").getBoundingClientRect();
          return [table.getBoundingClientRect().right > card.right, table.matches(".stacked")];
        });
      });
      document.documentElement.dataset.found = JSON.stringify(found); });</script></body>"""
    page = tmp_path / "page.html"
    page.write_text(whole[1].replace("</body>", probe))
    flags = "--headless --no-sandbox --disable-gpu --window-size=1280,900 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    wide, narrow = json.loads(re.search(r'data-found="([^"]*)"', done.stdout)[1])
    assert not any(beyond for beyond, _ in wide + narrow)
    assert sum(stacked for _, stacked in narrow) > sum(stacked for _, stacked in wide)


def test_the_radar_has_every_model_and_shows_the_first_six():
    rings = [svg.Ring([0.5, None, 1.0], i + 1, f"m{i}", "#123456", i < 6) for i in range(9)]
    drawn = svg.radar([["kNN", "64 px"], ["kNN", "96 px"], ["depth"]], rings)
    assert drawn.count('<g id="radar-') == 9 and drawn.count('class="off"') == 3
    assert "kNN 64 px: 50.0%" in drawn and "kNN 96 px: " not in drawn
    near = svg.radar([["kNN", "64 px"], ["kNN", "96 px"], ["depth"]], rings[:1], rim=0.5)
    assert f'cy="{svg.DOWN / 2 - svg.RIM}"' in near  # half a perfect score is at such a rim
    top = svg.ACROSS / 2, svg.DOWN / 2 - 0.5 * svg.RIM  # half way up the first axis
    assert f"{top[0]},{top[1]}" in drawn


def test_labels_of_a_log_axis_do_not_touch():
    dots = [svg.Dot(x, 50.0 + x, None, 1, "m", "#000000") for x in (0.004, 0.05)]
    drawn = svg.quality("t", "GMACs", "q", dots, more_is_better=False)
    found = re.findall(r'<text class="x" x="([\d.]+)" y="244">', drawn)
    places = sorted(float(x) for x in found)
    assert len(places) > 1 and min(b - a for a, b in itertools.pairwise(places)) >= 42
