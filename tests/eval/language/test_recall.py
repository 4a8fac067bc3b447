"""Recall from the context: solved by whoever looks things up, and by nobody else."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import zoo
from zoo.eval.language.recall import copying, needle, phonebook, phonebook_sample
from zoo.eval.language.subject import (
    Continuation,
    TextSubject,
    encode_pair,
    score_continuations,
)
from zoo.eval.settings import CopyingSettings, NeedleSettings, PhonebookSettings
from zoo.language.tokenizers import ByteTokenizer

pytest.importorskip("transformers")

SIZE = ByteTokenizer.size


class LooksUp(nn.Module):
    """Continues with what followed the longest earlier match of the text's end (an induction head).

    Args:
        reach: Tokens that it remembers; all by default.
    """

    def __init__(self, reach: int = 10**6):
        super().__init__()
        self.reach, self.head = reach, nn.Linear(SIZE, SIZE, bias=False)
        self.head.weight.data = torch.eye(SIZE)
        self.config = SimpleNamespace(max_position_embeddings=4096)

    @property
    def base_model(self):
        return self

    def get_output_embeddings(self):
        return self.head

    def get_input_embeddings(self):
        return self.head

    def forward(self, input_ids, output_hidden_states=False, use_cache=False):
        last = torch.zeros(*input_ids.shape, SIZE)
        for row, ids in enumerate(input_ids.tolist()):
            for end in range(1, len(ids) + 1):
                last[row, end - 1, self.next_of(ids[max(0, end - self.reach) : end])] = 1
        return SimpleNamespace(last_hidden_state=last)

    @staticmethod
    def next_of(ids):
        text = bytes(i % 256 for i in ids)
        for length in range(min(len(text) - 1, 40), 0, -1):
            place = text.rfind(text[-length:], 0, len(text) - 1)
            if place >= 0:
                return text[place + length]
        return 0


def subject_of(model, batch=4):
    return TextSubject(name="test", model=model, tokenizer=ByteTokenizer(), batch=batch)


def values(found):
    return {name: score.value for name, score in found}


def test_who_looks_things_up_solves_all_three():
    subject = subject_of(LooksUp())
    for found in (
        copying(subject, None, CopyingSettings(lengths=(8, 20), samples=3)),
        phonebook(subject, None, PhonebookSettings(entries=(3, 5), samples=3)),
        phonebook(subject, None, PhonebookSettings(entries=(4,), samples=2, reversed=True)),
        needle(subject, None, NeedleSettings(lengths=(150,), depths=3, samples=1)),
    ):
        assert set(values(found).values()) == {100.0}


def test_who_forgets_finds_the_needle_at_the_end_alone():
    settings = NeedleSettings(lengths=(400,), depths=3, samples=2)
    found = values(needle(subject_of(LooksUp(reach=120)), None, settings))
    assert found["needle/400/100/exact"] == 100
    assert found["needle/400/0/exact"] == found["needle/400/50/exact"] == 0
    assert found["needle/exact"] == pytest.approx(100 / 3)


def test_a_text_that_fills_its_length_and_no_more_is_asked():
    counted = []
    model = LooksUp()
    forward = model.forward

    def watched(input_ids, **options):
        counted.append(input_ids.shape[1])
        return forward(input_ids, **options)

    model.forward = watched
    values(needle(subject_of(model), None, NeedleSettings(lengths=(300,), depths=2, samples=2)))
    assert 300 - 60 < max(counted) <= 300  # less than a sentence is missing


def test_a_random_model_recalls_nothing():
    model = zoo.create_model("llama_tiny").eval()
    found = values(copying(subject_of(model), None, CopyingSettings(lengths=(16,), samples=16)))
    assert found["copying/exact"] == 0 and found["copying/token"] < 10


def test_right_tokens_given_the_right_ones_are_what_greedy_generation_writes():
    model = zoo.create_model("nemotron_h_tiny").eval()
    pairs = []
    for row in torch.randint(0, 256, (3, 9)):
        text = model.generate(row[None], max_new_tokens=5, do_sample=False, eos_token_id=None)
        pairs.append(Continuation(row.tolist(), text[0, 9:].tolist()))
    wrong = Continuation(pairs[0].given, [*pairs[0].wanted[:2], 7, *pairs[0].wanted[3:]])
    scored = score_continuations(subject_of(model, batch=2), [*pairs, wrong])
    assert all(one.chosen.all() for one in scored[:3])
    assert scored[3].chosen.tolist()[:3] == [True, True, False]
    with torch.no_grad():
        logits = model(torch.tensor([[*wrong.given, *wrong.wanted]])).logits[0, 8:13]
    nll = -logits.log_softmax(1)[range(5), wrong.wanted]
    torch.testing.assert_close(scored[3].nll, nll)


def test_a_phone_book_shows_other_names_than_it_asks_for_and_the_same_twice_for_a_seed():
    def draw():
        rng = np.random.default_rng(3)
        return phonebook_sample(rng, 6, "key", shots=2, reversed=False)

    sample = draw()
    assert sample == draw()
    book, _, asked = sample.text.partition("\n\n")
    name = asked.splitlines()[-1].removesuffix(":")
    assert len(book.splitlines()) == 6 and f"{name}:{sample.answer}" in book
    assert name not in "".join(asked.splitlines()[:-1])


def test_a_continuation_begins_where_the_tokens_of_its_text_end():
    pair = encode_pair(ByteTokenizer(), "ab:", " c")
    assert pair == (list(b"ab:"), list(b" c"))


@pytest.mark.parametrize(
    "made, said",
    [
        (lambda: PhonebookSettings(entries=(2,)), "at most 1 can be shown"),
        (lambda: CopyingSettings(lengths=()), "copying.lengths is empty"),
        (lambda: NeedleSettings(samples=0), "needle.samples is 0"),
        (lambda: list(needle(subject_of(LooksUp()), None, NeedleSettings(lengths=(9,)))), "larger"),
        (
            lambda: list(needle(subject_of(LooksUp()), None, NeedleSettings(lengths=(5000,)))),
            "longer than the 4,096 positions",
        ),
    ],
)
def test_wrong_numbers_are_refused_in_one_line(made, said):
    with pytest.raises(ValueError, match=said) as refused:
        made()
    assert "\n" not in str(refused.value)
