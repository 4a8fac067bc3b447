"""mmdet's detectors over our backbones: they train, predict, and resume."""

import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason="mmdet is not installed; it is in the extra [det]")

from zoo.eval.openmmlab.mmdet_config import DETECTORS, build_detector, mmdet_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # mmengine and mmdet warn of themselves
]

FAMILIES = {
    "eradio_nano": {},
    "fastervit_0": dict(depths=(1, 1, 1, 1), dim=8, num_heads=(1, 2), stem_dim=8),
    "mambavision_t": dict(depths=(1, 1, 2, 2), dim=8, num_heads=(1, 2), stem_dim=8),
    "radio_vit_base_patch16": dict(depth=2, embed_dim=32, num_heads=2),
}

_RPN = {
    "model.train_cfg.rpn_proposal.nms_pre": 50,
    "model.train_cfg.rpn_proposal.max_per_img": 20,
    "model.test_cfg.rpn.nms_pre": 50,
    "model.test_cfg.rpn.max_per_img": 20,
    "model.test_cfg.rcnn.score_thr": 0.0,
}
FEWER = {
    "mask-rcnn": _RPN | {"model.train_cfg.rcnn.sampler.num": 16},
    "cascade-mask-rcnn": _RPN | {f"model.train_cfg.rcnn.{i}.sampler.num": 16 for i in range(3)},
    "retinanet": {
        "model.bbox_head.stacked_convs": 1,
        "model.test_cfg.score_thr": 0.0,
        "model.test_cfg.nms_pre": 50,
    },
    "dino": {
        "model.num_queries": 20,
        "model.encoder.num_layers": 1,
        "model.decoder.num_layers": 2,
        "model.encoder.layer_cfg.ffn_cfg.feedforward_channels": 64,
        "model.decoder.layer_cfg.ffn_cfg.feedforward_channels": 64,
        "model.dn_cfg.group_cfg.num_dn_queries": 4,
        "model.test_cfg.max_per_img": 20,
    },
}
NARROWER = {
    **dict.fromkeys(("in_channels", "out_channels", "feat_channels", "conv_out_channels"), 8),
    "fc_out_channels": 32,
}
"""What the heads' widths are divided by, so that a shipped detector is quick."""


def narrow(part):
    for key, value in part.items() if isinstance(part, dict) else ():
        if isinstance(value, int) and value % 16 == 0 and key in NARROWER:
            part[key] = value // NARROWER[key]
        narrow(value)
    for inner in part if isinstance(part, (list, tuple)) else ():
        narrow(inner)


def tiny_config(detector, name, data, **fields):
    # A path that is dropped for both images has no gradient.
    backbone = dict(name=name, options=FAMILIES[name], drop_path_rate=0.0)
    how = dict(size=(96, 64), epochs=2, workers=0, overrides=FEWER[detector]) | fields
    config = mmdet_config(detector, backbone, data, **how)
    if detector != "dino":  # whose parts want their own widths of each other
        neck = config.model.pop("neck")  # what comes into it keeps its width
        narrow(config.model)
        neck.out_channels //= 8
        config.model.neck = neck
    return config


def two_images(config, split="train"):
    from mmdet.registry import DATASETS
    from mmengine.dataset import pseudo_collate

    dataset = DATASETS.build(config[f"{split}_dataloader"].dataset)
    return pseudo_collate([dataset[0], dataset[1]])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("detector", DETECTORS)
def test_the_loss_reaches_every_weight_of_the_backbone_and_boxes_come_out(detector, name, toy_coco):
    config = tiny_config(detector, name, toy_coco)
    model = build_detector(config).train()
    batch = two_images(config)
    losses = model(**model.data_preprocessor(batch, True), mode="loss")
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
        found = sample.pred_instances
        assert len(found) > 0 and found.bboxes.shape == (len(found), 4)
        assert set(found.labels.tolist()) <= {0, 1}
        assert torch.isfinite(found.bboxes).all()
        if "mask" in detector:
            assert found.masks.shape == (len(found), 64, 64)


