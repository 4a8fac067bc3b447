import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from zoo.data.conversations import open_conversations, open_part, other_images
from zoo.data.generated_vqa import COLORS, Generated
from zoo.data.image_text import Change, ImageTextFeed, ImageTextSource, encode, most_text
from zoo.data.plan import Plan
from zoo.language.tokenizers import ByteTokenizer
from zoo.multimodal.budget import fit_to_budget, tokens_of

IMAGE = 257


class Pixels:
    """A tower of cells of 16 px that keeps images' shapes."""

    patch_size, native, max_tokens = 16, True, 64

    def fitted(self, height, width):
        return fit_to_budget(height, width, 16, 64)


def picture(number, size=(32, 48)):
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def row(image, *said):
    turns = [
        turn
        for question, answer in said
        for turn in (
            dict(**{"from": "human"}, value=question),
            dict(**{"from": "gpt"}, value=answer),
        )
    ]
    return dict(id=str(image), image=image, conversations=turns)


@pytest.fixture
def llava(tmp_path):
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(40):
        picture(number, (32, 48) if number % 2 else (32, 32)).save(
            tmp_path / f"images/{number}.png"
        )
        said = [("<image>\nwhat is it?", f"thing {number}"), ("how many cats?", "two")]
        rows.append(row(f"{number}.png", *said))
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path / "data.json"


def test_llava_s_json_is_split_by_pictures_and_learnt_where_answers_stand(llava):
    train, val = open_conversations(llava, 0.3)
    assert len(train) + len(val) == 40
    assert not {s.images for s in train.samples} & {s.images for s in val.samples}
    asked = val.turn_by_turn()
    assert len(asked) == 2 * len(val)
    assert asked.samples[1].turns[0].question == "<image>\nhow many cats?"
    assert asked.samples[1].turns[0].kind == "count"
    tokenizer = ByteTokenizer()
    ids, answers = encode(train.samples[0], tokenizer, IMAGE, [6])
    assert (ids == IMAGE).sum() == 6
    learnt = ids[1:][answers[:-1]].tolist()
    first = train.samples[0].turns[0].answer.encode()
    assert learnt == [*first, 256, *b"two", 256]


def test_a_batch_holds_images_of_several_shapes_in_the_order_of_the_text(llava):
    train, _ = open_conversations(llava, 0.3)
    source = ImageTextSource(train, ByteTokenizer(), IMAGE, Pixels())
    batch = source.rows(range(6))
    shapes = [tuple(group.shape[1:]) for group in batch.images]
    assert sorted(shapes) == [(3, 32, 32), (3, 32, 48)]
    assert sorted(place for group in batch.order for place in group) == list(range(6))
    cells = (batch.tokens.ids == IMAGE).sum(1)
    for group, places in zip(batch.images, batch.order, strict=True):
        for image, place in zip(group, places, strict=True):
            (number,) = train.samples[place].images
            assert (image.numpy() == np.asarray(train.read(number)).transpose(2, 0, 1)).all()
            assert cells[place] == image.shape[1] // 16 * (image.shape[2] // 16)


