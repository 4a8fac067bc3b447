"""A tiny Llava over ranks, images and tokens shared out, beside one process; in float64."""

import copy

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from zoo.language.token_parallel import add_over_ranks
from zoo.language.tokens import Tokens
from zoo.layers.sequence import split_tokens
from zoo.multimodal.image_text import ImageText, read_image_text
from zoo.multimodal.open import build_llava, open_tower
from zoo.multimodal.sequence import ImageTextParallel

torch.float32 = torch.float = torch.float64
torch.Tensor.float = torch.Tensor.double
IMAGE = 31


def llava():
    options = dict(embed_dim=16, depth=2, num_heads=2, patch_size=8)
    tower = open_tower("vit_tiny_patch16_224", size=16, native=True, options=options)
    language = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, intermediate_size=8,
        )
    )  # fmt: skip
    model = build_llava(tower, language, image_token=IMAGE).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def rows(frames):
    """Two rows: one about some frames of 16 x 16 px, one about a wider image and padding."""
    ids = torch.randint(31, (2, 4 * frames + 7))
    for frame in range(frames):
        ids[0, 2 + 4 * frame : 6 + 4 * frame] = IMAGE
    ids[1, 1:9] = IMAGE
    segments = torch.zeros_like(ids)
    segments[1, -3:] = -1
    images = [torch.randint(0, 256, (frames, 3, 16, 16)), torch.randint(0, 256, (1, 3, 16, 32))]
    order = [list(range(frames)), [frames]]
    return ImageText(Tokens(ids, segments), segments >= 0, images, order)


def difference(group, frames, lengths=None):
    model, batch = llava(), rows(frames)
    whole = copy.deepcopy(model)
    look = torch.randn(*batch.tokens.ids.shape, 32).double() * batch.answers[..., None]
    last, head, _ = read_image_text(whole, batch)
    loss = (last @ head.T * look).sum()
    loss.backward()
    spread = ImageTextParallel(model, group)
    ours, head, _ = spread.read(batch, lengths)
    share = split_tokens(look, lengths or _even(batch, group), group)
    mine = (ours @ head.T * share).sum()
    mine.backward()
    add_over_ranks(list(model.parameters()), group)
    total = mine.detach().clone()
    dist.all_reduce(total, group=group)
    gaps = [((total - loss) / loss.abs()).abs().flatten()]
    wanted = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        right = wanted[name].grad
        right = torch.zeros_like(parameter) if right is None else right
        gaps.append((parameter.grad - right).abs().flatten() / max(1, right.abs().max().item()))
    return torch.cat(gaps).max().item()


def _even(batch, group):
    from zoo.layers.sequence import even_lengths

    return even_lengths(batch.tokens.ids.shape[1], group)


def case_many_frames(group):
    return difference(group, 6)


def case_fewer_images_than_ranks_and_uneven_stretches(group):
    lengths = [4, 7] if dist.get_world_size(group) == 2 else [5, 1, 2, 3]
    return difference(group, 1, lengths)
