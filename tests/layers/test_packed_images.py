"""Images of several sizes in one row of a vision transformer."""

import pytest
import timm
import torch

from zoo.layers.packed_images import packed_features

SMALL = dict(depth=2, embed_dim=24, num_heads=3)
SIZES = ((1, 2), (3, 1), (2, 2), (1, 1))


def random(name: str, **kwargs):
    """Build a ViT whose parameters are all random: at first, many of them do nothing."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL, **kwargs).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", dict(dynamic_img_size=True)),
        ("vit_tiny_patch16_224", dict(dynamic_img_size=True, qk_norm=True, class_token=False,
                                      global_pool="avg")),
        ("vit_base_patch14_dinov2", dict(dynamic_img_size=True)),
        ("radio_vit_base_patch16", {}),
        ("radio_vit_base_patch16.c_radio_v3", {}),
    ],
)  # fmt: skip
def test_images_in_one_row_are_the_same_as_alone_and_so_are_gradients(name, kwargs):
    model = random(name, **kwargs)
    step = 2 * model.patch_embed.patch_size[0]
    images = [torch.rand(3, step * h, step * w).double() for h, w in SIZES]
    found = []
    together = packed_features(model, images)
    alone = [model.forward_features(image[None])[0] for image in images]
    for features in (together, alone):
        total = torch.stack([(x * torch.arange(x.shape[0])[:, None]).sum() for x in features])
        weights = list(model.blocks.parameters())
        found.append(torch.autograd.grad(total.sum(), weights))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-11)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("vit_tiny_patch16_224", {}, "dynamic_img_size"),
        ("vit_tiny_patch16_224", dict(dynamic_img_size=True, drop_path_rate=0.1), "Random depth"),
        ("eva02_tiny_patch14_224", {}, "class Eva"),
        ("radio_vit_base_patch16", dict(vitdet=dict(window=2, num_global=1)), "in windows"),
    ],
)
def test_models_that_cannot_are_refused(name, kwargs, message):
    model = timm.create_model(name, depth=2, embed_dim=24, num_heads=3, **kwargs)
    with pytest.raises(ValueError, match=message):
        packed_features(model.train(), [torch.rand(3, 32, 32)])
