"""Retrieval of images by their captions, and of captions by their images."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.eval.dense.square import Squares
from zoo.eval.extract import extract_share
from zoo.eval.registry import Found, Scores, Subject
from zoo.eval.settings import RetrievalSettings
from zoo.eval.zeroshot import through_head
from zoo.eval.zeroshot import used as zeroshot_used
from zoo.features import Batch
from zoo.files import ANNOTATION_BYTES, read_json
from zoo.teachers.name import TeacherName
from zoo.teachers.text import BATCH, open_text
from zoo.train.mesh import gather, share, union

RANKS = (1, 5, 10)
ROWS = 1024
"""Queries that are ranked at once."""
FOLDERS = ("val", "val2017", "images", "test", ".")
"""Folders of images, relative to the data set's folder; the first that has an image is used."""


def retrieval(subject: Subject, data: Path, settings: RetrievalSettings) -> Iterator[Found]:
    """Yield the recall among the 1, 5 and 10 most similar, both ways, in per cent.

    An image finds its text if any of its captions is among them.

    Raises:
        ValueError: the captions or their images are missing, or as `zeroshot`.
    """
    settings = zeroshot_used(subject, (), settings, "retrieval")
    label = settings.head
    files, texts, owners = read_captions(data, settings.captions, settings.images)
    tower = open_text(TeacherName.parse(settings.teacher), subject.device)
    parts = [tower(texts[i : i + BATCH]).float().cpu() for i in range(0, len(texts), BATCH)]
    embedded = torch.cat(parts)
    side = max(subject.student.size)
    how: Any = dict(unreadable=subject.unreadable, share=share())
    images = Squares(files, side, subject.batch, subject.device, **how)
    seen: list[int] = []

    def noted() -> Iterator[Batch]:
        for batch in images:
            seen.extend(batch.positions)
            yield batch

    found = extract_share(through_head(subject, label), noted())
    seen = sorted(chain.from_iterable(gather(seen)))
    union(subject.unreadable)
    if found is None:
        return
    kept = torch.isin(owners, torch.tensor(seen))
    owners = torch.searchsorted(torch.tensor(seen), owners[kept])
    yield from recall(found.summaries, embedded[kept], owners, found.keys)


def used(subject: Subject, data: Sequence[Path], settings: RetrievalSettings) -> RetrievalSettings:
    """Return the settings with the teacher and the head that are used; see `zeroshot.used`.

    Raises:
        ValueError: as there, or a folder has no captions.
    """
    for folder in data:
        read_captions(folder, settings.captions, settings.images)
    return zeroshot_used(subject, data, settings, "retrieval")


def recall(
    images: Float[Tensor, "n D"],
    texts: Float[Tensor, "m D"],
    owners: Int[Tensor, " m"],
    keys: Sequence[str],
) -> Iterator[Found]:
    """Rank the texts for every image and the images for every text, by cosine.

    Args:
        owners: Index of the image that each text describes.
    """
    images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    own = torch.arange(len(images))
    for_images = _ranks(images, texts, lambda rows: owners[None, :] == own[rows, None])
    for_texts = _ranks(texts, images, lambda rows: own[None, :] == owners[rows, None])
    for rank in RANKS:
        hits = (for_images < rank).astype(float)
        yield f"retrieval/image_to_text/recall{rank}", Scores(keys, hits)
    names = [f"{keys[int(owner)]}#{i}" for i, owner in enumerate(owners)]
    for rank in RANKS:
        hits = (for_texts < rank).astype(float)
        yield f"retrieval/text_to_image/recall{rank}", Scores(names, hits)


def _ranks(
    queries: Tensor, bank: Tensor, right: Callable[[Tensor], Bool[Tensor, "rows m"]]
) -> np.ndarray:
    """Return for each query how many wrong rows are at least as similar as the best right one.

    Args:
        right: Returns which rows of the bank are right for some queries, by the queries' indices.
    """
    found = []
    for rows in torch.arange(len(queries)).split(ROWS):
        cosine, truth = queries[rows] @ bank.T, right(rows)
        best = cosine.masked_fill(~truth, -torch.inf).max(dim=1, keepdim=True).values
        # a tie counts against the model, so that constant features find nothing
        found.append(((cosine >= best) & ~truth).sum(dim=1))
    return torch.cat(found).numpy()


def read_captions(
    data: Path, captions: str = "", images: str = ""
) -> tuple[list[Path], list[str], Int[Tensor, " m"]]:
    """Read a COCO file of captions; return the images with captions, all texts, and their owners.

    The owner of a text is the index of its image.

    Raises:
        ValueError: there is no such file or no caption in it, an id is unknown, or an image is
            missing.
    """
    file = Path(captions) if captions else _captions_of(data)
    content = read_json(file, most=ANNOTATION_BYTES)
    images_of, texts = (content.get(part) for part in ("images", "annotations"))
    if not _all_have(images_of, id=int, file_name=str) or not _all_have(
        texts, image_id=int, caption=str
    ):
        raise ValueError(
            f"{file} holds no captions in COCO's form (images with id and file_name, annotations "
            "with image_id and caption)."
        )
    names = {image["id"]: image["file_name"] for image in images_of}
    pairs = [(entry["image_id"], entry["caption"].strip()) for entry in texts]
    lost = [image for image, _ in pairs if image not in names]
    if lost or not pairs:
        raise ValueError(
            f"{file}: {len(lost)} of {len(pairs)} captions name an image that it does not list."
        )
    used = list(dict.fromkeys(image for image, _ in pairs))
    folder = Path(images) if images else _folder_of(data, names[used[0]])
    files = [folder / names[image] for image in used]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(files)} images of {file} are missing, {missing[0]} first; "
            "name their folder with --retrieval.images."
        )
    index = {image: i for i, image in enumerate(used)}
    return files, [text for _, text in pairs], torch.tensor([index[image] for image, _ in pairs])


def _all_have(entries: Any, **types: type) -> TypeGuard[list[dict[str, Any]]]:
    """Return whether it is a list of dicts with such fields; a million are checked in a second."""
    return isinstance(entries, list) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in types.items())
        for entry in entries
    )


def _captions_of(data: Path) -> Path:
    found = sorted([*data.glob("annotations/captions_val*.json"), *data.glob("captions*.json")])
    if not found:
        raise ValueError(
            f"There is no annotations/captions_val*.json in {data}; name a file of captions with "
            "--retrieval.captions."
        )
    return found[0]


def _folder_of(data: Path, name: str) -> Path:
    for folder in FOLDERS:
        if (data / folder / name).is_file():
            return data / folder
    return data / FOLDERS[0]
