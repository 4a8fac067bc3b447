import copy
import json
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from zoo.features import Batch, gives_class_tokens, read_features, read_intermediates
from zoo.students.build import assign_tokens, build_student, read_options, student_grids
from zoo.students.export import export_student, load_export
from zoo.students.heads import Ladder, TeacherHead
from zoo.students.start import find_start
from zoo.students.student import summary_key
from zoo.train.distill.fold import folded
from zoo.train.distill.phi_s import Moments, fit, fold_inverse

WIDTHS = {"a": (24, 16), "b": (None, 8), "c": (12, None)}


def tiny(name="test_vit", size=160, **kwargs):
    torch.manual_seed(1)
    return build_student(name, WIDTHS, size=size, **kwargs)


@pytest.mark.parametrize(
    ("name", "size", "kind", "upsample"),
    [
        ("test_vit", 96, "v1", 1),
        ("test_vit", 96, "v2", 2),
        ("test_vit", 96, "attn", 1),
        ("test_vit", 96, "ladder", 2),
        ("resnet10t", 64, "v1", 1),
        ("resnet10t", 64, "ladder", 1),
        ("eradio_nano", 64, "v2", 1),
        ("eradio_nano", 64, "attn", 2),
    ],
)
def test_every_head_answers_for_what_its_teacher_has_and_learns(name, size, kind, upsample):
    student = tiny(name, size, kind=kind, hidden=20, upsample=upsample)
    batch = Batch(torch.rand(2, 3, 40, 48))
    ours = student(batch)
    rows, cols = student.features(batch).spatial.shape[1:3]
    grid = (upsample * rows, upsample * cols)
    assert ours["a"].summary.shape == (2, 24) and ours["a"].spatial.shape == (2, *grid, 16)
    assert ours["b"].summary is None and ours["b"].spatial.shape == (2, *grid, 8)
    assert ours["c"].spatial is None and ours["c"].summary.shape == (2, 12)
    sum(x.square().mean() for pair in ours.values() for x in pair if x is not None).backward()
    assert all(p.grad is not None for p in student.heads.parameters())


def test_folding_changes_the_copy_and_not_the_student():
    student = tiny().eval()
    batch = Batch(torch.rand(2, 3, 160, 160))

    def double(last: nn.Linear, blocks: int) -> nn.Linear:
        assert blocks == 1
        changed = nn.Linear(last.in_features, last.out_features)
        changed.load_state_dict({k: 2 * v for k, v in last.state_dict().items()})
        return changed

    before = student(batch)
    shown = student.with_folded_heads({"a": double})
    torch.testing.assert_close(shown(batch)["a"].spatial, 2 * before["a"].spatial)
    torch.testing.assert_close(shown(batch)["b"].spatial, before["b"].spatial)
    torch.testing.assert_close(student(batch)["a"].spatial, before["a"].spatial)
    assert shown.backbone is student.backbone


def test_a_size_that_the_backbone_cannot_take_is_refused_with_what_it_can():
    with pytest.raises(ValueError, match="100"):
        build_student("eradio_nano", WIDTHS, size=100)


