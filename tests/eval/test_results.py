"""Result files: what is written comes back, and hashes tell one thing from another."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from zoo.eval.registry import Picture, Scores
from zoo.eval.results import Record, check_out, hash_data, hash_weights, latest, read, write


def test_scores_and_pictures_come_back_from_beside_the_file(tmp_path):
    out = tmp_path / "new" / "results.jsonl"
    scores = {
        "segment/miou": Scores(["a", "b"], np.ones((2, 3)), 2 * np.ones((2, 3))),
        "segment/accuracy": Scores(["a", "b"], np.array([1, 0])),
    }
    pictures = {"a/b": Picture(np.zeros((4, 5, 3), np.uint8), "a mask")}
    record = Record(target="runs/x", benchmark="segment", values={"segment/miou": 50.0})
    written = write(out, record, scores, pictures)
    (back,) = read(out)
    assert back.scores().keys() == scores.keys() == written.scores().keys()
    assert back.scores()["segment/miou"].value == 50
    assert back.scores()["segment/accuracy"].keys == ["a", "b"]
    (picture,) = back.pictures
    assert (out.parent / picture["file"]).is_file() and picture["caption"] == "a mask"


def test_numbers_that_json_cannot_hold_are_written_as_none(tmp_path):
    out = tmp_path / "results.jsonl"
    values = {"x": float("nan"), "y": float("inf"), "z": 1.5}
    write(out, Record(target="a", benchmark="b", values=values), {}, {})
    line = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert line["values"] == {"x": None, "y": None, "z": 1.5}


def test_the_later_of_two_measurements_of_one_case_counts():
    older, newer = (Record(target="a", benchmark="knn", values={"x": v}) for v in (1.0, 2.0))
    other = Record(target="b", benchmark="knn", values={"x": 3.0})
    assert [r.values["x"] for r in latest([older, other, newer])] == [2.0, 3.0]


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1),
        dict(weights_hash="other"),
        dict(model=dict(name="m", size=96)),
        dict(precision="amp"),
        dict(settings=dict(k=5)),
        dict(data="b/birds", data_hash="e"),
        dict(features="stored"),
    ],
)
def test_measurements_that_differ_in_anything_are_all_kept(change):
    own = dict(target="a", benchmark="knn", values={"knn/top1": 1.0}, settings=dict(k=20))
    own |= dict(model=dict(name="m", size=224), weights_hash="w", data="a/birds", data_hash="d")
    assert len(latest([Record(**own), Record(**own | change)])) == 2
    assert len(latest([Record(**own), Record(**own | dict(date="later"))])) == 1


def test_settings_that_change_no_number_make_no_other_measurement():
    common = dict(target="a", benchmark="segment", values={})
    two = [Record(**common, settings=dict(crop=64, workers=n, pictures=n)) for n in (0, 4)]
    assert len(latest(two)) == 1 and two[0].case == two[1].case


@pytest.mark.parametrize("text", ["not json\n", "[1]\n", '{"target": "a"}\n', "\n"])
def test_a_file_that_holds_something_else_is_refused(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"x\.jsonl"):
        read(tmp_path / "x.jsonl")


def test_scores_that_were_deleted_are_missed_by_name(tmp_path):
    out = tmp_path / "results.jsonl"
    record = Record(target="a", benchmark="b", values={})
    written = write(out, record, {"x": Scores(["a"], np.ones(1))}, {})
    (tmp_path / str(written.scores_file)).unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        read(out)[0].scores()


def test_a_changed_weight_name_file_size_or_byte_changes_the_hash(tmp_path):
    torch.manual_seed(0)
    one = nn.Linear(2, 2)
    before = hash_weights(one)
    assert before == hash_weights(one)
    with torch.no_grad():
        one.weight[0, 0] += 1e-3
    assert hash_weights(one) != before
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"12")
    hashes = {hash_data(tmp_path)}
    (tmp_path / "a" / "x").write_bytes(b"13")
    hashes.add(hash_data(tmp_path))
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    hashes.add(hash_data(tmp_path))
    (tmp_path / "a" / "y").write_bytes(b"1" * 10_000)
    hashes.add(hash_data(tmp_path))
    (tmp_path / "a" / "index.safetensors").write_bytes(b"places and times of shards: no data")
    hashes.add(hash_data(tmp_path))
    assert len(hashes) == 4


def test_a_line_that_a_kill_has_cut_is_skipped_and_the_next_result_begins_a_line(tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    for seed in range(3):
        write(out, Record(target="a", benchmark="knn", values={"knn/top1": 1.0}, seed=seed), {}, {})
    whole = out.read_text()
    for kept in range(len(whole) - 2, len(whole) - 40, -7):
        out.write_text(whole[:kept])
        check_out(out)
        write(out, Record(target="b", benchmark="knn", values={}), {}, {})
        assert [r.target for r in read(out)] == ["a", "a", "b"]
        assert "Line 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"note": 1}', "benchmark"),
        ('{"target": "a", "benchmark": "knn", "values": {"x": "1"}}', "field values"),
        ('{"target": 3, "benchmark": "knn", "values": {}}', "field target"),
        ("[1]", "another form"),
        ("{" * 100_000, "JSON"),
        ("images", "JSON"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, line, said):
    out = tmp_path / "notes.jsonl"
    out.write_text(line + "\n")
    for look in (read, check_out):
        with pytest.raises(ValueError, match=rf"Line 1 of .*notes\.jsonl is not a result.*{said}"):
            look(out)
    assert out.read_text() == line + "\n"
