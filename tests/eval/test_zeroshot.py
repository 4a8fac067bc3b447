"""Zero-shot and retrieval: planted answers, chance, and what is refused before work."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from zoo.eval.registry import Scores
from zoo.eval.retrieval import RetrievalSettings, read_captions, recall, retrieval
from zoo.eval.zeroshot import ZeroShotSettings, class_names, classify, prompts, used, zeroshot
from zoo.features import Features
from zoo.teachers.name import TeacherName
from zoo.teachers.text import open_text, text_classifier

NAMES = ("cat", "red car", "dog")
TEACHER = "open_clip:tiny-words/random"
PLAIN = ZeroShotSettings(teacher=TEACHER, templates="plain")


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Register a text tower that builds in milliseconds with open_clip."""
    factory = pytest.importorskip(
        "open_clip.factory", reason="open_clip is in the extra [teachers]"
    )
    text = dict(context_length=16, vocab_size=49408, width=16, heads=2, layers=1)
    vision = dict(image_size=32, layers=1, width=16, head_width=8, patch_size=8)
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "tiny-words.json").write_text(
        json.dumps(dict(embed_dim=12, vision_cfg=vision, text_cfg=text))
    )
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    factory.add_model_config(folder)


def numbers(found):
    return {name: v.value if isinstance(v, Scores) else v for name, v in found}


def test_a_head_that_says_the_right_text_scores_100(
    words, planted, pictures, colours, answering, tmp_path
):
    images, labels = colours
    rows = text_classifier(TEACHER, NAMES)
    who = planted(heads={"tiny-words": answering(rows * 7)}, images=pictures(images, labels, NAMES))
    got = numbers(zeroshot(who, tmp_path, PLAIN))
    assert got["zeroshot/top1"] == got["zeroshot/mean_per_class"] == 100
    assert got["zeroshot/class/red car"] == 100
    swapped = planted(
        heads={"tiny-words": answering(rows[[1, 0, 2]])}, images=pictures(images, labels, NAMES)
    )
    got = numbers(zeroshot(swapped, tmp_path, PLAIN))
    assert got["zeroshot/top1"] == pytest.approx(100 / 3)
    assert (got["zeroshot/class/cat"], got["zeroshot/class/dog"]) == (0, 100)
    assert got["zeroshot/top5"] == 100


def test_random_embeddings_score_what_chance_says():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4000, 16, generator=generator)
    classifier = F.normalize(torch.randn(20, 16, generator=generator), dim=-1)
    labels = torch.randint(20, (4000,), generator=generator)
    keys, names = [str(i) for i in range(4000)], [str(i) for i in range(20)]
    got = numbers(classify(images, labels, classifier, keys, names))
    assert got["zeroshot/top1"] == pytest.approx(5, abs=1)
    assert got["zeroshot/top5"] == pytest.approx(25, abs=2)


def test_the_mean_over_classes_does_not_weigh_them_by_their_images():
    classifier, labels = torch.eye(2), torch.tensor([0, 0, 0, 1])
    images = torch.tensor([[1.0, 0.0]] * 4)
    got = numbers(classify(images, labels, classifier, list("abcd"), ["x", "y"]))
    assert (got["zeroshot/top1"], got["zeroshot/mean_per_class"]) == (75, 50)


def test_folders_are_read_as_words_and_wnids_as_imagenets_names(tmp_path):
    assert class_names(["red_car", "cat"], tmp_path) == ["red car", "cat"]
    pytest.importorskip("open_clip", reason="open_clip is in the extra [teachers]")
    assert class_names(["n01440764", "n15075141"], tmp_path) == ["tench", "toilet paper"]
    with pytest.raises(ValueError, match="1 of 2 classes are not in ImageNet-1k, n00000001"):
        class_names(["n01440764", "n00000001"], tmp_path)
    with pytest.raises(ValueError, match=r"are numbers; write a list .*classes\.json"):
        class_names(["0", "1"], tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps(["cat", "ice_cream"]))
    assert class_names(["0", "1"], tmp_path) == ["cat", "ice cream"]
    assert class_names(["0"], tmp_path) == ["cat", "ice cream"]  # the last has no image here
    for classes in (["0", "1", "2"], ["one"]):
        with pytest.raises(ValueError, match=f"names 2 classes, and the data has {len(classes)}"):
            class_names(classes, tmp_path)


