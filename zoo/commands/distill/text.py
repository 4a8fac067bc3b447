"""`zoo distill --text`: a language model from its config to its export."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from zoo.commands.distill.model_folder import write_model
from zoo.commands.distill.text_samples import write_samples
from zoo.compiled_blocks import as_written
from zoo.data.plan import mix
from zoo.data.text import TextFeed, TextSource
from zoo.data.text_mixture import TextMixture, open_texts, plan_of_rows
from zoo.language.attention import set_attention
from zoo.language.expert_parallel import expert_parameters
from zoo.language.gguf import find_gguf
from zoo.language.moe import moe_layers
from zoo.language.open import (
    check_length,
    check_tokenizer,
    open_language_model,
    own_tokenizer,
)
from zoo.language.spread import Sizes, Spread, stretch
from zoo.language.tokenizers import BYTES, Tokenizer, open_tokenizer
from zoo.language.tokens import separates_documents
from zoo.teachers.from_language import LanguageTeacher, open_language
from zoo.teachers.teacher import fingerprint_of
from zoo.train.config import to_json
from zoo.train.device import autocast, device_of, in_precision, machine
from zoo.train.distill.hidden import HiddenMatch
from zoo.train.distill.on_policy import OnPolicyFeed, OwnText
from zoo.train.distill.same import check_same_weights
from zoo.train.distill.token_calibrate import (
    TokenNormalizers,
    check_calibration,
    token_normalizers,
)
from zoo.train.distill.token_compiling import compile_models
from zoo.train.distill.token_config import DistillText, TokenLosses
from zoo.train.distill.token_placement import check_tower, cut_teachers, whole
from zoo.train.distill.token_task import TokenTask, evaluate_text
from zoo.train.distill.token_teachers import TokenTeacher
from zoo.train.loop import train
from zoo.train.mesh import (
    by_first,
    first_goes_first,
    is_first,
    rank,
    slices_of_rank,
    together,
    with_slices,
    world,
)
from zoo.train.run import Run, commit
from zoo.train.state import TrainState

Evaluation = dict[str, float]
Text = TextSource | TextMixture


@dataclass
class TextSetup:
    """What a run is made of."""

    config: DistillText
    device: torch.device
    tokenizer: Tokenizer
    student: Any
    teachers: Mapping[str, LanguageTeacher]
    train: Text
    val: Text
    attention: Mapping[str, str]
    """The form in which each model attends."""
    spread: Spread | None = None
    """How the models lie over the ranks, once they do."""
    compiled: Mapping[str, str] = field(default_factory=dict)
    """Of which models the layers are compiled, once they are, or why not."""

    @property
    def specs(self) -> dict[str, TokenTeacher]:
        """What each teacher counts, by label."""
        return dict(zip(self.config.labels, self.config.specs, strict=True))

    @property
    def comparable(self) -> dict[str, LanguageTeacher]:
        """The teachers whose heads have the student's rows."""
        rows = self.student.get_output_embeddings().weight.shape[0]
        return {
            label: teacher
            for label, teacher in self.teachers.items()
            if teacher.model.get_output_embeddings().weight.shape[0] == rows
        }


def prepare(config: DistillText, *, meta: bool = False) -> TextSetup:
    """Open everything that a run needs, and hold it against each other.

    Args:
        meta: Leave the models' weights out: they are on the device `meta`, for a plan.

    Raises:
        ValueError: something is not there, or the vocabularies differ.
    """
    check_complete(config)
    check_on_policy(config)
    device = torch.device("meta") if meta else device_of(config.device)
    tokenizer = open_tokenizer(config.tokenizer or own_tokenizer(config.student))
    text = open_texts(config.data, tokenizer, config.length)
    val = open_texts(config.val, tokenizer, config.length, in_turn=True) if config.val else None
    torch.manual_seed(config.seed)
    student = open_language_model(config.student, device=device)
    student = in_precision(student, config.precision)
    check_tokenizer(student, tokenizer, config.student)
    check_length(student, config.length, config.student)
    if config.losses.routers and not moe_layers(student):
        raise ValueError(
            f"{config.student} is no mixture of experts, which --losses.balance and "
            "--losses.router-z are for; leave them out."
        )
    sizes_of(config).check_student(student, config.student)
    if config.precision == "float64":
        in_float64(student)
    rows = student.get_output_embeddings().weight.shape[0]
    teachers = {}
    for label, spec in zip(config.labels, config.specs, strict=True):
        teacher = open_language(spec.name, device=device)
        check_vocabulary(teacher, tokenizer, rows, spec, config.losses)
        check_length(teacher.model, config.length, spec.name)
        if spec.place == "shard":
            check_tower(spec.name, teacher.model)
        teachers[label] = in_precision(teacher, config.precision)
        if config.precision == "float64":
            in_float64(teacher.model)
    models = (student, *(teacher.model for teacher in teachers.values()))
    attention = {} if meta else attentions(config, models, device)
    text = with_documents(text, mixed=meta or all(separates_documents(m) for m in models))
    if val is None:
        text, val = text.split(config.held_out)
    else:
        val = with_documents(val, mixed=text.mixed)
    setup = TextSetup(config, device, tokenizer, student, teachers, text, val, attention)
    tokens = config.calibration * config.batch * (config.length - 1)
    check_calibration(config.normalise, tokens, widths_of(setup))
    return setup


