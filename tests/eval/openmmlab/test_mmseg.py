"""mmseg's UPerNet over our backbones: it trains, predicts, resumes, and scores what is planted."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg", reason="mmseg is not installed; it is in the extra [seg]")

from zoo.eval.openmmlab.mmseg_config import build_segmenter, mmseg_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # mmengine and mmseg warn of themselves
]

FAMILIES = {
    "eradio_nano": {},
    "fastervit_0": dict(depths=(1, 1, 1, 1), dim=8, num_heads=(1, 2), stem_dim=8),
    "mambavision_t": dict(depths=(1, 1, 2, 2), dim=8, num_heads=(1, 2), stem_dim=8),
    "radio_vit_base_patch16": dict(depth=4, embed_dim=32, num_heads=2),
    "vit_small_patch14_dinov2": dict(depth=5, embed_dim=32, num_heads=2, img_size=56),
}
NARROW = {
    "model.decode_head.channels": 16,
    "model.auxiliary_head.channels": 16,
    "default_hooks.logger.interval": 1,
    "log_level": "WARNING",
}
COLOURS = np.array([(40, 40, 40), (220, 30, 30), (30, 220, 30)], np.uint8)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Red and green squares on grey, 64x96; void is what the first row of each mask says."""
    root, draws = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            truth = np.zeros((64, 96), np.uint8)
            top, left = draws.integers(1, 32), draws.integers(64)
            truth[top : top + 32, left : left + 32] = 1 + number % 2
            Image.fromarray(COLOURS[truth]).save(root / "images" / split / f"{number}.png")
            truth[0] = 3
            Image.fromarray(truth).save(root / "masks" / split / f"{number}.png")
    (root / "classes.json").write_text(json.dumps(["ground", "red", "green", "void"]))
    return root


def tiny_config(name, data, *, overrides=None, **fields):
    # A path that is dropped for both images has no gradient.
    backbone = dict(name=name, options=FAMILIES[name], drop_path_rate=0.0)
    how = dict(crop=(64, 64), size=(96, 64), steps=2, batch=2, workers=0) | fields
    return mmseg_config(backbone, data, overrides=NARROW | (overrides or {}), **how)


def two_images(config, split="train"):
    from mmengine.dataset import pseudo_collate
    from mmseg.registry import DATASETS

    dataset = DATASETS.build(config[f"{split}_dataloader"].dataset)
    return pseudo_collate([dataset[0], dataset[1]])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_reaches_every_weight_of_the_backbone_and_classes_come_out(name, shapes):
    config = tiny_config(name, shapes, inference="slide")
    assert config.model.test_cfg == dict(mode="slide", crop_size=(64, 64), stride=(42, 42))
    model = build_segmenter(config).train()
    batch = model.data_preprocessor(two_images(config), True)
    losses = model(**batch, mode="loss")
    assert {"decode.loss_ce", "aux.loss_ce"} <= set(losses)
    total, _ = model.parse_losses(losses)
    assert torch.isfinite(total)
    total.backward()
    weights = dict(model.backbone.named_parameters())
    assert len(weights) > 20
    assert [k for k, p in weights.items() if p.grad is None or not p.grad.any()] == []

    with torch.no_grad():
        batch = model.data_preprocessor(two_images(config, "val"))
        predictions = model.eval()(**batch, mode="predict")
    for sample in predictions:
        assert sample.pred_sem_seg.data.shape == (1, 64, 96)
        assert set(sample.pred_sem_seg.data.unique().tolist()) <= {0, 1, 2}
        assert sample.seg_logits.data.shape == (3, 64, 96)


