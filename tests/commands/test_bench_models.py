"""`zoo bench models` from the command line, on tiny models."""

import json

import pytest

from zoo.cli import main
from zoo.commands.bench.models import differences, expand_names, read_run, table_of
from zoo.eval.speed.models import Case, Measured

RUN = [
    "bench", "models", "eradio_nano", "--peer", "eradio_nano,drop_rate=0.5", "--device", "cpu",
    "--size", "64", "--batch", "1", "--rounds", "4",
]  # fmt: skip


def row(model, seconds, mode="eager", size=224, **measured):
    case = Case(model=model, mode=mode, size=size, batch=2)
    return Measured(case=case, seconds=seconds, **measured)


@pytest.mark.slow
def test_a_run_is_shown_written_drawn_and_compared_with(tmp_path, capsys):
    out = tmp_path / "results" / "cpu.json"
    main([*RUN, "--modes", "eager,deploy", "--out", str(out)])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("eradio_nano,drop_rate=0.5", "deploy", "× per MAC"))
    run = json.loads(out.read_text())
    assert run["command"].startswith("zoo bench models eradio_nano") and run["in_turns"]
    assert run["rounds"] == 4 and run["versions"]["torch"] and run["threads"]
    assert [(r["model"], r["mode"]) for r in run["rows"]] == [
        (model, mode)
        for mode in ("eager", "deploy")
        for model in ("eradio_nano", "eradio_nano,drop_rate=0.5")
    ]
    assert all(len(r["seconds"]) == 4 and r["images_per_s"] > 0 for r in run["rows"])
    table = out.with_suffix(".md").read_text().splitlines()
    assert sum(line.startswith("| eradio_nano") for line in table) == 4
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    main([*RUN, "--compare", str(out), "--profile"])
    again = capsys.readouterr().out
    assert "× earlier" in again and "where the time goes" in again and "aten::" in again


def test_ratios_are_to_the_peer_in_the_same_mode_and_to_the_same_row_of_the_earlier_run():
    rows = [
        row("ours", [1.0], macs=6e9, parameters=10**7),
        row("peer", [2.0], macs=2e9, parameters=10**6),
        row("ours", [8.0], "train", macs=6e9),
        row("peer", [4.0], "train", macs=2e9),
    ]
    head, body = table_of(rows, peer="peer", earlier=[row("ours", [3.0])])
    lines = [dict(zip(head, line, strict=True)) for line in body]
    assert [line["× img/s"] for line in lines] == ["2.00", "1.00", "0.50", "1.00"]
    assert [line["× per MAC"] for line in lines] == ["6.00", "1.00", "1.50", "1.00"]
    assert [line["× earlier"] for line in lines] == ["3.00", "-", "-", "-"]
    assert [line["M params"] for line in lines] == ["10.00", "1.00", "-", "-"]
    assert lines[0]["img/s"] == "2.0" and lines[0]["GMAC/s"] == "12.0"


def test_a_column_that_says_nothing_is_left_out():
    head, _ = table_of([row("ours", [1.0])], peer="nobody")
    assert head == ["model", "mode", "img/s"]
    head, _ = table_of([row("a", [1.0]), row("a", [1.0], size=64)], peer="nobody")
    assert "size" in head
    head, body = table_of([row("a", [], error="broken")], peer="a")
    assert head == ["model", "mode"] and body == [["a", "eager"]]


def test_patterns_stand_for_our_own_models_and_each_is_measured_once():
    names = expand_names(["eradio_xxxtiny_8x*", "resnet18", "eradio_xxxtiny_8x_ws12"])
    assert names == ["eradio_xxxtiny_8x_ws12", "eradio_xxxtiny_8x_ws16", "resnet18"]


def test_the_circumstances_that_changed_are_named():
    then = {"threads": 2, "versions": {"torch": "2.11"}, "machine": {"gpu": None}, "date": "x"}
    now = {"threads": 1, "versions": {"torch": "2.15"}, "machine": {"gpu": None}, "date": "y"}
    told = " ".join(differences(then, now))
    assert "threads 2 -> 1" in told and "torch 2.11 -> 2.15" in told and "gpu" not in told
    assert differences(now, now) == []


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"rows": [{"size": 3}]}', "\x00\xff"])
def test_a_file_that_is_no_run_is_refused(content, tmp_path):
    (tmp_path / "file.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="no run of"):
        read_run(tmp_path / "file.json")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["bench", "modles"], "there are models, distill"),
        (["bench", "models", "eradio_nan"], "Did you mean"),
        (["bench", "models", "nothing*"], "no model"),
        (["bench", "models", "--modes", "quick"], "no word"),
        (["bench", "models", "--precision", "int4"], "no precision"),
        (["bench", "models", "--device", "tpu"], "no device"),
        (["bench", "models", "eradio_nano,window_size"], "cannot be read"),
        (["bench", "models", "--compare", "NOWHERE"], "NOWHERE"),
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(args, told, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and told in line and "\n" not in line


def test_bench_alone_says_what_it_can_measure(capsys):
    main(["bench"])
    assert "zoo bench models" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--size", "--batch", "--rounds", "--threads"])
def test_a_number_out_of_range_is_refused_by_the_parser(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "models", option, "0"])
    assert stop.value.code == 2
    assert f"{option[2:]} is " in " ".join(capsys.readouterr().err.split())
