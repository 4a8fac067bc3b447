"""Teachers out of transformers: `hf:ORG/NAME[@RESOLUTION]` or `hf:FOLDER[@RESOLUTION]`.

A folder is one that `save_pretrained` wrote: `config.json`, `preprocessor_config.json`, weights.
With `/random` at the end of the name only the configuration is used.

No model has an adapter of its own. What serves as the teacher follows from the network's
configuration, its signatures and its outputs:

    two towers (get_image_features and get_text_features)   the image tower
    a vision encoder in a larger model (SAM, SAM 2, SAM 3)  that encoder
    a backbone under a depth head (Depth Anything)          that backbone
    anything else that takes pixels                         the model itself

The summary is the image embedding that a text tower's is compared with, if there is one; else what
the library calls summary or pooler output, if there is one. The map is the last hidden state as the
library returns it (CLIP's is before the last norm, which only its class token passes), without the
class and register tokens in front. SAM's is the map before its neck, as of timm's SAM
(`zoo.teachers.from_timm`); `hf:facebook/sam-vit-huge+neck` has the one behind it.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.features import Features
from zoo.teachers.hub import how_to_fetch, read_license
from zoo.teachers.name import FOLDER, TeacherName
from zoo.teachers.teacher import Frozen, check_patches, no_neck, reason, seeded_init, size_errors

CLASSES = {"sam3_video": "Sam3Model"}
"""Model types that are opened with another class than AutoModel's."""
TRUNKS = {"sam3_vision_model": "backbone"}
"""Encoders whose neck comes after the last hidden state, so that it can be left out."""
NECKS = ("sam_vision_model", "sam_hq_vision_model")
"""Encoders whose neck comes before the last hidden state."""
SUMMARIES = ("image_embeds", "summary", "pooler_output")
MAPS = ("feature_maps", "last_hidden_state")
"""Names of outputs; the first that a network returns is taken, and of several maps the last."""
SPECIAL = {"radio": "features", "sam2_vision_model": "fpn_hidden_states"}
"""Types whose map has a name of its own. SAM 2's is the level that its mask decoder starts from."""
PREFIXES = ("num_register_tokens", "num_registers", "num_cls_tokens", "n_cls_tokens")
"""Fields of a configuration that count tokens before the patches."""
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""PIL's numbers of interpolations, which image processors keep."""
PATH = (".", "/", "~")
"""A name that begins with one of these is a folder, not a repository."""
REFUSED = (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, TypeError)
"""Errors that transformers raises about names, files and weights."""


class TransformersTeacher(Frozen):
    """A vision network of transformers; the head of this file says what its features are.

    Args:
        network: A model that takes pixels, or one with `get_image_features`.
        pooled: Whether the pooler's weights are there; without them its output is not used.
    """

    def __init__(self, name: str, network: nn.Module, *, pooled: bool = True, **options: Any):
        # before Frozen.__init__, which calls `features` at once
        forward = getattr(network, "get_image_features", network.forward)
        self.parameter_names = inspect.signature(forward).parameters.keys()
        self.vision = _vision_config(network.config)
        self.pooled = pooled
        super().__init__(name, network, **options)

    def features(self, x) -> Features:
        forward = getattr(self.network, "get_image_features", self.network)
        out = forward(**self._inputs(x))
        summary = _first(out, SUMMARIES) if self.pooled else None
        spatial = _first(out, (SPECIAL.get(self.vision.model_type, ""), *MAPS))
        if spatial is None:
            raise ValueError(f"it returns {', '.join(out)}, and no map among them")
        prefix, spatial = to_map(spatial, (x.shape[-2], x.shape[-1]), self.vision)
        if not self.pooled and prefix is not None:
            summary = prefix[:, 0]
        return Features(None if summary is None else summary.flatten(1), spatial)

    def _inputs(self, x: Tensor) -> dict[str, Any]:
        if "spatial_shapes" in self.parameter_names:
            return as_patches(x, _patch(self.vision))
        inputs: dict[str, Any] = dict(pixel_values=x)
        if "interpolate_pos_encoding" in self.parameter_names:
            trained = _pair(self.vision.image_size)
            inputs["interpolate_pos_encoding"] = trained != (x.shape[-2], x.shape[-1])
        return inputs


def open_hf(name: TeacherName, device: torch.device) -> TransformersTeacher:
    """Build a model's image encoder, with its image processor's mean, deviation and size.

    Raises:
        ValueError: the model or its files are not there, it is no image encoder, or it refuses the
            resolution.
    """
    config = read_config(name)
    prepared = _preprocessing(name, config)
    if name.resolution:
        check_patches(name, _patch(_vision_config(config)) or 1)
        prepared["size"] = (name.resolution, name.resolution)
    network, missing = read_network(name, config, device)
    known = name.weights != "random" and device.type != "meta"
    with size_errors(name, prepared["size"]):
        teacher = TransformersTeacher(
            name.describe(),
            _image_encoder(network, name),
            pooled=not missing,
            license=read_license(name.name) if known else None,
            device=device,
            **prepared,
        )
    teacher.source = name
    return teacher


