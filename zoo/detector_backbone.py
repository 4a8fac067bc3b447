"""Our backbones, and all of timm's, inside transformers' detectors, without remote code.

`import zoo` alone lets transformers' own `TimmBackboneConfig(backbone="mambavision_t")` find our
models. This module adds what that way lacks:

* **options** of `timm.create_model` (`img_size`, `pad_input`, `drop_path_rate`, ...), kept in the
  detector's configuration;
* **reloading a DETR**. DETR and its like take timm's model out of transformers' wrapper, the one
  place that computes the tables which no file holds (FasterViT's and E-RADIO's position offsets):
  `from_pretrained` would leave them unset. Here the wrapper stays.

Importing it registers the backbone with `AutoBackbone`; do so before loading a detector that has
one. Needs transformers, which `import zoo` does not.
"""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedModel, TimmBackboneConfig
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput

import zoo  # noqa: F401  (registers the names that `backbone` may have)

__all__ = ["ZooBackbone", "ZooBackboneConfig"]


class ZooBackboneConfig(TimmBackboneConfig):
    """Name a registered model (`backbone`), the levels to return (`out_indices`), and `options`."""

    model_type = "zoo_backbone"

    options: dict[str, Any] | None = None
    """Keywords of `timm.create_model`, plain values only: they are saved as JSON."""


class ZooBackbone(BackboneMixin, PreTrainedModel):
    """A registered model as a backbone of transformers; its features are those of timm.

    Weights are random: detectors are built before they are loaded. `model` takes the state dict
    of `timm.create_model(..., features_only=True)` with the same levels.

    Raises:
        ValueError: no model is named. In `forward`: attentions or hidden states are wanted.
    """

    config_class = ZooBackboneConfig
    main_input_name = "pixel_values"
    precision: torch.dtype = torch.float32
    """Of the backbone, by autocast; its maps are returned in float32, for the detector's boxes."""

    def __init__(self, config: ZooBackboneConfig, **kwargs: Any):
        if config.backbone is None:
            raise ValueError('No backbone is named; give one, as in backbone="mambavision_t".')
        model = timm.create_model(
            config.backbone,
            features_only=True,
            out_indices=tuple(config.out_indices or (-1,)),
            in_chans=config.num_channels,
            **(config.options or {}) | kwargs,
        )
        super().__init__(config, timm_backbone=model)
        self.model = model
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Compute the tables that no file holds; timm has initialised everything else."""
        tables = getattr(module, "init_non_persistent_buffers", None)
        if tables is not None:
            tables()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BackboneOutput | tuple[tuple[Tensor, ...]]:
        """Return the maps of `out_indices`, [B C h w] each."""
        if output_attentions or output_hidden_states:
            raise ValueError(
                "This backbone returns feature maps, and neither attentions nor hidden states; "
                "name more levels in out_indices."
            )
        if self.precision == torch.float32:
            maps = tuple(self.model(pixel_values))
        else:
            with torch.autocast(pixel_values.device.type, self.precision):
                maps = tuple(level.float() for level in self.model(pixel_values))
        return (maps,) if return_dict is False else BackboneOutput(feature_maps=maps)


AutoConfig.register(ZooBackboneConfig.model_type, ZooBackboneConfig)
AutoBackbone.register(ZooBackboneConfig, ZooBackbone)
