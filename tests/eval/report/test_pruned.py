"""The page of a pruned model."""

import json

import numpy as np
import pytest
from PIL import Image

from zoo.cli import main
from zoo.eval.report.pruned import _share, build_pruned, heat

ABOUT = dict(
    model="vit", to="ffn=0.5,layers=0.5", score="activation", numbers=500,
    before=dict(numbers=1000, sizes={"blocks.0.f": 8, "blocks.10.f": 8, "C": 4},
                layers={"blocks": 4}),
    kept={
        "blocks.10.f": dict(kept=[0, 1, 2, 3], by=[]),
        "blocks.0.f": dict(kept=[4, 5, 6, 7], by=[]),
        "C": dict(kept=[0, 2], by=[]),
    },
    layers={"blocks": [0, 3]},
    scores={"blocks.0.f": [3.0, 1.0], "blocks.10.f": [2.0, 0.5], "C": [1.0]},
    distances=dict(activation=0.25, contribution=0.5),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prune.json").write_text(json.dumps(ABOUT))
    return tmp_path


def test_the_page_has_sizes_strips_and_scores(folder, capsys):
    main(["report", str(folder)])
    assert capsys.readouterr().out.strip().endswith("report.html")
    page = (folder / "report.html").read_text()
    for words in ("50%", "500 of 1,000", "blocks.#.f ×2", "layers of blocks", "as it was cut"):
        assert words in page
    names = {path.stem for path in (folder / "figures").iterdir()}
    assert names == {
        "kept-blocks.-.f", "kept-C", "layers-blocks", "scores-blocks.-.f", "scores-C"
    }  # fmt: skip
    assert "no candidates" not in page


def test_a_trained_model_has_its_recovery_and_a_searched_one_its_candidates(folder):
    (folder / "run").mkdir()
    rows = [dict(kind="eval", step=s, perplexity=p) for s, p in ((0, 90.0), (5, 40.0), (9, 30.0))]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    candidates = [dict(to=f"ffn={i}", cost=dict(params=i), distance=1 / i) for i in (1, 2, 4)]
    candidates[1]["chosen"] = True
    about = ABOUT | dict(
        distilled=dict(steps=9, teachers=["vit"]), search=dict(candidates=candidates)
    )
    (folder / "prune.json").write_text(json.dumps(about))
    page = build_pruned(folder).read_text()
    assert "perplexity from 90.0 to 30.0" in page
    assert "3 candidates by params and distance" in page


def test_a_strip_is_dark_where_units_stayed(tmp_path):
    assert _share([[0, 1], [2, 3]], 4).tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    many = _share(list(range(0, 960, 2)), 960)
    assert len(many) == 96
    assert np.allclose(many, 0.5)
    (tmp_path / "a.png").write_bytes(heat("half", np.array([[1.0, 0.0]]), "units"))
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    middle = pixels[pixels.shape[0] // 2 - 20]
    assert middle[200] < 120
    assert middle[-120] > 230


def test_a_damaged_record_says_which_field(folder):
    (folder / "prune.json").write_text(json.dumps(ABOUT | dict(numbers="many")))
    with pytest.raises(ValueError, match="field numbers"):
        build_pruned(folder)