LOAD = """
import json, sys, timm, torch
from safetensors.torch import load_file
folder, name, kwargs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if name.startswith("eradio"):
    import zoo
check = load_file(folder + "/check.safetensors")
model = timm.create_model(name, checkpoint_path=folder + "/model.safetensors", **kwargs).eval()
hub = timm.create_model("local-dir:" + folder, pretrained=True).eval()
with torch.no_grad():
    for m in (model, hub):
        final, maps = m.forward_intermediates(check["images"], indices=1, norm=True)
        torch.testing.assert_close(m.forward_head(final, pre_logits=True), check["summary"])
        torch.testing.assert_close(maps[-1].permute(0, 2, 3, 1), check["spatial"])
assert not any(m.startswith(("zoo.train", "zoo.students", "zoo.teachers")) for m in sys.modules)
print("same")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("eradio_nano", 128, {}),
        ("resnet10t", 96, dict(num_classes=0)),
        ("test_vit", 96, dict(num_classes=0, img_size=96)),
    ],
)
def test_an_export_is_an_ordinary_timm_checkpoint(tmp_path, name, size, kwargs):
    student = tiny(name, size)
    batch = Batch(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8))
    export_student(student, tmp_path / "export", batch)
    command = [sys.executable, "-c", LOAD, str(tmp_path / "export"), name, json.dumps(kwargs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize("kind", ["v1", "v2", "attn", "ladder"])
@pytest.mark.parametrize("upsample", [1, 2])
def test_folding_makes_the_heads_answer_in_the_teachers_own_space(kind, upsample):
    """Folding equals un-normalising the outputs, also where a cell makes u² vectors."""
    student = tiny(kind=kind, hidden=16, upsample=upsample).eval()
    moments = Moments(16)
    moments.update(torch.randn(400, 16) * torch.logspace(-2, 1, 16) + torch.arange(16.0))
    normalizer = fit("phi_s", moments)
    batch = Batch(torch.rand(2, 3, 160, 160))
    with torch.no_grad():
        before = student(batch)["a"].spatial
        folded = student.with_folded_heads({"a": partial(fold_inverse, normalizer=normalizer)})
        after = folded(batch)["a"].spatial
    torch.testing.assert_close(after, normalizer.inverse(before), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["v1", "attn", "ladder"])
def test_folding_brings_summaries_to_the_teachers_own_space_too(kind):
    student = tiny(kind=kind, hidden=16).eval()
    moments = Moments(24)
    moments.update(torch.randn(400, 24) * torch.logspace(-2, 1, 24) + torch.arange(24.0))
    normalizer = fit("standardize", moments)
    batch = Batch(torch.rand(2, 3, 160, 160))
    with torch.no_grad():
        before = student(batch)
        after = folded(student, {summary_key("a"): normalizer})(batch)
    expected = normalizer.inverse(before["a"].summary)
    torch.testing.assert_close(after["a"].summary, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after["a"].spatial, before["a"].spatial)
    torch.testing.assert_close(after["c"].summary, before["c"].summary)


def test_a_ladder_is_the_sum_of_one_small_mlp_for_each_block():
    ladder = Ladder([6, 6], 6, hidden=12, out_dim=5)
    earlier, x = [torch.randn(4, 6), torch.randn(4, 6)], torch.randn(4, 6)
    outer = ladder.last.weight.split([3, 3, 12], dim=1)
    parts = [
        F.gelu(layer(y)) @ weight.T
        for layer, y, weight in zip([*ladder.rungs, ladder.top], [*earlier, x], outer, strict=True)
    ]
    torch.testing.assert_close(ladder(x, earlier), sum(parts) + ladder.last.bias)


@pytest.mark.parametrize(
    ("name", "size", "earlier"),
    [("test_vit", 96, 5), ("test_vit3", 160, 8), ("eradio_nano", 64, 4)],
)
def test_a_ladder_stands_on_every_block_of_the_backbone(name, size, earlier):
    """A ViT's blocks but the last, by class token or mean; E-RADIO's stages below its neck."""
    student = tiny(name, size, kind="ladder", hidden=20).eval()
    batch = Batch(torch.rand(1, 3, size, size))
    before = student(batch)["a"]
    rungs = student.heads["a"].spatial.rungs
    assert len(rungs) == earlier
    for number in range(len(rungs)):
        cut = copy.deepcopy(student)
        for part in (cut.heads["a"].summary, cut.heads["a"].spatial):
            torch.nn.init.zeros_(part.rungs[number].weight)
        after = cut(batch)["a"]
        assert not torch.equal(before.summary, after.summary)  # each rung matters
        assert not torch.equal(before.spatial, after.spatial)


@pytest.mark.parametrize("name", ["test_vit", "test_vit3", "eradio_nano"])
def test_a_ladder_reads_blocks_as_they_are_and_its_top_what_the_other_heads_read(name):
    """A norm behind the blocks is the last one's: what a hook sees of the first must come."""
    backbone = tiny(name, kind="ladder").backbone.eval()
    for module in backbone.modules():  # norms that change what they get
        if isinstance(module, nn.LayerNorm) and module.weight is not None:
            nn.init.normal_(module.weight)
    seen = []
    first = getattr(backbone, "blocks", [nn.Identity()])[0]
    first.register_forward_hook(lambda *args: seen.append(args[-1]))
    x, class_tokens = torch.rand(2, 3, 160, 160), gives_class_tokens(backbone)
    with torch.no_grad():
        features, earlier = read_intermediates(backbone, x, class_tokens=class_tokens)
        final = read_features(backbone, x)
    torch.testing.assert_close(features, final)
    if seen:
        torch.testing.assert_close(earlier[0].spatial.flatten(1, 2), seen[0][:, 1:])
        summary = seen[0][:, 0] if class_tokens else seen[0][:, 1:].mean(1)
        torch.testing.assert_close(earlier[0].summary, summary)


