"""A run's folder: what was asked, what was measured, and the checkpoints."""

import importlib.util
import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from zoo.files import read_json, save_whole, try_writing, written_whole
from zoo.train.config import C, Training, differences, to_json
from zoo.train.fields import built
from zoo.train.mesh import by_first, is_first

KEPT = 2
"""Checkpoints that stay: the newest, and the one before it in case that one is damaged."""


M = TypeVar("M", bound=Callable[..., Any])


def by_first_alone(method: M) -> M:
    """Let rank 0 alone carry out a method that writes; on the others it does nothing."""

    @wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs) if is_first() else None

    return cast(M, guarded)


class Run:
    """The folder of one run, which rank 0 alone writes.

    `metrics.jsonl` holds only what a second run repeats exactly; speeds stand in `timing.jsonl`.
    """

    def __init__(self, path: Path):
        self.path = path
        self._board: Any = None  # False where there is no TensorBoard

    @staticmethod
    def refuse_existing(path: Path) -> None:
        """Raise a ValueError if `path` cannot become the folder of a new run."""
        by_first(partial(_refuse_existing, path))

    @classmethod
    def create(cls, config: Training) -> "Run":
        """Make the folder of a new run.

        Raises:
            ValueError: the folder exists, or cannot be made.
        """
        by_first(partial(cls._create, config))
        return cls(config.out)

    @classmethod
    def _create(cls, config: Training) -> None:
        _refuse_existing(config.out)
        try:
            config.out.mkdir(parents=True, exist_ok=True)
            run = cls(config.out)
            run.write_config(config)
        except OSError as error:
            raise ValueError(f"Cannot write to {config.out}: {error.strerror or error}.") from error

    @by_first_alone
    def discard(self) -> None:
        """Remove the folder of a run that was refused before anything was learnt."""
        shutil.rmtree(self.path, ignore_errors=True)

    @classmethod
    def reopen(cls, path: Path, config: Training) -> "Run":
        """Open the folder of an earlier run, to go on with it.

        Raises:
            ValueError: there is no run, or it was started with something else.
        """
        run = cls(path)
        changed = differences(run.config(type(config)), config)
        if changed:
            text = "; ".join(f"{k}: {old} there, {new} here" for k, (old, new) in changed.items())
            raise ValueError(
                f"The run in {path} cannot go on with other settings ({text}). "
                "Resume without them, or start a new run with another --out."
            )
        try_writing(path)
        return run

    @classmethod
    def begin(cls, config: Training) -> "Run":
        """Make the folder of a run, or open it again if it was begun with the same config.

        Raises:
            ValueError: the folder holds something else, or cannot be made.
        """
        begun = (config.out / "config.json").is_file()
        return cls.reopen(config.out, config) if begun else cls.create(config)

    def config(self, kind: type[C]) -> C:
        """Read what the run was started with.

        Raises:
            ValueError: there is no run, or it is one of another task.
        """
        path = self.path / "config.json"
        if not path.is_file():
            raise ValueError(f"There is no run in {self.path}: {path.name} is missing.")
        content = read_json(path)
        found = content.pop("kind", kind.kind)
        if found != kind.kind:
            raise ValueError(
                f"The run in {self.path} is one of {found}, not of {kind.kind}, says {path.name}."
            )
        try:
            return built(kind, content)
        except ValueError as error:
            raise ValueError(f"{path} is not the config of a run: {error}") from error

    def arm(self, name: str) -> "Run":
        """Return the sub-folder of a student that is trained for comparison."""
        path = self.path / "compare" / name
        path.mkdir(parents=True, exist_ok=True)
        return Run(path)

    def write_config(self, config: Training) -> None:
        """Write what the run is started with."""
        self.write_json("config.json", dict(kind=config.kind, **to_json(config)))

    @by_first_alone
    def write_json(self, name: str, content: Any) -> None:
        """Write a small file whole."""
        with written_whole(self.path / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")

    def read_json(self, name: str, kind: Any = dict[str, Any]) -> Any:
        """Read a small file again; `None` if there is none.

        Raises:
            ValueError: its content has another type than `kind`.
        """
        path = self.path / name
        return read_json(path, kind) if path.is_file() else None

    def skipped(self) -> list[str]:
        """Return the names of the samples that could not be read in training."""
        return self.read_json("skipped.json", list[str]) or []

    @by_first_alone
    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append measured values to `metrics.jsonl`, and to TensorBoard where it is installed."""
        self._append("metrics.jsonl", dict(kind=kind, step=step, **values))
        if self._board is None:
            self._board = _open_board(self.path)
        if self._board:
            prefix = f"{kind}/{values['arm']}" if "arm" in values else kind
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{prefix}/{name}", value, step)

    @by_first_alone
    def log_speed(self, step: int, rate: float, seconds: float, *, unit: str = "img") -> None:
        """Append a speed to `timing.jsonl`."""
        values = {"step": step, f"{unit}_s": round(rate, 1), "seconds": round(seconds, 3)}
        self._append("timing.jsonl", values)

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(values) + "\n")

    @by_first_alone
    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Forget the measurements that are not `wanted`: a resumed run makes them again."""
        for name in ("metrics.jsonl", "timing.jsonl"):
            path = self.path / name
            if path.is_file():
                rows = [(line, _row(line)) for line in path.read_text().splitlines()]
                kept = [line for line, row in rows if row is not None and wanted(row)]
                with written_whole(path) as temporary:
                    temporary.write_text("".join(line + "\n" for line in kept))

    def checkpoints(self) -> list[Path]:
        """List the checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step_*.pt"))

    def save(self, state: dict[str, Any]) -> Path:
        """Write a checkpoint whole, then remove the ones that are no longer needed.

        Raises:
            OSError: it could not be written; the checkpoints before it are still there.
        """
        folder = self.path / "checkpoints"
        path = folder / f"step_{state['step']:08d}.pt"
        try:
            folder.mkdir(exist_ok=True)
            save_whole(state, path)
        except OSError as error:
            before = self.checkpoints()
            kept = f"{before[-1]} survives" if before else "there is no earlier one"
            raise OSError(
                f"The checkpoint of step {state['step']} was not saved ({error}); {kept}. "
                f"Make room, then continue with --resume {self.path}."
            ) from error
        for old in self.checkpoints()[:-KEPT]:
            old.unlink()
        return path

    def load(self) -> dict[str, Any] | None:
        """Read the newest checkpoint that is whole; `None` if there is none yet.

        What a save left behind that was killed is removed.

        Raises:
            ValueError: there are checkpoints and all of them are damaged.
        """
        state: dict[str, Any] | None = None

        def newest() -> Path | None:
            nonlocal state
            path, state = self._newest()
            return path

        path = by_first(newest)
        return _read_checkpoint(path) if path and state is None else state

    def _newest(self) -> tuple[Path | None, dict[str, Any] | None]:
        for torn in (self.path / "checkpoints").glob(".step_*.tmp"):
            torn.unlink()
        found = self.checkpoints()
        for path in reversed(found):
            try:
                return path, _read_checkpoint(path)
            except Exception as error:  # what is damaged may raise anything
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                print(f"{path} is damaged ({reason}); trying the one before it.")
        if found:
            raise ValueError(
                f"No checkpoint in {found[0].parent} can be read. Bring one of them back, or start "
                "a new run with another --out."
            )
        return None, None


def _refuse_existing(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"The output folder {path} exists. Give another --out, continue that run with "
            f"--resume {path}, or remove it."
        )
    try_writing(path)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint after its checksums: torch writes one for each tensor and checks none."""
    with zipfile.ZipFile(path) as file:
        if (bad := file.testzip()) is not None:
            raise ValueError(f"the checksum of {bad} is another")
    return torch.load(path, map_location="cpu", weights_only=True)


def _row(line: str) -> dict[str, Any] | None:
    """Return what a line says; `None` if it was not written to its end, or is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _open_board(path: Path):
    """Open TensorBoard's writer, or give False where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return False
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path / "tensorboard"))


def commit() -> str | None:
    """Return the commit of the checkout that this code runs from, if it is one."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
