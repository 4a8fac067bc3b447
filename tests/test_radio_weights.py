"""RADIO's files: every layout, from a path, with what its arguments say."""

import argparse
import enum
import logging
import os
import pathlib

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from zoo.layers.patch_position import regridded_positions
from zoo.radio_weights import architecture, prefix_layout, published, teacher_tokens

STEP = 8
TINY = dict(embed_dim=32, depth=2, num_heads=2, patch_size=STEP)
TOKENS = dict(reg_tokens=3, summary_idxs=(0, 2), max_img_size=64)
HEADS = dict(
    clip=dict(token=0, summary=dict(hidden=8, out_dim=6), feature=dict(hidden=8, out_dim=5)),
    sam=dict(token=1, feature=dict(hidden=8, out_dim=4, num_inner=1, upsample=2)),
)
TEACHERS = [
    dict(name="clip", use_summary=True),
    dict(name="sam", use_summary=False, fd_upsample_factor=2),
    dict(name="dino_v2", use_summary=True),
]


class Stage(enum.Enum):
    LAST = 3


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def build(**kwargs):
    return timm.create_model("radio_vit_base_patch16", **(TINY | kwargs)).eval()


def load(path, **kwargs):
    return build(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **kwargs)


@pytest.fixture
def parent(golden):
    """A model with everything a file can hold, filled by the golden rule."""
    model = build(init_values=1e-5, adaptors=HEADS, feature_normalizer=True, **TOKENS)
    golden.fill(model)
    return model


