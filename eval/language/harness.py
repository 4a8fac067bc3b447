"""Tasks of lm-eval, by an adapter: its files and data come from a folder, so no network is needed.

A task's YAML says where its questions lie. For files on this machine:

    task: capitals
    dataset_path: json
    dataset_kwargs: {data_files: /data/tasks/capitals.jsonl}
    test_split: train
    output_type: multiple_choice
    doc_to_text: "The capital of {{country}} is"
    doc_to_target: right
    doc_to_choice: "{{choices}}"
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
from transformers import StoppingCriteria, StoppingCriteriaList

from zoo.eval.language.subject import Continuation, TextSubject, score_continuations
from zoo.eval.registry import Found, Scores
from zoo.eval.settings import LmEvalSettings

SHARES = ("acc", "acc_norm", "exact_match", "em", "f1")
"""Metrics that are shares of 1; they are shown in per cent."""
LONGEST = 2048
"""Tokens of context where a model has no positions that would end it."""
GENERATED = 256
"""Tokens that are generated at most, unless a task says otherwise."""


def lmeval(subject: TextSubject, data: Path, settings: LmEvalSettings) -> Iterator[Found]:
    """Yield `lmeval/TASK/METRIC` of each task, shares in per cent.

    Raises:
        ValueError: the folder holds no task, or not the one that is asked for.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = TaskManager(include_path=str(data), include_defaults=False)
    tasks = settings.tasks or tuple(sorted(manager.all_subtasks))
    if not tasks:
        raise ValueError(f"There is no task of lm-eval in {data}: give a folder of its YAML files.")
    if missing := [task for task in tasks if task not in manager.all_tasks]:
        known = ", ".join(sorted(manager.all_tasks))
        raise ValueError(f"There is no task {missing[0]!r} in {data}; there are {known or 'none'}.")
    found = lm_eval.simple_evaluate(
        model=Adapter(subject),
        tasks=list(tasks),
        num_fewshot=settings.shots,
        limit=settings.limit,
        bootstrap_iters=0,
        task_manager=manager,
        random_seed=subject.seed,
        numpy_random_seed=subject.seed,
        torch_random_seed=subject.seed,
        fewshot_random_seed=subject.seed,
    )
    assert found is not None, "other ranks than the first have none, and this is one process"
    yield "lmeval/mean", float(np.mean(_headlines(found["results"])))
    for task, values in found["results"].items():
        samples = found.get("samples", {}).get(task, ())
        for name, value in values.items():
            metric, _, _ = name.partition(",")
            if isinstance(value, int | float) and "," in name and "stderr" not in metric:
                yield f"lmeval/{task}/{metric}", _scored(task, metric, value, samples)


def _headlines(results: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """Return the first share of each task, in per cent."""
    first = []
    for values in results.values():
        names = {name.partition(",")[0]: value for name, value in values.items() if "," in name}
        shares = [100 * names[metric] for metric in SHARES if metric in names]
        first += shares[:1]
    return first or [float("nan")]


def _scored(task: str, metric: str, value: float, samples: Sequence[Mapping]) -> float | Scores:
    """Return each question's part in a share, where lm-eval took the mean over questions."""
    if metric not in SHARES:
        return value
    parts = np.array([float(sample[metric]) for sample in samples if metric in sample])
    if not len(parts) or abs(parts.mean() - value) > 1e-9:
        return 100 * value
    return Scores([f"{task}/{sample['doc_id']}" for sample in samples], parts)


class Adapter(TemplateLM):
    """A language model as lm-eval asks it: log-likelihoods, and greedy continuations."""

    def __init__(self, subject: TextSubject):
        super().__init__()
        self.subject = subject
        positions = getattr(subject.model.config, "max_position_embeddings", None)
        self.longest: int = positions or LONGEST

    @property
    def eot_token_id(self) -> int:
        return self.subject.tokenizer.end

    @property
    def prefix_token_id(self) -> int:
        begin = self.subject.tokenizer.begin
        return self.eot_token_id if begin is None else begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        ids, begin = self.subject.tokenizer.encode(string), self.subject.tokenizer.begin
        return ids if begin is None or add_special_tokens is False else [begin, *ids]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(Continuation(given, wanted)) for _, given, wanted in requests]
        scored = score_continuations(self.subject, pairs)
        return [(-one.nll.double().sum().item(), bool(one.chosen.all())) for one in scored]

    def _cut(self, pair: Continuation) -> Continuation:
        """Leave out the beginning of what is longer than the model has positions."""
        wanted = pair.wanted[-(self.longest - 1) :]
        return Continuation(pair.given[-(self.longest - len(wanted)) :], wanted)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in windows of the model's length that do not overlap."""
        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text, False), self.prefix_token_id, self.longest - 1, 1
            )
            pairs = [Continuation(*make_disjoint_window(window)) for window in windows]
            scored = score_continuations(self.subject, pairs)
            found.append(-sum(one.nll.double().sum().item() for one in scored))
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return [self._continued(*request.args) for request in requests]

    @torch.no_grad()
    def _continued(self, text: str, asked: Mapping[str, Any]) -> str:
        """Continue a text until one of `until` appears, or `max_gen_toks` tokens are there."""
        tokenizer, model = self.subject.tokenizer, self.subject.model
        stops = asked.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        most = int(asked.get("max_gen_toks", GENERATED))
        given = self.tok_encode(text)[-max(1, self.longest - most) :]
        ids = torch.tensor([given], device=self.subject.device)

        def written(row: torch.Tensor) -> str:
            return tokenizer.decode(row[len(given) :].tolist())

        class Stop(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                over = [any(stop in written(row) for stop in stops) for row in input_ids]
                return torch.tensor(over, device=input_ids.device)

        sampling = {
            key: asked[key]
            for key in ("temperature", "top_p", "top_k")
            if asked.get("do_sample") and key in asked
        }
        with self.subject.autocast():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=most,
                do_sample=bool(asked.get("do_sample")),
                eos_token_id=tokenizer.end,
                pad_token_id=tokenizer.end,
                stopping_criteria=StoppingCriteriaList([Stop()]),
                **sampling,
            )
        answer = written(out[0])
        for stop in stops:
            answer = answer.partition(stop)[0]
        return answer
