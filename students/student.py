"""A student: any timm backbone, and one pair of heads for each teacher."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from zoo.features import Batch, Features, gives_class_tokens, read_features, read_intermediates
from zoo.layers import spectral
from zoo.layers.vitdet import VitDet
from zoo.students.heads import TeacherHead
from zoo.students.start import create_backbone

MESA = "mesa.ema"
"""The key of a student's own map among its answers, for MESA; labels of teachers have no dot."""


GLOBAL_BLOCKS = 4
"""Blocks that see the whole image where the others attend in windows (2203.16527, section 3)."""


def summary_key(label: str) -> str:
    """Return the key of what is done to a teacher's summary, beside its map's, the label itself."""
    return f"{label}/summary"


class Student(nn.Module):
    """Batch -> {teacher: Features}: predict the features of every teacher.

    Args:
        heads: One head a teacher, by the teacher's label.
        size: Rows and columns of the images that the backbone gets.
        recipe: Name and keywords with which `zoo.create_model` builds the backbone again.
        head: Keywords with which `build_student` builds the heads again.
        tokens: The prefix token that each teacher's summary head reads, of a backbone with several
            summary tokens; without an entry a head reads the backbone's own summary.
        license: Licence of the weights that it started from; `None` if it started from none.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        heads: Mapping[str, nn.Module],
        *,
        size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        recipe: tuple[str, dict[str, Any]],
        head: dict[str, Any],
        tokens: Mapping[str, int] | None = None,
        license: str | None = None,
    ):
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleDict(heads)
        self.size, self.recipe, self.head, self.license = size, recipe, head, license
        self.class_tokens, self.tokens = gives_class_tokens(backbone), dict(tokens or {})
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def features(self, batch: Batch, size: tuple[int, int] | None = None) -> Features:
        """Return the backbone's own features."""
        return self.forward_features(batch.at(size or self.size))

    def own_map(self, batch: Batch, size: tuple[int, int] | None = None) -> Features:
        """Return the backbone's own map for MESA, each cell normalised to mean 0 and variance 1."""
        return _normalised(self.features(batch, size))

    def forward_features(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        return read_features(self.backbone, (images - self.mean) / self.std)

    def answer(
        self, images: Float[Tensor, "B 3 H W"], *, mesa: bool = False
    ) -> dict[str, Features]:
        """Answer for every teacher; the part that is worth compiling.

        Args:
            mesa: Return the own map as well, under the key `MESA`.
        """
        intermediates: list[Features] = []
        x, tokens = (images - self.mean) / self.std, sorted({0, *self.tokens.values()})
        tokens = tokens if self.tokens else []
        if any(head.kind == "ladder" for head in self.heads.values()):
            features, intermediates = read_intermediates(
                self.backbone, x, class_tokens=self.class_tokens, tokens=tokens
            )
        else:
            features = read_features(self.backbone, x, tokens=tokens)
        answers = {}
        for name, head in self.heads.items():
            read, earlier = features, intermediates
            if tokens:
                place = tokens.index(self.tokens.get(name, 0))
                read, *earlier = (_at_token(f, place) for f in (features, *intermediates))
            answers[name] = head(read, earlier)
        return answers | {MESA: _normalised(features)} if mesa else answers

    def forward(
        self, batch: Batch, *, size: tuple[int, int] | None = None, mesa: bool = False
    ) -> dict[str, Features]:
        images = batch.at(size or self.size)
        return self.answer(images, mesa=True) if mesa else self.answer(images)

    @contextmanager
    def in_windows(self, window: int) -> Iterator[None]:
        """Within this context, most blocks of a RADIO backbone attend in windows (ViTDet).

        Args:
            window: Side of a window, in patches.
        """
        backbone: Any = self.backbone
        own = backbone.vitdet
        backbone.vitdet = VitDet(window, num_global=GLOBAL_BLOCKS)
        try:
            yield
        finally:
            backbone.vitdet = own

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that the backbone exempts from weight decay."""
        exempt = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in exempt}

    def with_folded_heads(self, fold: Mapping[str, Callable[..., nn.Linear]]) -> "Student":
        """Return a student whose heads end in the teachers' own spaces.

        The backbone is shared with this one; the heads are copies, so this one trains on.

        Args:
            fold: For each teacher, what to make of the last linear layer of its spatial head and
                the keyword `blocks` (see `TeacherHead.fold`); by `summary_key(label)`, of its
                summary head.
        """
        folded = copy.copy(self)
        vars(folded).pop("answer", None)  # compiled, it would answer with the heads of this one
        folded._modules = dict(self._modules)
        folded.heads = copy.deepcopy(self.heads)
        for name, change in fold.items():
            label, _, part = name.partition("/")
            cast(TeacherHead, folded.heads[label]).fold(change, part or "spatial")
        return folded

    def as_released(self) -> "Student":
        """Return a student with plain weights: spectral norms and adapters are folded into them.

        The heads are shared. The backbone is built anew: torch keeps a parametrisation in a class
        that copies share, so what is removed from a copy is gone from the original (and from the
        average) as well.
        """
        state = self.backbone.state_dict()
        released = merged(spectral.baked(state))
        if released.keys() == state.keys():
            return self
        plain = copy.copy(self)
        plain._modules = dict(self._modules)
        name, kwargs = self.recipe
        with torch.device(self.mean.device):
            plain.backbone = create_backbone(name, **kwargs).to(self.mean.dtype)
        plain.backbone.load_state_dict(released)
        plain.backbone.train(self.backbone.training)
        return plain


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a backbone's state with its adapters (`zoo.students.lora`) added to the weights."""
    plain = {}
    for key, value in state.items():
        layer, base, leaf = key.partition(".base_layer.")
        if base and leaf == "weight":
            up, down = (state[f"{layer}.lora_{side}.default.weight"] for side in "BA")
            value = value + up @ down
        if ".lora_" not in key:
            plain[f"{layer}.{leaf}" if base else key] = value
    return plain


def _at_token(features: Features, place: int) -> Features:
    """Return features with one of their summaries [B n D]."""
    assert features.summary is not None
    return Features(features.summary[:, place], features.spatial)


def _normalised(features: Features) -> Features:
    """Put the map through a layer norm without scale and shift (C-RADIOv4, 2.3)."""
    assert features.spatial is not None  # every backbone of `read_features` has a map
    wide = torch.promote_types(features.spatial.dtype, torch.float32)
    spatial = features.spatial.to(wide)
    return Features(None, F.layer_norm(spatial, spatial.shape[-1:]))
