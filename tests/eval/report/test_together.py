"""One page about runs of every kind: detection, distillation, pruning, mmdet, mmseg, results."""

import json
import re

from tests.eval.report.test_joined import fill, make_run, section
from tests.eval.report.test_pruned import ABOUT
from zoo.cli import main
from zoo.eval.report.gathered import Measure, gather


def pruned(folder):
    (folder / "run").mkdir(parents=True)
    (folder / "prune.json").write_text(json.dumps(ABOUT | dict(distilled=dict(steps=9))))
    rows = [dict(kind="eval", step=s, **{"fidelity/vit": f}) for s, f in ((0, 1.5), (9, 4.5))]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "run" / "config.json").write_text(json.dumps(dict(student="vit", data="x")))


def detector(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(kind="detect", backbone="resnet18")))
    (folder / "metrics.jsonl").write_text(json.dumps(dict(kind="train", step=1, loss=1.0)) + "\n")
    (folder / "results.json").write_text(json.dumps({"detect/box/AP50": 11.5}))


def test_runs_of_every_kind_stand_on_one_page(tmp_path, capsys):
    pruned(tmp_path / "half")
    detector(tmp_path / "boxes")
    make_run(tmp_path / "student")
    fill(tmp_path / "r.jsonl", "resnet50", 0.5, 1)
    added = {"coco:mask_rcnn": {"coco/bbox_mAP_50": 0.412}, "ade:upernet": {"mIoU": 43.2}}
    words = [str(tmp_path / name) for name in ("half", "boxes", "student", "r.jsonl")]
    for name, content in added.items():
        file = tmp_path / name.partition(":")[2] / "x.json"
        file.parent.mkdir()
        file.write_text(json.dumps(content))
        words += ["--add", f"{name.partition(':')[0]}:{file}"]
    main(["report", *words, "--out", str(tmp_path / "all.html")])
    page = (tmp_path / "all.html").read_text()
    head = section(page, "headline")
    rows = dict(re.findall(r'<th scope="row">([^<]*)</th>(.*?)</tr>', head, re.S))
    assert set(rows) >= {"half", "boxes", "student", "resnet50", "mask_rcnn", "upernet"}
    for name, value in (("boxes", "11.5"), ("mask_rcnn", "41.2"), ("upernet", "43.2")):
        assert f">{value}<" in rows[name]
    assert ">61.0<" in rows["student"] and ">30.0<" in rows["resnet50"]  # kNN, mIoU
    numbers = section(page, "numbers")
    assert ">50.0<" in numbers and ">4.50<" in numbers and "prune/distance/activation" in numbers
    main(["report", *words, "--out", str(tmp_path / "all.csv")])
    assert "half,prune/kept,,,50.0" in (tmp_path / "all.csv").read_text()


def test_a_pruned_model_is_one_with_the_results_of_its_folder(tmp_path):
    pruned(tmp_path / "half")
    fill(tmp_path / "r.jsonl", str(tmp_path / "half"), 0.5, 1)
    (model,), _ = gather([tmp_path / "half", tmp_path / "r.jsonl"])
    values = model.values
    assert values[Measure("prune/kept", "")] == 50 and values[Measure("knn/top1", "birds")] > 40
    assert values[Measure("fidelity/vit", "x")] == 4.5
