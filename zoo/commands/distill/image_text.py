"""`zoo distill --image-text`: a model of images and text, from its config to its export."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.commands.distill.model_folder import write_model
from zoo.data.conversations import open_conversations, open_part
from zoo.data.image_text import Change, ImageTextFeed, ImageTextSource
from zoo.data.plan import Plan
from zoo.eval.multimodal.answers import (
    BLIND,
    SHUFFLED,
    SIGHT,
    Answered,
    answer_all,
    from_question_alone,
)
from zoo.eval.report.questions import show_questions
from zoo.language.any_length import any_length
from zoo.language.open import check_tokenizer, open_language_model, own_tokenizer
from zoo.language.tokenizers import BYTES, Tokenizer, has_tokenizer, open_tokenizer
from zoo.multimodal.image_text import ImageText
from zoo.multimodal.open import (
    build_llava,
    mixture_tower,
    open_tower,
    open_vlm,
    pixels_of,
    replace_tower,
    tower_of,
    vlm_folder,
)
from zoo.multimodal.towers import Tower, UnitVariance
from zoo.students.build import read_options
from zoo.students.lora import add_language_adapters
from zoo.students.student import merged
from zoo.teachers.open import open_teacher
from zoo.train.config import to_json
from zoo.train.device import autocast, device_of, in_precision, machine, workers_of
from zoo.train.distill.image_text_config import DistillImageText, vision_spec
from zoo.train.distill.image_text_task import (
    ImageTextTask,
    fit_features,
    fit_tower,
    parameter_groups,
    summary_part,
)
from zoo.train.distill.map_teacher import MapTeacher
from zoo.train.distill.phi_s import Normalizer
from zoo.train.freeze import freeze
from zoo.train.loop import train
from zoo.train.mesh import MORE_PATIENCE, by_first, first_goes_first, slices_of_rank, with_slices
from zoo.train.run import Run, commit
from zoo.train.state import TrainState

FITTED = 8
"""Batches that a tower's features are brought to variance 1 on."""


@dataclass
class ImageTextSetup:
    """What a run is made of."""

    config: DistillImageText
    device: torch.device
    tokenizer: Tokenizer
    model: Any
    """transformers' Llava."""
    teachers: Mapping[str, Any]
    train: ImageTextSource
    val: ImageTextSource
    """One question a conversation."""
    fits: bool
    """The tower is new, so its affine map is to be fitted."""


# ---------------------------------------------------------------- opening


def prepare(config: DistillImageText, *, meta: bool = False) -> ImageTextSetup:
    """Open everything that a run needs, and hold it against each other.

    Args:
        meta: Leave the language model's weights out, for a plan.

    Raises:
        ValueError: something is not there, or does not fit.
    """
    check_complete(config)
    device = torch.device("cpu") if meta else device_of(config.device)
    train_part, val_part = open_conversations(config.data, config.held_out)
    if config.val:
        val_part = open_part(config.val)
    torch.manual_seed(config.seed)
    tokenizer = open_tokenizer(config.tokenizer or _own_tokenizer(config))
    model, fits = open_model(config, tokenizer, meta=meta)
    if config.optim.lora:
        inner = model.model.language_model
        add_language_adapters(inner, config.optim.lora, config.optim.lora_layers)
    teachers = {
        label: in_precision(_teacher(name, model, tokenizer, device, meta), config.precision)
        for label, name in zip(config.labels, config.teachers, strict=True)
    }
    if not meta:
        model = in_precision(model.to(device), config.precision)
    length = _length(config, model)
    shared = (tokenizer, model.config.image_token_id, pixels_of(model), length)
    learnt = ImageTextSource(train_part, *shared)
    asked = ImageTextSource(val_part.turn_by_turn(), *shared)
    if left_out := len(train_part) - len(learnt):
        print(f"{left_out} conversations of more than {length} tokens are left out.")
    return ImageTextSetup(config, device, tokenizer, model, teachers, learnt, asked, fits)


def check_complete(config: DistillImageText) -> None:
    """Refuse a run that lacks a part.

    Raises:
        ValueError: it has no data, no tower, or no language model, or the latter twice.
    """
    given = dict(tower=config.tower or config.start, language=config.language or config.start)
    for option, value in (dict(data=config.data) | given).items():
        if not value:
            shown = "image-text" if option == "data" else option
            raise ValueError(f"--{shown} is missing; see zoo distill --image-text --help.")
    if config.start and config.language:
        raise ValueError(
            f"--start {config.start} has a language model already; leave out --language "
            f"{config.language}."
        )


def _own_tokenizer(config: DistillImageText) -> str:
    if config.start is None:
        return own_tokenizer(config.language)
    folder = vlm_folder(str(config.start))
    return str(folder) if has_tokenizer(folder) else BYTES