def test_a_detector_learns_the_toy_set(toy_coco):
    """Twenty steps on two images cut the loss by half, with the shipped losses and our backbone."""
    config = tiny_config("retinanet", "eradio_nano", toy_coco)
    model = build_detector(config).train()
    batch = model.data_preprocessor(two_images(config), True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for _ in range(20):
        total, _ = model.parse_losses(model(**batch, mode="loss"))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.5 * totals[0]


def planted(config):
    """A model in the detector's place whose answer is the truth, or noise."""
    from mmengine.model import BaseModel
    from mmengine.structures import InstanceData
    from pycocotools.coco import COCO

    truth = COCO(config.val_evaluator.ann_file)
    rank = {id: i for i, id in enumerate(truth.getCatIds())}

    class Planted(BaseModel):
        def __init__(self, shift):
            super().__init__()
            self.shift, self.weight = shift, torch.nn.Parameter(torch.zeros(1))

        def forward(self, inputs, data_samples=None, mode="tensor"):
            for sample in data_samples:
                notes = truth.loadAnns(truth.getAnnIds(imgIds=[sample.img_id]))
                corners = [np.array(n["bbox"]) for n in notes]
                corners = torch.tensor(np.stack([[*b[:2], *(b[:2] + b[2:])] for b in corners]))
                masks = np.stack([truth.annToMask(n) for n in notes]).astype(bool)
                sample.pred_instances = InstanceData(
                    bboxes=corners.float() + self.shift,
                    scores=torch.ones(len(notes)),
                    labels=torch.tensor([rank[n["category_id"]] for n in notes]),
                    masks=torch.from_numpy(np.roll(masks, self.shift, axis=(1, 2))),
                )
            return data_samples

    return Planted


@pytest.mark.parametrize(("shift", "expected"), [(0, 1.0), (30, 0.0)])
def test_the_runner_scores_planted_boxes_and_masks_as_they_are(toy_coco, tmp_path, shift, expected):
    from mmengine.runner import Runner

    config = tiny_config("mask-rcnn", "eradio_nano", toy_coco, out=tmp_path)
    build_detector(config)  # registers, and sets the scope
    runner = Runner(
        planted(config)(shift),
        work_dir=str(tmp_path),
        test_dataloader=config.test_dataloader,
        test_evaluator=config.test_evaluator,
        test_cfg=config.test_cfg,
        default_scope="mmdet",
        experiment_name=f"planted{shift}",
        log_level="WARNING",
    )
    scores = runner.test()
    for kind in ("bbox", "segm"):
        assert scores[f"coco/{kind}_mAP"] == expected
        assert scores[f"coco/{kind}_mAP_50"] == expected


def test_a_run_resumes_where_it_stopped_from_a_file_that_is_only_data(toy_coco, tmp_path):
    from mmengine.runner import Runner

    def train(epochs, **how):
        config = tiny_config("retinanet", "eradio_nano", toy_coco, epochs=epochs, out=tmp_path)
        config.merge_from_dict(how | {"default_hooks.logger.interval": 1, "log_level": "WARNING"})
        build_detector(config)
        config.experiment_name = f"to{epochs}"  # mmengine keeps a run's parts under its name
        runner = Runner.from_cfg(config)
        runner.train()
        return runner, torch.load(tmp_path / f"epoch_{epochs}.pth", weights_only=True)

    _, first = train(1)
    assert first["meta"]["epoch"] == 1 and first["meta"]["iter"] == 2
    history = first["message_hub"]["log_scalars"]["train/loss"]["values"]
    assert len(history) == 2

    runner, second = train(2, resume=True)
    assert second["meta"]["epoch"] == 2 and second["meta"]["iter"] == 4
    both = second["message_hub"]["log_scalars"]["train/loss"]["values"]
    assert len(both) == 4 and torch.equal(both[:2], history)
    assert {int(state["step"]) for state in second["optimizer"]["state"].values()} == {4}
    kept = runner.message_hub.get_scalar("train/loss")
    assert kept.data[0].tolist() == both.tolist()
    assert "coco/bbox_mAP" in str(runner.message_hub.log_scalars.keys())


def test_the_rate_of_a_very_short_run_rises(toy_coco):
    config = tiny_config("retinanet", "eradio_nano", toy_coco, epochs=5)
    build_detector(config)  # registers, and sets the scope
    from mmengine.registry import PARAM_SCHEDULERS

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    (rising,) = (s for s in config.param_scheduler if s.type == "LinearLR")
    scheduler = PARAM_SCHEDULERS.build(rising | dict(optimizer=optimizer))
    assert optimizer.param_groups[0]["lr"] < 0.01
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 1


def test_the_data_set_gives_classes_and_images_as_the_backbone_wants_them(toy_coco):
    config = tiny_config("mask-rcnn", "radio_vit_base_patch16", toy_coco)
    assert config.model.roi_head.bbox_head.num_classes == 2
    assert config.model.roi_head.mask_head.num_classes == 2
    model = build_detector(config)
    batch = model.data_preprocessor(two_images(config), True)
    image = batch["inputs"][0]
    # RADIO takes images in [0, 1]; the toy's background is 40 of 255 in each channel.
    assert image.shape == (3, 64, 64) and image.max() <= 1
    torch.testing.assert_close(image[:, 0, 0], torch.full((3,), 40 / 255))
    (box,) = batch["data_samples"][0].gt_instances.bboxes.tolist()
    left, top, right, bottom = map(int, box)
    inside = image[:, top:bottom, left:right].mean((1, 2)) * 255
    label = batch["data_samples"][0].gt_instances.labels.item()
    colour = [(220, 30, 30), (30, 220, 30)][label]  # red is class 0, whatever its id
    torch.testing.assert_close(inside, torch.tensor(colour).float(), atol=0.5, rtol=0)


def copied(toy_coco, folder, change):
    """The folder with the training annotations changed."""
    for path in toy_coco.rglob("*"):
        if path.is_file():
            place = folder / path.relative_to(toy_coco)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    notes = folder / "annotations/instances_train.json"
    content = json.loads(notes.read_text())
    change(content)
    notes.write_text(json.dumps(content))
    return folder


BAD_DATA = {
    "are missing in": lambda c: c["images"].append(
        dict(id=9, file_name="lost.png", height=1, width=1)
    ),
    "has no object": lambda c: c["annotations"].clear(),
    "different categories": lambda c: c["categories"].append(dict(id=8, name="blue")),
    "another order": lambda c: c["categories"].reverse(),
    "different names": lambda c: c["categories"][1].update(name="red"),
    "have no mask": lambda c: c["annotations"][0].pop("segmentation"),
    "not a COCO file": lambda c: c.pop("categories"),
}


@pytest.mark.parametrize("message", BAD_DATA)
def test_data_that_cannot_be_trained_on_are_refused_before_any_work(message, toy_coco, tmp_path):
    data = copied(toy_coco, tmp_path, BAD_DATA[message])
    with pytest.raises(ValueError, match=message):
        tiny_config("mask-rcnn", "eradio_nano", data)


def test_a_detector_or_a_backbone_that_does_not_fit_is_refused(toy_coco, tmp_path):
    with pytest.raises(ValueError, match="no detector 'yolo'; there are mask-rcnn"):
        mmdet_config("yolo", "eradio_nano", toy_coco)
    with pytest.raises(ValueError, match="needs"):
        mmdet_config("mask-rcnn", dict(name="eradio_nano", out_indices=(1, 2, 3)), toy_coco)
    with pytest.raises(ValueError, match="patch_size=16"):
        mmdet_config("mask-rcnn", "vit_small_patch14_dinov2", toy_coco)
    with pytest.raises(ValueError, match="no COCO split 'train'"):
        mmdet_config("mask-rcnn", "eradio_nano", tmp_path)


def test_masks_may_be_run_lengths_crowds_and_boxes_at_the_border(toy_coco, tmp_path):
    def change(content):
        from pycocotools import mask

        first, second = content["annotations"][:2]
        lit = np.zeros((64, 64), np.uint8, order="F")
        lit[10:30, 8:32] = 1
        coded = mask.encode(lit)
        first["segmentation"] = dict(size=coded["size"], counts=coded["counts"].decode())
        lit[:] = 0
        lit[44:, 44:] = 1
        flat = lit.flatten(order="F")
        edges = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *edges, flat.size]).tolist()
        second |= dict(segmentation=dict(size=[64, 64], counts=runs), bbox=[44, 44, 20, 20])
        content["annotations"].append(second | dict(id=99, iscrowd=1))

    config = tiny_config("mask-rcnn", "eradio_nano", copied(toy_coco, tmp_path, change))
    model = build_detector(config).train()
    batch = model.data_preprocessor(two_images(config), True)
    masks = [sample.gt_instances.masks.masks for sample in batch["data_samples"]]
    areas = sorted(int(mask.sum()) for one in masks for mask in one)
    assert areas[-1] == 480 and areas[0] == 400  # a crowd is ignored, not learnt
    total, _ = model.parse_losses(model(**batch, mode="loss"))
    assert torch.isfinite(total)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("detector", DETECTORS)
