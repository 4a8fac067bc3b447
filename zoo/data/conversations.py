"""Questions about images with their answers: LLaVA's JSON, webdataset's shards, easy-VQA's layout.

    data.json, data.jsonl   LLaVA's: a list of {"id", "image", "conversations": [{"from": "human",
                            "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]};
                            images beside it, or in the folder `images` there
    *.tar                   webdataset's shards: KEY.jpg beside KEY.json, which has `conversations`
    easy-VQA                PART/questions.json, a list of [question, answer, number] (or behind
                            them a kind of question), and PART/images/NUMBER.png; or
                            PART_questions.json and PART.npz (`images`)
    generated, generated:N  N pictures with one question each, drawn here (`zoo.data.generated_vqa`)

A file or folder of which nothing is called train and val is split by a hash of the images' names,
so that no picture is on both sides.
"""

import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from zoo.data.generated_vqa import GENERATED, Generated
from zoo.data.images import EncodedImage
from zoo.data.plan import mix
from zoo.data.shards import shards_in
from zoo.data.sources import SPLITS
from zoo.files import ANNOTATION_BYTES, json_items, near, parse_json, read_arrays, read_json

MARK = "<image>"
"""Where an image stands in a question."""
DRAWN = 128
"""Most tokens of a question about a drawn picture, with its answer."""
KINDS = (
    ("yes_no", ()),
    ("count", ("how many",)),
    ("color", ("color", "colour")),
    ("shape", ("shape",)),
)


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str
    kind: str = "other"
    """For scores by kind of question."""


class Conversation(NamedTuple):
    """Some turns about some images."""

    key: str
    images: tuple[int, ...]
    """Their numbers in the source."""
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Conversations:
    """Conversations, and the images that they are about."""

    name: str
    samples: Sequence[Conversation]
    read: Callable[[int], Image.Image]
    """Decode an image as RGB.

    Raises `OSError` or `ValueError` where it cannot be read.
    """
    size: Callable[[int], tuple[int, int]]
    """Return its height and width, without its pixels."""
    longest: int | None = None
    """Most tokens of a conversation without its images (`zoo.data.image_text.most_text`), where
    that is known without reading them."""

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, index: int) -> str:
        return f"{self.name}/{self.samples[index].key}"

    def taken(self, indices: Iterable[int]) -> "Conversations":
        """Return some of the conversations."""
        return replace(self, samples=[self.samples[i] for i in indices])

    def turn_by_turn(self) -> "Conversations":
        """Return every turn as a conversation of its own, as questions are asked in evaluation."""
        found = []
        for sample in self.samples:
            marks = MARK * len(sample.images)
            for number, turn in enumerate(sample.turns):
                alone = turn.question.replace(MARK, "").strip()
                asked = f"{marks}\n{alone}" if marks else alone
                key = f"{sample.key}.{number}" if len(sample.turns) > 1 else sample.key
                found.append(Conversation(key, sample.images, (turn._replace(question=asked),)))
        return replace(self, samples=found)


def kind_of(question: str, answer: str) -> str:
    """Name the kind of a question that has none: yes_no, count, color, shape or other."""
    if answer.strip().rstrip(".").lower() in ("yes", "no"):
        return "yes_no"
    return next((k for k, words in KINDS if any(w in question.lower() for w in words)), "other")


def open_conversations(
    path: str | Path, held_out: float = 0.05
) -> tuple[Conversations, Conversations]:
    """Open the training and the held-out part of a source.

    Args:
        held_out: Share of the images that are held out where the source has no parts.

    Raises:
        ValueError: there is nothing at `path`, or it is of none of these forms.
    """
    if str(path).partition(":")[0] == GENERATED:
        return _generated(str(path))
    place = Path(path)
    if not place.exists():
        word, colon, number = str(path).partition(":")
        meant = get_close_matches(word, [GENERATED], n=1) if colon else []
        hint = f" Did you mean {GENERATED}:{number}?" if meant else near(path, [f"{GENERATED}:N"])
        raise ValueError(
            f"There is no data at {path}; give LLaVA's JSON, shards, a folder in easy-VQA's "
            f"layout, or {GENERATED}:N.{hint}"
        )
    parts = {name: _part(place, words) for name, words in SPLITS.items()} if place.is_dir() else {}
    if all(parts.values()) and parts:
        train, val = parts["train"], parts["val"]
        assert train is not None and val is not None
        return train, val
    whole = next((part for part in parts.values() if part is not None), None) or _whole(place)
    return _split(whole, held_out)


def open_part(path: str | Path, part: str = "val") -> Conversations:
    """Open one part of a source that has parts, or all of another.

    Raises:
        ValueError: as `open_conversations`.
    """
    if str(path).partition(":")[0] == GENERATED:
        return _generated(str(path))[part == "val"]
    place = Path(path)
    if not place.exists():
        raise ValueError(f"There is no data at {path}.")
    return (_part(place, SPLITS[part]) if place.is_dir() else None) or _whole(place)