GRAPH = """
import torch
from zoo.students.build import build_student
x = torch.rand(1, 3, 64, 64)
for name, kind, upsample in [
    ("test_vit", "v2", 2), ("test_vit", "attn", 1), ("test_vit", "ladder", 1),
    ("eradio_nano", "ladder", 2),
]:
    how = dict(kind=kind, upsample=upsample, hidden=16)
    student = build_student(name, {"a": (24, 16)}, size=64, **how).eval()
    captured = torch.compile(student.answer, backend="eager", fullgraph=True)
    torch.testing.assert_close(captured(x)["a"], student.answer(x)["a"])
print("whole")
"""


@pytest.mark.long
def test_every_kind_of_head_is_captured_as_one_graph():
    """In a process of its own: the shape checks of the tests would break the graphs."""
    done = subprocess.run([sys.executable, "-c", GRAPH], capture_output=True, text=True)
    assert done.stdout.strip() == "whole", done.stderr


def test_an_attention_head_that_cannot_split_the_width_names_the_other_kind():
    with pytest.raises(ValueError, match=r"16 heads, and 24 do not split.*--heads\.kind v2"):
        TeacherHead((24, 24), (8, 8), kind="attn", hidden=20)
    TeacherHead((24, 24), (8, None), kind="attn", hidden=20)  # one token attends to nothing


@pytest.mark.parametrize(
    ("kind", "upsample"), [("v1", 1), ("v2", 1), ("v2", 2), ("attn", 2), ("ladder", 2)]
)
def test_an_exported_student_comes_back_with_its_heads(kind, upsample, tmp_path):
    student = tiny(kind=kind, upsample=upsample).eval()
    batch = Batch(torch.rand(2, 3, 160, 160))
    numbers = export_student(student, tmp_path / "export", batch)
    back = load_export(tmp_path / "export")
    for name, ours in student(batch).items():
        for mine, theirs in zip(ours, back(batch)[name], strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs)
    check = load_file(tmp_path / "export" / "check.safetensors")
    assert numbers["export/summary_norm"] == check["summary"].double().norm().item()
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architecture"] == "test_vit" and timm.is_model(config["architecture"])


def test_a_folder_without_an_export_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"heads\.json is missing"):
        load_export(tmp_path)


@pytest.mark.parametrize(("published", "stated"), [(False, None), (True, "apache-2.0")])
def test_an_export_states_a_licence_only_if_it_started_from_published_weights(
    published, stated, tmp_path
):
    model = timm.create_model("test_vit", num_classes=0)
    timm.models.save_for_hf(model, tmp_path / "published", safe_serialization=True)
    name = f"local-dir:{tmp_path / 'published'}" if published else "test_vit"
    student = build_student(name, WIDTHS, size=160)
    export_student(student, tmp_path / "export", Batch(torch.rand(1, 3, 160, 160)))
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["pretrained_cfg"].get("license") == stated
    built = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)
    assert built.pretrained_cfg.get("license") == stated


def test_an_exported_radio_has_what_it_was_built_with(tmp_path):
    """A release's name in the configuration would add that release's layer scale."""
    options = dict(embed_dim=32, depth=2, num_heads=2)
    student = build_student("radio_vit_base_patch16", WIDTHS, size=64, options=options).eval()
    batch = Batch(torch.rand(1, 3, 64, 64))
    export_student(student, tmp_path / "export", batch)
    alone = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    check = load_file(tmp_path / "export" / "check.safetensors")
    with torch.no_grad():
        features = read_features(alone, check["images"])
    torch.testing.assert_close(features.summary, check["summary"])
    torch.testing.assert_close(features.spatial, check["spatial"])
    config = timm.data.resolve_model_data_config(alone)
    for key in ("mean", "std"):
        assert list(config[key]) == getattr(student, key).flatten().tolist()


RADIO = dict(embed_dim=32, depth=2, num_heads=2)


def radio(teachers=WIDTHS, **how):
    torch.manual_seed(1)
    how = dict(size=64, hidden=16, options=RADIO) | how
    return build_student("radio_vit_base_patch16", teachers, **how).eval()


