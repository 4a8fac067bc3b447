"""What a text's length costs StripedHyena 2's operators, attention and Mamba-2, and what is moved.

python3 benchmarks/hyena_length.py --json hyena.json     # one H200, under a minute
python3 benchmarks/hyena_length.py --draw hyena.json hyena.png
python3 benchmarks/hyena_length.py --width 64 --lengths 256 512    # tried on a CPU

Three tables, all in bf16 without gradients:

lengths   one layer's operator with its projections, a text of each length. Attention is torch's
          scaled_dot_product_attention. Mamba-2 is transformers' layer where the kernels of
          mamba_ssm are installed, else the chunked form of its paper (2405.21060, section 6) in
          torch with the same weights.
forms     what an operator does between its projections, by kernels and in torch, and the forms of
          its filter, as multiples of the time to read the projections and write the result once.
decode    tokens a second from a cache, of layers as wide as the 7B's, as a share of what reading
          weights and states once would allow.

A floor is bytes over the bandwidth of copying 1 GB on this device.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.available import runs_kernels
from zoo.language import hyena_filters as filters
from zoo.language.hyena import OPERATORS, Hyena, HyenaConfig, HyenaForCausalLM
from zoo.language.hyena_cache import HyenaCache
from zoo.layers.ssd import ssd

NAMES = {"s": "Hyena SE", "m": "Hyena MR", "l": "Hyena LI", "a": "attention"}
GB = 1e9
Row = dict[str, Any]


def seconds(call: Callable[[], Any], device: torch.device, *, most: float = 0.4) -> float:
    """Return the median time of a call, of at most 20 and about `most` seconds in all."""
    call()
    times: list[float] = []
    while not times or (len(times) < 20 and sum(times) < most):
        _wait(device)
        begun = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bandwidth(device: torch.device) -> float:
    """Measure bytes a second of a copy, read and written."""
    size = 2**30 if device.type == "cuda" else 2**26
    x = torch.zeros(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * size / seconds(lambda: y.copy_(x), device)


def config_of(width: int, pattern: str) -> HyenaConfig:
    """Return the 7B's proportions at another width."""
    heads, groups = max(1, width // 128), max(1, width // 16)
    return HyenaConfig(
        hidden_size=width,
        intermediate_size=width * 11_008 // 4096 // 8 * 8,
        num_attention_heads=heads,
        se_groups=groups,
        mr_groups=groups,
        pattern=pattern,
        max_position_embeddings=2**21,
    )


# One layer at all lengths


def layer_of(letter: str, width: int, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return a layer's operator, with its projections."""
    with torch.device(options["device"]):
        tower = HyenaForCausalLM(config_of(width, letter)).model.to(options["dtype"])
    operator: Any = tower.layers[0].operator

    def forward(x: Tensor) -> Tensor:
        if letter != "a":
            return operator(x)
        return operator(x, None, tower._rotation(x, None, None, 0), None)

    return forward


class Mamba2(nn.Module):
    """A layer of Mamba-2 (2405.21060): transformers' with kernels, or its chunked form here."""

    def __init__(self, width: int, chunk: int = 128):
        super().__init__()
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        dim = min(64, 2 * width)
        config = Mamba2Config(
            hidden_size=width, num_heads=2 * width // dim, head_dim=dim, n_groups=1, state_size=128,
            num_hidden_layers=1, chunk_size=chunk,
        )  # fmt: skip
        self.mixer: Any = Mamba2Mixer(config, layer_idx=0)
        self.chunk = chunk
        self.has_kernels = False
        try:
            import mamba_ssm  # noqa: F401  # pyright: ignore[reportMissingImports]

            self.has_kernels = True
        except ImportError:
            pass

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x) if self.has_kernels else self.in_torch(x)

    def in_torch(self, x: Tensor) -> Tensor:
        """Compute the same in chunks, of which only the states follow one another."""
        m = self.mixer
        inner, state = m.num_heads * m.head_dim, m.n_groups * m.ssm_state_size
        z, xbc, dt = m.in_proj(x).split([inner, inner + 2 * state, m.num_heads], dim=-1)
        taps = m.conv1d.weight[:, 0].flip(1)
        xbc = F.silu(filters.direct(xbc, taps) + m.conv1d.bias)
        u, b, c = xbc.split([inner, state, state], dim=-1)
        u = u.unflatten(-1, (m.num_heads, m.head_dim))
        steps, falls = F.softplus(dt + m.dt_bias), -m.A_log.exp()
        y = ssd(u, steps, falls, b[:, :, None], c[:, :, None], chunk=self.chunk).out
        return m.out_proj(m.norm((y + u * m.D[:, None]).flatten(2), z))


def lengths_table(width: int, lengths: list[int], options: dict[str, Any]) -> Iterator[Row]:
    """Time every kind of layer at every length."""
    for letter in (*NAMES, "mamba"):
        if letter == "mamba":
            with torch.device(options["device"]):
                layer: Callable[[Tensor], Tensor] = Mamba2(width).to(options["dtype"])
            name = "Mamba-2" if getattr(layer, "has_kernels", False) else "Mamba-2 in torch"
        else:
            layer, name = layer_of(letter, width, options), NAMES[letter]
        for length in lengths:
            x = torch.randn(1, length, width, **options)
            try:
                ms = 1e3 * seconds(lambda: layer(x), options["device"])  # noqa: B023  used at once
            except torch.OutOfMemoryError:
                print(f"{name:16} {length:8,} tokens do not fit")
                continue
            yield dict(table="lengths", layer=name, width=width, length=length, ms=ms)


# What an operator does between its projections


def forms_of(letter: str, operator: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the forms of an operator's filter, from projections on, and the whole of it."""

    def whole(uses_kernels: bool) -> Callable[[Tensor], Tensor]:
        def forward(p: Tensor) -> Tensor:
            operator.uses_kernels = uses_kernels
            return operator.mix(p)

        return forward

    def filter_alone(form: Callable[..., Tensor], **how: Any) -> Callable[[Tensor], Tensor]:
        g = operator.filter[:, 0].contiguous()
        return lambda p: form(p[..., : p.shape[-1] // 3], g, **how)

    forms = {"in torch": whole(False)}
    if letter == "l":
        forms["filter, FFT"] = lambda p: operator.convolve(p[..., : p.shape[-1] // 3])
    else:
        forms["filter, blocked"] = filter_alone(filters.blocked)
        forms["filter, blocks of 128"] = filter_alone(filters.blocked, block=128)
        forms["filter, FFT"] = filter_alone(filters.fft)
    if letter == "s":
        forms["filter, direct"] = filter_alone(filters.direct)
    if runs_kernels(operator.filter if letter != "l" else operator.skip):
        forms = {"by kernels": whole(True)} | forms
    return forms


def forms_table(width: int, length: int, rate: float, options: dict[str, Any]) -> Iterator[Row]:
    """Time the forms, and compare with reading projections and writing the result once."""
    p = torch.randn(1, length, 3 * width, **options)
    for letter in "sml":
        with torch.device(options["device"]):
            operator = OPERATORS[letter](config_of(width, letter))
        assert isinstance(operator, Hyena)
        with torch.no_grad():
            operator.start(0.1)
        operator = operator.to(options["dtype"])
        for form, call in forms_of(letter, operator).items():
            ms = 1e3 * seconds(lambda: call(p), options["device"])  # noqa: B023  used at once
            moved = (2 if form.startswith("filter") else 4) * width * length * p.element_size()
            floor = 1e3 * moved / rate
            what = dict(operator=NAMES[letter], form=form, width=width, length=length)
            yield dict(table="forms", **what, ms=ms, floor_ms=floor, times=ms / floor)


# Decoding


def decode_table(
    width: int, pattern: str, batches: list[int], rate: float, options: dict[str, Any]
) -> Iterator[Row]:
    """Time one token of each row behind a prompt, and compare with reading what must be read."""
    with torch.device(options["device"]):
        model = HyenaForCausalLM(config_of(width, pattern)).to(options["dtype"]).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for batch in batches:
        ids = torch.randint(512, (batch, 256), device=options["device"])
        cache = HyenaCache(len(pattern))
        model(ids, past_key_values=cache, logits_to_keep=1)
        layers: Any = cache.layers
        states = sum(
            t.numel() * t.element_size() for layer in layers for t in layer.tensors.values()
        )
        took = seconds(lambda: model(ids[:, :1], past_key_values=cache), options["device"])  # noqa: B023
        floor = (weights + 2 * states) / rate
        what = dict(pattern=pattern, width=width, batch=batch, weights_gb=weights / GB)
        speed = dict(tokens_per_second=batch / took, ms=1e3 * took, floor_ms=1e3 * floor)
        yield dict(table="decode", **what, **speed, share_of_floor=floor / took)


def draw(rows: list[Row], out: Path) -> None:
    """Plot milliseconds over length, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name in dict.fromkeys(row["layer"] for row in rows if row["table"] == "lengths"):
        own = [r for r in rows if r["table"] == "lengths" and r["layer"] == name]
        axes.plot([r["length"] for r in own], [r["ms"] for r in own], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("ms, one layer's operator forward")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=150)


def report(rows: list[Row]) -> None:
    """Print the ratios of the last two lengths."""
    times = {(r["layer"], r["length"]): r["ms"] for r in rows if r["table"] == "lengths"}
    short, long = sorted({length for _, length in times})[-2:]
    for name in dict.fromkeys(layer for layer, _ in times):
        if (name, long) in times:
            ratio = times[name, long] / times[name, short]
            print(f"{name:16} {long:,} tokens take {ratio:.2f} x {short:,}")


@torch.no_grad()
def main(argv: list[str] | None = None) -> list[Row]:
    """Measure all tables, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("--draw", type=Path, nargs=2, metavar=("JSON", "PNG"))
    parser.add_argument("--width", type=int, default=2048, help="of the layers")
    parser.add_argument("--decode-width", type=int, default=4096)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(12, 18)])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 128])
    args = parser.parse_args(argv)
    if args.draw:
        rows = json.loads(args.draw[0].read_text())["rows"]
        draw(rows, args.draw[1])
        return rows
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    options: dict[str, Any] = dict(device=device, dtype=torch.bfloat16)
    rate = bandwidth(device)
    print(f"{name}, torch {torch.__version__}, copies at {rate / GB:,.0f} GB/s")
    torch.manual_seed(0)
    rows = []
    for row in (
        *lengths_table(args.width, args.lengths, options),
        *forms_table(args.width, args.lengths[-2], rate, options),
        *decode_table(args.decode_width, "smlasml", args.batches, rate, options),
    ):
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
        rows.append(row)
    report(rows)
    if args.json:
        about = dict(device=name, torch=torch.__version__, bandwidth=rate)
        args.json.write_text(json.dumps(dict(about, rows=rows), indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
