"""How long a model of images and text takes to its first token."""

import statistics
from collections.abc import Callable, Iterator

import torch

from zoo.eval.multimodal.subject import ImageTextSubject
from zoo.eval.registry import Found
from zoo.eval.settings import PrefillSettings
from zoo.eval.speed.models import timed
from zoo.language.tokens import Tokens
from zoo.multimodal.image_text import ImageText, read_image_text, see_images
from zoo.multimodal.open import tower_of


@torch.no_grad()
def prefill(subject: ImageTextSubject, data: None, settings: PrefillSettings) -> Iterator[Found]:
    """Yield milliseconds a batch of the tower alone and up to the first token, and peak memory.

    `prefill/tower_ms`, `prefill/ms` (tower, projector, language model and one row of logits),
    `prefill/image_tokens`, and on a GPU `prefill/tower_peak_gib` and `prefill/peak_gib`, of weights
    and activations. Medians over rounds.
    """
    batch = _batch(subject, settings)

    def tower() -> None:
        with subject.autocast():
            see_images(subject.model, batch)

    def whole() -> None:
        with subject.autocast():
            last, head, _ = read_image_text(subject.model, batch)
            _ = last[:, -1] @ head.T.to(last.dtype)

    for name, step in (("tower_", tower), ("", whole)):
        seconds, peak = _timed(step, subject.device, settings.rounds)
        yield f"prefill/{name}ms", 1e3 * seconds
        if peak:
            yield f"prefill/{name}peak_gib", peak / 2**30
    yield "prefill/image_tokens", float(_tokens(batch))


def _batch(subject: ImageTextSubject, settings: PrefillSettings) -> ImageText:
    tower = tower_of(subject.model)
    side = settings.size or tower.config.size
    height, width = tower.config.fitted(side, side)
    cells = (height // tower.config.patch_size) * (width // tower.config.patch_size)
    draws = torch.Generator().manual_seed(subject.seed)
    images = torch.randint(0, 256, (settings.batch, 3, height, width), generator=draws).byte()
    ids = torch.randint(0, 200, (settings.batch, cells + settings.text), generator=draws)
    ids[:, :cells] = subject.model.config.image_token_id
    tokens = Tokens(ids, torch.zeros_like(ids))
    order = [list(range(settings.batch))]
    return ImageText(tokens, torch.zeros_like(ids).bool(), [images], order).to(subject.device)


def _tokens(batch: ImageText) -> int:
    return int((batch.tokens.ids[0] == batch.tokens.ids[0, 0]).sum())


def _timed(step: Callable[[], None], device: torch.device, rounds: int) -> tuple[float, int]:
    for _ in range(3):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(timed(step, device.type, rounds))
    return seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