@pytest.mark.parametrize("kind", ["v2", "ladder"])
def test_each_teachers_head_reads_a_summary_token_of_its_own(kind):
    """AM-RADIO (2312.06709): one summary token for each teacher that has a summary."""
    student = radio(kind=kind)
    assert student.tokens == {"a": 0, "c": 1}  # b has no summary
    x = (torch.rand(2, 3, 64, 64) - student.mean) / student.std
    with torch.no_grad():
        own = student.backbone.forward_features(x)
        taps = student.backbone.forward_intermediates(
            x, intermediates_only=True, return_prefix_tokens=True
        )
        answers = student(Batch(x * student.std + student.mean))
        for label, token in (("a", 0), ("c", 1)):
            earlier = ([prefix[:, token] for _, prefix in taps[:-1]],) if kind == "ladder" else ()
            expected = student.heads[label].summary(own[:, token], *earlier)
            torch.testing.assert_close(answers[label].summary, expected)
    assert (own[:, 0] - own[:, 1]).abs().max() > 0.1


def test_an_export_states_who_reads_which_token_and_is_loaded_so(tmp_path):
    student, batch = radio(tokens={"a": 2, "c": 0}), Batch(torch.rand(1, 3, 64, 64))
    export_student(student, tmp_path / "export", batch)
    file = tmp_path / "export" / "heads.json"
    heads = json.loads(file.read_text())
    assert heads["tokens"] == {"a": 2, "c": 0}
    back = load_export(tmp_path / "export")
    for label in ("a", "c"):
        torch.testing.assert_close(back(batch)[label].summary, student(batch)[label].summary)
    del heads["tokens"]  # an export of before: all heads read the first
    file.write_text(json.dumps(heads))
    own = student.features(batch).summary
    former = load_export(tmp_path / "export")(batch)
    torch.testing.assert_close(former["a"].summary, student.heads["a"].summary(own))


def test_more_teachers_than_summary_tokens_are_refused_with_what_gives_more():
    many = dict.fromkeys("abcde", (8, 8))
    with pytest.raises(ValueError, match=r"3 summary tokens and 2 more.*idxs=\(0, 1, 2, 3, 4\)"):
        radio(many)
    more = radio(many, options=RADIO | dict(summary_idxs=(0, 1, 2, 3, 4)))
    assert list(more.tokens.values()) == [0, 1, 2, 3, 4]
    taken = assign_tokens(more.backbone, many, {"b": 0, "z": 3})
    assert taken == {"b": 0, "a": 1, "c": 2, "d": 3, "e": 4}  # who was there before keeps his
    assert tiny().tokens == {}


def test_options_are_read_as_python_writes_them():
    texts = ("crop_positions=False", 'vitdet={"window": 8}', "drop_rate=0.5", "act_layer=gelu")
    assert read_options(texts) == dict(
        crop_positions=False, vitdet={"window": 8}, drop_rate=0.5, act_layer="gelu"
    )
    for wrong, match in (("depth", "key=value"), ("img_size=64", "decided by the run")):
        with pytest.raises(ValueError, match=match):
            read_options((wrong,))


def test_an_option_reaches_the_backbone_and_the_export(tmp_path):
    options = dict(init_values=0.25, reg_tokens=2)
    student = tiny(options=options).eval()
    assert student.backbone.blocks[0].ls1.gamma.unique().item() == 0.25
    assert student.backbone.num_prefix_tokens == 3
    export_student(student, tmp_path / "export", Batch(torch.rand(1, 3, 160, 160)))
    assert load_export(tmp_path / "export").backbone.num_prefix_tokens == 3
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert options.items() <= config["model_args"].items()
    with pytest.raises(ValueError, match="test_vit refuses its options"):
        tiny(options=dict(windows=3))


@pytest.mark.parametrize("name", ["test_vit", "eradio_nano", "resnet10t"])
def test_a_student_for_several_sizes_answers_on_the_grid_that_was_promised(name):
    grids = student_grids(name, 160, (160, 96, 224))
    student = tiny(name, dynamic=True)
    for size, grid in grids.items():
        ours = student(Batch(torch.rand(1, 3, 50, 50)), size=(size, size))
        assert ours["a"].spatial.shape == (1, *grid, 16)


def test_a_student_of_one_size_refuses_others_by_name():
    with pytest.raises(ValueError, match="test_vit, built for 160 px, cannot look at 100 px"):
        student_grids("test_vit", 160, (160, 100))


