"""The options of `zoo embed`; read without torch."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, Suppress

from zoo.train.ranges import BATCH, PIXELS, WORKERS, between, check_ranges


@dataclass(frozen=True, kw_only=True)
class Embed:
    """What is embedded, by what, and how it is kept."""

    data: Positional[Path]
    """Images: a folder, tar shards or a .npz; parts called train and val are kept apart."""
    out: Positional[Path]
    """The folder to write; an incomplete one is resumed."""
    model: str
    """A run's folder, an exported student's folder, or a registered model."""
    size: Annotated[int | None, PIXELS] = None
    batch: Annotated[int, BATCH] = 64
    workers: Annotated[int, WORKERS] = 0
    """Processes that decode images."""
    precision: Literal["float32", "amp"] = "float32"
    """amp is autocast to bfloat16."""
    rows: Annotated[int, between(1, 10_000_000)] = 10_000
    """Images a shard."""
    half: bool = True
    """Keep float16: half the bytes, and more digits than autocast computes."""
    kind: Literal["auto", "parquet", "npz"] = "auto"
    """Format of the shards; auto is Parquet where pyarrow is installed."""
    bench: bool = False
    """Then measure the model alone, and print which share of its speed the embedding reached."""
    command: Suppress[str | None] = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.kind == "parquet" and find_spec("pyarrow") is None:
            raise ValueError(
                "Parquet needs pyarrow (pip install 'backbone-zoo[parquet]'); --kind npz does not."
            )

    @property
    def form(self) -> Literal["parquet", "npz"]:
        """Resolve `auto`: Parquet where pyarrow is installed."""
        if self.kind != "auto":
            return self.kind
        return "parquet" if find_spec("pyarrow") else "npz"
