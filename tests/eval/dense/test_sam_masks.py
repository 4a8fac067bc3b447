"""Masks through SAM's decoder: SAM's own features give SAM's own masks."""

from pathlib import Path

import pytest
import torch

from zoo.eval.dense.sam_masks import SamMasksSettings, agreement, grid_points, masks
from zoo.eval.registry import Picture
from zoo.features import Batch, Features
from zoo.teachers.name import TeacherName
from zoo.teachers.open import open_teacher
from zoo.teachers.sam import MaskDecoder

hf = pytest.importorskip("transformers", reason="transformers is in the extra [teachers]")
SIDE = 64


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """A tiny SAM with random weights, as a folder."""
    folder = tmp_path_factory.mktemp("hub") / "sam"
    torch.manual_seed(0)
    config = hf.SamConfig(
        vision_config=hf.SamVisionConfig(
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_size=24,
            image_size=SIDE,
            output_channels=16,
            patch_size=8,
            mlp_dim=16,
            window_size=3,
            global_attn_indexes=[1],
            num_pos_feats=8,
        ),
        prompt_encoder_config=hf.SamPromptEncoderConfig(
            hidden_size=16, image_size=SIDE, patch_size=8, mask_input_channels=4
        ),
        mask_decoder_config=hf.SamMaskDecoderConfig(
            hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16
        ),
    )
    model = hf.SamModel(config)
    for weight in model.parameters():  # of 1e-10 at first: no mask would depend on the image
        weight.data.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    square = dict(height=SIDE, width=SIDE)
    hf.SamImageProcessor(size=dict(longest_edge=SIDE), pad_size=square).save_pretrained(folder)
    return f"hf:{folder}"


def measured(who, teacher, **how):
    found = dict(masks(who, Path(), SamMasksSettings(teacher=teacher, points=3, **how)))
    return {k: v.value for k, v in found.items() if not isinstance(v, Picture)}, found


def test_a_student_that_is_sam_agrees_with_it_and_a_noisy_one_less(sam, planted, pictures):
    teacher = open_teacher(sam)
    images = pictures(torch.rand(3, 3, SIDE, SIDE))

    def subject(noise):
        def features(x):
            target = teacher(Batch(x)).spatial
            drawn = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
            return (target + noise * target.std() * drawn).permute(0, 3, 1, 2)

        return planted(
            features, {"sam": lambda s: Features(None, s.spatial)}, size=SIDE, images=images
        )

    same, found = measured(subject(0.0), sam)
    assert same == {"masks/miou": 100, "masks/iou_over_half": 100}
    assert found["masks/000"].pixels.shape == (SIDE, 2 * SIDE, 3)
    noisy, _ = measured(subject(1.0), sam)
    noisier, _ = measured(subject(20.0), sam)
    assert noisier["masks/miou"] < noisy["masks/miou"] < 100


@pytest.mark.parametrize("neck", ["", "+neck"])
def test_the_decoder_gives_the_masks_of_the_whole_model(sam, neck):
    """Both from the map before the neck and from the one behind it."""
    sam += neck
    name = TeacherName.parse(sam)
    teacher, decoder = open_teacher(sam), MaskDecoder(name)
    whole = hf.SamModel.from_pretrained(name.name).eval()
    images, points = torch.rand(2, 3, SIDE, SIDE), grid_points(2).expand(2, -1, -1)
    ours = decoder(teacher(Batch(images)).spatial, points)
    with torch.no_grad():
        theirs = whole(
            pixel_values=(images - teacher.mean) / teacher.std,
            input_points=points[:, :, None] * SIDE,
        )
    best = theirs.iou_scores.argmax(dim=-1)
    want = torch.stack(
        [torch.stack([theirs.pred_masks[i, j, best[i, j]] for j in range(4)]) for i in range(2)]
    )
    torch.testing.assert_close(ours, want)
    assert (ours > 0).any() and (ours < 0).any()


def test_features_on_another_grid_are_brought_to_sams(sam):
    decoder = MaskDecoder(TeacherName.parse(sam))
    assert decoder.grid == (8, 8)
    for width in (16, 24):
        assert decoder(torch.randn(1, 4, 4, width), grid_points(2)).shape[:2] == (1, 4)
    with pytest.raises(ValueError, match="8 channels and those of SAM 24 before its neck and 16"):
        decoder(torch.randn(1, 4, 4, 8), grid_points(2))


def test_agreement_is_intersection_over_union_and_two_empty_masks_agree():
    ours = torch.zeros(1, 3, 2, 2, dtype=torch.bool)
    theirs = ours.clone()
    ours[0, 0, 0], theirs[0, 0, :, 0] = True, True
    ours[0, 1] = True
    assert agreement(ours, theirs)[0].tolist() == pytest.approx([1 / 3, 0, 1])


def test_points_lie_in_the_middles_of_equal_cells_column_first():
    assert grid_points(2)[0].tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


def test_other_teachers_and_missing_heads_are_refused(sam, planted, pictures, tmp_path):
    who = planted(images=pictures(torch.rand(1, 3, 32, 32)))
    with pytest.raises(ValueError, match=r"Name the teacher"):
        measured(who, "")
    with pytest.raises(ValueError, match="no head 'sam'"):
        measured(who, sam)
    with pytest.raises(ValueError, match="mask decoder of timm:resnet18 cannot be opened"):
        MaskDecoder(TeacherName.parse("timm:resnet18"))
    small = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=16, image_size=32)
    hf.Dinov2Config(**small).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a dinov2, and masks are decoded with SAM"):
        MaskDecoder(TeacherName.parse(f"hf:{tmp_path}"))
    with pytest.raises(ValueError, match=r"masks\.points is 0"):
        SamMasksSettings(points=0)