def open_model(
    config: DistillImageText, tokenizer: Tokenizer, *, meta: bool = False
) -> tuple[Any, bool]:
    """Return the Llava that a config describes, and whether its tower is a new one.

    Raises:
        ValueError: a part is not there, or they do not fit.
    """
    tower = _tower(config) if config.tower else None
    balances = tower.balances if tower is not None else ()
    # a projector that is trained knows its tower as it is
    fits = not config.start and any(isinstance(each, UnitVariance) for each in balances)
    if config.start:
        model = open_vlm(str(config.start))
        if tower is not None:
            replace_tower(model, tower)
        return model, fits
    assert tower is not None  # `check_complete`
    language = open_language_model(config.language, device="meta" if meta else "cpu")
    check_tokenizer(language, tokenizer, config.language)
    return build_llava(tower, language, image_token=tokenizer.size), fits


def _tower(config: DistillImageText) -> Tower:
    balanced = config.normalizer == "phi_s"
    shared: dict[str, Any] = dict(native=config.native, max_tokens=config.tokens)
    if len(config.tower) == 1:
        return open_tower(
            config.tower[0], size=config.size, stride=config.stride, shuffle=config.shuffle,
            balanced=balanced, options=read_options(config.tower_options), **shared,
        )  # fmt: skip
    # an encoder of a mixture has a grid of its own; the budget is that of the common one
    each = [
        open_tower(
            name, size=config.size, native=config.native, max_tokens=2**20, balanced=balanced
        )
        for name in config.tower
    ]
    size = config.size or each[0].config.size
    stride = config.stride or each[0].config.stride * size // each[0].config.size
    return mixture_tower(each, size=size, stride=stride, shuffle=config.shuffle, **shared)


def _teacher(name: str, model: Any, tokenizer: Tokenizer, device: torch.device, meta: bool) -> Any:
    """Open a frozen model that answers the same rows, or one that sees the same images.

    Raises:
        ValueError: it has another tokenizer, another vocabulary, or another number of tokens; or
            there is no such teacher of vision, or it has no map.
    """
    if spec := vision_spec(name):
        teacher = open_teacher(spec.name, device="meta" if meta else device)
        return MapTeacher(teacher, spec, pixels_of(model).patch_size)
    teacher = open_vlm(name, device=device)
    folder = vlm_folder(name)
    own = open_tokenizer(str(folder) if has_tokenizer(folder) else BYTES)
    rows = [m.get_output_embeddings().weight.shape[0] for m in (teacher, model)]
    if own.digest != tokenizer.digest or rows[0] != rows[1]:
        raise ValueError(
            f"{name} has another tokenizer than the run, or {rows[0]} rows to {rows[1]}."
        )
    ours, theirs = tower_of(model).config, tower_of(teacher).config
    for side in (ours.size, 2 * ours.size):
        size = ours.fitted(side, side)
        if size[0] // theirs.patch_size != size[0] // ours.patch_size:
            raise ValueError(
                f"{name} makes a token of {theirs.patch_size} px along each side and this run of "
                f"{ours.patch_size}; only models of one grid can be compared."
            )
    return teacher.requires_grad_(False)


def _length(config: DistillImageText, model: Any) -> int:
    positions = getattr(model.config.text_config, "max_position_embeddings", None)
    return min(config.length, positions or config.length)


# ---------------------------------------------------------------- running


def distill_image_text(config: DistillImageText, *, resume: bool = False) -> Run:
    """Run a training of a model of images and text to its export and report.

    Raises:
        ValueError: something that the config names is wrong, a run cannot be resumed, or a loss
            stopped being finite. Nothing has been written unless training had begun.
        Interrupted: a signal came; the run can be resumed.
    """
    config = with_slices(config)
    if not resume:
        Run.refuse_existing(config.out)
    with first_goes_first():
        setup = prepare(config)
    run = Run.reopen(config.out, config) if resume else Run.create(config)
    began = time.perf_counter()
    with run.discarded(unless=lambda: resume):
        if setup.fits and not resume:
            _fit(setup)
        task, parts = build_task(setup)
        state = _state(setup, parts)
        state.resume(run)
    evaluate = partial(_log_evaluation, run, setup)
    with any_length():  # a batch is as wide as its longest conversation
        if not resume:
            evaluate(state.averaged, 0)
        train(
            task, state, build_feed(setup), config, run, evaluate=evaluate, title="images and text"
        )
        run.keep(lambda row: row.get("kind", "train") == "train" or row["step"] < config.steps)
        by_first(partial(finish, run, setup, state.averaged, began), patience=MORE_PATIENCE)
    return run


