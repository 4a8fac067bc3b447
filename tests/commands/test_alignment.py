"""What zoo writes goes into TRL as it is: a pruned tower learns from one preference by DPO."""

import math

import pytest
import torch

from zoo.cli import main
from zoo.language.open import open_language_model

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
)  # fmt: skip


def byte_tokenizer():
    """Build a tokenizer of transformers with one token a byte."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    marks = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    vocabulary = {word: i for i, word in enumerate([*letters, *marks.values()])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **marks)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_a_pruned_llama_takes_a_step_of_dpo(tmp_path, monkeypatch):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    parent, child, out = (tmp_path / name for name in ("parent", "child", "aligned"))
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(parent)
    byte_tokenizer().save_pretrained(parent)
    words = ("--to", "ffn=0.5,stream=0.5", "--score", "magnitude", "--out", str(child))
    main(["prune", str(parent), *words])

    pair = dict(prompt="2 + 2 is", chosen=" 4", rejected=" 5")
    arguments = trl.DPOConfig(
        output_dir=str(out), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model=str(child), args=arguments, train_dataset=datasets.Dataset.from_list([pair] * 4),
        processing_class=transformers.AutoTokenizer.from_pretrained(child),
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    # policy and reference are one at first, so that the loss is -log sigmoid(0)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[1] < losses[0]
    trainer.save_model(str(out))
    before, after = (open_language_model(str(folder)) for folder in (child, out))
    assert after.config.intermediate_size == before.config.intermediate_size == 12
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
