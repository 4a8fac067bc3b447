"""`zoo export` of a distillation of language models: its newest checkpoint, also before its end."""

from pathlib import Path

from zoo.commands.distill.model_folder import write_model
from zoo.commands.export.checkpoint import newest_of
from zoo.language.open import open_language_model, own_tokenizer
from zoo.language.tokenizers import open_tokenizer
from zoo.train.device import in_precision
from zoo.train.distill.token_config import DistillText
from zoo.train.run import Run


def export_text(path: Path, form: str, out: Path, *, best: bool = False) -> None:
    """Write the student of a run's newest checkpoint as a plain folder of transformers.

    One process reads what any number of them wrote together.

    Args:
        form: `average` of the weights, if the run keeps one, or `raw`.
        best: That of the best evaluation so far, in place of the newest.

    Raises:
        ValueError: there is no checkpoint yet, or no best one.
    """
    run = Run(path)
    config = run.config(DistillText)
    saved = newest_of(run, config, best=best)
    average = form == "average" and saved["ema"] is not None
    model = in_precision(open_language_model(config.student), config.precision)
    model.load_state_dict(saved["ema" if average else "model"])
    tokenizer = open_tokenizer(config.tokenizer or own_tokenizer(config.student))
    write_model(out, model, tokenizer)
    print(f"model  {out}  {'average' if average else 'raw'} weights after step {saved['step']}")