def test_templates_are_those_of_open_clip():
    pytest.importorskip("open_clip", reason="open_clip is in the extra [teachers]")
    assert (len(prompts("openai")), len(prompts("simple")), len(prompts("plain"))) == (80, 7, 1)
    assert prompts("openai")[0] == "a bad photo of a {}."


def test_heads_and_text_towers_that_do_not_go_together_are_refused(
    words, planted, pictures, colours, answering, tmp_path
):
    images = pictures(*colours, NAMES)
    bare = planted(images=images)
    with pytest.raises(ValueError, match=r"Name the teacher .* --zeroshot\.teacher"):
        list(zeroshot(bare, tmp_path, ZeroShotSettings()))
    with pytest.raises(ValueError, match=r"no head 'tiny-words'; it has none.*--zeroshot\.head"):
        list(zeroshot(bare, tmp_path, PLAIN))
    narrow = planted(heads={"tiny-words": answering(torch.eye(3))}, images=images)
    with pytest.raises(ValueError, match=r"has 3 channels and the text tower of .* 12"):
        list(zeroshot(narrow, tmp_path, PLAIN))
    mapped = planted(heads={"tiny-words": lambda out: Features(None, out.spatial)}, images=images)
    with pytest.raises(ValueError, match="'tiny-words' of planted returns no summary"):
        list(zeroshot(mapped, tmp_path, PLAIN))
    with pytest.raises(ValueError, match="timm:resnet18 has no text tower"):
        one = planted(heads={"resnet18": answering(torch.eye(3))}, images=images)
        list(zeroshot(one, tmp_path, ZeroShotSettings(teacher="timm:resnet18", templates="plain")))
    unlabelled = planted(heads={"tiny-words": answering(torch.eye(3))}, images=pictures(colours[0]))
    with pytest.raises(ValueError, match="has no classes"):
        list(zeroshot(unlabelled, tmp_path, PLAIN))


def test_a_text_tower_without_a_tokenizer_is_refused(
    planted, pictures, colours, answering, tmp_path
):
    hf = pytest.importorskip("transformers", reason="transformers is in the extra [teachers]")
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = hf.CLIPConfig(
        text_config=dict(small, vocab_size=12, max_position_embeddings=8),
        vision_config=dict(small, image_size=32, patch_size=8),
        projection_dim=12,
    )
    hf.CLIPModel(config).save_pretrained(tmp_path / "clip")
    who = planted(heads={"clip": answering(torch.eye(3))}, images=pictures(*colours, NAMES))
    settings = ZeroShotSettings(teacher=f"hf:{tmp_path / 'clip'}", templates="plain")
    with pytest.raises(ValueError, match=r"tokenizer of hf:.*clip.* tokenizer\.json"):
        list(zeroshot(who, tmp_path, settings))


# ---------------------------------------------------------------- retrieval


def test_recall_equals_a_ranking_written_down_plainly():
    images, texts = torch.randn(30, 8), torch.randn(70, 8)
    owners = torch.cat([torch.arange(30), torch.randint(30, (40,))])
    got = numbers(recall(images, texts, owners, [str(i) for i in range(30)]))
    cosine = F.cosine_similarity(images[:, None], texts[None], dim=-1)
    for rank in (1, 5, 10):
        top = cosine.topk(rank, dim=1).indices
        found = [(owners[row] == i).any().item() for i, row in enumerate(top)]
        assert got[f"retrieval/image_to_text/recall{rank}"] == pytest.approx(100 * sum(found) / 30)
        top = cosine.T.topk(rank, dim=1).indices
        found = [(row == owners[i]).any().item() for i, row in enumerate(top)]
        assert got[f"retrieval/text_to_image/recall{rank}"] == pytest.approx(100 * sum(found) / 70)


def test_pairs_that_agree_recall_100_and_features_that_are_all_the_same_nothing():
    x, keys = torch.randn(40, 8), [str(i) for i in range(40)]
    agreed = numbers(recall(x, x * 3, torch.arange(40), keys))
    assert set(agreed.values()) == {100.0}
    same = numbers(recall(torch.ones(40, 8), torch.ones(40, 8), torch.arange(40), keys))
    assert set(same.values()) == {0.0}


def captions(root, entries, images=("a.png", "b.png", "c.png")):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "val2017").mkdir(exist_ok=True)
    colours = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    for name, colour in zip(images, colours, strict=False):
        Image.new("RGB", (40, 32), colour).save(root / "val2017" / name)
    content = dict(
        images=[dict(id=10 * i, file_name=name) for i, name in enumerate(images)],
        annotations=[dict(image_id=image, caption=text) for image, text in entries],
    )
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps(content))


