"""What `zoo data pack` writes is the folder again, in shards."""

import gc
import io
import json
import warnings

import numpy as np
import pytest
from PIL import Image

from zoo.cli import main
from zoo.data.sources import open_labelled, open_source


def picture(seed: int, kind="PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


NAMES = ("a.png", "a.jpg", "a_.JPEG", "v1.0 über.png", "sub.dir/b.png", "sub.dir/c_d.e.png")


@pytest.fixture
def folder(tmp_path):
    seed = 0
    for part, classes in (("train", ("cat", "dög", "emu")), ("val", ("cat", "emu"))):
        for name in classes:
            for file in NAMES:
                path = tmp_path / "photos" / part / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture(seed, "PNG" if file.endswith("png") else "JPEG"))
                seed += 1
    return tmp_path / "photos"


def content(source):
    names = source.classes
    return [(source.read(i), names and names[source.label(i)]) for i in range(len(source))]


def test_packed_images_are_those_of_the_folder_with_their_classes(folder, tmp_path, capsys):
    shards = tmp_path / "new" / "100%d shards"
    main(["data", "pack", str(folder), str(shards), "--shard-mb", "1"])
    assert "30 images in 2 shards" in capsys.readouterr().out
    for ours, theirs in zip(open_labelled(shards, 0.5), open_labelled(folder, 0.5), strict=True):
        assert content(ours) == content(theirs) and len(content(ours)) in (12, 18)
        assert len({ours.key(i) for i in range(len(ours))}) == len(ours)
        assert list(ours.classes) == list(theirs.classes)
    names = {path.name for path in shards.iterdir()}
    assert names == {"train-000000.tar", "val-000000.tar", "classes.json", "index.safetensors"}
    assert not [path for path in shards.parent.iterdir() if path != shards]
    assert shards.stat().st_mode == shards.parent.stat().st_mode  # that of any new folder
    main(["data", "check", str(shards)])
    assert "30 images can be read; 0 problems" in capsys.readouterr().out


def test_webdataset_reads_the_same_samples(folder, tmp_path):
    import webdataset as wds

    main(["data", "pack", str(folder / "train"), str(tmp_path / "s")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset closes none of its files
        theirs = list(wds.WebDataset(str(tmp_path / "s" / "images-000000.tar"), shardshuffle=False))
        gc.collect()
    names = json.loads((tmp_path / "s" / "classes.json").read_text())
    ends = ("png", "jpg", "jpeg")
    found = [
        (next(sample[end] for end in ends if end in sample), names[int(sample["cls"])])
        for sample in theirs
    ]
    assert found == content(open_source(folder / "train"))


def test_a_shard_is_closed_when_it_is_full_and_the_same_folder_gives_the_same_bytes(tmp_path):
    (tmp_path / "flat").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (400, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "flat" / f"{number}.png")  # 480 kB
    for out in ("one", "two"):
        main(["data", "pack", str(tmp_path / "flat"), str(tmp_path / out), "--shard-mb", "1"])
    assert len(list((tmp_path / "one").glob("images-*.tar"))) == 2
    source = open_source(tmp_path / "one")
    assert not source.classes and content(source) == content(open_source(tmp_path / "flat"))
    for shard in (tmp_path / "one").glob("*.tar"):
        assert shard.read_bytes() == (tmp_path / "two" / shard.name).read_bytes()


def test_a_dry_run_writes_nothing_and_an_existing_folder_is_refused(folder, tmp_path, capsys):
    main(["data", "pack", str(folder), str(tmp_path / "s"), "--dry-run"])
    assert "train  18 images of 3 classes" in capsys.readouterr().out
    assert not (tmp_path / "s").exists()
    for words, reason in (
        ([str(folder), str(folder)], "is there already"),
        ([str(folder), str(tmp_path / "s"), "--shard-mb", "0"], "1 MB or more"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "s")], "There is no data at"),
    ):
        with pytest.raises(SystemExit):
            main(["data", "pack", *words])
        assert reason in " ".join(capsys.readouterr().err.split())


def test_a_pack_that_fails_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    last = sorted((folder / "val" / "emu").rglob("*.png"))[-1]
    monkeypatch.setattr("zoo.data.sources.FolderSource.read", reading_until(last))
    with pytest.raises(SystemExit) as stop:
        main(["data", "pack", str(folder), str(tmp_path / "s")])
    assert stop.value.code == 2 and "gone" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


def reading_until(last):
    def read(self, index):
        if self.root / self.files[index] == last:
            raise OSError("gone")
        return (self.root / self.files[index]).read_bytes()

    return read
