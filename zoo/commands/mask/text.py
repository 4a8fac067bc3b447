"""A language model as `zoo mask` thins it: opened, measured, shown a text, written."""

from pathlib import Path
from typing import Any

from zoo.commands.distill.text import evaluated, export, prepare
from zoo.data.text import TextFeed
from zoo.data.text_mixture import plan_of_rows
from zoo.language.open import open_language_model
from zoo.language.tokens import read_tokens
from zoo.train.device import autocast
from zoo.train.distill.mask_config import Mask
from zoo.train.distill.token_task import TokenTask
from zoo.train.masks import Lesson
from zoo.train.mesh import slices_of_rank
from zoo.train.run import Run


class TextModel:
    """A causal language model of transformers, and the text of a run.

    Raises:
        ValueError: as `zoo.commands.distill.text.prepare`.
    """

    def __init__(self, config: Mask):
        self.config, self.setup = config, prepare(config)
        self.model: Any = self.setup.student

    def opened(self, place: str) -> Any:
        """Open a run of the same model, or a folder."""
        run = Path(place.removeprefix("lm:"))
        folder = run / "export" if (run / "export").is_dir() else run
        if not (folder / "config.json").is_file():
            raise ValueError(f"There is no run of zoo mask and no folder of transformers in {run}.")
        return open_language_model(str(folder), device=self.setup.device)

    def measured(self) -> dict[str, float]:
        """Measure the model on held-out rows."""
        return evaluated(self.setup, self.model)

    def show(self) -> None:
        """Show the model its calibration rows."""
        config, setup = self.config, self.setup
        rows = setup.train.sample(config.calibration)
        self.model.eval()
        with autocast(config.precision, setup.device):
            for start in range(0, len(rows), config.batch):
                tokens = setup.train.rows(rows[start : start + config.batch])
                read_tokens(self.model, tokens.to(setup.device))

    def lesson(self, run: Run) -> Lesson:
        """Return what masks are learnt by: the text, teachers' next tokens, or both."""
        config, setup = self.config, self.setup
        plan = plan_of_rows(setup.train, config.batch, config.seed)
        slices = slices_of_rank(config.num_slices)
        feed = TextFeed(setup.train, plan, setup.device, config.num_slices, slices)
        return Lesson(
            TokenTask(config.losses, setup.teachers, specs=setup.specs), feed, self.model, {}
        )

    def export(self, run: Run) -> None:
        """Write an ordinary folder of transformers."""
        export(run, self.setup, self.model)