def attentions(config: DistillText, models: Sequence[Any], device: torch.device) -> dict[str, str]:
    """Let the student and its teachers attend as the config says; return and print the forms.

    Raises:
        ValueError: the form that was asked for does not run here.
    """
    labels, names = (
        ("student", *config.labels),
        (config.student, *(one.name for one in config.specs)),
    )
    context = partial(autocast, config.precision, device)
    forms = {
        label: set_attention(model, config.attention, name, context=context)
        for label, model, name in zip(labels, models, names, strict=True)
    }
    if config.attention != "own":
        print("attention  " + ", ".join(f"{label} {form}" for label, form in forms.items()))
    return forms


def sizes_of(config: DistillText) -> Sizes:
    """Return what is spread over how many ranks."""
    capacity = config.capacity or None
    return Sizes(sequence=config.sequence, experts=config.experts, capacity=capacity)


def in_float64(model: Any) -> None:
    """Let experts run one after another: torch's grouped product knows no float64."""
    if moe_layers(model):
        model.set_experts_implementation("eager")


def check_complete(config: DistillText) -> None:
    """Refuse a run that lacks a part.

    Raises:
        ValueError: it has no text, no student, a quantised one, or teachers without a weight (or
            the reverse).
    """
    for option, given in dict(text=config.data, student=config.student).items():
        if not given:
            raise ValueError(f"--{option} is missing; see zoo distill --text --help.")
    if find_gguf(config.student.removeprefix("lm:")):
        raise ValueError(
            f"{config.student} is quantised, and a student is trained and saved as float: cut one "
            "from it (zoo prune ... --dequantise). As a teacher it can stay as it is."
        )
    losses = config.losses
    if bool(config.teachers) != bool(losses.kl + losses.hidden):
        raise ValueError(
            f"There are {len(config.teachers)} teachers, losses.kl is {losses.kl:g} and "
            f"losses.hidden {losses.hidden:g}: name --teachers, or train on the text alone "
            "(--losses.kl 0 --losses.ce 1)."
        )
    for spec in config.specs:
        if not losses.kl * spec.kl + losses.hidden * spec.hidden:
            raise ValueError(
                f"Nothing is learnt from {spec.name}: kl={spec.kl:g} of losses.kl {losses.kl:g}, "
                f"hidden={spec.hidden:g} of losses.hidden {losses.hidden:g}; for its hidden states "
                "give --losses.hidden 1."
            )
    if config.normalise != "none" and not config.matched:
        raise ValueError(
            f"normalise is {config.normalise}, and no hidden states are compared; give "
            "--losses.hidden 1."
        )


def check_on_policy(config: DistillText) -> None:
    """Refuse rows that a student cannot write, or from which nothing is learnt.

    Raises:
        ValueError: there is no room for a prompt, no teacher to judge, or weights are cut.
    """
    own = config.on_policy
    if not own.fraction:
        return
    if config.kind != DistillText.kind:
        raise ValueError(
            "Only zoo distill --text lets a student write; leave out --on-policy.fraction."
        )
    if own.length >= config.length:
        raise ValueError(
            f"on_policy.length is {own.length}, and rows of {config.length} tokens have no room "
            f"for a prompt before it; give --on-policy.length {config.length // 2}."
        )
    if not any(config.losses.kl * spec.kl for spec in config.specs):
        raise ValueError(
            f"on_policy.fraction is {own.fraction:g}, and no teacher's next tokens are learnt that "
            "could judge what the student writes; name --teachers, with losses.kl above 0."
        )
    if config.losses.ce and own.fraction == 1:
        raise ValueError(
            "on_policy.fraction is 1, so no row of the text is left for losses.ce; give less."
        )
    if config.ranks in ("fsdp", "hsdp"):
        raise ValueError(
            f"A student whose weights are cut (--ranks {config.ranks}) does not generate in "
            "training; give --ranks ddp, or leave out --on-policy.fraction."
        )


