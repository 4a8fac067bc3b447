import subprocess
import sys

import pytest
import torch

from zoo.features import at_grid, read_features
from zoo.language.tokens import Tokens
from zoo.multimodal.image_text import ImageText, read_image_text
from zoo.multimodal.open import (
    adaptor_tower,
    mixture_tower,
    open_tower,
    open_vlm,
    replace_tower,
    tower_of,
)
from zoo.multimodal.projector import pixel_shuffle
from zoo.students.build import build_student
from zoo.train.distill.phi_s import Moments, fit

FAMILIES = ("vit_tiny_patch16_224", "eradio_xxxtiny", "mambavision_t", "radio_vit_base_patch16")


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_llava_takes_as_many_tokens_as_the_grid_has_cells_square_and_not(
    name, tmp_path, tiny_llava, ids_with
):
    tower = open_tower(name, size=64, native=True)
    model, config = tiny_llava(tower), tower.config
    for size in ((64, 64), (64, 64 + config.multiple), (64 + config.multiple, 64)):
        cells = size[0] // config.patch_size * (size[1] // config.patch_size)
        pixels = torch.rand(2, 3, *size)
        with torch.no_grad():
            out = model(input_ids=ids_with(cells), pixel_values=pixels)
            assert out.image_hidden_states.shape[0] == 2 * cells
            with pytest.raises(ValueError, match="do not match"):
                model(input_ids=ids_with(cells + 1), pixel_values=pixels)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        ids = ids_with(cells)
        again = open_vlm(f"vlm:{tmp_path}")(input_ids=ids, pixel_values=pixels).logits
        assert torch.equal(again, model(input_ids=ids, pixel_values=pixels).logits)


