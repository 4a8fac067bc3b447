"""A run's folder: what was asked, what was measured, and the checkpoints."""

import atexit
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from zoo.files import read_json, try_writing, written_whole
from zoo.train.checkpoint import (
    Like,
    Saver,
    State,
    after_failure,
    checkpoints,
    damage,
    name_of,
    of_file,
    read_checkpoint,
    remove,
)
from zoo.train.config import C, Training, differences, to_json
from zoo.train.fields import built
from zoo.train.mesh import by_first, is_first, launch
from zoo.train.trackers import Tracker, check_trackers, open_trackers

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
        self._trackers: list[Tracker] | None = None
        self._saver = Saver(path / "checkpoints")
        self._damaged: list[Path] = []

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
        check_trackers(config.track)
        try:
            config.out.mkdir(parents=True, exist_ok=True)
            run = cls(config.out)
            run.write_config(config)
        except OSError as error:
            raise ValueError(f"Cannot write to {config.out}: {error.strerror or error}.") from error

    @contextmanager
    def discarded(
        self, *, unless: Callable[[], Any], on: tuple[type[Exception], ...] = (ValueError,)
    ) -> Iterator[None]:
        """Within this context, an error removes the folder: nothing has been learnt yet.

        It would be in the way of the command that is right.

        Args:
            unless: Asked after an error: whether the folder is worth keeping.
            on: The errors that refuse a run.
        """
        try:
            yield
        except on:
            if is_first() and not unless():  # no collective: the error may be of one rank alone
                shutil.rmtree(self.path, ignore_errors=True)
            raise

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
        content.pop("launch", None)
        found = content.pop("kind", kind.kind)
        if found != kind.kind:
            raise ValueError(
                f"The run in {self.path} is one of {found}, not of {kind.kind}, says {path.name}."
            )
        try:
            return built(kind, dict(kind.before) | content)
        except ValueError as error:
            raise ValueError(f"{path} is not the config of a run: {error}") from error

    def arm(self, name: str) -> "Run":
        """Return the sub-folder of a student that is trained for comparison."""
        path = self.path / "compare" / name
        path.mkdir(parents=True, exist_ok=True)
        return Run(path)

    def write_config(self, config: Training) -> None:
        """Write what the run is started with, and which launch of torchrun starts it."""
        began = {} if launch() is None else dict(launch=launch())
        self.write_json("config.json", dict(kind=config.kind, **began, **to_json(config)))

    def launch(self) -> str:
        """Return which launch of torchrun began the run; "" if none did."""
        return (self.read_json("config.json") or {}).get("launch", "")

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
        """Append measured values to `metrics.jsonl`, and tell the trackers (TensorBoard, ...)."""
        self._append("metrics.jsonl", dict(kind=kind, step=step, **values))
        if self._trackers is None:
            self._trackers = self._open_trackers()
        prefix = f"{kind}/{values['arm']}" if "arm" in values else kind
        numbers = {f"{prefix}/{n}": x for n, x in values.items() if isinstance(x, (int, float))}
        for tracker in self._trackers:
            tracker.log(numbers, step)

    def _open_trackers(self) -> list[Tracker]:
        config = self.read_json("config.json") or {}
        found = open_trackers(self.path, config.get("track") or (), config)
        for tracker in found:
            atexit.register(tracker.close)  # a run that is stopped is closed as well
        return found

    @by_first_alone
    def log_speed(
        self,
        step: int,
        rate: float,
        seconds: float,
        *,
        unit: str = "img",
        late: Mapping[str, object] | None = None,
    ) -> None:
        """Append a speed to `timing.jsonl`.

        Args:
            late: What is known of ranks that keep others waiting; see `zoo.train.skew`.
        """
        values = {"step": step, f"{unit}_s": round(rate, 1), "seconds": round(seconds, 3)}
        self._append("timing.jsonl", values | dict(late or {}))

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        try:
            with (self.path / name).open("a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            left = after_failure(self.path / "checkpoints")
            raise OSError(f"{name} was not written ({error}); {left}") from None

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
        return checkpoints(self.path / "checkpoints")

    def save(self, state: State, *, wait: bool = True, kept: int = 2) -> None:
        """Write a checkpoint whole, then remove those that are no longer needed.

        Every rank calls this.

        Args:
            kept: The newest that stay, beside the state's `best`.
            wait: Else the state is copied, and written while training goes on.

        Raises:
            OSError: it could not be written, or the one before it; earlier ones are still there.
        """
        self._saver.begin(state, kept=kept)
        if wait:
            self.wait()

    def prepare(self, state: State) -> None:
        """Reserve what copying such a state takes, beside training."""
        self._saver.prepare(state)

    def hold(self) -> None:
        """Let a GPU wait, before it changes the state, until what is being saved is copied."""
        self._saver.hold()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written; raises as `save`. Every rank calls."""
        self._saver.wait()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Wait in the end for the checkpoint that is being written; raises as `save`."""
        try:
            yield
        finally:
            self.wait()

    def lost(self) -> bool:
        """Tell whether the checkpoint that was being written is known to be lost."""
        return self._saver.failed()

    def load(self, like: Like | None = None, *, step: int | None = None) -> State | None:
        """Read the newest checkpoint that is whole; `None` if there is none yet.

        Every rank calls this.

        Args:
            like: Gives the tensors that are sharded, by name.
            step: The only one that is asked for; by default any.

        Raises:
            ValueError: there are checkpoints and all of them are damaged.
        """
        found = by_first(self.checkpoints)
        if step is not None:
            found = [path for path in found if path.name == name_of(step)]
        for path in reversed(found):
            wrong = damage(path) if path.suffix != ".pt" else ""
            if wrong:
                self._damaged.append(path)
            else:
                try:
                    return of_file(path) if path.suffix == ".pt" else read_checkpoint(path, like)
                except Exception as error:  # what is damaged may raise anything
                    wrong = (str(error).splitlines() or [type(error).__name__])[0]
            if is_first():
                print(f"{path} is damaged ({wrong}); trying the one before it.")
        if found:
            raise ValueError(
                f"No checkpoint in {found[0].parent} can be read. Bring one of them back, or start "
                "a new run with another --out."
            )
        return None

    @by_first_alone
    def sweep(self) -> None:
        """Remove what a killed save left behind, and what `load` found to have another checksum.

        That would count as one of the newest. Only who trains on may do this.
        """
        for torn in (*self._damaged, *(self.path / "checkpoints").glob(".step_*.tmp")):
            remove(torn)
        self._damaged.clear()


def _refuse_existing(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"The output folder {path} exists. Give another --out, continue that run with "
            f"--resume {path}, or remove it."
        )
    try_writing(path)


def _row(line: str) -> dict[str, Any] | None:
    """Return what a line says; `None` if it was not written to its end, or is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def commit() -> str | None:
    """Return the commit of the checkout that this code runs from, if it is one."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
