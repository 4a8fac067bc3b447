"""The mask decoder of a SAM teacher, which takes features in place of an image."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from zoo.features import at_grid
from zoo.teachers.from_transformers import read_config, read_network
from zoo.teachers.name import TeacherName
from zoo.teachers.teacher import reason


class MaskDecoder:
    """Features and points in, masks out: SAM's prompt encoder and mask decoder (2304.02643).

    Args:
        name: An `hf:` teacher of type SAM; the weights are the teacher's own.

    Raises:
        ValueError: the teacher is not opened through transformers, or is not a SAM.
    """

    def __init__(self, name: TeacherName, device: torch.device | str = "cpu"):
        if name.kind != "hf":
            raise ValueError(
                f"The mask decoder of {name.describe()} cannot be opened; SAM is opened through "
                "transformers, as hf:facebook/sam-vit-huge or hf:FOLDER."
            )
        config = read_config(name)
        if config.model_type != "sam":
            raise ValueError(
                f"hf:{name.name} is a {config.model_type}, and masks are decoded with SAM. The "
                "decoders of its successors also need maps of their trunk, which no head learns."
            )
        network, _ = read_network(name, config, torch.device(device))
        del network.vision_encoder  # the features come from elsewhere
        self.network: Any = network.eval().requires_grad_(False).to(device)
        vision = config.vision_config
        self.side, self.width = vision.image_size, vision.output_channels
        self.grid = (self.side // vision.patch_size,) * 2

    @torch.no_grad()
    def __call__(
        self, features: Float[Tensor, "B h w C"], points: Float[Tensor, "B p 2"]
    ) -> Float[Tensor, "B p y x"]:
        """Return one mask a point, as logits: the one of three with the highest predicted IoU.

        Args:
            features: Features as the encoder's neck returns them, on any grid.
            points: Column and row of each point, as shares of the image in [0, 1].

        Raises:
            ValueError: the features do not have the encoder's width.
        """
        if features.shape[-1] != self.width:
            raise ValueError(
                f"The features have {features.shape[-1]} channels and those of SAM's encoder "
                f"{self.width}; take the head that learnt from this teacher."
            )
        maps = at_grid(features.float(), self.grid).permute(0, 3, 1, 2)
        pixels = points[:, :, None] * self.side
        labels = torch.ones(pixels.shape[:3], dtype=torch.long, device=pixels.device)
        try:
            out = self.network(image_embeddings=maps, input_points=pixels, input_labels=labels)
        except RuntimeError as error:
            raise ValueError(f"SAM's decoder refuses the features: {reason(error)}.") from error
        best = out.iou_scores.argmax(dim=-1)[..., None, None, None]
        shape = (*best.shape[:3], *out.pred_masks.shape[-2:])
        return out.pred_masks.gather(2, best.expand(shape)).squeeze(2)
