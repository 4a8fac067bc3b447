"""Tables for papers and programs, and foreign results beside ours."""

import csv
import json

import pytest

from zoo.cli import main
from zoo.eval.report.imported import read_added
from zoo.eval.results import Record, write


@pytest.fixture
def results(tmp_path):
    out = tmp_path / "r.jsonl"
    for target, shift in (("runs/a_b", 0.0), ("50%|c", 5.0)):
        for seed in range(2):
            model = dict(name="m", size=96, parameters=2_500_000, macs=1.5e9)
            own = dict(benchmark="knn", seed=seed, model=model, data="x/birds", data_hash="d")
            own |= dict(weights_hash=f"{target}{seed}", settings=dict(k=20))
            write(out, Record(target=target, values={"knn/top1": 60 + shift + seed}, **own), {}, {})
    return out


def test_every_number_is_a_row_of_csv_and_json(results, tmp_path, capsys):
    main(["report", str(results), "--out", str(tmp_path / "t.csv")])
    main(["report", str(results), "--out", str(tmp_path / "t.json")])
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    objects = json.loads((tmp_path / "t.json").read_text())
    assert [r["model"] for r in rows] == [o["model"] for o in objects] == ["a_b", "50%|c"]
    first = objects[0]
    assert (first["measure"], first["data"], first["mean"], first["seeds"]) == (
        "knn/top1", "birds", 60.5, 2,
    )  # fmt: skip
    assert first["deviation"] == pytest.approx(0.5**0.5) and first["size"] == 96
    assert float(rows[0]["macs"]) == 1.5e9 and float(rows[1]["mean"]) == 65.5
    assert str(tmp_path / "t.csv") in capsys.readouterr().out


def test_markdown_and_latex_have_the_headlines_and_escape_names(results, tmp_path):
    for name in ("t.md", "t.tex"):
        main(["report", str(results), "--out", str(tmp_path / name)])
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert lines[0].startswith("| model | kNN · birds |") and lines[1].count("---:") == 3
    assert r"50%\|c" in lines[3] and "**65.5 ± 0.7**" in lines[3]
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    latex = (tmp_path / "t.tex").read_text()
    assert r"a\_b & 60.5 $\pm$ 0.7" in latex and r"50\%|c & \textbf{65.5" in latex
    assert latex.count(r"\\") == 3 and r"\bottomrule" in latex


def test_results_of_mmdet_and_mmseg_stand_beside_ours(results, tmp_path):
    boxes = tmp_path / "mask_rcnn" / "20260102_030405"
    boxes.mkdir(parents=True)
    found = {"coco/bbox_mAP": 0.412, "coco/bbox_mAP_50": 0.6, "coco/bbox_mAP_s": -1.0, "x": "y"}
    (boxes / "r.json").write_text(json.dumps(found))
    seg = tmp_path / "upernet" / "vis_data"
    seg.mkdir(parents=True)
    lines = [{"loss": 0.5, "step": 1}, {"mIoU": 43.2, "aAcc": 81.0}, {"loss": 0.1, "step": 2}]
    (seg / "scalars.json").write_text("\n".join(map(json.dumps, lines)))
    one = read_added(f"coco:{boxes / 'r.json'}")
    assert one.model == "mask_rcnn" and one.values == {
        "detect/box/AP": pytest.approx(41.2), "detect/box/AP50": 60.0,
    }  # fmt: skip
    add = ["--add", f"coco:{boxes / 'r.json'}", "--add", f"ade:{seg / 'scalars.json'}"]
    main(["report", str(results), *add, "--out", str(tmp_path / "t.md")])
    table = (tmp_path / "t.md").read_text()
    assert "detection · coco" in table and "segmentation · ade" in table
    assert "| upernet |" in table and "43.2" in table and "60.0" in table
    main(["report", str(results), *add, "--out", str(tmp_path / "all.html")])
    assert "upernet" in (tmp_path / "all.html").read_text("utf-8")


def test_foreign_files_without_a_known_number_are_refused(tmp_path):
    (tmp_path / "r.json").write_text('{"accuracy": 1.0}')
    with pytest.raises(ValueError, match="holds no number of mmdet or mmseg"):
        read_added(f"coco:{tmp_path / 'r.json'}")
    with pytest.raises(ValueError, match="name the data set and the file"):
        read_added(str(tmp_path / "r.json"))
    with pytest.raises(ValueError, match="there is no file"):
        read_added("coco:nowhere.json")
