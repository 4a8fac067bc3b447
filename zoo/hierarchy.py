"""The base of a four-stage backbone, with all methods that timm's users call.

E-RADIO, FasterViT and MambaVision differ in their stages only; the rest is written once, here.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from jaxtyping import Float
from timm.layers import ClassifierHead, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.layers.stage import Stage
from zoo.licence import log_licence
from zoo.weights import check_keys, unwrapped

HINT = "Is it a file of another size? `zoo list` shows the names."


def _start_linear(part: nn.Module) -> None:
    """Initialise linear layers as the published FasterViT; other layers keep PyTorch's start."""
    if isinstance(part, nn.Linear) and not part.weight.is_meta:  # slow there, and for nothing
        trunc_normal_(part.weight, std=0.02)
        if part.bias is not None:
            nn.init.zeros_(part.bias)


class Hierarchy(nn.Module):
    """stem -> stages with down-sampling between them -> norm -> pool -> classifier.

    A family's constructor makes stem and stages and hands them to `_assemble`; the last stage's
    `downsample` is `nn.Identity`. Strides are 4, 8, 16, 32, and each stage doubles the width.
    """

    stem: nn.Module
    stages: Sequence[Stage]
    norm: nn.Module
    head: ClassifierHead

    no_decay: tuple[str, ...] = ()
    """Parts of the names of parameters that weight decay must leave alone."""

    published: str
    """Pattern that keys of published weights match and ours do not."""

    def _assemble(
        self,
        stem: nn.Module,
        stages: Sequence[Stage],
        dim: int,
        *,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
    ) -> None:
        self.stem = stem
        self.stages = cast(Sequence[Stage], nn.ModuleList(stages))
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dim * 2 ** (len(stages) - 1)
        self.feature_info: Any = [  # timm takes a list of dicts or its own FeatureInfo
            dict(num_chs=dim * 2**i, reduction=4 * 2**i, module=f"stages.{i}")
            for i in range(len(stages))
        ]
        self.norm = nn.BatchNorm2d(self.num_features)
        self.head = ClassifierHead(
            self.num_features, num_classes, global_pool, drop_rate, input_fmt="NHWC"
        )
        self.apply(_start_linear)

    def translate(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn a published state dict into one of this model."""
        raise NotImplementedError

    def published_in(self, state: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Return a published state dict without its authors' wrapping; `None` if it is ours."""
        bare = {re.sub(r"^((encoder|model)\.)+", "", k): v for k, v in unwrapped(state).items()}
        return bare if any(re.search(self.published, key) for key in bare) else None

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ):
        """Load weights, ours or published.

        Raises:
            ValueError: they do not fit, and `strict`; at most ten keys of each kind are listed.
        """
        published = self.published_in(state_dict)
        if published is not None:
            log_licence(self)
            state_dict = self.translate(published)
        if strict:
            check_keys(state_dict, self.state_dict(), hint=HINT, optional=r"\.num_batches_tracked$")
        return super().load_state_dict(state_dict, strict, assign)

    def forward_intermediates(
        self,
        x: Float[Tensor, "B C H W"],
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of the stages before down-sampling, as detectors want them.

        Args:
            indices: Stages to return: a list, the last so many (an int), or all (`None`).
            norm: Apply the final norm to the last stage's map.
            stop_early: Leave out the stages after the last one to return.
            output_fmt: "NCHW", the only one.
            intermediates_only: Return the maps alone, not a pair of the final map and these.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is not available; these maps are NCHW.")
        take, last = feature_take_indices(len(self.stages), indices)
        maps = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            final = i == len(self.stages) - 1
            if i in take:
                maps.append(self.norm(x) if norm and final else x)
            if not final:
                x = stage.downsample(x)
        return maps if intermediates_only else (self.norm(x), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the parts that `forward_intermediates` does not need for `indices`."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        self.stages[-1].downsample = nn.Identity()
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Return the last stage's map after the final norm."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage.downsample(stage(x))
        return self.norm(x)

    def forward_head(self, x: Float[Tensor, "B D h w"], pre_logits: bool = False) -> Tensor:
        """Pool and classify; `pre_logits` stops before the classifier."""
        # Pooled as [B h w D], so that a compiled backward pass gives maps with channels last.
        x = self.head(x.permute(0, 2, 3, 1), pre_logits=pre_logits)
        return x if x.ndim == 2 else x.permute(0, 3, 1, 2)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the linear layer of the head, or an identity."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; 0 classes leave the pooled features."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return patterns of layer groups for layer-wise learning rates (timm's convention)."""
        if coarse:
            return dict(stem=r"^stem", blocks=r"^stages\.(\d+)")
        return dict(
            stem=r"^stem",
            blocks=[
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.downsample", (99999,)),  # timm: with the layers before it
                (r"^stages\.(\d+)", (0,)),
                (r"^norm", (99999,)),
            ],
        )

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay would harm."""
        return {n for n, _ in self.named_parameters() if any(part in n for part in self.no_decay)}


def checkpoint_filter_fn(state: Mapping[str, Any], model: Hierarchy) -> dict[str, Tensor]:
    """Turn what timm has read into a state dict of `model`; one of ours is only unwrapped.

    Where the classifier differs, timm loads the rest without strictness, and what a file lacks
    would stay random in silence. So everything but the classifier is compared here.

    Raises:
        ValueError: keys are missing or extra.
    """
    published = model.published_in(state)
    ours = unwrapped(state) if published is None else model.translate(published)
    found = {key: value for key, value in ours.items() if not key.startswith("head.")}
    # no shapes: timm adapts the stem to other channels, and refuses the others itself
    own: dict[str, Tensor] = model.state_dict()
    wanted = own | {key: found[key] for key in found if key in own}
    wanted = {key: value for key, value in wanted.items() if not key.startswith("head.")}
    check_keys(found, wanted, hint=HINT, optional=r"\.num_batches_tracked$")
    return ours
