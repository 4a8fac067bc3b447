import copy
import json
from dataclasses import replace

import pytest
import torch

from zoo.cli import main
from zoo.experiments.compression import config as configs
from zoo.experiments.compression import hybrid, units
from zoo.experiments.compression.cells import FixedMask, cells
from zoo.experiments.compression.result import judge
from zoo.experiments.corpus import standard_library
from zoo.experiments.fast_mamba import fast
from zoo.students.prune.library import Parent
from zoo.students.prune.plan import Plan
from zoo.students.prune.prune import prune

transformers = pytest.importorskip("transformers")

SHAPE = configs.HybridShape("M*-M", 16, 8, 4, 4, 4, 24, (4, 2, 8))


def tiny_hybrid():
    torch.manual_seed(0)
    model = hybrid.build_hybrid(SHAPE).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_the_fast_pass_equals_transformers_with_its_gradients():
    model = tiny_hybrid()
    ours = fast(copy.deepcopy(model), compiled=False)
    ids = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(1))
    logits = [m(input_ids=ids, use_cache=False).logits for m in (ours, model)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)  # both in float32
    for y in logits:
        y.square().mean().backward()
    for (name, p), q in zip(ours.named_parameters(), model.parameters(), strict=True):
        error = (p.grad - q.grad).abs().max()
        assert error < 1e-4 * q.grad.abs().max(), name


def test_heads_kept_across_groups_equal_the_core_where_the_groups_allow_it():
    model = tiny_hybrid()
    kept = {name: torch.tensor([1, 2, 4, 7]) for name in hybrid.mamba_mixers(model)}

    def choose(axis):
        name = axis.rpartition(".")[0]
        return torch.zeros(8).index_fill(0, kept[name], 1).view(4, 2), (f"{name}.g",)

    ours = units.keep_heads(model, kept).state_dict()
    theirs = prune(Parent(model), Plan({"ssm_heads": 1}), choose).built.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_head_that_does_nothing_costs_nothing_and_is_the_first_to_go():
    model = tiny_hybrid()
    ids = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(1))
    for mixer in hybrid.mamba_mixers(model).values():
        mixer.out_proj.weight.data.view(16, 8, 4)[:, [0, 3, 5, 6]] = 0
    scores, _ = units.score_units(model, [ids[:1], ids[1:]])
    scores["leave_one_out"] = units.leave_one_out(model, ids)
    for way in ("contribution", "leave_one_out"):
        name, values = next(iter(scores[way].items()))
        dead = values.view(8, -1).abs().amax(1)[[0, 3, 5, 6]]
        assert dead.max() < 1e-6 < values.view(8, -1).abs().amax(1)[[1, 2, 4, 7]].min(), way
        if way == "contribution":  # a dead head has no contribution: one of each group stays
            child = units.cut_heads(Parent(model), way, 4, scores, 0)
            kept = child.get_submodule(name).out_proj.weight
            assert (kept.view(16, 4, 4).abs().amax((0, 2)) > 0).all()


def test_each_head_may_keep_channels_of_its_own():
    model = tiny_hybrid()
    name = next(iter(hybrid.mamba_mixers(model)))
    values = torch.arange(32.0).view(8, 4)
    values[1::2] = values[1::2].flip(1)
    scores = {"x": dict.fromkeys(hybrid.mamba_mixers(model), values)}
    whole = model.get_submodule(name).out_proj.weight.view(16, 8, 4)
    cut = units.cut_channels(Parent(model), "x_per_head", 2, scores, 0)
    cut = cut.get_submodule(name).out_proj.weight.view(16, 8, 2)
    assert torch.equal(cut[:, 0], whole[:, 0, 2:]) and torch.equal(cut[:, 1], whole[:, 1, :2])
    shared = units.cut_channels(Parent(model), "x_shared", 2, scores, 0)
    shared = shared.get_submodule(name).out_proj.weight.view(16, 8, 2)
    picked = [[i for i in range(4) if torch.equal(whole[:, 0, i], shared[:, 0, j])] for j in (0, 1)]
    assert torch.equal(shared[:, 5], whole[:, 5, [i for found in picked for i in found]])


def test_held_out_files_are_others_and_the_text_is_named():
    first, again = standard_library(64), standard_library(64)
    assert first.about == again.about and len(str(first.about["held_sha256"])) == 64
    share = first.about["held_bytes"] / (first.about["held_bytes"] + first.about["train_bytes"])
    assert 0.02 < share < 0.1 and first.about["train_bytes"] > 5e6
    assert bytes(first.held.tokens[:200]) not in bytes(first.train.tokens)


