"""Distillation of language models as a task of the training loop."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.data.text import Rows
from zoo.language.moe import Chosen, balance_loss, watched_routers, z_loss
from zoo.language.spread import Spread
from zoo.language.tokens import TokenFeatures, Tokens, read_tokens
from zoo.teachers.from_language import LanguageTeacher
from zoo.train.distill.hidden import HiddenMatch
from zoo.train.distill.on_policy import OwnText
from zoo.train.distill.token_config import TokenLosses
from zoo.train.distill.token_losses import cross_entropy, kl
from zoo.train.distill.token_teachers import TokenTeacher
from zoo.train.mesh import gathered, share
from zoo.train.state import TrainState
from zoo.train.task import Loss, Task


class Flat(NamedTuple):
    """The features of a batch, one row a token, in the precision in which products run."""

    last: Tensor
    head: Tensor


class TokenTask(Task):
    """Frozen towers, and the text itself, into one tower.

    Args:
        hidden: Compares the hidden states of those teachers whose labels it has.
        specs: What each teacher counts, by label; 1 by default.
        own: Rows that the student writes itself.
        spread: How the models lie over the ranks, if they do.
    """

    def __init__(
        self,
        losses: TokenLosses,
        teachers: Mapping[str, LanguageTeacher],
        hidden: HiddenMatch | None = None,
        specs: Mapping[str, TokenTeacher] | None = None,
        own: OwnText | None = None,
        spread: Spread | None = None,
    ):
        self.own, self.spread = own, spread
        self.config, self.teachers, self.hidden = losses, teachers, hidden
        every = TokenTeacher(name="")
        self.specs = {label: (specs or {}).get(label, every) for label in teachers}
        self.at = losses.hidden_at if hidden else ()
        for label, teacher in teachers.items():
            teacher.at = self.at if hidden and label in hidden.labels else ()

    def targets(self, batch: Tokens, step: int) -> dict[str, TokenFeatures]:
        """Ask the teachers; a head is a parameter, so only hidden states are made."""
        if self.own and self.own.number(step, len(batch.ids)):
            return {}  # the student has still to write
        return self.asked(batch)

    def asked(self, batch: Tokens) -> dict[str, TokenFeatures]:
        """Return what each teacher makes of a batch."""
        return {label: teacher(batch) for label, teacher in self.teachers.items()}

    def losses(
        self, state: TrainState, batch: Tokens, targets: dict[str, TokenFeatures], step: int
    ) -> dict[str, Loss]:
        config, routers = self.config, []
        counted = texts = batch.counted
        if self.own and self.own.number(step, len(batch.ids)):
            batch, counted, texts = self.own.mixed(state.model, batch, step)
            targets = self.asked(batch)
        with watched_routers(state.model, routers) if config.routers else nullcontext():
            features = read_tokens(state.model, batch, at=self.at)
        ours = flat(features)
        counted, count = counted.flatten(), batch.ids.numel()
        found = router_losses(routers, batch, self.spread)
        for label, theirs in targets.items():
            options: Any = dict(
                tau=config.tau, chunk=config.chunk, kind=config.kind, top_k=config.top_k
            )
            if config.kl * self.specs[label].kl:
                found[f"{label}/kl"] = kl(*ours, *flat(theirs), counted, **options)
            if self.hidden and label in self.hidden.labels:
                both = (features.hidden, theirs.hidden)
                found[f"{label}/hidden"] = self.hidden(label, *both, counted)
        if config.ce:
            following = batch.following.flatten()
            found["ce"] = cross_entropy(*ours, following, texts.flatten(), chunk=config.chunk)
        if self.spread and self.spread.sizes.capacity:
            wide = torch.promote_types(ours.last.dtype, torch.float32)
            dropped = self.spread.dropped(counted.numel())
            found["dropped"] = ours.last.new_tensor(dropped, dtype=wide)
        return {name: Loss(total, count) for name, total in found.items()}

    def weigh(self, losses: Mapping[str, Tensor], step: int) -> Tensor:
        return torch.stack([self._weight(name) * value for name, value in losses.items()]).sum()

    def _weight(self, name: str) -> float | Tensor:
        label, _, part = name.rpartition("/")
        if part == "dropped":
            return 0.0  # a count
        if part == "hidden" and self.hidden:
            return self.config.hidden * self.specs[label].hidden * self.hidden.weight(label)
        if part == "kl":
            return self.config.kl * self.specs[label].kl
        return getattr(self.config, part)

    def observe(self, means: Mapping[str, Tensor], step: int) -> None:
        if self.hidden:
            self.hidden.observe(means)


def router_losses(
    routers: Sequence[Chosen], batch: Tokens, spread: Spread | None = None
) -> dict[str, Tensor]:
    """Return the sums over tokens of the losses of a mixture's routers, means over its layers.

    Args:
        spread: Knows the ranks that hold the batch's rows together; their results add up.
    """
    if not routers:
        return {}
    group = spread.sequence if spread else None
    real, count = batch.segments >= 0, batch.ids.numel()  # padding is not
    total, own = int(real.sum()), real[:, batch.own].flatten()
    layers = [Chosen(logits[own], experts[own]) for logits, experts in routers]
    balance = torch.stack([balance_loss(*layer, group) for layer in layers]).mean()
    z = torch.stack([z_loss(layer.logits, total) for layer in layers]).mean()
    return dict(balance=balance * count, router_z=z * count)


def flat(features: TokenFeatures) -> Flat:
    """Return one row a token; under autocast as a linear layer would take them."""
    last, head = features.last.flatten(0, 1), features.head
    device = last.device.type
    if torch.is_autocast_enabled(device):
        last = last.to(torch.get_autocast_dtype(device))
    return Flat(last, head)


@torch.no_grad()
def evaluate_text(
    model: Any,
    teachers: Mapping[str, LanguageTeacher],
    source: Rows,
    device: torch.device,
    *,
    rows: int,
    batch: int,
    spread: Spread | None = None,
) -> Iterator[tuple[str, float]]:
    """Yield `loss` (nats a token), `perplexity`, `bpb` (bits a byte) and each teacher's `kl`.

    A byte's bits are a token's, over the bytes that a token of the whole text has on average. On
    several ranks each takes its share of the batches, and every one yields the numbers of all.

    Args:
        spread: How the models lie over the ranks, if they do: ranks that hold rows together take a
            batch together, and all of them read equally many, for tokens travel between them.
    """
    found: list[tuple[int, dict[str, Tensor]]] = []
    together = spread.sizes.sequence if spread else 1
    first, every = (n // together for n in share())
    starts = range(0, min(rows, len(source)), batch)
    for number in range(first, len(starts) + -len(starts) % every, every):
        idle, start = number >= len(starts), starts[min(number, len(starts) - 1)]
        if idle and not spread:
            break
        tokens = source.rows(range(start, min(start + batch, rows, len(source)))).to(device)
        if spread:
            tokens = replace(tokens, own=spread.own(tokens.ids.shape[1]))
        counted = tokens.counted.flatten()
        ours = flat(read_tokens(model, tokens))
        part = {"loss": cross_entropy(*ours, tokens.following.flatten(), counted)}
        for label, teacher in teachers.items():
            part[f"kl/{label}"] = kl(*ours, *flat(teacher(tokens)), counted)
        if not idle:
            found.append((start, dict(part, count=counted.sum())))
    if share()[1] > 1:
        found = gathered([(at, {n: x.cpu() for n, x in part.items()}) for at, part in found])
    sums = dict[str, Tensor]()  # in the order of the batches: the same to the bit as on one rank
    for _, part in sorted(found, key=lambda one: one[0]):
        for name, value in part.items():
            sums[name] = sums.get(name, 0) + value
    count = sums.pop("count").float()
    means = {name: (value / count).item() for name, value in sums.items()}
    loss = torch.tensor(means["loss"], dtype=torch.float64)
    yield "loss", means.pop("loss")
    yield "perplexity", loss.exp().item()
    yield "bpb", (loss / torch.log(torch.tensor(2.0)) / source.bytes_in(rows)).item()
    yield from means.items()
