"""Open and check everything that a distillation works with."""

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import zoo
from zoo.data.mixture import Mixture
from zoo.data.names import Weighted, is_stream
from zoo.data.sources import Source, in_one_list, open_labelled, open_splits
from zoo.data.stream import open_stream
from zoo.data.views import View
from zoo.files import cache_dir
from zoo.students.build import assign_tokens, build_student, read_options
from zoo.students.export import load_export, read_heads
from zoo.students.lora import add_adapters
from zoo.students.start import cut_folder, find_start, read_folder
from zoo.students.student import Student
from zoo.teachers.cache import Cache
from zoo.teachers.name import FOLDER, TeacherName, unknown_name
from zoo.teachers.open import open_teacher
from zoo.teachers.quantize import check_products, require_linears
from zoo.teachers.teacher import Teacher
from zoo.train.config import to_json
from zoo.train.device import autocast, device_of, in_precision, memory_of, workers_of
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.memory import check_memory, check_step, may_not_fit
from zoo.train.distill.phi_s import Normalizer, check_rows, fold_inverse
from zoo.train.distill.placement import check_blocks
from zoo.train.distill.plan_step import Grids, check_step_plans, grids_of, view_of
from zoo.train.distill.sizes import frozen, match_student_size
from zoo.train.freeze import freeze
from zoo.train.mesh import first_goes_first, world
from zoo.train.run import Run

NOT_HELD = frozenset(
    ("out", "data", "labelled", "steps", "seed", "workers", "calibration", "eval_images",
     "probe_images", "track", "profile", "every", "held_out", "keep", "normalise", "compare")
)  # fmt: skip
"""Fields of a config that say nothing of what a step holds."""