def test_spectral_norms_leave_a_vit_as_it_is_and_fold_away():
    plain, spectral = tiny().eval(), tiny(spectral_norms=True).eval()
    weights = {k: v for k, v in plain.state_dict().items() if k.startswith("backbone")}
    back = spectral.as_released()
    assert set(weights) <= set(back.state_dict())
    batch = Batch(torch.rand(2, 3, 160, 160))
    for mine, theirs in zip(spectral.features(batch), back.features(batch), strict=True):
        torch.testing.assert_close(mine, theirs)
    again = copy.deepcopy(spectral).features(batch)  # a class that copies share is still whole
    torch.testing.assert_close(again.summary, spectral.features(batch).summary)
    assert spectral.backbone.blocks[0].attn.qkv.parametrizations
    assert plain.as_released() is plain
    with pytest.raises(ValueError, match="eradio_nano has no attention blocks of a ViT"):
        tiny("eradio_nano", spectral_norms=True)


@pytest.mark.slow
@pytest.mark.parametrize("option", ['vitdet={"window":2,"num_global":1}', "crop_positions=True"])
def test_windows_and_cropped_positions_are_options_of_a_radio_student(option):
    options = read_options((option, "depth=2", "embed_dim=32", "num_heads=2"))
    student = tiny("radio_vit_base_patch16", 64, options=options, dynamic=True)
    for size in (64, 96):
        ours = student(Batch(torch.rand(2, 3, 96, 96)), size=(size, size))
        assert ours["b"].spatial.shape == (2, size // 16, size // 16, 8)


# Starting from earlier weights


@pytest.mark.parametrize(("name", "size"), [("eradio_nano", 64), ("test_vit", 96)])
def test_a_student_starts_from_an_earlier_one_with_all_its_weights(tmp_path, name, size):
    earlier = tiny(name, size)
    earlier.license = "mit"
    batch = Batch(torch.rand(2, 3, size, size))
    export_student(earlier, tmp_path / "run" / "export", batch)
    start = find_start(tmp_path / "run")
    torch.manual_seed(2)
    again = build_student(name, {}, size=size, start=start, drop_path_rate=0.1)
    for key, value in earlier.backbone.state_dict().items():
        assert again.backbone.state_dict()[key].equal(value), key
    assert again.license == "mit"


def test_a_start_at_another_size_resizes_the_positions_once(tmp_path):
    earlier = tiny("test_vit", 96)
    export_student(earlier, tmp_path / "export", Batch(torch.rand(1, 3, 96, 96)))
    larger = build_student("test_vit", {}, size=192, start=tmp_path / "export")
    earlier.backbone.set_input_size(img_size=(192, 192))
    images = torch.rand(1, 3, 192, 192)
    torch.testing.assert_close(
        larger.eval().features(Batch(images)).spatial,
        earlier.eval().forward_features(images).spatial,
    )


def test_a_start_that_does_not_fit_or_is_not_there_is_refused(tmp_path):
    export_student(tiny("test_vit", 96), tmp_path / "export", Batch(torch.rand(1, 3, 96, 96)))
    with pytest.raises(ValueError, match=r"cannot start from .* which holds test_vit"):
        build_student("test_vit2", {}, size=96, start=tmp_path / "export")
    with pytest.raises(ValueError, match="no run, no export and no file of weights"):
        find_start(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "export" / "heads.json").unlink()
    with pytest.raises(ValueError, match="finish it with --resume"):
        find_start(tmp_path)


def test_a_damaged_export_is_refused_with_the_file_and_the_field(tmp_path):
    folder = tmp_path / "export"
    export_student(tiny("test_vit", 96), folder, Batch(torch.rand(1, 3, 96, 96)))
    content = json.loads((folder / "heads.json").read_text())
    for change, said in (
        (dict(size="96"), r"heads\.json, field size"),
        (dict(teachers=dict(a=["wide", 3])), r"heads\.json, field teachers"),
        (dict(head=[]), r"heads\.json, field head"),
        (dict(head=dict(content["head"], colour=1)), r"do not fit its heads\.json"),
        (dict(teachers=dict(content["teachers"], a=[24, 17])), r"do not fit its heads\.json"),
    ):
        (folder / "heads.json").write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=said):
            load_export(folder)
    (folder / "heads.json").write_text(json.dumps(content))
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors"):
        load_export(folder)


def test_a_student_is_exported_at_a_size_that_is_not_its_family_s_own(tmp_path):
    options = dict(dim=16, stem_dim=8, depths=(1, 1, 2, 2), num_heads=(2, 4))
    student = build_student("mambavision_t", WIDTHS, size=96, hidden=16, options=options)
    export_student(student, tmp_path / "export", Batch(torch.rand(1, 3, 96, 96)))
    again = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images), student.backbone.eval()(images))
    assert tuple(again.pretrained_cfg["input_size"]) == (3, 96, 96)  # a list for timm 1.0.29
