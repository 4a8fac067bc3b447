"""A teacher's weights are hashed once for each state of their file."""

import os

import pytest
import timm
import torch
from safetensors.torch import save_file

from zoo.teachers.fingerprint import remembered_fingerprint, weight_files
from zoo.teachers.name import TeacherName
from zoo.teachers.open import open_teacher
from zoo.teachers.teacher import fingerprint


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))


def changed(teacher):
    """Change a weight that was loaded, as no file would: only a new hash could notice."""
    with torch.no_grad():
        next(teacher.network.parameters()).add_(1)
    return teacher


def test_a_file_is_hashed_again_only_when_its_size_or_time_is_another(own_cache, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file)
    name = f"timm:test_vit/{file}@64"
    teacher = open_teacher(name)
    first = remembered_fingerprint(name, teacher)
    assert first == fingerprint(teacher)
    changed(teacher)
    assert remembered_fingerprint(name, teacher) == first != fingerprint(teacher)
    later = file.stat().st_mtime_ns + 10**9
    os.utime(file, ns=(later, later))
    assert remembered_fingerprint(name, teacher) == fingerprint(teacher)


def test_another_size_or_precision_of_the_same_file_has_a_hash_of_its_own(own_cache, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file)
    found = {
        remembered_fingerprint(name, teacher)
        for name in (f"timm:test_vit/{file}@64", f"timm:test_vit/{file}@96")
        for teacher in (open_teacher(name), open_teacher(name).double())
    }
    assert len(found) == 4


def test_weights_without_a_file_are_hashed_each_time(own_cache):
    name = "timm:test_vit/random@64"
    teacher = open_teacher(name)
    first = remembered_fingerprint(name, teacher)
    assert remembered_fingerprint(name, changed(teacher)) == fingerprint(teacher) != first


def test_all_files_of_a_folder_count(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("x")
    for text in (f"hf:{tmp_path}", f"timm:local-dir:{tmp_path}"):
        found = weight_files(TeacherName.parse(text))
        assert [path.name for path in found] == ["config.json", "model.safetensors"]
