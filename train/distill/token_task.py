"""Distillation of language models as a task of the training loop."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.data.text import TextSource
from zoo.language.moe import Chosen, balance_loss, watched_routers, z_loss
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
    """

    def __init__(
        self,
        losses: TokenLosses,
        teachers: Mapping[str, LanguageTeacher],
        hidden: HiddenMatch | None = None,
        specs: Mapping[str, TokenTeacher] | None = None,
        own: OwnText | None = None,
    ):
        self.own = own
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
        found = router_losses(routers, batch.segments.flatten() >= 0) if routers else {}
        for label, theirs in targets.items():
            options: Any = dict(tau=config.tau, chunk=config.chunk, kind=config.kind)
            if config.kl * self.specs[label].kl:
                found[f"{label}/kl"] = kl(*ours, *flat(theirs), counted, **options)
            if self.hidden and label in self.hidden.labels:
                both = (features.hidden, theirs.hidden)
                found[f"{label}/hidden"] = self.hidden(label, *both, counted)
        if config.ce:
            following = batch.following.flatten()
            found["ce"] = cross_entropy(*ours, following, texts.flatten(), chunk=config.chunk)
        return {name: Loss(total, count) for name, total in found.items()}

    def weigh(self, losses: Mapping[str, Tensor], step: int) -> Tensor:
        return torch.stack([self._weight(name) * value for name, value in losses.items()]).sum()

    def _weight(self, name: str) -> float | Tensor:
        label, _, part = name.rpartition("/")
        if part == "hidden" and self.hidden:
            return self.config.hidden * self.specs[label].hidden * self.hidden.weight(label)
        if part == "kl":
            return self.config.kl * self.specs[label].kl
        return getattr(self.config, part)

    def observe(self, means: Mapping[str, Tensor], step: int) -> None:
        if self.hidden:
            self.hidden.observe(means)


def router_losses(routers: Sequence[Chosen], real: Tensor) -> dict[str, Tensor]:
    """Return the sums over tokens of the losses of a mixture's routers, means over its layers.

    Args:
        real: Tokens that are no padding.
    """
    layers = [Chosen(logits[real], experts[real]) for logits, experts in routers]
    balance = torch.stack([balance_loss(*layer) for layer in layers]).mean()
    z = torch.stack([z_loss(layer.logits) for layer in layers]).mean()
    return dict(balance=balance * len(real), router_z=z * len(real))


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
    source: TextSource,
    device: torch.device,
    *,
    rows: int,
    batch: int,
) -> Iterator[tuple[str, float]]:
    """Yield `loss` (nats a token), `perplexity`, `bpb` (bits a byte) and each teacher's `kl`.

    A byte's bits are a token's, over the bytes that a token of the whole text has on average. On
    several ranks each takes its share of the batches, and every one yields the numbers of all.
    """
    found: list[tuple[int, dict[str, Tensor]]] = []
    first, every = share()
    for start in range(first * batch, min(rows, len(source)), every * batch):
        tokens = source.rows(range(start, min(start + batch, rows, len(source)))).to(device)
        counted = tokens.counted.flatten()
        ours = flat(read_tokens(model, tokens))
        part = {"loss": cross_entropy(*ours, tokens.following.flatten(), counted)}
        for label, teacher in teachers.items():
            part[f"kl/{label}"] = kl(*ours, *flat(teacher(tokens)), counted)
        found.append((start, dict(part, count=counted.sum())))
    if every > 1:
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
    yield "bpb", (loss / torch.log(torch.tensor(2.0)) / source.bytes_a_token).item()
    yield from means.items()