@pytest.mark.long
def test_a_clean_process_loads_it_without_remote_code(small_tower, tmp_path, tiny_llava, ids_with):
    model = tiny_llava(small_tower)
    model.save_pretrained(tmp_path)
    ids, pixels = ids_with(4, rows=1), torch.rand(1, 3, 64, 64)
    torch.save((ids, pixels, model(input_ids=ids, pixel_values=pixels).logits), tmp_path / "x.pt")
    code = (
        "import sys, torch, zoo.multimodal\n"
        "from transformers import LlavaForConditionalGeneration as Llava\n"
        "model = Llava.from_pretrained(sys.argv[1], trust_remote_code=False).eval()\n"
        "ids, pixels, wanted = torch.load(sys.argv[1] + '/x.pt')\n"
        "assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits, wanted)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_the_tokens_are_the_backbone_s_map_and_nothing_else():
    student = build_student("vit_tiny_patch16_224", {}, size=32)
    torch.manual_seed(0)
    tower = open_tower("vit_tiny_patch16_224", size=32)
    tower.backbone.load_state_dict(student.backbone.state_dict())
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        x = (pixels - student.mean) / student.std
        wanted = read_features(student.eval().backbone, x).spatial
        assert torch.equal(tower(pixels).last_hidden_state, wanted.flatten(1, 2))


def test_a_pixel_shuffle_keeps_every_channel_of_a_square_of_cells():
    x = torch.arange(2 * 4 * 6 * 3).view(2, 4, 6, 3)
    y = pixel_shuffle(x, 2)
    assert y.shape == (2, 2, 3, 12)
    assert torch.equal(y[1, 1, 2], torch.cat([x[1, 2, 4], x[1, 2, 5], x[1, 3, 4], x[1, 3, 5]]))


def test_phi_s_inside_gives_every_channel_variance_one():
    tower, pixels = open_tower("resnet18", size=64), torch.rand(64, 3, 64, 64)
    with torch.no_grad():
        (raw,) = tower.maps(pixels)
        moments = Moments(raw.shape[-1])
        moments.update(raw)
        fitted = fit("phi_s", moments)
        tower.standardise([(fitted.mean, fitted.weight)])
        rows = tower(pixels).last_hidden_state.flatten(0, 1)
    assert rows.mean(0).abs().max() < 1e-3
    # 256 rows of 512 channels: the mean of the variances is what is known
    assert abs(rows.var(0).mean().item() - 1) < 1e-3


def test_a_mixture_joins_what_each_encoder_sees_at_its_own_resolution():
    torch.manual_seed(0)
    towers = [
        open_tower("vit_tiny_patch16_224", size=32, native=True),
        open_tower("resnet18", size=64, native=True),
    ]
    mixture = mixture_tower(towers, size=64, stride=16, native=True)
    pixels = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        joined = mixture.features(pixels)
        assert joined.shape == (2, 4, 6, 192 + 512)
        (second,) = towers[1].maps(pixels)
        assert torch.equal(joined[..., 192:], at_grid(second, (4, 6)))
        first = torch.nn.functional.interpolate(
            pixels, (32, 48), mode="bicubic", antialias=True
        ).clamp(0, 1)
        (small,) = towers[0].maps(first)
        assert torch.allclose(joined[..., :192], at_grid(small, (4, 6)), atol=1e-5)


def test_adaptors_stand_in_for_a_mixture_with_the_same_shape(tmp_path, tiny_llava, ids_with):
    torch.manual_seed(0)
    towers = [open_tower("vit_tiny_patch16_224", size=32), open_tower("resnet18", size=32)]
    mixture = mixture_tower(towers, size=32, stride=16)
    student = build_student(
        "resnet18", dict(vit=(192, 192), resnet=(512, 512)), size=32, hidden=16, upsample=2
    )
    adaptors = adaptor_tower(student, stride=16)
    pixels = torch.rand(2, 3, 32, 32)
    model = tiny_llava(mixture)
    with torch.no_grad():
        assert mixture(pixels).last_hidden_state.shape == adaptors(pixels).last_hidden_state.shape
        answers = student.eval().answer(pixels)
        wanted = torch.cat([answers[name].spatial for name in ("vit", "resnet")], -1)
        assert torch.allclose(adaptors.features(pixels), wanted, atol=1e-6)
        before = model(input_ids=ids_with(4), pixel_values=pixels).logits
        replace_tower(model, adaptors)
        after = model(input_ids=ids_with(4), pixel_values=pixels).logits
    assert before.shape == after.shape and not torch.equal(before, after)
    model.save_pretrained(tmp_path)
    again = open_vlm(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(tower_of(again).features(pixels), adaptors.features(pixels))


def test_a_tower_of_another_width_is_refused(small_tower, tiny_llava):
    model = tiny_llava(small_tower)
    with pytest.raises(
        ValueError, match="gives tokens of 192 channels and the projector takes 512"
    ):
        replace_tower(model, open_tower("vit_tiny_patch16_224", size=32))


def test_features_of_images_of_several_sizes_are_those_of_each_alone(
    small_tower, tiny_llava, ids_with
):
    model = tiny_llava(small_tower)
    wide, square = (
        torch.randint(0, 256, (2, 3, 64, 96)).byte(),
        torch.randint(0, 256, (1, 3, 64, 64)),
    )
    ids = torch.cat(
        [ids_with(6, rows=2), torch.cat([ids_with(4, rows=1), torch.zeros(1, 2)], 1).long()]
    )
    ids = ids[[0, 2, 1]]
    batch = ImageText(
        Tokens(ids, torch.zeros_like(ids)), torch.ones_like(ids).bool(),
        [wide, square.byte()], [[0, 2], [1]],
    )  # fmt: skip
    with torch.no_grad():
        both = read_image_text(model, batch)
        one = model(input_ids=ids[[1]], pixel_values=square.float() / 255).logits
        two = model(input_ids=ids[[0, 2]], pixel_values=wide.float() / 255).logits
    logits = both.last @ both.head.T
    assert torch.allclose(logits[[1]], one, atol=1e-5)
    assert torch.allclose(logits[[0, 2]], two, atol=1e-5)
    fewer = ImageText(batch.tokens, batch.answers, [wide], [[0, 2]])
    with pytest.raises(ValueError, match="16 tokens for images and the images make 12"):
        read_image_text(model, fewer)


def test_generation_says_what_teacher_forcing_says(small_tower, tiny_llava, ids_with):
    model = tiny_llava(small_tower)
    ids, pixels = ids_with(4, rows=1), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        made = model.generate(
            input_ids=ids, pixel_values=pixels, max_new_tokens=4, do_sample=False,
            attention_mask=torch.ones_like(ids), eos_token_id=[256],
        )  # fmt: skip
        logits = model(input_ids=made, pixel_values=pixels).logits
    new = made[:, ids.shape[1] :]
    assert torch.equal(new, logits.argmax(-1)[:, ids.shape[1] - 1 : -1])


def test_gradients_reach_tower_projector_and_language_model(small_tower, tiny_llava, ids_with):
    model = tiny_llava(open_tower("resnet18", size=64))
    model(input_ids=ids_with(4), pixel_values=torch.rand(2, 3, 64, 64)).logits.sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert [n for n in missing if ".fc." not in n] == []


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("resnet81", {}, "no network 'resnet81' for a tower.*Did you mean resnet"),
        ("vlm:nowhere", {}, "no model of images and text in nowhere"),
        ("adaptors:nowhere", {}, "nowhere"),
        ("resnet18", dict(size=64, shuffle=3), "do not fall into tokens of 96 px"),
        ("resnet18", dict(size=256, max_tokens=16), "make 64 tokens, beyond the budget of 16"),
    ],
)
def test_a_tower_that_cannot_be_is_refused_in_one_line(name, options, says):
    with pytest.raises(ValueError, match=says) as refused:
        open_tower(name, **options)
    assert "\n" not in str(refused.value)


def test_a_larger_image_than_the_budget_is_refused_by_the_tower():
    tower = open_tower("resnet18", size=64, max_tokens=4)
    with pytest.raises(ValueError, match="beyond the budget of 4; resize it to 64 x 64"):
        tower(torch.rand(1, 3, 96, 96))