class TextTower:
    """Texts in, their embeddings [T D] out: the tokenizer and text tower of a CLIP-like model.

    Raises:
        ValueError: the model has no text tower, or its tokenizer is not there.
    """

    def __init__(self, name: TeacherName, device: torch.device):
        from transformers import AutoTokenizer

        config = read_config(name)
        network, _ = read_network(name, config, device)
        if not _has_two_towers(network):
            raise ValueError(
                f"{name.describe()} has no text tower that its images are compared with."
            )
        files = "Put tokenizer.json and tokenizer_config.json beside its config.json."
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name.name)
        except REFUSED as error:
            raise ValueError(
                f"The tokenizer of {name.describe()} could not be opened: {reason(error)}. {files}"
            ) from error
        if len(self.tokenizer) <= len(self.tokenizer.all_special_ids):
            # without its files, transformers makes an empty tokenizer of some kinds
            raise ValueError(f"The tokenizer of {name.describe()} is not there. {files}")
        _delete_tower(network, "vision")
        self.network = network.eval().requires_grad_(False).to(device)
        self.length = config.text_config.max_position_embeddings
        self.device = device

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        # SigLIP was trained on texts of full length; padding makes no difference to CLIP
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        return self.network.get_text_features(**tokens.to(self.device)).pooler_output


def read_config(name: TeacherName) -> Any:
    """Read a model's configuration.

    Raises:
        ValueError: it is not there, or of a type that transformers does not know.
    """
    from transformers import AutoConfig

    if name.name.startswith(PATH) and not Path(name.name).is_dir():
        raise ValueError(f"There is no folder {name.name}. {_files_hint(name)}")
    if (Path(name.name) / "heads.json").is_file():
        raise ValueError(
            f"{name.name} is a student's export, in timm's form; write zoo:{FOLDER}{name.name}."
        )
    try:
        return AutoConfig.from_pretrained(name.name)
    except REFUSED as error:
        raise ValueError(
            f"{name.describe()} could not be opened: {reason(error)}. {_files_hint(name)}"
        ) from error


def read_network(name: TeacherName, config: Any, device: torch.device) -> tuple[Any, list[str]]:
    """Build a whole model in float32.

    Returns:
        The model, and the keys of its pooler's weights if they are missing.

    Raises:
        ValueError: transformers has no such model, or other weights are missing.
    """
    kind = _class_of(name, config)
    if kind.main_input_name != "pixel_values" and not _has_two_towers(kind):
        raise ValueError(
            f"{name.describe()} is a {kind.__name__}, which is not an image encoder. "
            "Name the encoder that it was built with."
        )
    if device.type == "meta" or name.weights == "random":
        with seeded_init(device):
            return kind(config).float(), []
    try:
        network, loading = kind.from_pretrained(
            name.name, config=config, dtype=torch.float32, output_loading_info=True
        )
    except REFUSED as error:
        raise ValueError(
            f"The weights of {name.describe()} could not be loaded: {reason(error)}. "
            f"{_files_hint(name)} {name.describe()}/random is for a trial run."
        ) from error
    missing = sorted(loading["missing_keys"])
    lost = [key for key in missing if not re.search(r"(^|\.)pooler\.", key)]
    if lost:
        raise ValueError(
            f"The weights of {name.describe()} lack {len(lost)} tensors of {kind.__name__}, "
            f"{lost[0]} first; they are another model's."
        )
    return network, missing