def test_shards_and_easy_vqa_s_layout_say_the_same_as_the_json(llava, tmp_path):
    with tarfile.open(tmp_path / "a-000.tar", "w") as tar:
        for one in json.loads(llava.read_text()):
            key = one["image"].removesuffix(".png")
            for ending, data in (
                ("png", (llava.parent / "images" / one["image"]).read_bytes()),
                ("json", json.dumps(one).encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    shards, whole = open_part(tmp_path / "a-000.tar"), open_part(llava)
    assert [s.turns for s in shards.samples] == [s.turns for s in whole.samples]
    for i in (0, 7):
        (a,), (b,) = shards.samples[i].images, whole.samples[i].images
        assert shards.size(a) == whole.size(b)
        assert (np.asarray(shards.read(a)) == np.asarray(whole.read(b))).all()
    rows = [["is there a cat?", "yes", 1], ["what color is it?", "red", 0]]
    for part in ("train", "val"):
        (tmp_path / f"{part}_questions.json").write_text(json.dumps(rows))
        np.savez(
            tmp_path / f"{part}.npz", images=np.stack([np.asarray(picture(i)) for i in (0, 1)])
        )
    train, val = open_conversations(tmp_path)
    assert [turn.kind for sample in val.samples for turn in sample.turns] == ["yes_no", "color"]
    assert (np.asarray(train.read(1)) == np.asarray(picture(1))).all()


@pytest.mark.parametrize(
    "said, images, says",
    [
        ([("what is it?", "a")], "0.png", "there is an image and no <image> in the text"),
        ([("<image> what?", "a")], ["0.png", "1.png"], "there are 2 images and 1 <image>"),
        ([("<image><image> what?", "a")], "0.png", "the text has 2 <image>, and there are 1"),
        ([("<image>", "a")], "nowhere.png", "names an image that is not there"),
    ],
)
def test_images_that_the_text_does_not_place_are_refused_in_one_line(llava, said, images, says):
    llava.write_text(json.dumps([row(images, *said)]))
    with pytest.raises(ValueError, match=says) as refused:
        open_part(llava)
    assert "\n" not in str(refused.value)


def test_shuffled_pictures_are_never_one_s_own(llava):
    samples = open_part(llava).turn_by_turn().samples
    others = other_images(samples, 3)
    assert all(a != s.images for a, s in zip(others, samples, strict=True))
    with pytest.raises(ValueError, match="two at least"):
        other_images(samples[:2], 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_follow_from_the_step_alone(llava, workers):
    train, _ = open_conversations(llava, 0.3)
    source = ImageTextSource(train, ByteTokenizer(), IMAGE, Pixels())
    change = Change((0.5, 1.0), 0.5)

    def feed(workers):
        plan = Plan(len(source), 4, 0)
        return ImageTextFeed(source, plan, "cpu", change, 2, workers=workers)

    whole = list(feed(0).batches(0, 6))
    part = list(feed(workers).batches(3, 6))
    for a, b in zip(whole[6:], part, strict=True):
        assert (a.tokens.ids == b.tokens.ids).all()
        assert all((x == y).all() for x, y in zip(a.images, b.images, strict=True))
    counts = [
        int(a.answers.sum() + b.answers.sum()) for a, b in zip(whole[::2], whole[1::2], strict=True)
    ]
    assert counts == [feed(0).counts(step)["ce"] for step in range(6)]


def test_a_conversation_that_is_too_long_is_left_out(llava):
    train, _ = open_conversations(llava, 0.3)
    source = ImageTextSource(train, ByteTokenizer(), IMAGE, Pixels(), most=20)
    with pytest.raises(ValueError, match="longer than 20 tokens"):
        len(source)


class CountingTokenizer(ByteTokenizer):
    calls = 0

    def encode(self, text):
        self.calls += 1
        return super().encode(text)


@pytest.mark.parametrize("most", [200, 110])
def test_a_conversation_is_tokenised_when_it_is_read(llava, most):
    """Unless its length is in question: at most 64 tokens of the image, some 60 of the text."""
    train, _ = open_conversations(llava, 0.3)
    tokenizer = CountingTokenizer()
    source = ImageTextSource(train, tokenizer, IMAGE, Pixels(), most=most)
    assert len(source) == len(train)
    assert bool(tokenizer.calls) == (most == 110)
    before = tokenizer.calls
    first = source.encoded(3)
    assert before < tokenizer.calls
    ids, answers = encode(
        train.samples[3], ByteTokenizer(), IMAGE, [int((first.ids == IMAGE).sum())]
    )
    assert (first.ids == ids).all() and (first.answers == answers).all()
    assert source.learnt(3) == answers.sum()


def test_those_kept_are_those_whose_tokens_are_few_enough(llava):
    rows = json.loads(llava.read_text())
    for number, one in enumerate(rows):
        one["conversations"][0]["value"] += " \u00fc\ufdfa" * number  # NFKC: 18 letters
    llava.write_text(json.dumps(rows))
    train, _ = open_conversations(llava, 0.3)
    source = ImageTextSource(train, ByteTokenizer(), IMAGE, Pixels(), most=160)
    lengths = [
        len(encode(s, ByteTokenizer(), IMAGE, [tokens_of(*Pixels().fitted(*train.size(i)), 16)])[0])
        for s in train.samples
        for i in s.images
    ]
    assert list(source.kept) == [i for i, length in enumerate(lengths) if length <= 160]
    assert 0 < len(source) < len(train)


def test_drawn_questions_are_short_and_those_of_their_pictures():
    train, _ = open_conversations("generated:40")
    for number, sample in enumerate(train.samples):
        assert sample.turns[0].question.endswith(Generated(40).drawn(number).question)
        assert sample.turns[0].answer == Generated(40).drawn(number).answer
        assert most_text(sample) <= train.longest


def test_drawn_pictures_hold_what_their_answers_say():
    drawn = [Generated(200).drawn(i) for i in range(80)]
    assert drawn[3].answer == Generated(9).drawn(3).answer
    for one in drawn:
        pixels = np.asarray(one.image)
        if one.kind == "color":
            assert (pixels == COLORS[one.answer]).all(-1).any()
        if one.kind == "position":
            colors = [c for c in COLORS.values() if (pixels == c).all(-1).any()]
            centers = [np.argwhere((pixels == c).all(-1)).mean(0) for c in colors]
            sizes = [(pixels == c).all(-1).sum() for c in colors]
            circle, square = (centers[i] for i in np.argsort(sizes))  # a disc covers less
            dy, dx = circle - square
            found = (
                ("left" if dx < 0 else "right")
                if abs(dx) > abs(dy)
                else ("above" if dy < 0 else "below")
            )
            assert found == one.answer
    answers = {one.answer for one in drawn if one.kind == "count"}
    assert answers == set("12345")
