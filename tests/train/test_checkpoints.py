"""What a run has saved is read again, or the damage is named and what was before it is taken."""

import io
import json
import os
import pickle
import random
from concurrent.futures import Future

import pytest
import torch
import torch.distributed.checkpoint as dcp

from zoo.train.checkpoint import TENSORS, packed, split, write_sum
from zoo.train.config import Training
from zoo.train.run import Run
from zoo.train.saved_tensor import SavedTensors, without_crc, write_all
from zoo.train.staging import pinned_like


def run_of(folder) -> Run:
    """Return a run with the checkpoints of the steps 4 and 8."""
    run = Run.create(Training(out=folder / "run"))
    for step in (4, 8):
        run.save(dict(step=step, model={"w": torch.full((40,), float(step))}, names=["a", "b"]))
    return run


@pytest.fixture(autouse=True)
def kind(monkeypatch):
    monkeypatch.setattr(Training, "kind", "plain", raising=False)


def test_a_flipped_byte_anywhere_in_a_checkpoint_is_harmless_or_the_one_before_is_taken(tmp_path):
    run = run_of(tmp_path)
    draw, fell_back = random.Random(0), 0
    files = sorted(run.checkpoints()[-1].iterdir())
    for path in draw.choices(files, [file.stat().st_size for file in files], k=120):
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        found = run.load()
        fell_back += found["step"] == 4
        path.write_bytes(content)
    assert fell_back == 120
    assert run.load()["step"] == 8


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"P",
        lambda content: content[: len(content) // 2],
        lambda content: b"\x80\x04N.",
    ],
    ids=["empty", "one byte", "cut", "a bare pickle"],
)
@pytest.mark.parametrize("name", [".metadata", "state.json", "__0_0.distcp"])
def test_any_unreadable_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path, capsys, damage, name
):
    run = run_of(tmp_path)
    path = run.checkpoints()[-1] / name
    path.write_bytes(damage(path.read_bytes()))
    for believed in (False, True):
        if believed:  # its checksum agrees
            write_sum(path)
        assert run.load()["step"] == 4
        assert "step_00000008 is damaged" in capsys.readouterr().out


def test_the_metadata_of_a_stranger_runs_nothing(tmp_path):
    run = run_of(tmp_path)
    path = run.checkpoints()[-1] / ".metadata"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    write_sum(path)
    assert run.load()["step"] == 4
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_state_comes_back_to_the_bit_with_the_types_it_had(tmp_path):
    state = dict(
        step=3,
        optimizer=dict(state={0: dict(step=torch.tensor(3.0), x=torch.rand(2).double())}),
        groups=[dict(betas=(0.1, 0.2), lr=1e-300 / 3, params=[0])],
        ema=None, odd={"a.b": {"c": torch.ones(1)}, "a": {"b.d": torch.zeros(1)}},
    )  # fmt: skip
    run = Run.create(Training(out=tmp_path / "run"))
    run.save(state)
    found = run.load()
    assert found["groups"] == state["groups"]
    assert found["optimizer"]["state"][0]["x"].equal(state["optimizer"]["state"][0]["x"])
    assert repr(found) == repr(state)


def test_a_checkpoint_holds_the_moment_at_which_it_was_begun(tmp_path):
    run, weight = Run.create(Training(out=tmp_path / "run")), torch.zeros(300_000)
    run.save(dict(step=1, w=weight), wait=False)
    weight += 1
    with run.settled():
        pass
    assert run.load()["w"].abs().max() == 0


@pytest.mark.parametrize(
    "x",
    [
        torch.rand(300, 500), torch.rand(7), torch.tensor(3), torch.empty(0, 4), torch.rand(5, 6).T,
        torch.rand(4, 3).bfloat16(), torch.rand(9).double(), torch.tensor([True, False]),
        torch.arange(10)[2:5], torch.rand(8).to(torch.float8_e4m3fn), torch.rand(2**18 + 1),
    ],
)  # fmt: skip
def test_three_pieces_are_what_torch_writes_of_a_tensor(x):
    saved, file = SavedTensors(), io.BytesIO()
    with without_crc():
        torch.save(x.contiguous().clone(), file)
    for _ in range(2):  # made, and remembered
        assert b"".join(saved.pieces(x)) == file.getvalue()


def test_dcp_itself_reads_a_checkpoint(tmp_path):
    run, state = Run(tmp_path), dict(step=1, w=torch.rand(2**17), b=torch.rand(300, 300).half())
    run.save(state)
    found = {TENSORS: {name: torch.zeros_like(state[name]) for name in ("w", "b")}}
    dcp.load(found, checkpoint_id=run.checkpoints()[0], no_dist=True)
    assert all(torch.equal(x, state[name]) for name, x in found[TENSORS].items())


