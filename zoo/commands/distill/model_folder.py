"""The export of a run with a language model: an ordinary folder of transformers."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.language.bars import bars_for_large
from zoo.language.tokenizers import Tokenizer


def write_model(
    folder: Path, model: Any, tokenizer: Tokenizer, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model whole, with its tokenizer where that has files.

    Args:
        state: Other weights than the model's own, such as those with adapters added.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with bars_for_large(model):
        model.save_pretrained(temporary, state_dict=state)
    if inner := getattr(tokenizer, "inner", None):
        inner.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
