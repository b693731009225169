"""Synthetic tasks as data: the same examples however shared, and a loss at labels alone."""

import functools

import pytest
import torch
import torch.nn.functional as F

from zoo.data import synthetic
from zoo.data.examples import SPLITS, ExampleSteps, open_synthetic
from zoo.data.synthetic import NO_LABEL

SHAPE = {"seq_len": 16, "batch_size": 8, "seed": 3, "start_step": 5, "steps": 2}


@pytest.fixture
def data():
    return open_synthetic("recall", functools.partial(synthetic.recall, keys=3, values=4), 16)


@pytest.mark.parametrize(("world", "micro_batches"), [(2, 1), (1, 4), (2, 2), (4, 2)])
def test_a_step_reads_the_same_rows_however_they_are_shared(data, world, micro_batches):
    whole = ExampleSteps(data, **SHAPE)
    for step in range(SHAPE["steps"]):
        rows = {name: torch.full((8, 16), -1) for name in ("tokens", "labels")}
        shares = []
        for rank in range(world):
            part = ExampleSteps(data, **SHAPE, rank=rank, world=world, micro_batches=micro_batches)
            for micro in range(micro_batches):
                found = part[step * micro_batches + micro]
                mine = slice(micro * world + rank, None, world * micro_batches)
                rows["tokens"][mine], rows["labels"][mine] = found["tokens"], found["labels"]
                shares.append((found["weight"], (found["labels"] != NO_LABEL).sum()))
        assert all(torch.equal(rows[name], whole[step][name]) for name in rows)
        counts = torch.stack([count for _, count in shares]).double()
        expected = counts / counts.mean()  # so that the mean of the parts' losses is the step's
        torch.testing.assert_close(torch.tensor([s for s, _ in shares]).double(), expected)


def test_splits_seeds_and_steps_share_no_examples(data):
    draws = [
        data.examples(split, seed, step, 4, 16).tokens.tobytes()
        for split in SPLITS
        for seed in (0, 1)
        for step in (0, 1)
    ]
    assert len({*draws}) == len(draws)
    again = data.examples("train", 1, 1, 4, 16).tokens.tobytes()
    assert again == draws[3]


def test_the_fingerprint_is_of_the_task_and_its_settings(data):
    other = open_synthetic("recall", functools.partial(synthetic.recall, keys=4, values=4), 16)
    longer = open_synthetic("recall", functools.partial(synthetic.recall, keys=3, values=4), 64)
    assert data.fingerprint != other.fingerprint
    assert data.fingerprint == longer.fingerprint  # the length is the run's
    assert (data.vocab_size, data.answers) == (7, 4)


def test_the_loss_is_the_mean_over_labels_alone(data, tiny):
    model = tiny("transformer")
    batch = data.batch("train", 0, 0, 4, 16)
    logits = model(batch["tokens"])
    rows, places = (batch["labels"] != NO_LABEL).nonzero().unbind(1)
    expected = F.cross_entropy(logits[rows, places], batch["labels"][rows, places])
    found = model.labels_loss(batch["tokens"], batch["labels"])
    torch.testing.assert_close(found, expected)
    changed = batch["labels"].clone()
    changed[rows[0], places[0]] = NO_LABEL
    assert model.labels_loss(batch["tokens"], changed) != found


def test_rows_without_a_label_cost_nothing_and_have_a_gradient(tiny):
    model = tiny("transformer")
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    loss = model.labels_loss(tokens, torch.full_like(tokens, NO_LABEL))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_workers_do_not_change_what_is_read(data):
    from zoo.data.examples import example_loader

    one, two = (list(example_loader(data, workers=n, **SHAPE)) for n in (0, 2))
    for mine, other in zip(one, two, strict=True):
        assert torch.equal(mine["tokens"], other["tokens"])
        assert torch.equal(mine["labels"], other["labels"])
