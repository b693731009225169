"""Whether every weight has a gradient in every step is known before the first one."""

import functools

import pytest
import torch
from building import ARCHITECTURES, ENCODERS, train_config

from zoo.model.build import build_model
from zoo.training.unused import every_weight_learns

WORDS = ("size=tiny", "seq_len=48", "match=none")
ORDINARY = ("star", "mamba", "etc", "learned")
config_of = functools.cache(train_config)


def some(names: list[str]) -> list:
    """The names, most of them for the slow part."""
    slow = pytest.mark.slow
    return [name if name in ORDINARY else pytest.param(name, marks=slow) for name in names]


def learn(model, *losses) -> bool:
    """Whether each weight has a gradient of each loss."""
    weights = [*model.parameters()]
    grads = [torch.autograd.grad(loss, weights, allow_unused=True) for loss in losses]
    return all(grad is not None for those in grads for grad in those)


@pytest.mark.parametrize("architecture", some(ARCHITECTURES))
def test_what_is_found_of_a_few_tokens_is_so_in_steps(architecture, tiny):
    model, tokens = tiny(architecture, "match=none"), torch.randint(32, (2, 49))
    expected = learn(model, model.loss(tokens))
    assert every_weight_learns(model, config_of(*WORDS)) == expected
    loss, state = model.loss(tokens, model.empty_state(2))
    later, _ = model.loss(tokens, model.truncate_state(state, 48))
    expected = learn(model, loss, later)
    assert every_weight_learns(model, config_of("state_passing=carry", *WORDS)) == expected


@pytest.mark.parametrize("encoder", some(ENCODERS))
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


@pytest.mark.parametrize(
    "words",
    [
        ["model=transformer"],
        ["model=transformer", "trainer.sequence_parallel=2"],
        ["model=mamba", "state_passing=carry"],
    ],
)
def test_a_sink_token_has_a_gradient_also_where_a_text_goes_on(words):
    config = train_config(*words, "model.sink_token=true", *WORDS)
    assert every_weight_learns(build_model(config, 32)[0], config)
