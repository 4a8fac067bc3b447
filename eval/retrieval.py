"""Retrieval of images by their captions, and of captions by their images."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zoo.eval.dense.square import squares
from zoo.eval.extract import extract
from zoo.eval.registry import Found, Scores, Subject
from zoo.eval.settings import RetrievalSettings
from zoo.eval.zeroshot import check_width, head_for, through_head
from zoo.teachers.name import TeacherName
from zoo.teachers.text import BATCH, open_text

RANKS = (1, 5, 10)
ROWS = 1024
"""Queries that are ranked together."""
FOLDERS = ("val", "val2017", "images", "test", ".")
"""Where the images of a captions file lie, seen from its data set's folder."""


def retrieval(subject: Subject, data: Path, settings: RetrievalSettings) -> Iterator[Found]:
    """Yield recall among the 1, 5 and 10 most similar, both ways, per cent.

    An image finds its text if any one of its captions is among them.

    Raises:
        ValueError: the captions or their images are missing, or as `zeroshot`.
    """
    label = head_for(subject, settings.teacher, settings.head, "retrieval")
    files, texts, owners = read_captions(data, settings.captions, settings.images)
    tower = open_text(TeacherName.parse(settings.teacher), subject.device)
    parts = [tower(texts[i : i + BATCH]).float().cpu() for i in range(0, len(texts), BATCH)]
    embedded = torch.cat(parts)
    check_width(subject, label, embedded.shape[1], settings.teacher)
    side = max(subject.student.size)
    found = extract(
        through_head(subject, label), squares(files, side, subject.batch, subject.device)
    )
    yield from recall(found.summaries, embedded, owners, found.keys)


def recall(
    images: Float[Tensor, "n D"],
    texts: Float[Tensor, "m D"],
    owners: Int[Tensor, " m"],
    keys: Sequence[str],
) -> Iterator[Found]:
    """Rank texts for every image and images for every text, by cosine.

    Args:
        owners: The image that each text belongs to.
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


def _ranks(queries: Tensor, bank: Tensor, right) -> np.ndarray:
    """Return how many wrong ones are at least as similar as the best right one."""
    found = []
    for rows in torch.arange(len(queries)).split(ROWS):
        cosine, truth = queries[rows] @ bank.T, right(rows)
        best = cosine.masked_fill(~truth, -torch.inf).max(dim=1, keepdim=True).values
        # a tie counts against the model: features that are all the same must not find anything
        found.append(((cosine >= best) & ~truth).sum(dim=1))
    return torch.cat(found).numpy()


def read_captions(
    data: Path, captions: str = "", images: str = ""
) -> tuple[list[Path], list[str], Int[Tensor, " m"]]:
    """Read a COCO file of captions: images that have any, all texts, and whose each text is.

    Raises:
        ValueError: it is not there or holds no captions, an id is unknown, or a file is missing.
    """
    file = Path(captions) if captions else _captions_of(data)
    try:
        content = json.loads(file.read_text())
        names = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(entry["image_id"], entry["caption"].strip()) for entry in content["annotations"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} holds no captions in COCO's form (images with id and file_name, annotations "
            f"with image_id and caption): {error!r}."
        ) from error
    lost = [image for image, _ in pairs if image not in names]
    if lost or not pairs:
        raise ValueError(
            f"{file}: {len(lost)} of {len(pairs)} captions are of an image that it does not list."
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
    place = {image: i for i, image in enumerate(used)}
    return files, [text for _, text in pairs], torch.tensor([place[image] for image, _ in pairs])


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