def check_vocabulary(
    teacher: LanguageTeacher,
    tokenizer: Tokenizer,
    rows: int,
    spec: TokenTeacher,
    losses: TokenLosses,
) -> None:
    """Refuse a teacher whose tokens are not the student's.

    Args:
        rows: Of the student's head.

    Raises:
        ValueError: its next tokens count and it has another number of them, or it has a tokenizer
            of its own that differs.
    """
    theirs = teacher.model.get_output_embeddings().weight.shape[0]
    if theirs != rows and losses.kl * spec.kl:
        raise ValueError(
            f"{teacher.name} has {theirs} tokens and the student {rows}; only models of one "
            "vocabulary can be compared token by token. For its hidden states alone, write "
            f"{spec.name},kl=0 (and --losses.hidden 1)."
        )
    own = own_tokenizer(teacher.name)
    if own != BYTES and open_tokenizer(own).digest != tokenizer.digest:
        raise ValueError(
            f"{teacher.name} has another tokenizer than the run, so that neither its next tokens "
            f"nor its hidden states stand beside the student's; give --tokenizer {own} if the "
            "student learns from that one, or another teacher."
        )
    check_tokenizer(teacher.model, tokenizer, teacher.name)


def with_documents(text: Text, *, mixed: bool) -> Text:
    """Return the text with several documents in a row, if every model keeps them apart."""
    if not mixed and text.mixed:
        print(
            "A model carries its state from one document to the next: each row holds one of them."
        )
    return text.packed(mixed)


def distill_text(config: DistillText, *, resume: bool = False) -> Run:
    """Run a distillation of language models to its export.

    Raises:
        ValueError: something that the config names is wrong, a run cannot be resumed, or a loss
            stopped being finite. Nothing has been written unless training had begun.
        Interrupted: a signal came; the run can be resumed.
    """
    if resume:
        check_room(Run(config.out).config(DistillText), config)
    sizes_of(config).check_ranks(world())
    config = with_slices(config)
    if not resume:
        Run.refuse_existing(config.out)
    with first_goes_first():  # tokenises
        setup = prepare(config)
    run = Run.reopen(config.out, config) if resume else Run.create(config)
    began = time.perf_counter()
    with run.discarded(unless=lambda: resume):
        check_same_weights(run, by_first(partial(fingerprints, setup)))
        cut_teachers(config, setup.teachers, setup.device)
        before = evaluated(setup, setup.student)
        samples = by_first(partial(samples_of, setup, setup.student))
        hidden = hidden_match(setup)
        if hidden:
            hidden.normalizers = normalizers(run, setup)
        parts = dict(hidden=hidden) if hidden else {}
        student = setup.student.train()
        apart = [name for name, _ in expert_parameters(student)]
        place = place_over_ranks(setup)
        state = TrainState.of(
            student, config.optim, parts=parts, ranks=config.ranks, place=place, apart=apart
        )
        state.resume(run)
        rows = feed_of(setup, config.seed)
        setup.compiled = compile_models(config, student, setup.teachers, rows, state.step)
    if not resume:
        run.log("eval", 0, before)
    feed, own = feed_of(setup, config.seed), None
    if config.on_policy.fraction:
        own = OwnText(config.on_policy, config.seed, setup.tokenizer.end)
        feed = OnPolicyFeed(feed, own)

    def evaluate(model: Any, step: int) -> float:
        found = evaluated(setup, model)
        run.log("eval", step, found)
        return -found["bpb"]

    task = TokenTask(config.losses, setup.teachers, hidden, setup.specs, own, setup.spread)
    title = "distil text" if config.teachers else "learn text"
    train(task, state, feed, config, run, evaluate=evaluate, title=title)
    run.keep(lambda row: row.get("kind", "train") == "train" or row["step"] < config.steps)
    after = evaluated(setup, state.averaged)
    measured = dict(before=before, after=after, teachers=of_teachers(setup), samples=samples)
    model = next(iter(state.forms.values()))  # whole on rank 0
    by_first(partial(finish, run, setup, model, measured, began))
    return run


def place_over_ranks(setup: TextSetup) -> Callable[[torch.nn.Module], None] | None:
    """Spread the teachers as the config says; return what spreads the student, if it is to be."""
    if not (sizes := sizes_of(setup.config)):
        return None
    setup.spread = Spread.over_ranks(sizes, setup.device.type)
    for label, teacher in setup.teachers.items():
        whole = setup.spread.place_teacher(teacher.model)
        if whole and is_first():
            print(f"Of the teacher {label}, {whole}")
    return setup.spread.place


def check_room(begun: DistillText, config: DistillText) -> None:
    """Refuse to spread a run with a capacity otherwise: other tokens would find no room.

    Raises:
        ValueError: it is.
    """
    for name in ("sequence", "experts") if config.capacity else ():
        before, now = getattr(begun, name), getattr(config, name)
        if before != now:
            raise ValueError(
                f"With --capacity experts drop tokens by the processes that share them, so a run "
                f"keeps its --{name} ({before} there, {now} here)."
            )


