"""Whether every weight has a gradient in every step is known before the first one."""

import pytest
import torch
from building import ENCODERS, train_config

from zoo.model.build import build_model
from zoo.training.unused import every_weight_learns

WORDS = ("size=tiny", "seq_len=48", "match=none")


def learn(model, *losses) -> bool:
    """Whether each weight has a gradient of each loss."""
    weights = [*model.parameters()]
    grads = [torch.autograd.grad(loss, weights, allow_unused=True) for loss in losses]
    return all(grad is not None for those in grads for grad in those)


@pytest.mark.parametrize("state_passing", ["none", "carry"])
def test_what_is_found_of_a_few_tokens_is_so_in_steps(architecture, state_passing):
    if (architecture, state_passing) == ("learned", "carry"):
        pytest.skip("it has an end")
    words = [f"model={architecture}", f"state_passing={state_passing}", *WORDS]
    words += ["size.layers=3"] * (architecture == "hybrid")
    config = train_config(*words)
    model, _ = build_model(config, 32)
    tokens = torch.randint(32, (2, config.seq_len + 1))
    if state_passing == "none":
        expected = learn(model, model.loss(tokens))
    else:
        loss, state = model.loss(tokens, model.empty_state(2))
        later, _ = model.loss(tokens, model.truncate_state(state, config.seq_len))
        expected = learn(model, loss, later)
    assert every_weight_learns(model, config) == expected


@pytest.mark.parametrize("encoder", ENCODERS)
def test_so_it_is_of_masked_tokens(encoder):
    config = train_config(f"model={encoder}", "objective=masked", *WORDS)
    model, _ = build_model(config, 33)
    tokens = torch.randint(32, (2, config.seq_len))
    expected = learn(model, model.masked_loss(tokens, tokens, tokens > 3))
    assert every_weight_learns(model, config) == expected


def test_a_weight_that_nothing_reads_is_found():
    config = train_config("model=transformer", *WORDS)
    model, _ = build_model(config, 32)
    assert every_weight_learns(model, config)
    model.blocks[0].more = torch.nn.Parameter(torch.zeros(3))
    assert not every_weight_learns(model, config)


def test_a_sink_token_learns_at_the_start_of_texts_alone():
    words = ["model=transformer", "model.sink_token=true", *WORDS]
    for more, expected in ([], True), (["trainer.sequence_parallel=2"], False):
        config = train_config(*words, *more)
        assert every_weight_learns(build_model(config, 32)[0], config) == expected
