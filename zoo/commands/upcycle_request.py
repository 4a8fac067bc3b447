"""What `zoo upcycle` can be asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from zoo.language.upcycling import Upcycling


@dataclass(frozen=True, kw_only=True)
class Upcycle:
    model: tyro.conf.Positional[str]
    """lm:FOLDER of transformers' files, or a name on the Hub: llama, mistral, qwen3, nemotron_h."""
    how: Annotated[Upcycling, tyro.conf.arg(name="")]
    dense: bool = False
    """The way back: write the dense model that is inside a mixture made by this command."""
    copy: int = 0
    """With --dense: which of the E copies of each MLP is kept."""
    seed: int = 0
    """Of the routers' rows."""
    out: Path | None = None
    """Folder for the model; it must not exist yet."""
    dry_run: bool = False
    """Print what would be made (class, parameters, bytes); read no weights, write nothing."""
