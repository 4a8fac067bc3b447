"""What a run has saved is read again, or the damage is named and what was before it is taken."""

import json
import random

import pytest
import torch

from zoo.train.config import Training
from zoo.train.run import Run


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
    path, whole = run.checkpoints()[-1], run.load()
    content, draw, fell_back = path.read_bytes(), random.Random(0), 0
    for place in draw.sample(range(len(content)), 120):
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        found = run.load()
        assert found["step"] in (4, 8)
        fell_back += found["step"] == 4
        if found["step"] == 8:
            assert found["names"] == whole["names"]
            assert torch.equal(found["model"]["w"], whole["model"]["w"])
    assert fell_back > 30  # the rest lies in padding


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"P",
        lambda content: content[: len(content) // 2],
        lambda content: b"\x80\x04N.",
        lambda content: content.replace(b"names", b"nam\xff\xff"),
    ],
    ids=["empty", "one byte", "cut", "a bare pickle", "its pickle"],
)
def test_any_unreadable_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, capsys, damage):
    run = run_of(tmp_path)
    path = run.checkpoints()[-1]
    path.write_bytes(damage(path.read_bytes()))
    assert run.load()["step"] == 4
    assert "step_00000008.pt is damaged" in capsys.readouterr().out


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_in_silence(tmp_path):
    run = run_of(tmp_path)
    for path in run.checkpoints():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"No checkpoint in .*checkpoints can be read"):
        run.load()


def test_what_a_kill_left_of_a_save_is_swept_at_the_next_start(tmp_path):
    run = run_of(tmp_path)
    (run.path / "checkpoints" / ".step_00000012.pt.abc123.tmp").write_bytes(b"half")
    assert run.load()["step"] == 8
    names = sorted(p.name for p in (run.path / "checkpoints").iterdir())
    assert names == ["step_00000004.pt", "step_00000008.pt"]


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
