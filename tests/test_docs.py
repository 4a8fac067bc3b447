"""What the documentation shows must run."""

import re
from pathlib import Path

import pytest

MODELS = Path(__file__).parent.parent / "docs" / "models.md"


def test_the_table_of_models_has_every_name_and_tag():
    import timm

    import zoo

    text = MODELS.read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)", text, re.MULTILINE))
    ours = [
        n for n in zoo.list_models() if not re.match(r"faster_vit|mamba_vision|eradio(_large|$)", n)
    ]
    assert sorted(n for n in rows if n in zoo.list_models()) == ours
    for name in ours:
        for tagged in timm.list_pretrained(f"{name}.*"):
            assert f"`{tagged.partition('.')[2]}`" in rows[name], tagged


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter and its dependencies warn about themselves
def test_the_code_in_the_page_of_models_runs(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", MODELS.read_text(), re.DOTALL | re.MULTILINE)
    runnable = [block for block in blocks if ".pth.tar" not in block]  # those need official files
    assert len(runnable) == len(blocks) - 1 == 2
    scope = {}
    for block in runnable:
        exec(compile(block, str(MODELS), "exec"), scope)
    assert (tmp_path / "nano.onnx").exists()
