"""Accuracy of synthetic tasks, on models that know the answer, half of it, or nothing."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import Remembers, make_context, measure, random_text, text_store
from torch import Tensor

from zoo.data import synthetic
from zoo.data.examples import open_synthetic
from zoo.data.guesses import best_guess
from zoo.errors import UserError
from zoo.model.backbone import BackboneState
from zoo.tasks.accuracy import Accuracy

PARITY = open_synthetic("parity", functools.partial(synthetic.parity), 16)
INDUCTION = open_synthetic("induction", functools.partial(synthetic.induction, symbols=4), 16)


class Tracks(Remembers):
    """Knows the parity of the bits so far, up to `span` tokens, and answers 0 beyond."""

    def __init__(self, span: float = float("inf")):
        super().__init__(memory=1)
        self.vocab_size, self.span = 2, span

    def forward(self, tokens: Tensor, state: BackboneState | None = None):
        before = self.empty_state(len(tokens)) if state is None else state
        sums = before.blocks[0] + tokens.cumsum(1)
        at = before.tokens_seen + torch.arange(tokens.shape[1])
        answers = torch.where(at < self.span, sums % 2, 0)
        logits = torch.nn.functional.one_hot(answers, 2).float()
        after = BackboneState((sums[:, -1:],), before.tokens_seen + tokens.shape[1])  # type: ignore
        return logits if state is None else (logits, after)


NOWHERE = Path("nowhere")
TEXT = text_store(random_text(2000))


def rows_of(model, data=PARITY, **settings):
    return list(measure(Accuracy, make_context(model, NOWHERE, TEXT, data=data), **settings))


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_a_model_that_knows_the_answer_is_right_at_every_length(chunk):
    rows = rows_of(Tracks(), lengths=[4, 16, 33], chunk=chunk, examples=8)
    assert [row["length"] for row in rows] == [4, 16, 33]
    assert all(row["accuracy"] == 1.0 for row in rows)
    assert all(row["accuracy_by_quarter"] == [1.0] * 4 for row in rows)
    assert [row["count"] for row in rows] == [8 * 4, 8 * 16, 8 * 33]
    assert all(row["interval"][0] < 0.9 for row in rows)  # eight rows do not prove more


def test_where_a_model_forgets_shows_by_quarter():
    (row,) = rows_of(Tracks(span=32), lengths=[64], examples=512)
    first, second, third, fourth = row["accuracy_by_quarter"]
    assert first == second == 1.0
    assert abs(third - 0.5) < 0.03
    assert abs(fourth - 0.5) < 0.03
    assert row["accuracy"] == pytest.approx(np.mean(row["accuracy_by_quarter"]))


def test_labels_of_other_rows_give_chance(monkeypatch):
    """Shuffled labels: what a model knows of the task no longer helps."""
    draw = synthetic.parity

    def shuffled(generator, rows, length):
        examples = draw(generator, rows, length)
        return examples._replace(labels=generator.permuted(examples.labels, axis=0))

    data = open_synthetic("parity", functools.partial(shuffled), 16)
    (row,) = rows_of(Tracks(), data=data, lengths=[16], examples=512)
    low, high = row["interval"]
    assert low < row["chance"] == 0.5 < high


def test_places_without_labels_are_not_counted():
    model = Remembers(memory=3)
    model.vocab_size = 5
    (row,) = rows_of(model, data=INDUCTION, lengths=[64], examples=256)
    assert row["count"] == 256  # one label a row, at its end
    assert row["accuracy_by_quarter"][:3] == [None, None, None]
    assert row["chance"] == 0.25
    assert row["guess"] == best_guess(INDUCTION.examples("test", 0, 0, 256, 64))


def test_the_same_examples_are_given_to_every_model():
    requested = []

    class Notes(Tracks):
        def forward(self, tokens, state=None):
            requested.append(tokens)
            return super().forward(tokens, state)

    rows_of(Notes(), lengths=[16], examples=4)
    rows_of(Notes(span=2), lengths=[16], examples=4)
    rows_of(Notes(), lengths=[16], examples=4, seed=1)
    assert torch.equal(requested[0], requested[1])
    assert not torch.equal(requested[0], requested[2])


def test_held_out_seeds_of_the_generator_rank_models_alike():
    spans = [8, 16, 32, 64]  # each model remembers twice as far as the one before
    ranks = []
    for seed in (0, 1, 2):
        found = [rows_of(Tracks(span), lengths=[64], seed=seed)[0]["accuracy"] for span in spans]
        ranks.append(sorted(spans, key=lambda span, found=found: found[spans.index(span)]))
    assert ranks == [spans] * 3


def test_a_model_of_text_has_no_accuracy_and_one_of_a_task_no_perplexity():
    from zoo.tasks.perplexity import Perplexity

    (row, *_) = list(measure(Accuracy, make_context(Remembers(memory=3), NOWHERE, TEXT)))
    assert row["status"] == "not_applicable"
    assert "is a text and no task. Use task=perplexity." in row["reason"]
    with pytest.raises(Exception, match=r"is a task and no text\. Use task=accuracy\."):
        list(measure(Perplexity, make_context(Tracks(), NOWHERE, TEXT, data=PARITY)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lengths": [0]}, r"task.accuracy.lengths=\[0\]"),
        ({"examples": 0}, "task.accuracy.examples=0"),
        ({"chunk": 0}, "task.accuracy.chunk=0"),
    ],
)
def test_settings_below_one_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        rows_of(Tracks(), **settings)


def test_a_length_that_the_task_cannot_have_is_said():
    (row,) = rows_of(Tracks(), data=INDUCTION, lengths=[2])
    assert row["status"] == "failed"
    assert "length=2" in row["reason"]