def _first_batches(setup: ImageTextSetup) -> list[ImageText]:
    config = setup.config
    plan, size = Plan(len(setup.train), config.batch, config.seed), config.batch
    batches = range(min(FITTED, -(-len(setup.train) // size)))
    return [setup.train.rows(plan.indices(step)).to(setup.device) for step in batches]


def _fit(setup: ImageTextSetup) -> None:
    """Bring a new tower's features to variance 1."""
    tower = tower_of(setup.model).eval()
    with autocast(setup.config.precision, setup.device):
        tower.standardise(fit_tower(tower, _first_batches(setup)))


def build_task(setup: ImageTextSetup) -> tuple[ImageTextTask, dict[str, nn.Module]]:
    """Return the task, and what learns beside the model."""
    config = setup.config
    if not config.vision:
        return ImageTextTask(config, setup.teachers), {}
    batches = _first_batches(setup)
    normalizers, widths = dict[str, Normalizer](), dict[str, int]()
    for label, model in setup.teachers.items():
        normalizer, summary = fit_features(model, batches)
        if normalizer is not None:
            normalizers[label] = normalizer
            widths[label] = normalizer.dim
        if summary is not None:
            widths[summary_part(label)] = summary
    ours = tower_of(setup.model).config.hidden_size
    projections = nn.ModuleDict({name: nn.Linear(ours, width) for name, width in widths.items()})
    projections = in_precision(projections.to(setup.device), config.precision)
    task = ImageTextTask(config, setup.teachers, normalizers, projections)
    return task, dict(projections=projections, normalizers=nn.ModuleDict(normalizers))


def build_feed(setup: ImageTextSetup) -> ImageTextFeed:
    """Return the batches of a run, as this rank takes them."""
    config = setup.config
    return ImageTextFeed(
        setup.train,
        Plan(len(setup.train), config.batch, config.seed),
        setup.device,
        Change(config.augment.scale, config.augment.flip),
        config.num_slices,
        slices_of_rank(config.num_slices),
        workers_of(config.workers, setup.device),
    )


def _state(setup: ImageTextSetup, parts: Mapping[str, nn.Module]) -> TrainState:
    config, model = setup.config, setup.model.train()
    known = {name for name, _ in model.named_parameters()}  # a head that is tied has no name
    frozen = config.frozen.split(",") if config.frozen else []
    names = [part for part in frozen if any(n.startswith(part) for n in known)]
    if names:
        freeze(model, ",".join(names))
    groups = parameter_groups(model, config)
    return TrainState.of(model, config.optim, groups=groups, parts=parts)


# ---------------------------------------------------------------- measuring


def scores_of(answers: Sequence[Answered]) -> dict[str, float]:
    """Return `exact` over all questions and by kind, in per cent, and `nll` a question."""
    kinds = defaultdict[str, list[bool]](list)
    for one in answers:
        kinds[one.kind].append(one.right)
    found = {"exact": 100 * float(np.mean([one.right for one in answers]))}
    if len(kinds) > 1:
        found |= {f"{kind}/exact": 100 * float(np.mean(kinds[kind])) for kind in sorted(kinds)}
    if 0 < len(kinds.get("yes_no", ())) < len(answers):
        others = [one.right for one in answers if one.kind != "yes_no"]
        found["not_yes_no/exact"] = 100 * float(np.mean(others))
    return found | {"nll": float(np.mean([one.nll for one in answers]))}


def evaluated(setup: ImageTextSetup, model: Any, control: str = SIGHT) -> list[Answered]:
    """Ask a model the held-out questions, `eval_samples` of them in a random choice."""
    config, training = setup.config, model.training
    indices = np.sort(np.random.default_rng(0).permutation(len(setup.val))[: config.eval_samples])
    model.eval()
    answers = list(
        answer_all(
            model, setup.val, device=setup.device, batch=config.batch, control=control,
            indices=[int(i) for i in indices],
            autocast=partial(autocast, config.precision, setup.device),
        )
    )  # fmt: skip
    model.train(training)
    return answers


def _log_evaluation(run: Run, setup: ImageTextSetup, model: Any, step: int) -> float:
    def measure() -> dict[str, float]:
        return scores_of(evaluated(setup, model))

    found = by_first(measure, patience=MORE_PATIENCE)
    run.log("eval", step, found)
    return found["exact"]


def finish(run: Run, setup: ImageTextSetup, model: Any, began: float) -> None:
    """Write what was learnt, what it answers, and the controls beside it."""
    config = setup.config
    answers = {control: evaluated(setup, model, control) for control in (SIGHT, SHUFFLED, BLIND)}
    after = scores_of(answers[SIGHT])
    run.log("eval", config.steps, after)
    export(run, setup, model)
    alone = from_question_alone(setup.train, setup.val)
    shown = {one.key for one in answers[SIGHT]}
    asked = np.array([setup.val.key(i) in shown for i in range(len(setup.val))])
    about = dict(
        after=after,
        shuffled=scores_of(answers[SHUFFLED]),
        blind=scores_of(answers[BLIND]),
        question_alone=100 * float(alone[asked].mean()),
        questions=len(answers[SIGHT]),
        parameters={
            name: sum(p.numel() for p in part.parameters())
            for name, part in dict(
                tower=model.model.vision_tower,
                projector=model.model.multi_modal_projector,
                language=model.model.language_model,
            ).items()
        },
        image_tokens=model.config.image_seq_length,
        commit=commit(),
        machine=machine(setup.device),
        seconds=time.perf_counter() - began,
        config=to_json(config),
    )
    run.write_json("about.json", about)
    show_questions(run.path, setup.val, answers[SIGHT], model.eval(), setup.device)


def export(run: Run, setup: ImageTextSetup, model: Any) -> None:
    """Write the model into a run's folder, adapters added to its weights."""
    state = model.state_dict()
    plain = merged(state)
    adapted = plain if plain.keys() != state.keys() else None
    write_model(run.path / "export", model, setup.tokenizer, adapted)
