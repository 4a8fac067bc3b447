"""lm-eval's tasks from a folder of files, without a network."""

import json

import pytest
import torch

import zoo
from zoo.cli import main
from zoo.eval.language.subject import TextSubject
from zoo.eval.settings import LmEvalSettings
from zoo.language.tokenizers import ByteTokenizer

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # its dependencies warn


CAPITALS = {"Fonia": "Tebu", "Lemar": "Kosi", "Ruvan": "Dapo"}


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    questions = [
        dict(country=country, choices=list(CAPITALS.values()), right=number, text="ab " * 700)
        for number, country in enumerate(CAPITALS)
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (folder / "capitals.jsonl").write_text(lines)
    shared = f"""dataset_path: json
dataset_kwargs: {{data_files: {folder / "capitals.jsonl"}}}
test_split: train
"""
    (folder / "capitals.yaml").write_text(f"""task: capitals
{shared}output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_target: right
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
""")
    (folder / "text.yaml").write_text(f"""task: text
{shared}output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
""")
    (folder / "written.yaml").write_text(f"""task: written
{shared}output_type: generate_until
doc_to_text: "{{{{country}}}}: "
doc_to_target: "x"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
""")
    return folder


def subject():
    torch.manual_seed(0)
    model = zoo.create_model("llama_tiny").eval()
    return TextSubject(name="x", model=model, tokenizer=ByteTokenizer(), batch=2)


@torch.no_grad()
def nll(model, ids, first):
    """Minus the log-likelihood of the tokens from `first` on."""
    ids = torch.tensor(ids)[None]
    logs = model(ids).logits[0].log_softmax(1)[first - 1 : -1]
    return -logs.gather(1, ids[0, first:, None]).sum().item()


def test_tasks_of_a_folder_are_what_the_model_itself_says(tasks):
    from zoo.eval.language.harness import Adapter, lmeval

    tested = subject()
    found = dict(lmeval(tested, tasks, LmEvalSettings()))
    right = 0
    for number, country in enumerate(CAPITALS):
        given = list(f"The capital of {country} is".encode())
        scores = [
            nll(tested.model, [*given, *f" {city}".encode()], len(given))
            for city in CAPITALS.values()
        ]
        right += scores.index(min(scores)) == number
    accuracy = found["lmeval/capitals/acc"]
    assert accuracy.value == pytest.approx(100 * right / 3)
    assert accuracy.keys == ["capitals/0", "capitals/1", "capitals/2"]
    assert 200 < found["lmeval/text/byte_perplexity"] < 320  # 256 equally likely bytes
    assert found["lmeval/mean"] == pytest.approx(
        (accuracy.value + found["lmeval/written/exact_match"].value) / 2
    )
    assert Adapter(tested).longest == 512  # the text has 2,100 bytes: windows


def test_windows_score_each_byte_once():
    from lm_eval.api.instance import Instance

    from zoo.eval.language.harness import Adapter

    adapter, text = Adapter(subject()), "abcdefghijkl"
    adapter.longest = 6
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (found,) = adapter.loglikelihood_rolling([request])
    model, ids = adapter.subject.model, list(text.encode())
    by_hand = nll(model, [256, *ids[:5]], 1) + nll(model, ids[4:10], 1)
    by_hand += nll(model, ids[6:], 4)  # the last window is filled up with context
    assert found == pytest.approx(-by_hand, rel=1e-5)


def test_a_continuation_is_greedy_and_ends_before_its_stop():
    from zoo.eval.language.harness import Adapter

    adapter = Adapter(subject())
    ids = torch.tensor([list(b"hello")])
    out = adapter.subject.model.generate(ids, max_new_tokens=8, do_sample=False)
    whole = ByteTokenizer().decode(out[0, 5:].tolist())
    assert adapter._continued("hello", dict(max_gen_toks=8)) == whole
    stop = whole[3]
    assert adapter._continued("hello", dict(max_gen_toks=8, until=[stop])) == whole.split(stop)[0]


def test_eval_runs_it_and_names_a_task_that_is_not_there(tasks, capsys):
    words = ["eval", "llama_tiny/random", "--on", "lmeval", "--data", str(tasks)]
    main([*words, "--lmeval.tasks", "capitals", "--lmeval.limit", "2"])
    assert "lmeval/capitals/acc" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*words, "--lmeval.tasks", "hellaswag"])
    assert "no task 'hellaswag'" in capsys.readouterr().err