def test_a_gpu_gives_the_scores_of_the_cpu_and_trains(detector, name, toy_coco):
    """Losses are of random samples, so predictions are compared."""
    config = tiny_config(detector, name, toy_coco)
    model = build_detector(config).eval()
    batch = two_images(config, "val")
    with torch.no_grad():
        here = model(**model.data_preprocessor(batch), mode="predict")
        here = [sample.pred_instances.scores.sort().values for sample in here]
        model = model.cuda()
        there = model(**model.data_preprocessor(batch), mode="predict")
        there = [sample.pred_instances.scores.sort().values.cpu() for sample in there]
    for ours, theirs in zip(there, here, strict=True):
        count = min(len(ours), len(theirs))
        assert abs(len(ours) - len(theirs)) <= 2
        torch.testing.assert_close(ours[-count:], theirs[-count:], atol=5e-3, rtol=5e-3)
    batch = model.train().data_preprocessor(two_images(config), True)
    total, _ = model.parse_losses(model(**batch, mode="loss"))
    total.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.backbone.parameters())


def test_the_page_runs_as_written(toy_coco, tmp_path, run_page):
    (tmp_path / "coco").symlink_to(toy_coco)
    printed, out = run_page("mmdet.md", tmp_path, commands=5)
    assert "coco/bbox_mAP" in printed
    assert re.search(r"torch.Size\(\[[1-9]\d*, 4\]\)", out) and re.search("red|green", out)
    assert (tmp_path / "runs/detector/epoch_2.pth").is_file()