@dataclass(frozen=True)
class Setup:
    """What a run works with: opened, checked, and resolved once."""

    config: Distill
    device: torch.device
    train: Source
    val: Source
    labelled: tuple[Source, Source] | None
    teachers: Mapping[str, Teacher]
    view: View
    """The crop that is decoded once for student and teachers."""
    grids: Grids
    widths: Mapping[str, tuple[int | None, int | None]]
    """Of the summary and of the map of each teacher, as far as the student learns them."""
    stored: Mapping[str, Teacher] = field(default_factory=dict)
    """What the teachers answer for the held-out images, if a cache has it."""
    unreadable: set[str] = field(default_factory=set)
    """Names of held-out images that could not be read; they are in no number."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """Shards that are left out, and why."""

    @property
    def workers(self) -> int:
        """The processes that read images, `auto` resolved."""
        return workers_of(self.config.workers, self.device)

    def autocast(self) -> contextlib.AbstractContextManager:
        return autocast(self.config.precision, self.device)


def with_decoder(config: Distill, *, resume: bool) -> Distill:
    """Return the config with an `auto` decoder settled: it stays what it was when a run began."""
    if config.decoder != "auto":
        return config
    if resume:
        return replace(config, decoder=Run(config.out).config(Distill).decoder)
    on_gpu = device_of(config.device).type == "cuda"
    return replace(config, decoder="torch" if on_gpu else "pillow")


def check_names(config: Distill) -> None:
    """Refuse unknown models before anything is read or built."""
    if not config.teachers:
        raise ValueError("There is no teacher; name at least one, e.g. --teachers timm:resnet18.")
    architecture, *_ = read_folder(config.student)
    if not cut_folder(config.student) and not timm.is_model(architecture.partition(".")[0]):
        raise unknown_name(config.student, timm.list_models(), "registered model")
    for spec in config.teachers:
        name = TeacherName.parse(spec.name)
        if name.kind == "cache":
            raise ValueError(
                f"The teacher {spec.name} knows the views of one run alone, and a new run looks at "
                "others. Name the teachers, and give their features by --cache FOLDER."
            )
        if name.kind not in ("timm", "zoo") or name.name.startswith(FOLDER):
            continue
        if not timm.is_model(name.name.partition(".")[0]):
            known = zoo.list_models() if name.kind == "zoo" else timm.list_models()
            raise unknown_name(name.name, known, f"{name.kind} model")
    start = config.start and find_start(config.start)
    if start and start.is_dir():
        check_start(config, start)
    optim = config.optim
    windows = config.attention_windows
    if config.spectral or config.student_options or windows or optim.freeze or optim.lora:
        student = build_student(  # without memory: will it do?
            config.student, {}, size=config.size, **backbone_options(config), device="meta"
        )
        if windows and not hasattr(student.backbone, "vitdet"):
            raise ValueError(
                f"The student {config.student} cannot attend in windows; leave out "
                "--attention-windows, which is for radio_vit_*."
            )
        if optim.freeze:
            freeze(student, optim.freeze)
        if optim.lora:
            add_adapters(student, optim.lora, optim.lora_layers)


def check_start(config: Distill, folder: Path) -> None:
    """Refuse to go on from a student that was built otherwise than this one."""
    name, before = config.student, read_heads(folder)
    if before["student"] != name.partition(".")[0] and before["student"] != name:
        raise ValueError(
            f"The student in {folder} is {before['student']}, and this run's is {name}; leave out "
            "student, or start."
        )
    ours, theirs = read_options(config.student_options), before.get("options") or {}
    other = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    if other := other - {"dynamic_img_size"}:
        raise ValueError(
            f"The student in {folder} was built with other options ({', '.join(sorted(other))}); "
            "leave out student_options, or start."
        )


def open_data(
    config: Distill, lost: dict[str, str] | None = None
) -> tuple[Source, Source, tuple[Source, Source] | None]:
    """Open training images, held-out images, and labelled ones for the probes.

    Args:
        lost: Takes the shards that are left out, if the config says that they may be.
    """
    skipped = (lost if lost is not None else {}) if config.damaged_shards == "skip" else None
    labelled: Path | str | None = config.labelled
    if is_stream(config.data):
        train, val = open_stream(config.data)
    elif weighted := Weighted.parse(config.data):
        parts = [open_splits(place_of(name), config.held_out, skipped) for name in weighted.names]
        train, val = (Mixture(part, weighted) for part in zip(*parts, strict=True))
    else:
        train, val = open_splits(place_of(config.data), config.held_out, skipped)
        if config.data == "embedded":
            labelled = labelled or Path(place_of(config.data)).parent / "digits"
    if is_stream(config.data) and not labelled:
        return train, val, None
    if not labelled:
        probe = in_one_list(train, val, config.data)
    elif not (probe := open_labelled(labelled, config.held_out, skipped))[0].classes:
        raise ValueError(f"{labelled} has no classes: one sub-folder a class, or .cls files.")
    return train, val, probe if probe[0].classes else None


def place_of(data: str) -> Path | str:
    """Return where data lie; data that ship in wheels are written there first.

    Raises:
        ValueError: there are no embedded data of that name.
    """
    if not data.startswith("embedded"):
        return data
    from zoo.data.embedded import EMBEDDED

    if data not in EMBEDDED:
        raise unknown_name(data, list(EMBEDDED), "embedded data")
    made = EMBEDDED[data]()
    return made / "images" if data == "embedded" else made


def open_teachers(
    config: Distill, train: Source, device: torch.device, grids: Grids
) -> dict[str, Teacher]:
    """Build the teachers by label; a pretext teacher is trained on `train` first."""
    teachers = {}
    for label, spec in zip(config.labels, config.teachers, strict=True):
        name = TeacherName.parse(spec.name)
        text = spec.name
        if name.kind == "pretext" and name.weights is None:
            from zoo.train.pretext import pretext_weights

            with first_goes_first():  # trains it; the others find the file
                path = pretext_weights(name.name, train, seed=config.seed, device=device)
            text = f"{spec.name}/{path}"
        teachers[label] = open_spec(replace(spec, name=text), config, device, grids)
        if isinstance(teachers[label], nn.Module):
            in_precision(teachers[label], config.precision)
    return teachers


def open_spec(spec: TeacherSpec, config: Distill, device: torch.device, grids: Grids) -> Teacher:
    """Build a teacher, for all sizes of the student if it follows them."""
    opened = partial(open_teacher, device=device, mosaic=spec.mosaic)
    if spec.follow:
        return match_student_size(spec.name, opened, grids, config.size)
    return opened(spec.name)


def widths(config: Distill, teachers: Mapping[str, Teacher]) -> dict[str, tuple]:
    """Return the summary and spatial width that each head must have; `None` for no head."""
    found = {}
    for (label, teacher), spec in zip(teachers.items(), config.teachers, strict=True):
        check_losses(spec.name, teacher, summary=float(spec.summary), spatial=float(spec.spatial))
        summary = teacher.summary_dim if spec.summary else None
        found[label] = (summary, teacher.spatial_dim if spec.spatial else None)
    return found


def backbone_options(config: Distill) -> dict[str, Any]:
    """Return what `build_student` needs to know of the backbone beside its name and size."""
    return dict(
        options=read_options(config.student_options),
        dynamic=bool(config.sizes),
        spectral_norms=config.spectral,
    )


def new_student(setup: Setup, normalizers: Mapping[str, Normalizer]) -> Student:
    """Build the student of a run, the same one at each call.

    Args:
        normalizers: Of the space in which its heads are to answer; heads of an earlier student
            come from the teachers' own spaces.
    """
    config = setup.config
    torch.manual_seed(config.seed)
    student = build_student(
        config.student,
        setup.widths,
        size=config.size,
        **config.heads.options(),
        pretrained=config.pretrained,
        start=config.start and find_start(config.start),
        drop_path_rate=config.optim.drop_path,
        **backbone_options(config),
    )
    if earlier := earlier_student(config):
        adopt_heads(student, earlier, normalizers)
        # a token that was never trained is no summary of a trunk that stays as it is
        known = student.heads if config.optim.freeze == "trunk" else earlier.heads
        taken = {label: earlier.tokens.get(label, 0) for label in known}
        student.tokens = assign_tokens(student.backbone, setup.widths, taken)
    return in_precision(student, config.precision).to(setup.device)


def earlier_student(config: Distill) -> Student | None:
    """Return the student that a run starts from, with its heads; `None` if it has no such."""
    start = config.start and find_start(config.start)
    return load_export(start) if start and start.is_dir() else None


def adopt_heads(student: Student, earlier: Student, normalizers: Mapping[str, Normalizer]) -> None:
    """Let each head begin as that of an earlier student for the same teacher, if it is alike."""

    def shapes(heads: nn.ModuleDict, label: str) -> dict[str, torch.Size]:
        return {key: value.shape for key, value in heads[label].state_dict().items()}

    alike = {
        label
        for label in student.heads.keys() & earlier.heads.keys()
        if shapes(student.heads, label) == shapes(earlier.heads, label)
    }
    folds = {
        label: partial(fold_inverse, normalizer=normalizer, forward=True)
        for label, normalizer in normalizers.items()
        if label.partition("/")[0] in alike
    }
    earlier = earlier.with_folded_heads(folds)
    for label in alike:
        student.heads[label].load_state_dict(earlier.heads[label].state_dict())


def meta_models(config: Distill) -> tuple[dict[str, Teacher], Student]:
    """Build teachers and student on the meta device: the same code as in the run, but no memory.

    Raises:
        ValueError: as the run itself would, about its models.
    """
    check_names(config)
    meta, grids = torch.device("meta"), grids_of(config)
    teachers = {
        label: open_spec(spec, config, meta, grids)
        for label, spec in zip(config.labels, config.teachers, strict=True)
    }
    options: dict[str, Any] = {**config.heads.options(), **backbone_options(config)}
    options["spectral_norms"] = False  # their FLOPs are negligible
    student = build_student(
        config.student, widths(config, teachers), size=config.size, **options, device="meta"
    )
    return teachers, student.eval()


def prepare(config: Distill) -> Setup:
    """Check and open everything that a run needs, before it writes anything."""
    check_names(config)
    device = device_of(config.device)
    if config.precision == "float64" and device.type != "cpu":
        raise ValueError("precision float64 is for tests on a CPU; give --device cpu with it.")
    check_mosaics(config)
    check_memory(config, device)
    if config.cache:
        Cache.refuse_other(config.cache)
    if config.teacher_precision in ("int8", "fp8"):
        check_products(config.teacher_precision, device)
    grids = grids_of(config)  # refuses what the student cannot take
    check_memory_of_step(config, device)
    lost: dict[str, str] = {}
    train, val, labelled = open_data(config, lost)
    teachers = open_teachers(config, train, device, grids)
    wide = widths(config, teachers)  # refuses a loss that a teacher has nothing for
    if config.teacher_precision in ("int8", "fp8"):
        for network in (n for teacher in teachers.values() for n in frozen(teacher)[:1]):
            require_linears(network, config.teacher_precision)
    for spec, teacher in zip(config.teachers, teachers.values(), strict=True):
        if spec.place == "shard":
            check_blocks(spec.name, teacher)
    check_memory(config, device, teachers)
    check_step_plans(config, teachers, grids)
    check_calibration(config, teachers, grids)
    view = view_of(config, teachers, grids)
    return Setup(config, device, train, val, labelled, teachers, view, grids, wide, lost=lost)


def check_memory_of_step(config: Distill, device: torch.device) -> None:
    """Refuse a step that does not fit into the memory, before any weights are read.

    A teacher of somebody's own (`torch:`) has no shape before its function is called: a run with
    one is not estimated. Counting takes seconds, so what was found to fit is remembered.

    Raises:
        ValueError: as `zoo.train.distill.memory.check_step`.
    """
    own = any(TeacherName.parse(spec.name).kind == "torch" for spec in config.teachers)
    if own or not may_not_fit(config, device):
        return
    fits = _fits_mark(config, device)
    if fits and fits.is_file():
        return
    check_step(config, device, *meta_models(config))
    if fits:
        with contextlib.suppress(OSError):  # what is not remembered is counted again
            fits.parent.mkdir(parents=True, exist_ok=True)
            fits.touch()


def _fits_mark(config: Distill, device: torch.device) -> Path | None:
    """Return the file that says that a step fits; `None` if its models may change under a name."""
    kinds = [TeacherName.parse(spec.name).kind for spec in config.teachers]
    named = [config.student, *(spec.name for spec in config.teachers)]
    if any(FOLDER in name for name in named) or not {*kinds} <= {"timm", "zoo"}:
        return None
    held = {name: value for name, value in to_json(config).items() if name not in NOT_HELD}
    about = [held, device.type, memory_of(device), world()]
    about += [zoo.__version__, torch.__version__, timm.__version__]
    return cache_dir() / "fits" / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def check_calibration(config: Distill, teachers: Mapping[str, Teacher], grids: Grids) -> None:
    """Refuse to whiten a teacher's map with fewer rows than its channels need.

    Raises:
        ValueError: as `zoo.train.distill.phi_s.check_rows`.
    """
    ours = [cells * config.heads.upsample for cells in grids[config.size]]
    for label, teacher in teachers.items():
        if teacher.grid and teacher.spatial_dim:
            cells = math.prod(map(min, ours, teacher.grid))
            what = f"{label} (--calibration {config.calibration}, {cells} cells an image)"
            for kind in (config.normalise, *config.compare):
                rows = config.calibration * config.batch * cells
                check_rows(kind, rows, teacher.spatial_dim, what)


def check_mosaics(config: Distill) -> None:
    """Refuse slices that leave a teacher's canvas part empty: it is packed within a slice.

    Raises:
        ValueError: a canvas would stay part empty. One slice alone may: its last canvas is
            filled with images again.
    """
    sizes = {(n, config.images_by_size[side]) for side, n in config.slice_images.items()}
    if config.partition:  # the calibration has slices of equal size
        sizes.add((config.batch // config.num_slices, config.batch))
    for (size, batch), spec in product(sorted(sizes), config.teachers):
        if config.num_slices > 1 and size % spec.mosaic**2:
            raise ValueError(
                f"The teacher {spec.name} packs {spec.mosaic}x{spec.mosaic} images, and a slice "
                f"has {size} of the {batch}; choose --batch and --slices so that a slice "
                f"is a multiple of {spec.mosaic**2}."
            )


def check_losses(name: str, teacher: Teacher, *, summary: float, spatial: float) -> None:
    """Check that a teacher has the targets that the weights of its losses need.

    For a teacher without a summary the summary loss is left out whatever its weight, as AM-RADIO
    (2312.06709, section 3.4) does for SAM. A map must be there if its weight is not 0.

    Raises:
        ValueError: the teacher has no map and `spatial` is above 0, or no loss is left.
    """
    if spatial and teacher.spatial_dim is None:
        raise ValueError(
            f"The teacher {name} has no spatial output, and its spatial loss has the weight "
            f"{spatial:g}. Write {name},spatial=0 to learn its summary alone."
        )
    if not spatial and not (summary and teacher.summary_dim):
        raise ValueError(
            f"The teacher {name} has no summary, and its spatial loss is off; "
            "nothing can be learnt from it."
        )
