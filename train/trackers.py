"""Where the numbers of a run are shown besides its own files: TensorBoard, W&B, MLflow, trackio.

Each is opened only where its package is installed and, but for TensorBoard, asked for. They are
told what `metrics.jsonl` holds, under the same names, so that no number exists there alone.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from zoo.files import written_whole

Name = Literal["wandb", "mlflow", "trackio"]
PROJECT = "zoo"
MLFLOW_RUN = "mlflow-run.txt"


class Tracker(Protocol):
    """One place that shows numbers."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/` of the run's folder."""

    def __init__(self, path: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(path / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases. Offline, in `wandb/` of the run's folder, unless `WANDB_MODE` says more;
    `wandb sync` sends it later."""

    def __init__(self, path: Path, config: Mapping[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=path.name,
            dir=str(path),
            config=dict(config),
            reinit="create_new",
            mode=os.environ.get("WANDB_MODE", "offline"),  # pyright: ignore[reportArgumentType]
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})  # its own step only rises; ours goes back on resume

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow. A local store in `mlruns/` of the run's folder, unless `MLFLOW_TRACKING_URI` names
    another place.

    The id of its run is kept in `mlflow-run.txt`, so that a run that is resumed goes on in it.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]):
        # the newest versions ask for this before they write a store of files
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        uri = os.environ.get("MLFLOW_TRACKING_URI", (path / "mlruns").absolute().as_uri())
        self._client: Any = MlflowClient(tracking_uri=uri)
        kept = path / MLFLOW_RUN
        self._id = self._resumed(kept) or self._new(kept, config)

    def _resumed(self, kept: Path) -> str | None:
        """Open the run again that this folder had; `None` if the store has no such."""
        from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]

        if not kept.is_file():
            return None
        known = kept.read_text().strip()
        try:
            self._client.update_run(known, status="RUNNING")
        except MlflowException:  # another store than before, or the run was deleted there
            return None
        return known

    def _new(self, kept: Path, config: Mapping[str, Any]) -> str:
        """Begin a run; its parameters are those of the start, as MLflow lets none be changed."""
        known = self._client.get_experiment_by_name(PROJECT)
        experiment = known.experiment_id if known else self._client.create_experiment(PROJECT)
        made = self._client.create_run(experiment, run_name=kept.parent.name).info.run_id
        for name, value in config.items():
            self._client.log_param(made, name, str(value)[:500])
        with written_whole(kept) as temporary:
            temporary.write_text(f"{made}\n")
        return made

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """trackio: a database in `TRACKIO_DIR`, by default in the user's cache; `trackio show`."""

    def __init__(self, path: Path, config: Mapping[str, Any]):
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio: Any = trackio
        self._open = True
        trackio.init(project=PROJECT, name=path.name, config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        if self._open:  # finishing twice is an error there
            self._open = False
            self._trackio.finish()


KINDS: Mapping[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not known or not installed, before any work.

    Raises:
        ValueError: there is one.
    """
    for name in names:
        if name not in KINDS:
            raise ValueError(
                f"There is no tracker {name!r}; there are {', '.join(get_args(Name))}."
            )
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"The tracker {name} is not installed: pip install {name}.")


def open_trackers(
    path: Path, names: Sequence[str], config: Mapping[str, Any], *, board: bool = True
) -> list[Tracker]:
    """Open trackers for a run's folder.

    Args:
        board: Open TensorBoard too, where it is installed; evaluations, which do not, are not
            resumed, so each is a run of its own.
    """
    found: list[Tracker] = []
    if not board:
        (path / MLFLOW_RUN).unlink(missing_ok=True)
    if board and importlib.util.find_spec("tensorboard") is not None:
        found.append(TensorBoard(path))
    return found + [KINDS[name](path, config) for name in names]