def _hub(state):
    """As torch.hub's files have it: the transformer under `base_model.`, the heads on top."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("model.", "base_model.", 1) if key.startswith("model.") else key
        key = key.replace("feature_normalizer.", "_feature_normalizer.")
        for name in ("clip", "sam"):
            key = key.replace(f"adaptors.{name}.head_mlp.", f"_heads.{name}.")
            key = key.replace(f"adaptors.{name}.feat_mlp.", f"_feature_projections.{name}.")
        renamed[key] = value
    return renamed


def _numbered(state):
    for number, name in enumerate(("clip", "sam")):
        state = {
            key.replace(f"_heads.{name}.", f"_heads.{number}.").replace(
                f"_feature_projections.{name}.", f"_feature_projections.{number}."
            ): value
            for key, value in state.items()
        }
    return state


LAYOUTS = {
    "wrapper": lambda state: state,
    "safetensors hub": lambda state: {f"radio_model.{k}": v for k, v in state.items()},
    "torch hub": _hub,
    "torch hub, numbered heads": lambda state: _numbered(_hub(state)),
}


@pytest.fixture
def write(tmp_path):
    def write(state, **args):
        content = dict(state_dict=state, args=argparse.Namespace(**args), epoch=3)
        torch.save(content, tmp_path / "radio.pth.tar")
        return tmp_path / "radio.pth.tar"

    return write


def same(model, parent, keys=None):
    ours, theirs = model.state_dict(), parent.state_dict()
    keys = theirs if keys is None else keys
    torch.testing.assert_close(
        {k: ours[k] for k in keys}, {k: theirs[k] for k in keys}, rtol=0, atol=0
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_and_its_arguments_shape_the_model(parent, write, layout):
    path = write(
        LAYOUTS[layout](published(parent.state_dict())),
        teachers=TEACHERS,
        cls_token_per_teacher=True,
        output=pathlib.Path("/runs") / "3",
        lr=np.float32(0.5),
        stage=Stage.LAST,
        dtype=torch.bfloat16,
    )
    model = load(path, adaptors=["clip", "sam"])
    assert list(model.state_dict()) == list(parent.state_dict())
    same(model, parent)
    x = torch.rand(2, 3, 32, 16)
    torch.testing.assert_close(model.radio(x), parent.radio(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_path_loads_into_a_model_of_that_form(parent, write, layout):
    path = write(LAYOUTS[layout](published(parent.state_dict())), teachers=TEACHERS)
    heads = {
        name: dict(sizes, source=str(i) if "numbered" in layout else None)
        for i, (name, sizes) in enumerate(HEADS.items())
    }
    form = dict(init_values=1e-5, adaptors=heads, feature_normalizer=True, **TOKENS)
    same(build(checkpoint_path=path, **form), parent)


def test_heads_that_nobody_asked_for_are_left_out(parent, write):
    model = load(write(_hub(published(parent.state_dict())), teachers=TEACHERS))
    assert not model.adaptors
    same(model, parent, [k for k in parent.state_dict() if not k.startswith("adaptors.")])
    one = load(write(_hub(published(parent.state_dict())), teachers=TEACHERS), adaptors=["sam"])
    assert list(one.adaptors) == ["sam"]


def test_asking_for_a_teacher_that_is_not_there_names_those_that_are(parent, write):
    path = write(published(parent.state_dict()), teachers=TEACHERS)
    with pytest.raises(ValueError, match=r"\['clip', 'sam', 'dino_v2'\], not 'siglip'"):
        load(path, adaptors=["siglip"])
    with pytest.raises(ValueError, match="no heads of the teacher 'dino_v2'"):
        load(path, adaptors=["dino_v2"])


def test_our_own_weights_load_in_any_form(parent, tmp_path):
    save_file(parent.state_dict(), tmp_path / "ours.safetensors")
    model = load(tmp_path / "ours.safetensors", adaptors=HEADS)
    same(model, parent)
    assert model.summary_idxs.tolist() == [0, 2]
    state = build(
        pretrained=True,
        pretrained_cfg_overlay=dict(state_dict=parent.state_dict()),
        adaptors=HEADS,
    )
    same(state, parent)


def test_files_of_timms_own_radio_models_load(parent, tmp_path):
    state = {k: v for k, v in parent.state_dict().items() if not k.startswith("adaptors.")}
    kept = {k: v for k, v in state.items() if "norm" not in k or k.startswith("blocks.")}
    kept = {k: v for k, v in kept.items() if k != "summary_idxs"}
    save_file(kept | {"patch_embed.proj.bias": torch.zeros(32)}, tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors")
    assert model.patch_embed.proj.bias is None
    same(model, parent, list(kept))


def test_summaries_are_those_that_the_file_names(parent, write):
    state = published(parent.state_dict())
    state["summary_idxs"] = torch.tensor([1])
    assert load(write(state)).radio(torch.rand(1, 3, 16, 16)).summary.shape == (1, 32)
    del state["summary_idxs"]
    assert load(write(state, teachers=TEACHERS)).summary_idxs.tolist() == [0, 2]


def test_spectral_weights_are_baked_in(parent, write):
    x = torch.rand(1, 3, 16, 16)
    parent.set_spectral()
    expected = parent.forward_features(x)
    model = load(write(published(parent.state_dict()), teachers=TEACHERS))
    assert not any("parametrizations" in key for key in model.state_dict())
    torch.testing.assert_close(model.forward_features(x), expected)


def test_a_foreign_grid_of_positions_is_resampled(parent, write):
    path = write(published(parent.state_dict()))
    assert load(path).pos_embed.shape[1] == 64
    larger = load(path, max_img_size=96)
    torch.testing.assert_close(larger.pos_embed, regridded_positions(parent.pos_embed, 144))


def test_other_channels_and_classes_are_adapted(parent, write):
    path = write(published(parent.state_dict()))
    grey = load(path, in_chans=1, num_classes=7)
    weight = "patch_embed.proj.weight"
    torch.testing.assert_close(
        grey.state_dict()[weight], parent.state_dict()[weight].sum(1, keepdim=True)
    )
    assert grey(torch.rand(1, 1, 16, 16)).shape == (1, 7)


def test_features_only_loads_too(parent, write):
    model = load(write(published(parent.state_dict())), features_only=True, out_indices=[0])
    x = torch.rand(1, 3, 16, 16)
    expected = parent.forward_intermediates(x, [0], intermediates_only=True)
    torch.testing.assert_close(model(x), expected)


def test_missing_and_extra_keys_are_listed_ten_of_each_with_a_hint(parent, write):
    state = published(parent.state_dict())
    state = {k: v for k, v in state.items() if ".1." not in k} | {"base_model.x": torch.ones(1)}
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more.*1 extra.*Is it a file") as e:
        load(write(state))
    assert str(e.value).count("blocks.1.") == 10
    with pytest.raises(ValueError, match="of another shape"):
        load(write(published(parent.state_dict())), embed_dim=64)


def test_a_file_of_another_family_is_refused(write):
    with pytest.raises(ValueError, match=r"1 extra: conv\.weight"):
        load(write({"conv.weight": torch.ones(1)}))


def test_a_malicious_file_is_refused_and_nothing_is_executed(parent, write, tmp_path):
    path = write(published(parent.state_dict()), hook=Runs(tmp_path / "trace"))
    with pytest.raises(ValueError, match="could run code"):
        load(path)
    with pytest.raises(RuntimeError, match="blocked"):  # timm's own reader
        build(checkpoint_path=path)
    assert not (tmp_path / "trace").exists()


def test_loading_research_weights_says_so(parent, write, caplog):
    path = write(published(parent.state_dict()))
    overlay = dict(file=str(path))
    for tag, warned in (("radio_v2_5", True), ("c_radio_v3", False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "zoo"):
            timm.create_model(
                f"radio_vit_base_patch16.{tag}",
                pretrained=True,
                pretrained_cfg_overlay=overlay,
                **TINY,
            )
        assert ("non-commercial" in caplog.text) == warned


def test_a_tag_brings_the_flags_of_its_release(parent, write):
    path = write(published(parent.state_dict()))
    model = timm.create_model(
        "radio_vit_base_patch16.c_radio_v3",
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(path)),
        **TINY,
    )
    assert model.align_corners
    assert not load(path).align_corners
    assert load(path, align_corners=True).align_corners


def test_a_release_without_a_known_repository_asks_for_the_file():
    with pytest.raises(ValueError, match=r"huge_patch14 .*give the file"):
        timm.create_model("radio_vit_huge_patch14", pretrained=True)


# -- teachers and tokens -------------------------------------------------------------------------


def test_each_distinct_teacher_has_a_token_and_registers_pad_the_prefix():
    assert teacher_tokens(TEACHERS) == dict(clip=0, sam=1, dino_v2=2)
    layout = prefix_layout(TEACHERS, register_multiple=8)
    assert layout == dict(reg_tokens=7, summary_idxs=[0, 2])
    assert prefix_layout(TEACHERS, num_registers=2)["reg_tokens"] == 4


def test_a_count_that_is_a_multiple_already_gets_a_whole_multiple_more():
    four = [*TEACHERS, dict(name="siglip")]
    assert prefix_layout(four, register_multiple=4) == dict(reg_tokens=7, summary_idxs=[0, 2, 3])


def test_teachers_may_share_a_name_a_slot_or_all_one_token():
    twice = [*TEACHERS, dict(name="clip", use_summary=True)]
    assert prefix_layout(twice) == dict(reg_tokens=2, summary_idxs=[0, 2])
    slots = [dict(name="a", token_slot=4), dict(name="b", token_slot=4)]
    assert prefix_layout(slots) == dict(reg_tokens=4, summary_idxs=[4])
    assert prefix_layout(TEACHERS, per_teacher=False) == dict(reg_tokens=0, summary_idxs=[0])


def test_the_form_of_a_model_is_read_from_its_weights(parent):
    found = architecture(published(parent.state_dict()), dict(teachers=TEACHERS), ["sam"])
    assert found == dict(
        reg_tokens=3,
        max_img_size=64,
        patch_bias=False,
        init_values=1e-5,
        feature_normalizer=True,
        mlp_ratio=4.0,
        summary_idxs=[0, 2],
        adaptors=dict(
            sam=dict(
                token=1,
                source="sam",
                summary=None,
                feature=dict(
                    hidden=8, out_dim=4, num_inner=1, kind="v2", pre_norm=False, upsample=2
                ),
            )
        ),
    )


@pytest.mark.parametrize("hidden", [4304, 4320])
def test_the_width_of_the_mlp_survives_its_ratio(hidden):
    with torch.device("meta"):
        model = timm.create_model(
            "radio_vit_so400m_patch16", depth=1, mlp_ratio=(hidden + 0.5) / 1152
        )
        assert model.blocks[0].mlp.fc1.out_features == hidden
        state = {k: v for k, v in model.state_dict().items() if k != "summary_idxs"}
        ratio = architecture(state, {})
        again = timm.create_model("radio_vit_so400m_patch16", depth=1, mlp_ratio=ratio["mlp_ratio"])
    assert again.blocks[0].mlp.fc1.out_features == hidden
