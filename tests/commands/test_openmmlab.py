"""`zoo detect-config`: what it refuses; docs/mmdet.md, which a test runs, is what it does."""

import pytest

from zoo.cli import main
from zoo.students.build import read_pairs


def test_values_are_read_as_python_writes_them():
    texts = ("frozen_stages=2", "img_size=(800,1344)", 'options={"mask_padding":True}', "a.b=name")
    assert read_pairs(texts) == {
        "frozen_stages": 2,
        "img_size": (800, 1344),
        "options": {"mask_padding": True},
        "a.b": "name",
    }


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("yolo", "eradio_nano", "coco", "d.py"), "there are mask-rcnn"),
        (("dino", "eradio_nano", "coco", "d.yaml"), "a name that ends in .py"),
        (("dino", "eradio_nano", "coco", "d.py"), "instances_train"),
        (("dino", "eradio_nano", "coco", "d.py", "--options", "frozen"), "key=value"),
    ],
)
def test_wrong_input_ends_with_a_line_that_says_what_is_allowed(words, told, tmp_path, capsys):
    (tmp_path / "coco").mkdir()
    words = [str(tmp_path / w) if w in ("coco", "d.py", "d.yaml") else w for w in words]
    with pytest.raises(SystemExit) as stopped:
        main(["detect-config", *words])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "d.py").exists()
