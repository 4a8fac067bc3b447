import torch

from zoo.train.profiling import StepProfile, covered


def test_overlapping_spans_count_once():
    assert covered([(5, 7), (0, 2), (1, 3), (1, 2)]) == 5
    assert covered([]) == 0


def test_some_warm_steps_are_profiled_and_written(tmp_path):
    profile, x = StepProfile(tmp_path, 0, 8, torch.device("cpu")), torch.rand(64, 64)
    said = []
    for done in range(1, 9):
        x = x @ x / 64
        said.append(profile.step(done))
    assert [line is not None for line in said] == [False] * 6 + [True, False]
    table = (tmp_path / "profile.txt").read_text()
    assert "over 6 steps" in table and "1.0  aten::mm" in table
    assert (tmp_path / "profile.json").stat().st_size > 1000
