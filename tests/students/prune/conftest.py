"""Tiny models of every architecture that the tables cover, in float64, with weights that show."""

from functools import cache
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn

import zoo  # noqa: F401  registers zoo's families with timm
from zoo.axes import Shapes, State, named_shapes
from zoo.language.classes import find_class
from zoo.students.prune.proof import Forward, forward_of

ERADIO = dict(
    depths=(1, 1, 1, 1),
    dim=8,
    num_heads=(2, 4),
    in_dim=6,
    neck_dim=20,
    bias_hidden=12,
    trained_window=2,
    num_classes=7,
    return_full_features=True,
)

TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", dict(embed_dim=24, depth=2, num_heads=4, img_size=32)),
    "vit_reg": (
        "vit_small_patch14_reg4_dinov2",
        dict(embed_dim=24, depth=2, num_heads=4, img_size=28, init_values=0.5, num_classes=7),
    ),
    "vit_swiglu": (
        "vit_giant_patch14_dinov2",
        dict(embed_dim=24, depth=2, num_heads=4, img_size=28, init_values=0.5, num_classes=7),
    ),
    "vit_map": (
        "vit_base_patch16_siglip_224",
        dict(embed_dim=24, depth=2, num_heads=4, img_size=32, num_classes=7),
    ),
    "eva02": (
        "eva02_tiny_patch14_224",
        dict(embed_dim=24, depth=2, num_heads=2, img_size=28, num_classes=7),
    ),
    "eva02_base": (
        "eva02_base_patch14_224",
        dict(embed_dim=24, depth=2, num_heads=2, img_size=28, num_classes=7),
    ),
    "dinov3": (
        "vit_small_patch16_dinov3",
        dict(embed_dim=32, depth=2, num_heads=2, img_size=32, num_classes=7, init_values=0.5),
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(embed_dim=16, depths=(1, 2), num_heads=(2, 4), img_size=32, window_size=4),
    ),
    "swinv2": (
        "swinv2_tiny_window8_256",
        dict(embed_dim=16, depths=(1, 2), num_heads=(2, 4), img_size=32, window_size=4),
    ),
    "convnext": ("convnext_tiny", dict(dims=(8, 12, 16, 20), depths=(1, 1, 2, 1))),
    "convnextv2": ("convnextv2_tiny", dict(dims=(8, 12, 16, 20), depths=(1, 1, 2, 1))),
    "resnet": ("resnet18", dict(num_classes=7, channels=(8, 12, 16, 20), layers=(1, 2, 1, 1))),
    "resnet_bottleneck": (
        "resnet50",
        dict(num_classes=7, channels=(4, 6, 8, 10), layers=(1, 2, 1, 1)),
    ),
    "efficientnet": ("efficientnet_b0", dict(num_classes=7)),
    "efficientnet_lite": ("tf_efficientnet_lite0", dict(num_classes=7)),
    "fastervit": (
        "fastervit_0",
        dict(dim=8, stem_dim=6, depths=(1, 1, 1, 1), num_heads=(2, 4), img_size=128),
    ),
    "mambavision": (
        "mambavision_t",
        dict(dim=8, stem_dim=6, depths=(1, 1, 2, 2), num_heads=(2, 4), img_size=64),
    ),
    "eradio": (
        "eradio_nano",
        dict(ERADIO, light=False, neck_start=1),
    ),
    "eradio_light": ("eradio_nano", ERADIO),
    "radio": (
        "radio_vit_base_patch16",
        dict(embed_dim=24, depth=2, num_heads=4, img_size=64, max_img_size=64),
    ),
}


def llama_like(**changes: Any) -> dict[str, Any]:
    return (
        dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=40,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        | changes
    )


VIT = dict(
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=16,
)
TEXT = dict(
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=40,
    max_position_embeddings=16,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
)
MOE = dict(num_local_experts=4, num_experts_per_tok=2)

TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", llama_like()),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", llama_like()),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", llama_like(tie_word_embeddings=True)),
    "mistral": ("MistralConfig", "MistralForCausalLM", llama_like()),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", llama_like(num_hidden_layers=2)),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", llama_like()),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", llama_like(**MOE)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        llama_like(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
    ),
    "laguna": (
        "LagunaConfig",
        "LagunaForCausalLM",
        llama_like(
            num_attention_heads_per_layer=[4, 8],
            layer_types=["full_attention", "sliding_attention"],
            mlp_layer_types=["dense", "sparse"],
            sliding_window=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=20,
        ),
    ),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        dict(
            hidden_size=32,
            num_heads=8,
            head_dim=8,
            state_size=6,
            n_groups=2,
            num_hidden_layers=2,
            vocab_size=40,
            chunk_size=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        llama_like(
            layers_block_type=["mamba", "attention", "mlp", "moe"],
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=6,
            n_groups=2,
            chunk_size=4,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            moe_shared_expert_intermediate_size=20,
            n_group=1,
            topk_group=1,
        ),
    ),
    "falcon_h1": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        llama_like(
            mamba_d_ssm=64,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_n_groups=2,
            mamba_d_state=6,
            mamba_chunk_size=4,
            mamba_rms_norm=True,
            ssm_multipliers=[0.5, 0.7, 1.1, 1.3, 1.7],
            key_multiplier=0.8,
            embedding_multiplier=1.5,
        ),
    ),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        llama_like(
            num_hidden_layers=2,
            layer_types=["mamba", "attention"],
            position_embedding_type="rope",
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=20,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_n_groups=2,
            mamba_d_state=6,
            mamba_chunk_size=4,
            attention_multiplier=0.3,
        ),
    ),
    "zamba2": (
        "Zamba2Config",
        "Zamba2ForCausalLM",
        dict(
            hidden_size=32,
            num_hidden_layers=5,
            layers_block_type=["mamba", "hybrid", "hybrid", "mamba", "hybrid"],
            num_mem_blocks=2,
            intermediate_size=48,
            num_attention_heads=4,
            adapter_rank=3,
            use_mem_rope=True,
            use_shared_attention_adapter=True,
            n_mamba_heads=8,
            mamba_headdim=8,
            mamba_ngroups=2,
            mamba_d_state=6,
            chunk_size=4,
            vocab_size=40,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "hyena": (
        "HyenaConfig",
        "HyenaForCausalLM",
        dict(
            hidden_size=32,
            intermediate_size=48,
            pattern="smla",
            se_groups=4,
            mr_groups=2,
            mr_length=16,
            li_order=4,
            num_attention_heads=4,
            vocab_size=40,
            max_position_embeddings=64,
        ),
    ),
    "siglip": (
        "SiglipConfig",
        "SiglipModel",
        dict(vision_config=VIT, text_config=TEXT | dict(projection_size=24)),
    ),
    "siglip_vision": ("SiglipVisionConfig", "SiglipVisionModel", VIT),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        dict(vision_config=VIT, text_config=TEXT, projection_dim=20),
    ),
    "dinov2": ("Dinov2Config", "Dinov2Model", VIT | dict(layerscale_value=0.5)),
    "bert": ("BertConfig", "BertModel", TEXT),
    "llava": (
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        dict(image_token_index=39, image_seq_length=4, vision_feature_layer=-1),
    ),
}


EFFICIENTNETS = ("efficientnet", "efficientnet_lite")
"""They come in no small size: a few of their axes stand for all."""


def build_tiny(name: str) -> nn.Module:
    """Build a tiny model with random weights, in float64 and evaluation mode."""
    torch.manual_seed(0)
    if name in TIMM:
        model = timm.create_model(TIMM[name][0], **TIMM[name][1])
    else:
        model = from_transformers(name)
    # float64 takes minutes there
    return model.eval() if name in EFFICIENTNETS else model.double().eval()


def from_transformers(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config_class, model_class, fields = TRANSFORMERS[name]
    if name == "llava":
        fields = fields | dict(
            vision_config=transformers.SiglipVisionConfig(**VIT, vision_use_head=False),
            text_config=transformers.LlamaConfig(**llama_like()),
            vision_feature_select_strategy="full",
        )
    if name == "granite_hybrid":  # its released configurations have none
        fields = {key: value for key, value in fields.items() if key != "head_dim"}
    config = find_class(config_class)(**fields)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the grouped product has no float64
    return find_class(model_class)(config)


def inputs_of(name: str) -> dict[str, Tensor]:
    """Make inputs that show every axis of a tiny model."""
    torch.manual_seed(1)
    if name in TIMM:
        size = INPUT_SIZES.get(name, 32)
        dtype = torch.float32 if name in EFFICIENTNETS else torch.float64
        return {"x": torch.randn(2, 3, size, size, dtype=dtype)}
    ids = torch.randint(3, 38, (2, 7))
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    if name in ("siglip_vision", "dinov2"):
        return {"pixel_values": pixels}
    if name in ("siglip", "clip"):
        return {"input_ids": ids, "pixel_values": pixels}
    if name == "llava":
        ids[:, 1:5] = 39
        return {"input_ids": ids, "pixel_values": pixels}
    return {"input_ids": ids}


INPUT_SIZES = {
    "vit_reg": 28,
    "vit_swiglu": 28,
    "eva02": 28,
    "eva02_base": 28,
    "fastervit": 128,
    "mambavision": 64,
    "eradio": 64,
    "eradio_light": 64,
    "radio": 64,
}


@torch.no_grad()
def awaken(model: nn.Module) -> nn.Module:
    """Give every weight a size at which it shows in the outputs: norms, biases and scales too."""
    torch.manual_seed(2)
    for name, tensor in model.named_parameters():
        if tensor.ndim < 2 or any(word in name for word in ("table", "embed", "poles")):
            tensor.add_(torch.randn_like(tensor) * 0.3)
        else:
            tensor.normal_(std=2 / tensor[0].numel() ** 0.5)
    for name, tensor in model.named_buffers():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.3)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    return model


class Tiny(NamedTuple):
    name: str
    model: nn.Module
    shapes: Shapes
    state: State
    forward: Forward
    inputs: dict[str, Tensor]


@cache
def tiny(name: str) -> Tiny:
    model = awaken(build_tiny(name))
    inputs = inputs_of(name)
    state = dict(model.state_dict())
    return Tiny(name, model, named_shapes(model), state, forward_of(model, inputs), inputs)


@pytest.fixture(params=[*TIMM, *TRANSFORMERS])
def each(request: pytest.FixtureRequest) -> Tiny:
    """One tiny model of each architecture."""
    return tiny(request.param)


@pytest.fixture
def build():
    """Build the tiny model of a name."""
    return tiny


@pytest.fixture
def timm_names() -> dict[str, tuple[str, dict[str, Any]]]:
    """timm's names of the tiny models, and the arguments they were built with."""
    return TIMM