def _class_of(name: TeacherName, config: Any) -> Any:
    import transformers
    from transformers import MODEL_FOR_DEPTH_ESTIMATION_MAPPING, MODEL_MAPPING

    saved = (config.architectures or [""])[0]
    if saved.endswith("VisionModelWithProjection"):
        return getattr(transformers, saved)
    if config.model_type in CLASSES:
        return getattr(transformers, CLASSES[config.model_type])
    for mapping in (MODEL_MAPPING, MODEL_FOR_DEPTH_ESTIMATION_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise ValueError(
        f"{name.describe()} is a {config.model_type}, for which there is no AutoModel."
    )


def _has_two_towers(network: Any) -> bool:
    return hasattr(network, "get_image_features") and hasattr(network, "get_text_features")


def _delete_tower(network: nn.Module, tower: str) -> None:
    for child in [key for key, _ in network.named_children() if key.startswith(tower)]:
        delattr(network, child)


def _image_encoder(network: Any, name: TeacherName) -> nn.Module:
    """Return the part of a model that takes images; a text tower is deleted from it.

    Raises:
        ValueError: the map behind a neck is asked for, and this is no SAM.
    """
    encoder = getattr(network, "vision_encoder", network)
    if encoder.config.model_type not in NECKS:
        if name.neck:
            raise no_neck(name)
    elif not name.neck:
        encoder.neck = nn.Identity()
    if _has_two_towers(network):
        _delete_tower(network, "text")
        return network
    if type(network).__name__.endswith("ForDepthEstimation"):
        return network.backbone
    trunk = TRUNKS.get(encoder.config.model_type)
    return getattr(encoder, trunk) if trunk else encoder


def _preprocessing(name: TeacherName, config: Any) -> dict[str, Any]:
    """Read mean, deviation, size and interpolation from the model's image processor."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name.name)
    except REFUSED as error:
        raise ValueError(
            f"The image processor of {name.describe()} could not be opened: {reason(error)}. "
            "Put its preprocessor_config.json beside config.json."
        ) from error
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if processor.do_normalize:
        mean, std = processor.image_mean, processor.image_std
    # processors take values up to 255, `Frozen` up to 1
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255
    return dict(
        mean=tuple(m / scale for m in mean),
        std=tuple(s / scale for s in std),
        size=_own_size(processor, config),
        interpolation=RESAMPLE.get(processor.resample, ""),
    )


def _own_size(processor: Any, config: Any) -> tuple[int, int]:
    cropped = getattr(processor, "do_center_crop", None) and processor.crop_size
    size = cropped or processor.size or {}
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    side = size.get("shortest_edge") or size.get("longest_edge")
    if not side and getattr(processor, "max_num_patches", None):
        side = int(processor.max_num_patches**0.5) * processor.patch_size
    return (side, side) if side else _pair(_vision_config(config).image_size)


def to_map(x: Tensor, size: tuple[int, int], config: Any) -> tuple[Tensor | None, Tensor]:
    """Lay a network's last hidden state out as a map.

    Args:
        x: [B N C] tokens, prefix tokens first, or a map with its channels first or last.
        size: Rows and columns of the image, in pixels.
        config: The network's configuration, which states its patch and its prefix tokens.

    Returns:
        The prefix tokens [B n C], `None` if there are none, and the map [B H W C].

    Raises:
        ValueError: the number of tokens is not that of the image's patches and the prefix tokens.
    """
    if x.ndim == 4 and _is_grid(x.shape[2:], size):
        return None, x.permute(0, 2, 3, 1)
    if x.ndim == 4 and _is_grid(x.shape[1:3], size):
        return None, x
    if x.ndim != 3:
        raise ValueError(f"its output of shape {tuple(x.shape)} is neither tokens nor a map")
    count, patch = x.shape[1], _patch(config)
    stated = sum(getattr(config, field, 0) or 0 for field in PREFIXES)
    for level in range(6):
        stride = (patch or 4) << level
        grid = (size[0] // stride, size[1] // stride)
        prefix = count - grid[0] * grid[1]
        # configurations do not count class and distillation tokens; pyramids of patches have none
        if prefix == 0 or (stride == (patch or stride) and 0 <= prefix - stated <= 2):
            return x[:, :prefix] if prefix else None, x[:, prefix:].unflatten(1, grid)
    raise ValueError(
        f"its {count} tokens are not those of {patch or 'unknown'} px patches after {stated} to "
        f"{stated + 2} others; choose the model from timm, or wrap it with torch:package.function"
    )


def as_patches(x: Tensor, patch: int) -> dict[str, Tensor | None]:
    """Cut images [B 3 H W] into lists of patches, as SigLIP 2's NaFlex models take (2502.14786).

    Args:
        patch: Side of a patch in pixels.
    """
    rows, cols = x.shape[-2] // patch, x.shape[-1] // patch
    cut = x.unflatten(-1, (cols, patch)).unflatten(-3, (rows, patch))  # B 3 rows p cols p
    return dict(
        pixel_values=cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2),
        pixel_attention_mask=None,  # there is no padding to mask
        # the model reads them as Python numbers; from the CPU, nothing waits for the device
        spatial_shapes=torch.tensor([[rows, cols]], device="cpu").expand(len(x), 2),
    )


def _first(out: Mapping[str, Any], names: Sequence[str]) -> Tensor | None:
    found = next((out[key] for key in names if out.get(key) is not None), None)
    return found[-1] if isinstance(found, tuple | list) else found


def _is_grid(sides: Sequence[int], size: tuple[int, int]) -> bool:
    """Tell whether a map has the proportions of the image, up to one cell that was cut off."""
    return abs(sides[0] * size[1] / size[0] - sides[1]) < 1


def _pair(side: Any) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _vision_config(config: Any) -> Any:
    config = getattr(config, "detector_config", None) or config
    return getattr(config, "vision_config", None) or config


def _patch(config: Any) -> int:
    """Return the pixels from one patch to the next; 0 if the configuration does not say."""
    config = getattr(config, "backbone_config", None) or config
    return _pair(getattr(config, "patch_stride", 0) or getattr(config, "patch_size", 0) or 0)[0]


def _files_hint(name: TeacherName) -> str:
    files = "config.json, preprocessor_config.json and model.safetensors"
    if Path(name.name).is_dir() or name.name.startswith(PATH):
        return f"A teacher's folder holds {files}."
    return f"{how_to_fetch(name.name)} Then give it as hf:FOLDER; it must hold {files}."
