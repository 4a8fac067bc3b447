"""Perplexity as a benchmark, and language models in `zoo eval`."""

import math

import pytest
import torch

import zoo
from zoo.cli import main
from zoo.data.text import open_text
from zoo.eval.language.perplexity import perplexity
from zoo.eval.language.subject import TextSubject
from zoo.eval.registry import Scores
from zoo.eval.results import read
from zoo.eval.settings import PerplexitySettings
from zoo.language.tokenizers import ByteTokenizer
from zoo.train.distill.token_task import evaluate_text

pytest.importorskip("transformers")

TEXT = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    zoo.create_model("gemma3_tiny").save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    line = f'{{"text": "{TEXT * 3}"}}\n'
    file.write_text(line * 4)
    return file


def test_perplexity_is_that_of_training_and_of_transformers(folder, text):
    model = zoo.create_model("gemma3", pretrained=folder).eval()
    subject = TextSubject(name="x", model=model, tokenizer=ByteTokenizer(), batch=3)
    found = dict(perplexity(subject, text, PerplexitySettings(length=40, rows=100)))
    source = open_text(text, ByteTokenizer(), 40)
    there = dict(evaluate_text(model, {}, source, torch.device("cpu"), rows=len(source), batch=4))
    for name in ("loss", "perplexity", "bpb"):
        assert found[f"perplexity/{name}"] == pytest.approx(there[name], rel=1e-6)
    # by hand: rows of one document, which transformers' own loss takes
    losses, foreseen = [], dict[int, int]()
    for index in range(len(source)):
        ids, segments = source.row(index)
        if segments.max() == 0:
            ids = torch.tensor(ids)[None]
            out = model(ids, labels=ids)
            losses.append(out.loss.item())
            foreseen[index] = int((out.logits[:, :-1].argmax(-1) == ids[:, 1:]).sum())
    rows = [i for i in range(len(source)) if source.row(i)[1].max() == 0]
    part = dict(
        evaluate_text(model, {}, _Some(source, rows), torch.device("cpu"), rows=99, batch=9)
    )
    assert part["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    top = found["perplexity/top1"]
    assert isinstance(top, Scores) and len(top.keys) == len(source)
    assert {index: top.top[index] for index in foreseen} == foreseen
    assert math.isclose(found["perplexity/bpb"], 8, abs_tol=0.3)  # bytes, guessed at random


class _Some:
    """Some rows of a source."""

    def __init__(self, source, rows):
        self.source, self.chosen, self.bytes_a_token = source, rows, source.bytes_a_token

    def __len__(self):
        return len(self.chosen)

    def bytes_in(self, rows):
        return self.bytes_a_token

    def rows(self, indices):
        return self.source.rows([self.chosen[i] for i in indices])


def test_eval_measures_a_folder_and_a_name_and_compares_them_text_by_text(
    folder, text, tmp_path, capsys
):
    out = tmp_path / "results.jsonl"
    words = ["--on", "perplexity,copying", "--data", str(text), "--perplexity.length", "32"]
    words += ["--copying.samples", "4", "--copying.lengths", "8", "--out", str(out)]
    for target in (f"lm:{folder}", "llama_tiny/random"):
        main(["eval", target, *words])
    first, second, *_ = read(out)
    assert (first.benchmark, second.benchmark) == ("perplexity", "copying")
    assert first.model["parameters"] == 33_120 and first.model["tokenizer"] == "bytes"
    again = zoo.evaluate(f"lm:{folder}", on="copying", copying=dict(samples=4, lengths=[8]))
    assert again[0].values == second.values and again[0].weights_hash == second.weights_hash
    main(["eval", "--compare", f"{out}:lm:{folder}", f"{out}:llama_tiny/random"])
    assert "perplexity/top1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        ("lm:X --on perplexity,knn --data TEXT", "name them in two commands"),
        ("lm:X", "is a language model; measure it with --on perplexity"),
        ("lm:X --on perplexity", "needs data. Name a text"),
        ("lm:X --on copying --size 224", "--size is of images"),
        ("resnet18 --on knn --data TEXT --tokenizer bytes", "--tokenizer is of text"),
        ("lm:X --on perplexity --data TEXT --perplexity.length 9999", "512 positions"),
        ("lm:X --on copying --tokenizer nowhere", "no tokenizer in nowhere"),
        ("llama_tiny --on copying", "no released weights"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(words, said, folder, text, capsys):
    filled = words.replace("TEXT", str(text)).replace("lm:X", f"lm:{folder}").split()
    with pytest.raises(SystemExit):
        main(["eval", *filled])
    *_, error = capsys.readouterr().err.splitlines()  # behind bars of transformers
    assert error.startswith("zoo: ") and said in error


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(tmp_path, capsys):
    zoo.create_model("llama_tiny", vocab_size=200, eos_token_id=199).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main(["eval", f"lm:{tmp_path}", "--on", "copying"])
    assert "has 200 tokens and the tokenizer 257" in capsys.readouterr().err
