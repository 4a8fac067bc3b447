"""Language towers: their batches, tokenizers, and how a language model's features are read.

transformers knows StripedHyena 2 (`zoo_hyena`) as soon as both are imported, in either order. This
imports neither transformers nor torch.
"""

from zoo.import_hook import once_imported


def _register() -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from zoo.language.hyena import HyenaConfig, HyenaForCausalLM, HyenaModel

    AutoConfig.register(HyenaConfig.model_type, HyenaConfig, exist_ok=True)
    AutoModel.register(HyenaConfig, HyenaModel, exist_ok=True)
    AutoModelForCausalLM.register(HyenaConfig, HyenaForCausalLM, exist_ok=True)


once_imported(
    "transformers.models.auto.configuration_auto", _register, outside=("zoo.", "transformers.")
)
