"""Images with text: vision towers for transformers' Llava, and what it is given.

transformers knows `zoo_tower`, `zoo_mixture_tower` and `zoo_adaptor_tower` as soon as both are
imported, in either order, so that `LlavaForConditionalGeneration.from_pretrained(FOLDER)` loads a
model that has one of them, without remote code. This imports neither transformers nor torch.
"""

from zoo.import_hook import once_imported


def _register() -> None:
    from transformers import AutoConfig, AutoModel

    import zoo.language  # noqa: F401  StripedHyena 2 may be the language model
    from zoo.multimodal.towers import TOWERS

    for config, tower in TOWERS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, tower, exist_ok=True)


once_imported(
    "transformers.models.auto.configuration_auto", _register, outside=("zoo.", "transformers.")
)
