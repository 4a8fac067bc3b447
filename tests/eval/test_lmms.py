"""lmms-eval's own registry and instances reach a model of zoo's."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval.api.model", reason="lmms-eval is not installed")

from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2

from zoo.eval.multimodal.lmms_plugin import manifest
from zoo.language.open import open_language_model
from zoo.multimodal.open import build_llava, open_tower, open_vlm


def test_an_instance_of_lmms_eval_is_answered_as_transformers_generates(tmp_path):
    torch.manual_seed(0)
    tower = open_tower("resnet10t", size=32)
    model = build_llava(tower, open_language_model("llama_tiny/random"), image_token=257)
    model.save_pretrained(tmp_path)
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    asked = registry.get_model_class("zoo_vlm")(pretrained=str(tmp_path), device="cpu")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    rows = [dict(picture=Image.fromarray(pixels))]
    asked.task_dict = {"mine": {"test": rows}}
    settings = dict(max_new_tokens=5, until=["\n\n"])
    arguments = ("what is it?", settings, lambda row: [row["picture"]], 0, "mine", "test")
    about = dict(task="mine", doc_id=0, repeats=1)
    (said,) = asked.generate_until([Instance("generate_until", arguments, 0, about)])
    ids = torch.tensor([[257] * model.config.image_seq_length + list(b"\nwhat is it?\n")])
    begins = getattr(asked.tokens, "begin", None)
    ids = ids if begins is None else torch.cat([torch.tensor([[begins]]), ids], 1)
    image = torch.from_numpy(pixels.transpose(2, 0, 1))[None].float() / 255
    made = open_vlm(str(tmp_path)).generate(
        input_ids=ids, pixel_values=image, attention_mask=torch.ones_like(ids), max_new_tokens=5,
        do_sample=False, eos_token_id=[asked.tokens.end], pad_token_id=asked.tokens.end,
    )  # fmt: skip
    written = [t for t in made[0, ids.shape[1] :].tolist() if t < 256]
    assert said == bytes(written).decode(errors="replace").split("\n\n")[0].strip()
