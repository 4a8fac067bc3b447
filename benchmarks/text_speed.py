"""Measure `zoo distill --text` itself on one GPU: plain, compiled, and with another attention.

python3 benchmarks/text_speed.py --json text_speed.json --seconds 300    # one H200, nothing beside
python3 benchmarks/text_speed.py --tiny --json text_speed.json           # a rehearsal on a CPU

Each row is a run of the command, a process of its own, on the Python standard library read as bytes
by models of random weights: Llamas, a hybrid of Mamba-2 and attention, StripedHyena 2, and a small
Llama that learns from a larger one. Its speed is the median of the last third of its steps, beside
the share of 790 TFLOP/s that 6 operations a parameter and token (2 for a teacher's) make of it.
What stands in --json is not measured again.
"""

import argparse
import json
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEAK = 790e12
WIDE = dict(d_model=2048, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=8)
SMALL = dict(d_model=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4)
HYBRID = dict(
    d_model=1024, pattern="M-M-M*-M-M-M*-", num_attention_heads=16, num_key_value_heads=4,
    head_dim=64, mamba_num_heads=32, mamba_head_dim=64, ssm_state_size=128, n_groups=1,
)  # fmt: skip
HYENA = dict(d_model=1024, pattern="smlasml" * 2, num_attention_heads=16)
MODELS: dict[str, tuple[str, dict[str, Any]]] = dict(
    small=("llama", SMALL), wide=("llama", WIDE), hybrid=("nemotron_h", HYBRID),
    hyena=("hyena", HYENA),
)  # fmt: skip
TINY: dict[str, tuple[str, dict[str, Any]]] = dict(
    small=("llama", dict(d_model=32, num_hidden_layers=2)),
    wide=("llama", dict(d_model=64, num_hidden_layers=2)),
    hybrid=("nemotron_h", dict(
        d_model=32, pattern="M-M*-*", num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=1,
    )),
    hyena=("hyena", dict(
        d_model=32, pattern="smlasml", num_attention_heads=2, se_groups=4, mr_groups=4,
    )),
)  # fmt: skip
VOCABULARY = 32_768
FORMS = dict(
    plain="--speed plain",
    compiled="--speed compiled",
    fused="--speed compiled --attention auto",
    documents="--speed plain --attention auto",
)


@dataclass(frozen=True)
class Row:
    """A run: who learns, from whom, in which form."""

    student: str
    form: str
    teacher: str = ""

    @property
    def key(self) -> str:
        return f"{self.student}{'<' * bool(self.teacher)}{self.teacher}:{self.form}"


def rows() -> Iterator[Row]:
    """Yield the runs by how much they are wanted."""
    for student, teacher in (("small", ""), ("wide", ""), ("hybrid", ""), ("small", "wide")):
        for form in ("plain", "compiled", "fused"):
            if not (form == "fused" and student == "hybrid"):
                yield Row(student, form, teacher)
    yield from (Row("hyena", "plain"), Row("hyena", "compiled"), Row("wide", "documents"))


def prepare(folder: Path, *, tiny: bool) -> dict[str, int]:
    """Write the text and the models; return the models' parameters, without their embeddings."""
    import zoo

    text, held = folder / "text.jsonl", Path(sysconfig.get_path("stdlib"))
    if not text.is_file():
        files = sorted(held.glob("*.py"))[: 5 if tiny else None]
        lines = [json.dumps(dict(text=f.read_text(errors="ignore"))) for f in files]
        text.write_text("\n".join(lines))
    sizes = {}
    for name, (family, fields) in (TINY if tiny else MODELS).items():
        model: Any = zoo.create_model(family, vocab_size=300 if tiny else VOCABULARY, **fields)
        if not (folder / name / "config.json").is_file():
            model.save_pretrained(folder / name)
        table = model.get_input_embeddings().weight.numel()
        sizes[name] = sum(p.numel() for p in model.parameters()) - table
    return sizes


def measure(row: Row, folder: Path, sizes: dict[str, int], *, tiny: bool) -> dict[str, Any]:
    """Carry out a run and read what it says of itself."""
    steps, batch, length = (6, 2, 32) if tiny else (60, 16, 2048)
    out = folder / f"run-{row.key}".replace(":", "-").replace("<", "-")
    command = (
        f"{sys.executable} -m zoo {'distill' if row.teacher else 'train-lm'} --text text.jsonl "
        f"{'--student' if row.teacher else '--model'} lm:{row.student} --tokenizer bytes "
        f"--batch {batch} --length {length} --steps {steps} --every.log 1 "
        f"--every.evaluate {10 * steps} --every.checkpoint {10 * steps} --eval-rows {batch} "
        f"--out {out.name} {FORMS[row.form]} " + f"--teachers lm:{row.teacher}" * bool(row.teacher)
    )
    began = time.perf_counter()
    done = subprocess.run(
        shlex.split(command), cwd=folder, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        return dict(key=row.key, error=(done.stderr or done.stdout)[-400:])
    about = json.loads((out / "about.json").read_text())
    timing = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    last = sorted(line["tok_s"] for line in timing[-steps // 3 :])
    speed = last[len(last) // 2]
    work = 6 * sizes[row.student] + 2 * sizes.get(row.teacher, 0)
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return dict(
        key=row.key, tok_s=speed, of_peak=speed * work / PEAK, speed=about["speed"],
        attention=about["attention"], seconds=time.perf_counter() - began,
        first_step_s=timing[0]["seconds"],
        losses=[line["loss"] for line in losses if line["kind"] == "train"],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540, help="no run is begun after them")
    parser.add_argument("--rows", nargs="*", help="student:form, or student<teacher:form")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # where zoo is not installed
    import torch

    began = time.perf_counter()
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json.is_file() else {}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = dict(machine=device, torch=torch.__version__, rows=found.get("rows", {}))
    folder = Path(tempfile.gettempdir()) / f"text_speed{'_tiny' * args.tiny}"
    folder.mkdir(exist_ok=True)
    sizes = prepare(folder, tiny=args.tiny)
    for row in rows():
        late = time.perf_counter() - began > args.seconds
        if late or row.key in found["rows"] or (args.rows and row.key not in args.rows):
            continue
        found["rows"][row.key] = result = measure(row, folder, sizes, tiny=args.tiny)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
        shown = {name: value for name, value in result.items() if name != "losses"}
        print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