def _generated(text: str) -> tuple[Conversations, Conversations]:
    word, _, count = text.partition(":")
    if count and not (count.isdecimal() and int(count)):
        raise ValueError(f"{text} is no number of pictures; give {word}:20000.")
    total = int(count or 4000)
    parts = Generated(total, part=0), Generated(min(total, 1000), part=1)
    train, val = (
        Conversations(f"{word}-{name}", DrawnConversations(part), part.read, part.size, DRAWN)
        for name, part in zip(("train", "val"), parts, strict=True)
    )
    return train, val


@dataclass(frozen=True)
class DrawnConversations(Sequence[Conversation]):
    """The questions about drawn pictures, each drawn when it is read."""

    part: Generated

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        number = range(len(self))[index]
        question, answer, kind = self.part.asked(number)
        turn = Turn(f"{MARK}\n{question}", answer, kind)
        return Conversation(str(number), (number,), (turn,))


def _split(whole: Conversations, held_out: float) -> tuple[Conversations, Conversations]:
    """Hold a share of the images out, with all that is said of them."""

    def draw(sample: Conversation) -> float:
        first = sample.images[0] if sample.images else -1
        return mix(7, first) / 2**63 if first >= 0 else mix(8, *sample.key.encode()) / 2**63

    held = [draw(sample) < held_out for sample in whole.samples]
    parts = [whole.taken(i for i, h in enumerate(held) if h == side) for side in (False, True)]
    if not all(map(len, parts)):
        raise ValueError(
            f"{whole.name} has {len(whole)} conversations, and a share of {held_out:g} of their "
            "images is none or all; give more, or --val."
        )
    return parts[0], parts[1]


# ---------------------------------------------------------------- forms


def _part(place: Path, words: Sequence[str]) -> Conversations | None:
    """Open the part of a folder that is called by one of `words`, if there is one."""
    for word in words:
        if (place / f"{word}_questions.json").is_file():
            return _easy_vqa(place / f"{word}_questions.json", place / f"{word}.npz")
        if (place / word / "questions.json").is_file():
            return _easy_vqa(place / word / "questions.json", place / word / "images")
        for suffix in (".json", ".jsonl"):
            if (place / f"{word}{suffix}").is_file():
                return _llava(place / f"{word}{suffix}")
    return _shards(place.name, shards) if (shards := shards_in(place, words)) else None


def _whole(place: Path) -> Conversations:
    if place.suffix in (".json", ".jsonl"):
        return _llava(place)
    if place.suffix == ".tar":
        return _shards(place.name, [place])
    if place.is_dir() and (shards := shards_in(place)):
        return _shards(place.name, shards)
    if (place / "questions.json").is_file():
        return _easy_vqa(place / "questions.json", place / "images")
    raise ValueError(
        f"There are no questions about images in {place}: give LLaVA's .json or .jsonl, .tar "
        "shards with KEY.json beside KEY.jpg, or a folder in easy-VQA's layout."
    )


def _easy_vqa(questions: Path, images: Path) -> Conversations:
    rows = read_json(questions, list[list[Any]], most=ANNOTATION_BYTES)
    arrays = read_arrays(images).get("images") if images.suffix == ".npz" else None
    if images.suffix == ".npz" and (arrays is None or arrays.ndim != 4 or arrays.shape[-1] != 3):
        raise ValueError(f"{images} has no array `images` of bytes [n H W 3].")
    samples = []
    for number, row in enumerate(rows):
        if len(row) not in (3, 4) or not isinstance(row[2], int):
            raise ValueError(f"{questions}, entry {number}: it is no [question, answer, number].")
        question, answer, image = str(row[0]), str(row[1]), row[2]
        if arrays is not None and not 0 <= image < len(arrays):
            raise ValueError(
                f"{questions}, entry {number}, names image {image}; {images} has {len(arrays)}."
            )
        kind = str(row[3]) if len(row) > 3 else kind_of(question, answer)
        turn = Turn(f"{MARK}\n{question}", answer, kind)
        samples.append(Conversation(f"{number}", (image,), (turn,)))
    name = questions.parent.name if images.suffix != ".npz" else images.stem
    if arrays is not None:
        pixels = arrays
        return Conversations(
            name, samples, lambda i: Image.fromarray(pixels[i]), lambda i: pixels.shape[1:3]
        )
    numbers = {sample.images[0] for sample in samples}
    return Conversations(name, samples, *_files({n: images / f"{n}.png" for n in numbers}))


