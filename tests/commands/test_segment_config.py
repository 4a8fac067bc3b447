"""`zoo segment-config`: what it refuses; docs/mmseg.md, which a test runs, is what it does."""

import pytest

from zoo.cli import main


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("eradio_nano", "empty", "s.yaml"), "a name that ends in .py"),
        (("eradio_nano", "empty", "s.py"), "holds no images with masks"),
        (("eradio_nano", "empty", "s.py", "--layout", "coco"), "there are ade20k"),
        (("eradio_nano", "empty", "s.py", "--options", "frozen"), "key=value"),
    ],
)
def test_wrong_input_ends_with_a_line_that_says_what_is_allowed(words, told, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    words = [str(tmp_path / w) if w in ("empty", "s.py", "s.yaml") else w for w in words]
    with pytest.raises(SystemExit) as stopped:
        main(["segment-config", *words])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "s.py").exists()