def test_a_segmenter_learns_the_shapes(shapes):
    """Twenty steps on two images cut the loss by half, with the shipped losses and our backbone."""
    wider = {f"model.{head}.channels": 64 for head in ("decode_head", "auxiliary_head")}
    config = tiny_config("eradio_nano", shapes, overrides=wider)
    model = build_segmenter(config).train()
    batch = model.data_preprocessor(two_images(config), True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    totals = []
    for _ in range(20):
        total, _ = model.parse_losses(model(**batch, mode="loss"))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.5 * totals[0]


def planted(data):
    """A model in the segmenter's place whose answer is the truth, or ground everywhere."""
    from mmengine.model import BaseModel
    from mmengine.structures import PixelData

    class Planted(BaseModel):
        def __init__(self, knows):
            super().__init__()
            self.knows, self.weight = knows, torch.nn.Parameter(torch.zeros(1))

        def forward(self, inputs, data_samples=None, mode="tensor"):
            for sample in data_samples:
                mask = data / "masks" / "val" / Path(sample.img_path).name
                truth = torch.from_numpy(np.array(Image.open(mask))).long()
                # what is void may be called anything
                answer = truth % 3 if self.knows else torch.zeros_like(truth)
                sample.pred_sem_seg = PixelData(data=answer[None])
            return data_samples

    return Planted


@pytest.mark.parametrize("knows", [True, False])
def test_the_runner_scores_planted_masks_as_they_are(shapes, tmp_path, knows):
    from mmengine.runner import Runner

    config = tiny_config("eradio_nano", shapes, out=tmp_path)
    build_segmenter(config)  # registers, and sets the scope
    runner = Runner(
        planted(shapes)(knows),
        work_dir=str(tmp_path),
        test_dataloader=config.test_dataloader,
        test_evaluator=config.test_evaluator,
        test_cfg=config.test_cfg,
        default_scope="mmseg",
        experiment_name=f"planted{knows}",
        log_level="WARNING",
    )
    scores = runner.test()
    scored = 63 * 96  # without the row that is void
    ground = 1.0 if knows else (scored - 32 * 32) / scored
    expected = 100.0 if knows else 100 * ground / 3
    assert scores["mIoU"] == pytest.approx(expected, abs=0.006)  # mmseg rounds to two places
    assert scores["aAcc"] == pytest.approx(100 * ground, abs=0.006)


def test_a_run_resumes_where_it_stopped_from_a_file_that_is_only_data(shapes, tmp_path):
    from mmengine.runner import Runner

    def train(steps, **how):
        config = tiny_config("eradio_nano", shapes, out=tmp_path, overrides=how, steps=steps)
        build_segmenter(config)
        config.experiment_name = f"to{steps}"  # mmengine keeps a run's parts under its name
        runner = Runner.from_cfg(config)
        runner.train()
        return runner, torch.load(tmp_path / f"iter_{steps}.pth", weights_only=True)

    runner, first = train(2)
    assert first["meta"]["iter"] == 2
    assert list(first["meta"]["dataset_meta"]["classes"]) == ["ground", "red", "green"]
    history = first["message_hub"]["log_scalars"]["train/loss"]["values"]
    assert len(history) == 2 and torch.isfinite(history).all()
    assert 0 <= runner.message_hub.get_scalar("val/mIoU").current() <= 100

    runner, second = train(4, resume=True)
    assert second["meta"]["iter"] == 4
    both = second["message_hub"]["log_scalars"]["train/loss"]["values"]
    assert len(both) == 4 and torch.equal(both[:2], history)
    assert {int(state["step"]) for state in second["optimizer"]["state"].values()} == {4}


def test_masks_of_16_bits_and_palettes_are_read_as_classes(shapes, tmp_path):
    for path in shapes.rglob("*.*"):
        place = tmp_path / path.relative_to(shapes)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    first = tmp_path / "masks" / "val" / "0.png"
    truth = np.array(Image.open(first))
    Image.fromarray(np.where(truth == 3, 65535, truth).astype(np.uint16)).save(first)
    second = tmp_path / "masks" / "val" / "1.png"
    palette = Image.fromarray(np.array(Image.open(second)), mode="P")
    palette.putpalette([9, 9, 9, *range(1, 100)])
    palette.save(second)

    def masks(data):
        config = tiny_config("eradio_nano", data)
        build_segmenter(config)
        return [s.gt_sem_seg.data for s in two_images(config, "val")["data_samples"]]

    for ours, theirs in zip(masks(tmp_path), masks(shapes), strict=True):
        assert torch.equal(ours, theirs)
        assert set(ours[0, 0].tolist()) == {255} and ours[0, 1:].max() < 3


def test_the_zeros_of_ade20k_are_no_class(tmp_path):
    truth = np.repeat(np.array([[0, 1, 150]], np.uint8), 32, axis=0).repeat(32, axis=1)
    for split in ("training", "validation"):
        for kind, pixels in (
            ("images", np.zeros((*truth.shape, 3), np.uint8)),
            ("annotations", truth),
        ):
            (tmp_path / kind / split).mkdir(parents=True)
            for number in range(2):
                Image.fromarray(pixels).save(tmp_path / kind / split / f"{number}.png")
    config = tiny_config("eradio_nano", tmp_path)
    assert config.model.decode_head.num_classes == 150
    build_segmenter(config)
    sample = two_images(config, "val")["data_samples"][0]
    assert sample.gt_sem_seg.data[0, 0, ::32].tolist() == [255, 0, 149]


def test_the_backbone_gets_images_as_it_wants_them(shapes):
    config = tiny_config("radio_vit_base_patch16", shapes)
    assert config.model.decode_head.num_classes == config.model.auxiliary_head.num_classes == 3
    assert config.model.backbone.out_indices == [0, 1, 2, 3]
    model = build_segmenter(config)
    batch = model.data_preprocessor(two_images(config, "val"))
    image, sample = batch["inputs"][0], batch["data_samples"][0]
    # RADIO takes images in [0, 1]; colours are red first.
    colours = torch.from_numpy(COLOURS) / 255
    truth = sample.gt_sem_seg.data[0, 1:]
    torch.testing.assert_close(image[:, 1:], colours[truth.long()].permute(2, 0, 1))


@pytest.mark.parametrize(("steps", "rates"), [(2, (1.0, 0.0)), (40, (0.0, 0.333, 0.667, 1.0))])
def test_the_rate_rises_in_a_tenth_of_the_run_and_falls_to_nothing(steps, rates, shapes):
    from mmengine.registry import PARAM_SCHEDULERS

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = tiny_config("eradio_nano", shapes, steps=steps)
    made = [PARAM_SCHEDULERS.build(s | dict(optimizer=optimizer)) for s in config.param_scheduler]
    measured = []
    for _ in range(steps):
        measured.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in made:
            scheduler.step()
    assert measured[: len(rates)] == pytest.approx(rates, abs=1e-3)
    assert measured[-1] == pytest.approx(0.0, abs=1e-6)


def test_other_classes_than_the_configuration_has_are_refused(shapes):
    from mmseg.registry import DATASETS

    config = tiny_config("eradio_nano", shapes)
    build_segmenter(config)
    config.train_dataloader.dataset.metainfo.classes = ("ground", "red", "blue")
    with pytest.raises(ValueError, match="make the configuration again"):
        DATASETS.build(config.train_dataloader.dataset)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_a_gpu_gives_the_logits_of_the_cpu_and_trains(name, shapes):
    config = tiny_config(name, shapes)
    model = build_segmenter(config).eval()
    batch = two_images(config, "val")
    with torch.no_grad():
        here = model(**model.data_preprocessor(batch), mode="predict")
        here = [sample.seg_logits.data for sample in here]
        model = model.cuda()
        there = model(**model.data_preprocessor(batch), mode="predict")
    for ours, theirs in zip(there, here, strict=True):
        torch.testing.assert_close(ours.seg_logits.data.cpu(), theirs, atol=5e-3, rtol=5e-3)
    batch = model.train().data_preprocessor(two_images(config), True)
    total, _ = model.parse_losses(model(**batch, mode="loss"))
    total.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.backbone.parameters())


def test_the_page_runs_as_written(shapes, tmp_path, run_page):
    (tmp_path / "streets").symlink_to(shapes)
    printed, out = run_page("mmseg.md", tmp_path, commands=3)
    assert "mIoU" in printed
    assert re.search(r"torch.Size\(\[64, 96\]\)", out) and re.search("ground|red|green", out)
    assert (tmp_path / "runs/segmenter/iter_2.pth").is_file()
