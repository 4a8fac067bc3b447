"""`zoo distill` on two processes in the form of a GPU learns what it does as it is written."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.train.test_ranks import ALL, environment, largest_gap

PLAIN = ("--speed", "plain")
RUN = shlex.split(
    "distill --data images --size 64 --batch 8 --slices 4 --steps 6 --normalise alpha_only "
    "--precision float64 --calibration 2 --eval-images 8 --every.log 1 "
    "--every.evaluate 4 --optim.clip 0.5"
)
WHOLE = [*RUN, *ALL, *shlex.split(
    "--teachers timm:test_vit/random@64 timm:test_resnet/random@64 --student eradio_nano"
)]  # fmt: skip
PLACED = [*RUN, *shlex.split(
    "--teachers timm:test_vit/random@64,follow=1,place=shard timm:test_resnet/random@64,at=64 "
    "--student test_resnet --sizes 64 96 --partition 1 1"
)]  # fmt: skip


def on_two(place: Path, commands: dict[str, list[str]], device: str) -> dict[str, list[dict]]:
    """Carry commands out on two processes; return what each rank tells."""
    (place / "images").mkdir()
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 255, (100, 100, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"images/{i:02d}.png")
    lines = {name: [*words, "--device", device, "--out", name] for name, words in commands.items()}
    (place / "commands.json").write_text(json.dumps(lines))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = Path(__file__).with_name("in_form.py")
    done = subprocess.run(
        [*torchrun, str(worker), "commands.json", device], cwd=place,
        env={**os.environ, **environment(place)}, capture_output=True, text=True, timeout=500,
        check=False,
    )  # fmt: skip
    told = [path.read_text()[-1500:] for path in sorted(place.glob("*.err"))]
    assert done.returncode == 0, "\n".join([*told, done.stderr[-3000:]])
    return {
        name: [json.loads((place / f"{name}.{rank}.json").read_text()) for rank in range(2)]
        for name in commands
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    place = tmp_path_factory.mktemp("two")
    runs = dict(whole=WHOLE, cut=[*WHOLE, "--ranks", "fsdp"], placed=PLACED)
    runs |= {f"{name}_plain": [*runs[name], *PLAIN] for name in ("whole", "placed")}
    return place, on_two(place, runs, "cpu")


def about(place: Path, name: str) -> dict:
    return json.loads((place / name / "about.json").read_text())["speed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "cut", "placed"])
def test_processes_that_take_compiled_code_over_learn_what_plain_ones_do(two, name):
    """With weights that are whole, cut, and of teachers that are cut or on one process alone."""
    place, found = two
    # rank 1 is ready two steps after rank 0, which waits for it: all change at one step
    assert [one["step"] for one in found[name]] == [4, 4]
    assert about(place, name)["compiled_from"] == [4]
    plain = "placed_plain" if name == "placed" else "whole_plain"
    assert found[plain] == [{}, {}]
    said = [(place / f"{name}.{rank}.err").read_text() for rank in range(2)]
    assert not any("not compiled:" in text for text in said)
    assert largest_gap(place / name, place / plain) < 1e-12


@pytest.mark.slow
def test_one_process_of_a_machine_compiles_beside_the_run(two):
    place, found = two
    assert [one["parts"] for one in found["whole"]] == [["student", "test_vit", "test_resnet"], []]
    assert [one["parts"] for one in found["cut"]] == [["test_vit", "test_resnet"], []]
    assert [one["parts"] for one in found["placed"]] == [["student"], []]
    form = about(place, "whole")["form"]
    assert form.startswith("channels last, student compiled, teachers compiled, teachers a batch")
    assert "a student whose weights are cut is not compiled" in about(place, "cut")["form"]
    form = about(place, "placed")["form"]
    assert form.startswith("channels last, student compiled (") and "place=shard" in form


@pytest.mark.gpu
def test_two_processes_on_a_gpu_compile_and_learn_what_plain_ones_do_but_for_rounding(tmp_path):
    words = shlex.split(
        "distill --data images --teachers timm:test_vit/random@64 timm:test_efficientnet/random@64 "
        "--student test_resnet --size 64 --batch 16 --slices 2 --steps 6 --calibration 2 "
        "--eval-images 8 --every.log 1 --optim.drop-path 0"
    )
    found = on_two(tmp_path, dict(auto=words, plain=[*words, *PLAIN]), "cuda")
    assert [one["step"] for one in found["auto"]] == [2, 2]
    assert [len(one["parts"]) for one in found["auto"]] == [3, 0]
    said = [(tmp_path / f"auto.{rank}.err").read_text() for rank in range(2)]
    assert not any("not compile" in text for text in said), said
    assert "the student runs compiled for 8 images of 64 px" in " ".join(said[0].split())
    fast, plain = (losses(tmp_path / name) for name in ("auto", "plain"))
    assert len(fast) == 6 and fast == pytest.approx(plain, rel=0.02)


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]