def finish(
    run: Run, setup: TextSetup, model: Any, measured: Mapping[str, Any], began: float
) -> None:
    """Write what was learnt, and say in `about.json` what was measured of it and its teachers."""
    config, after = setup.config, measured["after"]
    run.log("eval", config.steps, after)
    written = zip(measured["samples"], samples_of(setup, model), strict=True)
    samples = [
        dict(prompt=one["prompt"], text=one["text"], before=one["written"], after=other["written"])
        for one, other in written
    ]
    export(run, setup, model)
    about = dict(
        **{**measured, "samples": samples}, attention=dict(setup.attention), commit=commit(),
        speed=dict(setup.compiled), machine=machine(setup.device),
        seconds=time.perf_counter() - began, config=to_json(config),
    )  # fmt: skip
    run.write_json("about.json", about)


def samples_of(setup: TextSetup, model: Any) -> list[dict[str, str]]:
    """Let a model continue some held-out rows."""
    with autocast(setup.config.precision, setup.device):
        return write_samples(model, setup.val, setup.tokenizer, setup.config.seed)


def hidden_match(setup: TextSetup) -> HiddenMatch | None:
    """Return the projections between hidden states, if the config compares them."""
    losses = setup.config.losses
    if not setup.config.matched:
        return None
    widths, normalised = widths_of(setup), setup.config.normalise != "none"
    match = HiddenMatch(
        _width(setup.student), widths, len(losses.hidden_at), normalised=normalised
    ).to(setup.device)
    return in_precision(match, setup.config.precision)


def widths_of(setup: TextSetup) -> dict[str, int]:
    """Return the widths of those teachers whose hidden states are compared."""
    return {label: _width(setup.teachers[label].model) for label in setup.config.matched}


def normalizers(run: Run, setup: TextSetup) -> TokenNormalizers:
    """Return what brings the teachers' hidden states to one scale; measure it in a new run.

    Raises:
        ValueError: as `token_normalizers`.
    """
    config = setup.config
    if config.normalise == "none":
        return {}
    teachers = {label: setup.teachers[label] for label in config.matched}
    for teacher in teachers.values():
        teacher.at = config.losses.hidden_at
    return token_normalizers(
        run,
        config.normalise,
        teachers,
        feed_of(setup, mix(config.seed, 3)).batches(0, config.calibration),
        steps=config.calibration,
        context=partial(autocast, config.precision, setup.device),
        device=setup.device,
    )


def feed_of(setup: TextSetup, seed: int) -> TextFeed:
    """Return this rank's part of the training rows, in the order of a seed."""
    config = setup.config
    plan = plan_of_rows(setup.train, config.batch, seed)
    slices = slices_of_rank(config.num_slices, config.sequence)
    own = stretch(config.length, config.sequence, rank() % config.sequence)
    return TextFeed(setup.train, plan, setup.device, config.num_slices, slices, own)


def fingerprints(setup: TextSetup) -> dict[str, str]:
    """Return a hash of each teacher's weights."""
    return {label: fingerprint_of(teacher.model) for label, teacher in setup.teachers.items()}


def _width(model: Any) -> int:
    return model.get_output_embeddings().weight.shape[1]


def evaluated(setup: TextSetup, model: Any, *, alone: bool = False) -> Evaluation:
    """Measure a model on the held-out rows; every rank calls this.

    Args:
        model: `None` on a rank that lacks it, since weights are cut: then rank 0 measures alone.
        alone: Without its divergence from the teachers.
    """
    with whole(setup.teachers):
        return together(partial(_evaluated, setup, model, alone), here=model is not None)


def _evaluated(setup: TextSetup, model: Any, alone: bool) -> Evaluation:
    config, training = setup.config, model.training
    beside, batch = {} if alone else setup.comparable, max(1, config.batch // config.num_slices)
    options: Any = dict(rows=config.eval_rows, batch=batch, spread=setup.spread)
    model.eval()
    plain = as_written(model, *(teacher.model for teacher in setup.teachers.values()))
    with plain, autocast(config.precision, setup.device):
        found = dict(evaluate_text(model, beside, setup.val, setup.device, **options))
    model.train(training)
    return found


def of_teachers(setup: TextSetup) -> dict[str, Evaluation]:
    """Measure the teachers on the held-out rows."""
    return {n: evaluated(setup, t.model, alone=True) for n, t in setup.teachers.items()}


def export(run: Run, setup: TextSetup, model: Any) -> None:
    """Write the student into a run's folder."""
    write_model(run.path / "export", model, setup.tokenizer)
