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
        name: An `hf:` teacher of type SAM; the weights are the teacher's own. Features are those
            before its neck, or behind it (`+neck`): their width tells which, if the two differ.

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
        self.neck = network.vision_encoder.neck.requires_grad_(False).to(device)
        del network.vision_encoder  # the features come from elsewhere
        self.network: Any = network.eval().requires_grad_(False).to(device)
        vision = config.vision_config
        self.side, self.behind = vision.image_size, name.neck
        self.widths = (vision.hidden_size, vision.output_channels)
        self.grid = (self.side // vision.patch_size,) * 2

    @torch.no_grad()
    def __call__(
        self, features: Float[Tensor, "B h w C"], points: Float[Tensor, "B p 2"]
    ) -> Float[Tensor, "B p y x"]:
        """Return one mask a point, as logits: the one of three with the highest predicted IoU.

        Args:
            features: Features before the encoder's neck or behind it, on any grid.
            points: Column and row of each point, as shares of the image in [0, 1].

        Raises:
            ValueError: the features have neither width.
        """
        width, (before, behind) = features.shape[-1], self.widths
        if width not in self.widths:
            raise ValueError(
                f"The features have {width} channels and those of SAM {before} before its neck and "
                f"{behind} behind it; take the head that learnt from this teacher."
            )
        maps = at_grid(features.float(), self.grid)
        is_behind = self.behind if before == behind else width == behind
        maps = maps.permute(0, 3, 1, 2) if is_behind else self.neck(maps)
        pixels = points[:, :, None] * self.side
        labels = torch.ones(pixels.shape[:3], dtype=torch.long, device=pixels.device)
        try:
            out = self.network(image_embeddings=maps, input_points=pixels, input_labels=labels)
        except RuntimeError as error:
            raise ValueError(f"SAM's decoder refuses the features: {reason(error)}.") from error
        best = out.iou_scores.argmax(dim=-1)[..., None, None, None]
        shape = (*best.shape[:3], *out.pred_masks.shape[-2:])
        return out.pred_masks.gather(2, best.expand(shape)).squeeze(2)