def test_captions_of_coco_are_found_through_a_students_head(words, planted, answering, tmp_path):
    texts = ["a cat", "a red car", "a dog", "the dog "]
    captions(tmp_path, zip([0, 10, 20, 20], texts, strict=True))
    tower = open_text(TeacherName.parse(TEACHER))
    who = planted(heads={"tiny-words": answering(tower(texts[:3]))})
    got = numbers(retrieval(who, tmp_path, RetrievalSettings(teacher=TEACHER)))
    assert got["retrieval/image_to_text/recall1"] == 100
    assert got["retrieval/text_to_image/recall1"] >= 75
    assert got["retrieval/text_to_image/recall5"] == 100


def test_captions_of_an_unreadable_image_are_left_out_with_it(words, planted, answering, tmp_path):
    texts = ["a cat", "a red car", "a dog", "the dog "]
    captions(tmp_path, zip([0, 10, 20, 20], texts, strict=True))
    torn = tmp_path / "val2017" / "a.png"
    torn.write_bytes(torn.read_bytes()[:60])
    tower = open_text(TeacherName.parse(TEACHER))
    who = planted(heads={"tiny-words": answering(tower(texts[:3]))})
    found = dict(retrieval(who, tmp_path, RetrievalSettings(teacher=TEACHER)))
    both = (found[f"retrieval/{way}/recall1"] for way in ("image_to_text", "text_to_image"))
    assert [len(one.keys) for one in both] == [2, 3] and who.unreadable == {str(torn)}
    assert found["retrieval/image_to_text/recall1"].value == 100


def test_captions_without_their_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no annotations/captions_val\*\.json"):
        read_captions(tmp_path)
    captions(tmp_path, [(0, "x"), (20, "y"), (0, "z")])
    files, texts, owners = read_captions(tmp_path)
    assert [f.name for f in files] == ["a.png", "c.png"] and texts == ["x", "y", "z"]
    assert owners.tolist() == [0, 1, 0]
    (tmp_path / "val2017" / "c.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images of .* are missing, .*c\.png"):
        read_captions(tmp_path)
    captions(tmp_path, [(0, "x"), (33, "y")])
    with pytest.raises(ValueError, match="1 of 2 captions name an image that it does not list"):
        read_captions(tmp_path)
    (tmp_path / "annotations" / "captions_val2017.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match="holds no captions in COCO's form"):
        read_captions(tmp_path)


def test_no_image_is_held_out_where_nothing_is_trained(tmp_path):
    """A folder that is itself the validation part, and one that holds a part called val alone."""
    from zoo.data.sources import open_whole

    for place in ("flat", "parent/val"):
        for name in ("a", "b", "c"):
            folder = tmp_path / place / name
            folder.mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    for place in ("flat", "parent"):
        source = open_whole(tmp_path / place)
        assert len(source) == 30 and list(source.classes) == ["a", "b", "c"]


def test_a_tower_with_fewer_words_than_its_tokenizer_is_refused_in_words(words, tmp_path):
    from open_clip import factory

    about = json.loads((tmp_path / "configs" / "tiny-words.json").read_text())
    about["text_cfg"]["vocab_size"] = 100
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "few-words.json").write_text(json.dumps(about))
    factory.add_model_config(tmp_path / "few")
    with pytest.raises(
        ValueError, match=r"few-words.* has a smaller vocabulary than its tokenizer"
    ):
        text_classifier("open_clip:few-words/random", NAMES)


def test_the_teacher_is_the_runs_own_if_it_has_one_with_texts(
    words, planted, pictures, colours, answering, tmp_path
):
    images, labels = colours
    rows = text_classifier(TEACHER, NAMES)
    who = planted(heads={"tiny-words": answering(rows * 7)}, images=pictures(images, labels, NAMES))
    who.name = str(tmp_path / "run" / "export")
    (tmp_path / "run").mkdir()
    teachers = [dict(name="timm:resnet18"), dict(name=TEACHER)]
    (tmp_path / "run" / "config.json").write_text(json.dumps(dict(teachers=teachers)))
    settings = used(who, (), ZeroShotSettings(templates="plain"))
    assert (settings.teacher, settings.head) == (TEACHER, "tiny-words")
    got = numbers(zeroshot(who, tmp_path, ZeroShotSettings(templates="plain")))
    assert got["zeroshot/top1"] == 100
