"""How much slower a forward pass is while it is scored: tokens a second on one GPU.

python3 benchmarks/importance_rate.py                  # a Llama and a hybrid of about 1 B, bf16
python3 benchmarks/importance_rate.py --json FILE
python3 benchmarks/importance_rate.py --tiny           # toys in float32, on a CPU too

Random weights and tokens; all axes of widths are scored (stream, FFN, heads, groups, heads and
channels of the state-space layers). Plain and scoring passes take turns, and the medians count.
transformers' plain scan is slow and would hide any overhead, so for the hybrid the overhead is also
given as a share of the time with the scans taken out: the mixers then return their x.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.axes import Shapes, named_shapes
from zoo.students.prune.score import taps_of
from zoo.students.prune.taps import Taps, seen_products

LLAMA: dict[str, Any] = dict(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128_256,
    tie_word_embeddings=True,
)
# The proportions of Nemotron-H 8B: 24 state-space, 24 FFN and 4 attention layers, narrower.
PATTERN = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
HYBRID: dict[str, Any] = dict(
    hidden_size=1536,
    intermediate_size=6144,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=128,
    mamba_num_heads=48,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=8,
    chunk_size=128,
    vocab_size=131_072,
    tie_word_embeddings=False,
)
KINDS = {"M": "mamba", "-": "mlp", "*": "attention"}
TINY: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=256,
)


def build(name: str, tiny: bool) -> nn.Module:
    """Build one of the two models with random weights."""
    import transformers

    if name == "llama":
        sizes: dict[str, Any] = LLAMA | (TINY | dict(num_hidden_layers=2) if tiny else {})
        config: Any = transformers.LlamaConfig(**sizes)
        return transformers.LlamaForCausalLM(config).eval()
    pattern = "M-*-" if tiny else PATTERN
    small: dict[str, Any] = TINY | dict(
        mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=2
    )
    config = transformers.NemotronHConfig(
        layers_block_type=[KINDS[letter] for letter in pattern],
        **(HYBRID | (small if tiny else {})),
    )
    return transformers.NemotronHForCausalLM(config).eval()


@contextmanager
def without_scans(model: nn.Module) -> Iterator[None]:
    """Let the state-space mixers skip their convolution and scan; all products stay."""
    mixers: list[Any] = [m for m in model.modules() if type(m).__name__.endswith("Mamba2Mixer")]

    def skips(mixer: Any) -> Any:
        width = mixer.intermediate_size

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            del args, kwargs
            gate, x = mixer.in_proj(hidden_states)[..., : 2 * width].split(width, -1)
            return mixer.out_proj(mixer.norm(x.contiguous(), gate.contiguous()))

        return forward

    try:
        for mixer in mixers:
            mixer.forward = skips(mixer)
        yield
    finally:
        for mixer in mixers:
            del mixer.forward


def seconds(call: Any, device: torch.device) -> float:
    """Time one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    model: nn.Module, shapes: Shapes, ids: Tensor, *, steps: int, rounds: int
) -> dict[str, float]:
    """Time plain and scoring passes over the same batches, in turns."""
    batches = [{"input_ids": ids}] * steps
    axes = [axis for axis in shapes.sizes if shapes.readers(axis)]

    @torch.no_grad()
    def plain() -> None:
        with seen_products(model):  # no cache of keys there either
            for batch in batches:
                model(**batch)

    def scoring() -> None:
        taps = Taps(model, taps_of(shapes, axes))
        taps.run(model, batches)
        taps.scores()

    for call in (plain, scoring):
        call()
    times = [(seconds(plain, ids.device), seconds(scoring, ids.device)) for _ in range(rounds)]
    base, scored = (statistics.median(column) for column in zip(*times, strict=True))
    tokens = ids.numel() * steps
    return dict(
        plain_tokens_per_s=tokens / base,
        scoring_tokens_per_s=tokens / scored,
        share=base / scored,
        plain_s=base,
        scoring_s=scored,
        taps=len(list(taps_of(shapes, axes))),
    )


def main() -> None:
    """Measure both models, print, and write JSON."""
    parser = argparse.ArgumentParser(description="Plain and scoring passes.")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    length = 64 if args.tiny else args.length
    how: dict[str, Any] = dict(steps=2 if args.tiny else 32, rounds=2 if args.tiny else 3)
    found: dict[str, Any] = dict(
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        torch=torch.__version__,
        batch=args.batch,
        length=length,
    )
    for name in ("llama", "hybrid"):
        torch.manual_seed(0)
        with device:
            torch.set_default_dtype(dtype)
            model = build(name, args.tiny)
            torch.set_default_dtype(torch.float32)
        shapes = named_shapes(model)
        ids = torch.randint(0, 256, (args.batch, length), device=device)
        print(f"{name}: {shapes.count() / 1e9:.2f} B")
        if name == "hybrid":
            with without_scans(model):
                found[f"{name}, no scans"] = measure(model, shapes, ids, **how)
            # The plain scan takes most of the time, and 6 GB for each row of 2,048 tokens.
            found[name] = measure(model, shapes, ids[:1], steps=2, rounds=2)
            extra = found[name]["scoring_s"] - found[name]["plain_s"]
            print(f"{name}: {extra:.3f} s more for two rows with their scans")
        else:
            found[name] = measure(model, shapes, ids, **how)
        found.setdefault("numbers", {})[name] = shapes.count()
        del model
    for name, row in found.items():
        if isinstance(row, dict) and "share" in row:
            print(
                f"{name:20} plain {row['plain_tokens_per_s']:12,.0f} tokens/s, scoring "
                f"{row['scoring_tokens_per_s']:12,.0f}: {row['share']:.1%} ({row['taps']} taps)"
            )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