def row(way, seed, before, after, arm="heads", rate=1e-3, share=0.5):
    curve = [[0, before], [100, after]]
    return dict(arm=arm, way=way, seed=seed, share=share, rate=rate, curve=curve)


def test_an_effect_counts_with_one_sign_in_all_seeds_and_twice_the_deviation():
    rows = [row("contribution", s, 2.0, 1.5 + 0.1 * s) for s in range(3)]
    rows += [row("contribution_global", s, 2.1 + 0.01 * s, 1.45 + 0.2 * s) for s in range(3)]
    found = {v["when"]: v for v in judge(rows) if v["theirs"] == "contribution_global"}
    assert found["zero-shot"]["verdict"] == "holds"
    assert found["zero-shot"]["mean"] == pytest.approx(-0.11)
    assert found["distilled"]["verdict"] == "not told apart"
    other = {"contribution": "contribution_global", "contribution_global": "contribution"}
    turned = [dict(r, way=other[r["way"]]) for r in rows]
    found = {v["when"]: v for v in judge(turned) if v["theirs"] == "contribution_global"}
    assert found["zero-shot"]["verdict"] == "the reverse holds"
    assert {v["verdict"] for v in judge(rows[:2] + rows[3:5])} == {"too few seeds"}


def test_random_is_the_mean_of_its_draws_and_students_have_their_best_rate():
    rows = [row("contribution", 0, 2.0, 1.5)]
    rows += [row("random_0", 0, 2.2, 1.7), row("random_1", 0, 2.6, 2.6, rate=0.0)]
    found = {v["when"]: v["mean"] for v in judge(rows) if v["theirs"] == "random"}
    assert found == pytest.approx({"zero-shot": -0.4, "distilled": -0.2})
    rows = [row("prune_kd", 0, 3, 2.0, "students", share=1.0)]
    rows += [row("scratch_ce", 0, 8, x, "students", rate=x, share=1.0) for x in (2.5, 2.25, 3.0)]
    assert [v["mean"] for v in judge(rows)] == [pytest.approx(-0.25)]


def test_a_fixed_mask_keeps_zeros_while_the_weights_learn():
    layer = torch.nn.Linear(4, 2, bias=False)
    layer.weight.data[:, ::2] = 0
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", FixedMask(layer.weight))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 4)).sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert (layer.weight[:, ::2] == 0).all() and (layer.weight[:, 1::2] != before[:, 1::2]).all()


def test_the_full_experiment_has_every_control():
    found = list(cells(configs.full()))
    heads = {c.way for c in found if c.arm == "heads" and c.seed == 2 and c.share == 0.75}
    assert heads == {*units.HEADS, *(f"random_{i}" for i in range(5))}
    assert all(c.rate for c in found if c.arm in ("heads", "channels"))
    assert len({c.key for c in found}) == len(found)


def small_experiment(tmp_path, monkeypatch, *options):
    tiny = replace(configs.SCALES["tiny"], held=2, calibration=2)
    monkeypatch.setitem(configs.SCALES, "tiny", tiny)
    out = tmp_path / "run"
    main(["experiment", "compression", "--tiny", "--seeds", "1", "--device", "cpu",
          "--out", str(out), *options])  # fmt: skip
    rows = out / "rows.jsonl"  # where nothing fits the time there are none
    lines = rows.read_text().splitlines() if rows.is_file() else ()
    return out, [json.loads(line) for line in lines]


@pytest.mark.slow
def test_the_tiny_experiment_runs_every_arm_and_resumes_what_is_missing(tmp_path, monkeypatch):
    out, rows = small_experiment(tmp_path, monkeypatch)
    assert {r["arm"] for r in rows} == {"teacher", *configs.ARMS}
    assert all(len(r["curve"]) > 1 for r in rows if r["rate"])
    assert "An effect counts when" in (out / "result.md").read_text()
    assert (out / "compression.png").stat().st_size > 5000
    (out / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in rows[:-1]) + '\n{"torn')
    _, again = small_experiment(tmp_path, monkeypatch, "--resume")
    assert again[-1]["key"] == rows[-1]["key"]
    assert again[-1]["curve"] == rows[-1]["curve"]


@pytest.mark.slow
def test_what_does_not_fit_the_time_is_left_out_and_counted(tmp_path, monkeypatch):
    out, rows = small_experiment(tmp_path, monkeypatch, "--minutes", "0.0001", "--arms", "heads")
    result = json.loads((out / "result.json").read_text())
    assert result["left_out"] and not rows
