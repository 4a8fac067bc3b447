"""Forms of an export and its card; the Hub is a server of this test."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch

from zoo.cli import main
from zoo.commands.export.model_card import card_of, interval
from zoo.eval.registry import Scores
from zoo.eval.results import Record, write
from zoo.features import Batch
from zoo.students.build import build_student
from zoo.students.export import export_student, load_export


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with the export of a tiny student."""
    folder = tmp_path_factory.mktemp("forms") / "mine"
    folder.mkdir()
    torch.manual_seed(0)
    student = build_student("test_vit", {"dino": (8, 12)}, size=64).eval()
    batch = Batch(torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8))
    export_student(student, folder / "export", batch, about=dict(licenses={"dino": "apache-2.0"}))
    config = dict(kind="distill", student="test_vit", data="photos", steps=7, batch=4, seed=3)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "about.json").write_text(json.dumps(dict(command="zoo distill ...")))
    return folder


@pytest.fixture
def results(run, tmp_path):
    hits = (np.arange(100) < 64).astype(np.uint8)
    scores = Scores([str(i) for i in range(100)], hits)
    own = dict(target=str(run), benchmark="knn", data="x/birds", seed=5, model=dict(size=64))
    record = Record(values={"knn/top1": scores.value, "knn/other": 1.0}, **own)
    write(tmp_path / "r.jsonl", record, {"knn/top1": scores}, {})
    return tmp_path / "r.jsonl"


def test_an_interval_over_images_is_that_of_the_binomial():
    hits = (np.arange(400) < 300).astype(np.uint8)
    low, high = interval(Scores([str(i) for i in range(400)], hits))
    half = 100 * 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert low == pytest.approx(75 - half, abs=0.5) and high == pytest.approx(75 + half, abs=0.5)


def test_timms_form_loads_and_its_card_says_what_is_known(run, results, tmp_path, capsys):
    from huggingface_hub import ModelCard

    out = tmp_path / "timm"
    main(["export", str(run), "--to", "timm", "--out", str(out), "--results", str(results)])
    assert str(out) in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert sum(p.numel() for p in model.parameters()) > 0
    card = ModelCard((out / "README.md").read_text())
    assert card.data.library_name == "timm" and card.data.license == "other"
    (found,) = card.data.eval_results
    assert (found.metric_type, found.metric_value, found.dataset_name) == (
        "knn/top1",
        64.0,
        "birds",
    )
    for text in ("| dino | 8 | 12 | apache-2.0 |", "zoo distill ...", "64.00 | [5", "64 px | 5 |"):
        assert text in card.text, text
    with pytest.raises(SystemExit):
        main(["export", str(run), "--to", "timm", "--out", str(out)])
    assert "is there already" in capsys.readouterr().err


def test_a_program_of_torch_export_has_the_exports_features(run, tmp_path):
    out = tmp_path / "pt2"
    main(["export", str(run), "--to", "pt2", "--out", str(out)])
    program = torch.export.load(out / "model.pt2").module()
    images = torch.rand(3, 3, 64, 64)  # another batch than it was made with
    student = load_export(run / "export")
    with torch.no_grad():
        want = student.forward_features(images)
        summary, spatial = program(images)
    torch.testing.assert_close(summary, want.summary, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(spatial, want.spatial, rtol=1e-4, atol=1e-4)
    assert (out / "README.md").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_and_transformers_have_the_exports_features(run, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra [dev]")
    pytest.importorskip("transformers", reason="transformers is in the extra [teachers]")
    import onnxruntime

    student, images = load_export(run / "export"), torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        want = student.forward_features(images)
    main(["export", str(run), "--to", "onnx", "--out", str(tmp_path / "onnx")])
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    summary, _ = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(summary), want.summary, rtol=1e-3, atol=1e-3)
    main(["export", str(run), "--to", "transformers", "--out", str(tmp_path / "hf")])
    from transformers import AutoModel

    import zoo.multimodal  # noqa: F401

    tower = AutoModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        found = tower(pixel_values=images).last_hidden_state
    torch.testing.assert_close(found, want.spatial.flatten(1, 2), rtol=1e-3, atol=1e-3)


class Hub(BaseHTTPRequestHandler):
    """The few requests of a push and a pull, in memory."""

    files: ClassVar[dict[str, bytes]] = {}

    def log_message(self, *_):
        pass

    def _json(self, content, code=200, head=()):
        body = json.dumps(content).encode()
        self.send_response(code)
        for name, value in (("Content-Type", "application/json"), *head):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        here = f"http://{self.headers['Host']}/me/mine"
        if self.path == "/api/repos/create":
            self._json(dict(url=here, name="me/mine"))
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self._json(
                dict(files=[
                    dict(path=f["path"], uploadMode="regular", shouldIgnore=False) for f in asked
                ])
            )  # fmt: skip
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    one = line["value"]
                    self.files[one["path"]] = base64.b64decode(one["content"])
            self._json(dict(commitUrl=f"{here}/commit/abc", commitOid="a" * 40, success=True))
        else:
            self._json({})

    def do_GET(self):
        name = self.path.partition("/resolve/main/")[2]
        if not name:
            about = dict(
                id="me/mine", sha="a" * 40, siblings=[dict(rfilename=n) for n in self.files]
            )
            self._json(about)
            return
        if name not in self.files:
            self._json({}, 404, [("X-Error-Code", "EntryNotFound")])
            return
        body = self.files[name]
        self.send_response(200)
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET


def test_the_hub_gets_the_export_and_its_client_fetches_it_whole(
    run, tmp_path, monkeypatch, capsys
):
    """Push and pull against the server that HF_ENDPOINT names; no other is asked."""
    from huggingface_hub import constants, hf_hub_download

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in (("HF_ENDPOINT", url), ("HF_TOKEN", "hf_test"), ("NO_PROXY", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        main(["export", str(run), "--to", "hub", "--repo", "me/mine"])
        assert f"{url}/me/mine/commit/abc" in capsys.readouterr().out
        assert {"README.md", "model.safetensors", "config.json", "heads.json"} <= set(Hub.files)
        assert b"hf-hub:me/mine" in Hub.files["README.md"]
        for file in ("config.json", "model.safetensors"):
            got = hf_hub_download("me/mine", file, endpoint=url, local_dir=tmp_path / "pulled")
            assert Path(got).read_bytes() == (run / "export" / file).read_bytes()
    finally:
        server.shutdown()
        server.server_close()
    model = timm.create_model(f"local-dir:{tmp_path / 'pulled'}", pretrained=True)
    ours = load_export(run / "export").backbone.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in model.state_dict().items())


def test_what_cannot_be_written_is_refused_in_a_line(run, tmp_path, capsys):
    for words, told in (
        ([str(tmp_path), "--to", "pt2", "--out", str(tmp_path / "x")], "no exported student"),
        ([str(run), "--to", "hub"], "--repo ORG/NAME"),
        ([str(run), "--to", "onnx"], "needs --out"),
        ([str(run)], "Give --out"),
    ):
        with pytest.raises(SystemExit):
            main(["export", *words])
        assert told in capsys.readouterr().err
    assert "## Teachers" in card_of(run / "export")
