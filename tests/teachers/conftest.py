"""Teachers are tested without a network, whatever the machine has."""

import json

import pytest


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


TEXT = dict(context_length=16, vocab_size=49408, width=16, heads=2, layers=1)
TINY = {
    "tiny-vit": dict(
        embed_dim=12,
        vision_cfg=dict(image_size=32, layers=2, width=16, head_width=8, patch_size=8),
        text_cfg=TEXT,
    ),
    "tiny-clipa": dict(
        embed_dim=12,
        vision_cfg=dict(
            image_size=32, layers=2, width=16, head_width=8, patch_size=8, no_ln_pre=True,
            pool_type="avg", final_ln_after_pool=True,
        ),
        text_cfg=dict(TEXT, pool_type="last", no_causal_mask=True),
    ),
    "tiny-sigmoid": dict(
        embed_dim=96,
        init_logit_bias=-10,
        custom_text=True,
        vision_cfg=dict(
            image_size=160, timm_model_name="test_vit3", timm_model_pretrained=False,
            timm_pool="map", timm_proj="none",
        ),
        text_cfg=dict(TEXT, no_causal_mask=True, proj_bias=True, pool_type="last"),
    ),
    "tiny-resnet": dict(
        embed_dim=12,
        vision_cfg=dict(image_size=64, layers=[1, 1, 1, 1], width=8, head_width=8),
        text_cfg=TEXT,
    ),
    "tiny-coca": dict(
        embed_dim=24,
        custom_text=True,
        vision_cfg=dict(
            image_size=32, layers=2, width=16, head_width=8, patch_size=8, attentional_pool=True,
            attn_pooler_heads=2, output_tokens=True,
        ),
        text_cfg=dict(TEXT, embed_cls=True, output_tokens=True),
        multimodal_cfg=dict(TEXT, width=24, attn_pooler_heads=2),
    ),
}  # fmt: skip
"""Models of open_clip's kinds that build in milliseconds."""


@pytest.fixture
def tiny(tmp_path_factory, monkeypatch):
    """Register `TINY` with open_clip for one test; the table comes back."""
    from open_clip import factory

    folder = tmp_path_factory.mktemp("configs")
    for name, config in TINY.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    factory.add_model_config(folder)
    return TINY


@pytest.fixture
def words():
    """A tokenizer of a few words, as transformers saves and opens it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = ["<pad>", "<eos>", "<unk>", "a", "photo", "of", "the", "cat", "dog", "red", "car", "."]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_input_names=["input_ids"],
    )