@pytest.mark.parametrize("same", [True, False])
def test_memory_that_was_reserved_is_used_only_for_a_state_that_fits(tmp_path, same):
    run, fits = Run(tmp_path), dict(step=1, model=dict(w=torch.ones(2**17), b=torch.ones(3)))
    other = dict(step=1, model=dict(w=torch.ones(2**17 + (not same)), b=torch.ones(3)))
    staging = run._saver._writer.staging
    staging._reserved = Future()
    staging._reserved.set_result(reserved := pinned_like(packed(split(other)[0])[0]))
    found = staging._memory_for(packed(split(fits)[0])[0])
    assert (found is reserved) == same
    for step in (1, 2):
        state = dict(step=step, model=dict(w=torch.rand(2**17), b=torch.rand(3)))
        run.save(state)
        assert all(torch.equal(x, run.load()["model"][k]) for k, x in state["model"].items())


@pytest.mark.parametrize("most", [1, 7, 100, 10**9])
def test_pieces_are_written_whole_when_the_system_takes_a_part_at_a_time(
    tmp_path, monkeypatch, most
):
    real, pieces = os.writev, [b"abc", memoryview(b""), b"defghijk", memoryview(b"xyz" * 9), b""]

    def part(number, buffers):
        whole = b"".join(buffers)[:most]
        return real(number, [whole])

    monkeypatch.setattr("zoo.train.saved_tensor.os.writev", part)
    with (tmp_path / "file").open("wb", buffering=0) as file:
        write_all(file, pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


def test_pieces_are_written_whole_where_the_system_takes_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.delattr("zoo.train.saved_tensor.os.writev")
    pieces = [b"abc", memoryview(b""), b"defghijk", memoryview(b"xyz" * 9), b""]
    with (tmp_path / "file").open("wb", buffering=0) as file:
        write_all(file, pieces)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


@pytest.mark.gpu
@pytest.mark.parametrize("room", [True, False])
def test_memory_is_reserved_beside_training_and_the_checkpoint_is_the_same(
    tmp_path, monkeypatch, room
):
    monkeypatch.setattr("zoo.train.staging.has_room", lambda parts: room)
    run = Run(tmp_path)
    for step in (1, 2, 3):
        model = dict(w=torch.rand(2**20, device="cuda"), b=torch.rand(3, device="cuda"))
        state = dict(step=step, model=model)
        run.prepare(state)
        run.save(state, wait=False)
        run.hold()
        model["w"].zero_()  # training goes on
        run.wait()
        found = run.load()
        assert found and torch.equal(found["model"]["b"], model["b"].cpu())
        assert found["model"]["w"].min() >= 0 and found["model"]["w"].mean() > 0.4


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path):
    run = run_of(tmp_path)
    torch.save(dict(step=12, names=["old"]), run.path / "checkpoints" / "step_00000012.pt")
    assert run.load()["names"] == ["old"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_in_silence(tmp_path):
    run = run_of(tmp_path)
    for path in run.checkpoints():
        (path / "state.json").write_bytes(b"")
    with pytest.raises(ValueError, match=r"No checkpoint in .*checkpoints can be read"):
        run.load()


def test_what_a_kill_left_of_a_save_is_swept_at_the_next_start(tmp_path):
    run = run_of(tmp_path)
    (run.path / "checkpoints" / ".step_00000012.pt.abc123.tmp").write_bytes(b"half")
    (run.path / "checkpoints" / ".step_00000012.tmp").mkdir()
    run.sweep()
    assert run.load()["step"] == 8
    names = sorted(p.name for p in (run.path / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000008"]


def test_damaged_lines_of_the_metrics_are_left_out_when_a_run_goes_on(tmp_path):
    run = run_of(tmp_path)
    good = [json.dumps(dict(kind="train", step=step)) for step in (2, 4, 6)]
    bad = ["{}", "[1]", '{"step": "two"}', '{"step": 2}}', "{" * 100_000, '{"kind": "tr']
    (run.path / "metrics.jsonl").write_text("\n".join([*good, *bad]))
    run.keep(lambda row: row["step"] <= 4)
    assert (run.path / "metrics.jsonl").read_text().splitlines() == good[:2]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("[]", "another form"),
        ("{" * 100_000, "JSON"),
        ('{"batch": "many"}', "batch is 'many'; it must be int"),
        ('{"batch": true}', "batch is True"),
        ('{"optim": {"betas": [0.9]}}', "optim.betas is .* it has 2 values"),
        ('{"optim": [1]}', "optim is"),
        ('{"optim": {"lr": NaN}}', "optim.lr is nan"),
        ('{"steps": null}', "steps is None"),
    ],
)
def test_a_wrong_type_in_the_config_of_a_run_is_refused_with_its_file(tmp_path, wrong, said):
    run = run_of(tmp_path)
    (run.path / "config.json").write_text(wrong)
    with pytest.raises(ValueError, match=rf"config\.json.*{said}"):
        run.config(Training)
