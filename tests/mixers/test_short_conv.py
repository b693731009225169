"""model.short_conv puts a Canon layer before the mixer of any architecture; off by default."""

import pytest
import test_contract as contract
import torch
from building import train_config

from zoo.errors import UserError
from zoo.mixers.base import count_bytes
from zoo.mixers.short_conv import ShortConvolution
from zoo.model.build import TOLERANCE, build_model, count_parameters


def test_it_adds_to_each_token_a_weighted_sum_of_itself_and_those_before():
    torch.manual_seed(0)
    conv = ShortConvolution(width=3).double()
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    wanted = x.clone()
    for t in range(7):
        for back in range(min(4, t + 1)):
            wanted[:, t] += conv.weight[:, 3 - back] * x[:, t - back]
    torch.testing.assert_close(conv(x), wanted, rtol=1e-12, atol=1e-12)


def test_weights_start_as_those_of_pytorchs_convolutions():
    torch.manual_seed(0)
    mine = ShortConvolution(width=4096).weight.detach()
    theirs = torch.nn.Conv1d(4096, 4096, 4, groups=4096).weight.detach()
    for weight in (mine, theirs):
        assert weight.abs().max() <= 0.5
        assert float(weight.std(correction=0)) == pytest.approx(0.5 / 3**0.5, rel=0.02)


@pytest.fixture
def with_conv(architecture, tiny):
    return tiny(architecture, "model.short_conv=4")


def test_every_architecture_keeps_the_contract_behind_a_short_convolution(with_conv):
    model = with_conv
    tokens = contract.random_tokens(model, contract.readable(model, 41))
    whole, after = contract.read_in_chunks(model, tokens, [41])
    contract.test_the_future_cannot_change_the_past(model, 17)
    for sizes in ([1, 1, 1, 38], [2, 39], [35, 6]):
        logits, state = contract.read_in_chunks(model, tokens, sizes)
        torch.testing.assert_close(logits, whole, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(state, after, rtol=1e-8, atol=1e-9)
    assert count_bytes(after) == model.state_bytes(41, 2)
    contract.test_every_parameter_gets_a_finite_gradient_that_is_not_zero(model)


def test_match_counts_the_convolutions_parameters(architecture, tiny):
    plain, model = (tiny(architecture, f"model.short_conv={n}") for n in ("null", 4))
    goal = count_parameters(tiny("transformer"))
    for one in (plain, model):
        assert abs(count_parameters(one) - goal) <= TOLERANCE * goal
    assert [name for name, _ in plain.named_parameters() if "short_conv" in name] == []


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "model.short_conv=1": "model.short_conv=1: must be greater than or equal to 2.",
        "model.short_conv=9": "model.short_conv=9: must be less than or equal to 8.",
        "model.short_conv=4 objective=masked": "model.short_conv=4: the convolution sees earlier "
        "tokens alone. Leave it out, or use objective=causal.",
    }.items(),
)
def test_what_it_cannot_do_is_refused(words, message):
    with pytest.raises(UserError) as error:
        train_config(*words.split())
    assert str(error.value) == message


def test_a_hybrids_layers_all_have_it():
    model, _ = build_model(train_config("size=tiny", "model=hybrid", "model.short_conv=3"), 32)
    assert all(block.short_conv.weight.shape == (64, 3) for block in model.blocks)