def _files(files: dict[int, Path]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what reads image files by their numbers, and their sizes."""

    def opened(number: int) -> EncodedImage:
        return EncodedImage(files[number], name=str(files[number]))

    return lambda i: opened(i).rgb(), lambda i: _size(opened(i))


def _size(image: EncodedImage) -> tuple[int, int]:
    return image.size[1], image.size[0]


def _rows_of(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix != ".jsonl":
        yield from json_items(file)
        return
    with file.open(encoding="utf-8") as lines:  # one in memory at a time
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse_json(line, dict[str, Any], f"{file}, line {number}")


def _llava(file: Path) -> Conversations:
    numbers: dict[str, int] = {}
    samples = []
    for number, row in enumerate(_rows_of(file)):
        named = row.get("image") or []
        names = [named] if isinstance(named, str) else list(named)
        images = tuple(numbers.setdefault(str(name), len(numbers)) for name in names)
        where = f"{file}, entry {number}"
        samples.append(_conversation(str(row.get("id", number)), images, row, where))
    folder = file.parent / "images" if (file.parent / "images").is_dir() else file.parent
    files = {i: file.parent / name for name, i in numbers.items()}
    files = {i: p if p.is_file() else folder / p.relative_to(file.parent) for i, p in files.items()}
    if missing := next((p for p in files.values() if not p.is_file()), None):
        raise ValueError(f"{file} names an image that is not there: {missing}.")
    return Conversations(file.stem, samples, *_files(files))


def _shards(name: str, shards: Sequence[Path]) -> Conversations:
    """Read the conversations of webdataset's shards; images stay where they lie."""
    samples, places = [], list[tuple[Path, int, int]]()
    for shard in shards:
        images, texts = dict[str, list[tuple[int, int]]](), dict[str, bytes]()
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                if ending.lower() == "json" and (file := tar.extractfile(member)):
                    texts[key] = file.read()
                elif member.isfile():
                    images.setdefault(key, []).append((member.offset_data, member.size))
        for key, text in texts.items():
            here = images.get(key, [])
            numbers = tuple(range(len(places), len(places) + len(here)))
            places += [(shard, *place) for place in here]
            where = f"{shard}, {key}.json"
            row = parse_json(text, dict[str, Any], where)
            samples.append(_conversation(f"{shard.stem}/{key}", numbers, row, where))
    if not samples:
        raise ValueError(f"There is no KEY.json with conversations in {shards[0]}.")

    def opened(number: int) -> EncodedImage:
        shard, offset, size = places[number]
        with shard.open("rb") as file:
            file.seek(offset)
            return EncodedImage(file.read(size), name=f"{shard}, at byte {offset},")

    return Conversations(name, samples, lambda i: opened(i).rgb(), lambda i: _size(opened(i)))


def _conversation(
    key: str, images: tuple[int, ...], row: dict[str, Any], where: str
) -> Conversation:
    """Read LLaVA's turns: a question of `human`, an answer of `gpt`, and so on.

    Raises:
        ValueError: they do not alternate, or images and their marks are not as many.
    """
    said = row.get("conversations")
    if not isinstance(said, list) or not said or len(said) % 2:
        raise ValueError(f"{where}: `conversations` is no list of questions, each with its answer.")
    turns = []
    for asked, answered in zip(said[::2], said[1::2], strict=True):
        if asked.get("from") != "human" or answered.get("from") != "gpt":
            raise ValueError(f"{where}: `conversations` does not alternate between human and gpt.")
        question, answer = str(asked["value"]), str(answered["value"])
        turns.append(Turn(question, answer, str(row.get("kind") or kind_of(question, answer))))
    check_marks(sum(turn.question.count(MARK) for turn in turns), len(images), where)
    return Conversation(key, images, tuple(turns))


def check_marks(marks: int, images: int, where: str) -> None:
    """Refuse a conversation whose images and places for them are not as many.

    Raises:
        ValueError: they are not.
    """
    if images and not marks:
        raise ValueError(
            f"{where}: there is an image and no {MARK} in the text; put {MARK} where it belongs."
        )
    if images > marks:
        raise ValueError(f"{where}: there are {images} images and {marks} {MARK} in the text.")
    if marks > images:
        raise ValueError(f"{where}: the text has {marks} {MARK}, and there are {images} images.")


def other_images(samples: Sequence[Conversation], seed: int) -> list[tuple[int, ...]]:
    """Give each conversation the images of another one, none its own: the control of sight.

    Raises:
        ValueError: all of them are about the same image.
    """
    if len({sample.images for sample in samples}) < 2:
        raise ValueError("Pictures can be shuffled where there are two at least, and here is one.")
    order = np.random.default_rng([seed, 11]).permutation(len(samples))
    found: list[tuple[int, ...]] = [()] * len(samples)
    for place, index in enumerate(order):
        for further in range(1, len(samples)):
            other = samples[order[(place + further) % len(samples)]].images
            if other != samples[index].images and len(other) == len(samples[index].images):
                found[index] = other
                break
        else:
            raise ValueError(
                f"No other conversation has as many images as {samples[index].key}, so its "
                "pictures cannot be shuffled."
            )
    return found
