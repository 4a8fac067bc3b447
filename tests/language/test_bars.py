"""transformers' bars: none for a small model, in place for a large one and behind the context."""

import pytest
import torch

from zoo.language import bars
from zoo.language.bars import bars_for_large

logging = pytest.importorskip("transformers").utils.logging


@pytest.fixture(autouse=True)
def with_bars():
    logging.enable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.mark.parametrize(("large", "shown"), [(7, True), (9, False)])
def test_a_bar_is_for_as_many_bytes(tmp_path, monkeypatch, large, shown):
    (tmp_path / "model.safetensors").write_bytes(8 * b"x")
    model = torch.nn.Linear(2, 1, bias=False)  # 8 bytes too
    monkeypatch.setattr(bars, "LARGE", large)
    for what in (tmp_path, str(tmp_path), model):
        with bars_for_large(what):
            assert logging.is_progress_bar_enabled() is shown
        assert logging.is_progress_bar_enabled()


def test_a_name_of_the_hub_keeps_them_and_so_does_who_wants_none(tmp_path):
    with bars_for_large("org/model"):
        assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    with pytest.raises(KeyError), bars_for_large(tmp_path):
        raise KeyError
    assert not logging.is_progress_bar_enabled()
