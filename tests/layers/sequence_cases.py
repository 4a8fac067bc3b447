"""What ranks of a sequence do together, beside one process that holds all tokens, in float64."""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from on_ranks import refused

from zoo.layers import sequence
from zoo.layers.ssd import ssd, ssd_over_ranks


def lengths_of(total: int, group) -> tuple[int, ...]:
    """Uneven, and with three ranks or more one without a token."""
    parts = list(sequence.even_lengths(total, group))
    parts[0] += parts[-2]
    parts[-2] = 0
    return tuple(parts) if len(parts) > 2 else (total - 3, 3)


def difference(one, many, tokens, weights, group, dim=1, total=11):
    """Compare outputs and gradients; of weights, the sum of the ranks' gradients.

    Args:
        one: Takes whole tokens and weights.
        many: Takes this rank's tokens, weights, and the lengths.
    """
    lengths = lengths_of(total, group)
    cut = partial(sequence.split_tokens, lengths=lengths, group=group, dim=dim)
    tokens, weights = ([t.double().requires_grad_() for t in ts] for ts in (tokens, weights))
    whole = one(*tokens, *weights)
    look = torch.randn_like(whole)
    wanted = torch.autograd.grad((whole * look).sum(), [*tokens, *weights])
    stretches = [cut(t).detach().requires_grad_() for t in tokens]
    ours = many(*stretches, *weights, lengths, group)
    found = torch.autograd.grad((ours * cut(look)).sum(), [*stretches, *weights])
    gaps = [ours - cut(whole)]
    gaps += [g - cut(w) for g, w in zip(found, wanted[: len(tokens)], strict=False)]
    for grad, right in zip(found[len(tokens) :], wanted[len(tokens) :], strict=True):
        dist.all_reduce(grad, group=group)
        gaps.append(grad - right)
    return max((gap.abs().max().item() for gap in gaps if gap.numel()), default=0.0)


def case_gathered_tokens_are_the_whole(group):
    def many(x, w, lengths, group):
        whole = sequence.gather_tokens(x, lengths, group)
        return sequence.split_tokens(whole * w * whole.mean(1, keepdim=True), lengths, group)

    def one(x, w):
        return x * w * x.mean(1, keepdim=True)

    return difference(one, many, [torch.randn(2, 11, 3)], [torch.randn(3)], group)


def attend_case(group, heads, key_heads, causal):
    attend = partial(F.scaled_dot_product_attention, is_causal=causal)
    q, k, v = (torch.randn(2, n, 11, 5) for n in (heads, key_heads, key_heads))

    def one(q, k, v):
        return attend(q, k, v, enable_gqa=True)

    return difference(
        one, partial(sequence.ulysses_attention, attend=attend), [q, k, v], [], group, dim=2
    )


def case_attention(group):
    return attend_case(group, 4, 4, False)


def case_causal_attention_with_grouped_queries(group):
    return attend_case(group, 8, 4, True)


def case_one_head_of_keys_for_all_ranks(group):
    return attend_case(group, 8, 1, True)


def case_an_operator_of_channels(group):
    """A filter as long as the sequence, for each channel: Hyena's, by its FFT."""

    def filtered(x):
        spectrum = torch.fft.rfft(x, 22, dim=2) * torch.fft.rfft(x.cos(), 22, dim=2)
        return torch.fft.irfft(spectrum, 22, dim=2)[:, :, :11]

    def many(x, lengths, group):
        return sequence.over_heads(filtered, [x], lengths, group)

    return difference(filtered, many, [torch.randn(2, 8, 11, 1)], [], group, dim=2)


def case_a_short_causal_convolution(group):
    """Wider than a rank's tokens, so that what lies before comes from several."""

    def one(x, weight, bias):
        return F.conv1d(F.pad(x.mT, (6, 0)), weight[:, None], bias, groups=3).mT

    weights = [torch.randn(3, 7), torch.randn(3)]
    return difference(one, sequence.causal_conv, [torch.randn(2, 11, 3)], weights, group)


def ssm(total):
    delta = torch.rand(2, total, 4) + 0.1
    A = -torch.rand(4) - 0.1
    return [torch.randn(2, total, 4, 3), delta, *torch.randn(2, 2, total, 2, 5)], [A]


def case_a_linear_recurrence(group):
    tokens, weights = ssm(11)

    def one(x, delta, B, C, A):
        return ssd(x, delta, A, B, C, chunk=4).out

    def many(x, delta, B, C, A, lengths, group):
        return ssd_over_ranks(x, delta, A, B, C, group, chunk=4)

    return difference(one, many, tokens, weights, group)


def case_refusals(group):
    """On several ranks alone: heads that do not split name the nearest number of ranks."""
    n = dist.get_world_size(group)
    lengths = [2] * n
    q, k = torch.zeros(1, 5 * n + 1, 2, 4), torch.zeros(1, 3 * n + 1, 2, 4)
    calls = (
        (lambda: sequence.over_heads(lambda x: x, [q], lengths, group), f"over {n} ranks"),
        (lambda: sequence.ulysses_attention(q, q, q, lengths, group), "nearest number of ranks"),
        (lambda: sequence.ulysses_attention(q[:, :-1], k, k, lengths, group), "of keys do not"),
        (lambda: sequence.tokens_before(q, 1, [3] * n, group, dim=2), "holds 2 tokens"),
        (lambda: sequence.split_tokens(q, lengths, group, dim=2), "do not split into"),
    )
    refused(calls)
    return 0.0
