import json

import pytest
import torch

from zoo.cli import main

transformers = pytest.importorskip("transformers")

SMALL = "--batch 8 --eval-samples 16 --optim.warmup 0"


def zoo(text):
    main(text.split())


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    from zoo.language.open import open_language_model

    folder = tmp_path_factory.mktemp("lm")
    torch.manual_seed(0)
    open_language_model("llama_tiny/random").save_pretrained(folder)
    return f"lm:{folder}"


def about(run):
    return json.loads((run / "about.json").read_text())


def states(*runs):
    from zoo.multimodal.open import open_vlm

    return [open_vlm(str(run)).state_dict() for run in runs]


@pytest.mark.long
def test_prealignment_trains_each_encoder_then_the_projector_then_everything(language, tmp_path):
    zoo(
        f"distill --image-text generated:48 --stages prealign --tower resnet10t@32 "
        f"vit_tiny_patch16_224@32 --stride 16 --language {language} --align-steps 2 "
        f"--project-steps 2 --steps 2 {SMALL} --out {tmp_path}/run"
    )
    folders = sorted(tmp_path.glob("run/*-*"))
    names = ["1-align_1_resnet10t", "2-align_2_vit_tiny_patch16_224", "3-project", "4-tune"]
    assert [folder.name for folder in folders] == names
    first, second, project, tune = states(*folders)
    given = transformers.AutoModelForCausalLM.from_pretrained(language[3:]).state_dict()
    for name, tensor in given.items():  # frozen until the last stage
        if name.startswith("model.layers"):
            kept = f"model.language_model.{name.removeprefix('model.')}"
            assert tensor.equal(first[kept]) and tensor.equal(project[kept])
            assert not tensor.equal(tune[kept]) or tensor.numel() < 2
    for place, state in enumerate((first, second)):
        for name, tensor in state.items():
            if ".backbone." in name and tensor.is_floating_point():
                joined = name.replace("vision_tower.", f"vision_tower.towers.{place}.")
                assert tensor.equal(project[joined]), joined
    written = (folders[-1] / "about.json").stat().st_mtime_ns
    zoo(f"distill --resume {tmp_path}/run")  # every stage is finished: nothing is trained again
    assert (folders[-1] / "about.json").stat().st_mtime_ns == written


@pytest.mark.long
def test_a_stopped_run_in_stages_goes_on_with_the_stage_that_is_not_finished(language, tmp_path):
    import shutil

    words = (
        f"distill --image-text generated:48 --stages prealign --tower resnet10t@32 "
        f"resnet10t@64 --language {language} --align-steps 1 --project-steps 1 --steps 1 {SMALL}"
    )
    zoo(f"{words} --size 32 --out {tmp_path}/run")
    whole = about(tmp_path / "run" / "4-tune")["after"]
    for name in ("3-project", "4-tune"):
        shutil.rmtree(tmp_path / "run" / name)
    zoo(f"distill --resume {tmp_path}/run")
    assert about(tmp_path / "run" / "4-tune")["after"] == whole


@pytest.mark.long
def test_a_student_learns_from_a_frozen_model_s_answers_and_its_tower(language, tmp_path):
    tower = "--tower resnet10t@32 --tower-options output_stride=16"
    learns = f"--steps 25 --every.log 1 --optim.lr 2e-3 {SMALL}"
    zoo(
        f"distill --image-text generated:48 {tower} --language {language} {learns} "
        f"--out {tmp_path}/teacher"
    )
    zoo(
        f"distill --image-text generated:48 --tower vit_tiny_patch16_224@32 --language {language} "
        f"--teachers vlm:{tmp_path}/teacher --losses.kl 2 --losses.ce 0 --vision 0.5 {learns} "
        f"--out {tmp_path}/student"
    )
    lines = (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    for name in ("teacher/kl", "teacher/vision"):  # the student starts where its teacher did
        early, late = (sum(row[name] for row in part) for part in (rows[:4], rows[-4:]))
        assert late < 0.9 * early, name
    first = rows[0]
    weighed = 2 * first["teacher/kl"] + 0.5 * first["teacher/vision"]
    assert first["loss"] == pytest.approx(weighed, rel=1e-5)


@pytest.mark.long
def test_adapters_learn_in_place_of_the_language_model_and_are_added_to_it(language, tmp_path):
    pytest.importorskip("peft")
    zoo(
        f"distill --image-text generated:48 --tower resnet10t@32 --language {language} --steps 3 "
        f"--optim.lora 2 --optim.lora-layers q_proj {SMALL} --out {tmp_path}/run"
    )
    (state,) = states(tmp_path / "run")
    given = transformers.AutoModelForCausalLM.from_pretrained(language[3:]).state_dict()
    moved = {
        name.rpartition(".weight")[0].rpartition(".")[2]
        for name, tensor in given.items()
        if name.startswith("model.layers")
        and not tensor.equal(state[f"model.language_model.{name.removeprefix('model.')}"])
    }
    assert moved == {"q_proj"}


def test_a_random_language_model_is_no_anchor_for_encoders(tmp_path):
    from zoo.train.distill.image_text_config import DistillImageText
    from zoo.train.distill.image_text_stages import prealigned

    config = DistillImageText(tower=("a", "b"), language="llama_tiny/random", out=tmp_path)
    with pytest.raises(ValueError, match="has no weights; train one first"):
        prealigned(config, 1, 1)
