"""`zoo export` of a run that has not ended, or of its other form: its newest checkpoint."""

from pathlib import Path

from zoo.commands.distill.run import keep_heads
from zoo.data.loader import eval_batches
from zoo.data.sources import spread
from zoo.students.export import export_student
from zoo.students.lora import add_adapters
from zoo.train.checkpoint import State
from zoo.train.config import Training
from zoo.train.distill.calibrate import fit_normalizers
from zoo.train.distill.config import Distill
from zoo.train.distill.fold import folded
from zoo.train.distill.setup import new_student, prepare
from zoo.train.run import Run


def export_checkpoint(path: Path, form: str, out: Path, *, best: bool = False) -> None:
    """Write the student of a distillation's newest checkpoint, as the run's own export is written.

    Args:
        form: `average` of the weights, or `raw`.
        best: That of the best evaluation so far, in place of the newest.

    Raises:
        ValueError: there is no checkpoint yet, or the run keeps no average, or no best one.
    """
    run = Run(path)
    config = run.config(Distill)
    saved = newest_of(run, config, best=best)
    weights = saved["ema"] if form == "average" else saved["model"]
    if weights is None:
        raise ValueError(f"{path} keeps no average of its weights; give --form raw.")
    setup = prepare(config)
    normalizers = fit_normalizers(run, setup)[config.normalise].normalizers
    student = new_student(setup, normalizers)
    if config.optim.lora:
        add_adapters(student, config.optim.lora, config.optim.lora_layers)
    student.load_state_dict(weights)
    released = folded(student, normalizers).eval().as_released()
    keep_heads(released, config)
    batch = next(eval_batches(spread(setup.val, 1), setup.view.size, 1)).to(setup.device)
    licenses = {name: teacher.license for name, teacher in setup.teachers.items()}
    export_student(released, out, batch, about=dict(licenses=licenses))
    print(f"model  {out}  {form} weights after step {saved['step']}")


def newest_of(run: Run, config: Training, *, best: bool = False) -> State:
    """Return a run's newest checkpoint, or the one that it calls the best so far.

    Raises:
        ValueError: there is none.
    """
    saved = run.load()
    if saved is None:
        each = config.every.checkpoint
        raise ValueError(f"{run.path} has no checkpoint yet; one comes every {each} steps.")
    return best_of(run, saved) if best else saved


def best_of(run: Run, newest: State) -> State:
    """Return the checkpoint that the newest one calls the best so far."""
    step, measure = newest.get("best") or (None, None)
    if step is None:
        raise ValueError(
            f"{run.path} keeps no best checkpoint; that is for a run with --keep-best, from its "
            "first evaluation on (--every.evaluate)."
        )
    if (found := run.load(step=step)) is None:
        raise ValueError(
            f"The best checkpoint of {run.path}, of step {step} ({measure:.4g}), is not there: the "
            "run keeps it with --keep-best."
        )
    return found
