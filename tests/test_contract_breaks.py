"""Every test of the contract can fail: each is given a model that breaks its one property."""

from typing import ClassVar

import pytest
import test_contract as contract
import torch
from torch import nn

from zoo.mixers.base import Mixer, linear
from zoo.mixers.parts import shifted
from zoo.model.backbone import Backbone


class Sound(Mixer):
    """Two tokens and nothing else: keeps the whole contract, and is broken below."""

    def __init__(self, *, width: int, layer: int = 0, layers: int = 1) -> None:
        super().__init__()
        self.now, self.before = linear(width, width), linear(width, width)

    def forward(self, x, state=None):
        y = self.now(x) + self.before(shifted(x, state[0] if state else None))
        return y if state is None else (y, (x[:, -1], state[1] + x.shape[1]))

    def empty_state(self, batch):
        return self.now.weight.new_zeros(batch, self.now.in_features), 0


class ReadsWhatTheLayerBelowLeft(Sound):
    """Wrong when a layer runs again: by then another one has left its own."""

    left: ClassVar[torch.Tensor | None] = None

    def __init__(self, *, layer: int = 0, **place) -> None:
        super().__init__(layer=layer, **place)
        self.layer = layer

    def forward(self, x, state=None):
        below, type(self).left = self.left if self.layer else None, x
        return super().forward(x if below is None else x * below, state)


class ReturnsFloat64(Sound):
    """As a model in float32 does not expect."""

    def forward(self, x, state=None):
        out = super().forward(x, state)
        return out.double() if state is None else (out[0].double(), out[1])


class WritesIntoItsState(Sound):
    def forward(self, x, state=None):
        out = super().forward(x, state)
        if state is not None:
            state[0].copy_(x[:, -1].detach())
        return out


class StartsPositionsAnew(Sound):
    """Weighs tokens by their position in the chunk instead of in the text."""

    def forward(self, x, state=None):
        return super().forward(x * torch.arange(1, x.shape[1] + 1)[:, None].to(x), state)


class LosesItsLength(Sound):
    """Counts the tokens of the last chunk instead of all."""

    def forward(self, x, state=None):
        start = state[1] if state else 0
        positions = torch.arange(start + 1, start + x.shape[1] + 1)[:, None]
        out = super().forward(x * positions.to(x), state)
        return out if state is None else (out[0], (out[1][0], x.shape[1]))


class LooksAhead(Sound):
    def forward(self, x, state=None):
        out = super().forward(x, state)
        ahead = torch.cat([x[:, 1:], x[:, -1:]], 1)
        return out + ahead if state is None else (out[0] + ahead, out[1])


class KnowsTheLength(Sound):
    def forward(self, x, state=None):
        out = super().forward(x * x.shape[1], state)
        return out


class ForgetsBetweenChunks(Sound):
    def forward(self, x, state=None):
        return super().forward(x, state and (torch.zeros_like(state[0]), state[1]))


class CutsTheGradientBetweenChunks(Sound):
    def forward(self, x, state=None):
        return super().forward(x, state and (state[0].detach(), state[1]))


class AlwaysReturnsAState(Sound):
    def forward(self, x, state=None):
        return super().forward(x, state or self.empty_state(len(x)))


class MixesRows(Sound):
    def forward(self, x, state=None):
        return super().forward(x - x.mean(0), state)


class ReadsMemoryInOrder(Sound):
    """As a kernel does that is given the first address and the sizes alone."""

    def forward(self, x, state=None):
        first = x.as_strided(x.shape, x.flatten().view_as(x).stride())
        return super().forward(first, state)


class HasAnIdleParameter(Sound):
    def __init__(self, **place) -> None:
        super().__init__(**place)
        self.idle = nn.Parameter(torch.ones(3))


class LosesPrecision(Sound):
    def forward(self, x, state=None):
        out = super().forward(x, state)
        return out.float().double() * 1e300 * 1e300 if state is None else out


class GivesUpInSilence(Sound):
    def forward(self, x, state=None):
        out = super().forward(x, state)
        return out if x.shape[1] <= 300 else out * torch.nan


class DeclaresTooLittle(Sound):
    def state_bytes(self, tokens, batch=1):
        return super().state_bytes(tokens, batch) - 8 * batch


class ClaimsToBeBounded(Sound):
    recurrent: ClassVar[bool] = True

    def forward(self, x, state=None):
        y = super().forward(x)
        return y if state is None else (y, (torch.cat([state[0], x], 1), state[1] + x.shape[1]))

    def empty_state(self, batch):
        return self.now.weight.new_zeros(batch, 0, self.now.in_features), 0

    def state_bytes(self, tokens, batch=1):
        return super().state_bytes(tokens, batch) + 8 * tokens * batch * self.now.in_features


class Overflows(Sound):
    def forward(self, x, state=None):
        out = super().forward(x, state)
        grown = torch.exp(x.float().square())
        return out * grown if state is None else (out[0] * grown, out[1])


class CarriesItsGraph(Sound):
    def truncate_state(self, state, window):
        return state


class LearnsNothing(Sound):
    def forward(self, x, state=None):
        out = super().forward(x, state)
        return 0 * out if state is None else (0 * out[0], out[1])


class LongConvolution(Mixer):
    """Sound, by Fourier transforms: y_t = W sum_j exp(-decay j) x_(t-j)."""

    leak = 0.0

    def __init__(self, *, width: int, layer: int = 0, layers: int = 1) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(0.1, 2.0, width))
        self.proj = linear(width, width)

    def forward(self, x, state=None):
        before = x[:, :0] if state is None else state[0]
        every, t = torch.cat([before, x], 1), before.shape[1] + x.shape[1]
        kernel = torch.exp(-self.decay * torch.arange(t)[:, None])
        product = torch.fft.rfft(every, 2 * t, 1) * torch.fft.rfft(kernel, 2 * t, 0)
        y = torch.fft.irfft(product, 2 * t, 1)[:, before.shape[1] : t]
        y = self.proj(y + self.leak * nn.functional.pad(x[:, 1:], (0, 0, 0, 1)))
        return y if state is None else (y, (every,))

    def empty_state(self, batch):
        return (self.proj.weight.new_zeros(batch, 0, self.proj.in_features),)


class LeaksAMillionth(LongConvolution):
    leak = 1e-6


@pytest.mark.parametrize("cut", [1, 17, 63, 64])
def test_a_fourier_transform_keeps_the_contract_and_a_tiny_leak_in_it_does_not(cut):
    contract.test_the_future_cannot_change_the_past(tiny_model(LongConvolution), cut)
    contract.test_rows_of_a_batch_do_not_mix(tiny_model(LongConvolution))
    contract.test_a_prefix_gives_the_prefix_of_the_outputs(tiny_model(LongConvolution), 33)
    contract.test_any_chunking_gives_the_whole(tiny_model(LongConvolution), 65)
    with pytest.raises(pytest.fail.Exception, match=r"from later tokens|changes outputs before"):
        contract.test_the_future_cannot_change_the_past(tiny_model(LeaksAMillionth), cut)


def test_the_gradient_of_a_millionths_leak_is_far_above_rounding():
    """By gradients alone: where outputs are compared coarsely it is still seen."""
    tokens = contract.random_tokens(tiny_model(LongConvolution), 40)

    def share(kind) -> float:
        model = tiny_model(kind)
        logits, embedded = contract.with_embeddings(model, tokens)
        (grad,) = torch.autograd.grad(logits[:, :20].square().sum(), embedded)
        bound = contract.rounding(model, tokens)
        assert bound > 0
        return float(grad[:, 20:].abs().max() / grad.abs().max()) / bound

    assert share(LongConvolution) < 0.1
    assert share(LeaksAMillionth) > 1e4


def test_without_a_fourier_transform_gradients_are_exactly_zero():
    model = tiny_model(Sound)
    assert contract.rounding(model, contract.random_tokens(model, 9)) == 0


BREAKS = [
    (contract.test_logits_have_the_shape_and_dtype_requested, [7], LosesPrecision),
    (contract.test_logits_have_the_shape_and_dtype_requested, [7], ReturnsFloat64),
    (contract.test_every_parameter_gets_a_finite_gradient_that_is_not_zero, [], HasAnIdleParameter),
    (
        contract.test_activations_computed_again_give_the_same_gradients,
        [],
        ReadsWhatTheLayerBelowLeft,
    ),
    (contract.test_the_future_cannot_change_the_past, [17], LooksAhead),
    (contract.test_a_prefix_gives_the_prefix_of_the_outputs, [17], KnowsTheLength),
    (contract.test_any_chunking_gives_the_whole, [65], ForgetsBetweenChunks),
    (contract.test_any_chunking_gives_the_whole, [65], StartsPositionsAnew),
    (contract.test_any_chunking_gives_the_whole, [65], LosesItsLength),
    (contract.test_any_chunking_gives_the_whole, [65], CutsTheGradientBetweenChunks),
    (contract.test_a_state_comes_back_exactly_when_one_is_given, [], AlwaysReturnsAState),
    (contract.test_a_state_comes_back_exactly_when_one_is_given, [], WritesIntoItsState),
    (contract.test_rows_of_a_batch_do_not_mix, [], MixesRows),
    (
        contract.test_numbers_that_lie_apart_in_memory_are_read_as_if_side_by_side,
        [],
        ReadsMemoryInOrder,
    ),
    (
        contract.test_eight_times_the_training_length_is_read_or_refused_by_number,
        [],
        GivesUpInSilence,
    ),
    (contract.test_the_state_holds_the_bytes_it_declares, [33, 3], DeclaresTooLittle),
    (contract.test_the_state_holds_the_bytes_it_declares, [33, 3], ClaimsToBeBounded),
    (contract.test_bfloat16_autocast_stays_finite_under_extreme_inputs, [1e2], Overflows),
    (
        contract.test_state_carried_between_windows_is_out_of_the_graph_and_bounded,
        [],
        CarriesItsGraph,
    ),
    (contract.test_it_overfits_one_batch, [], LearnsNothing),
    (contract.test_the_canary_lives_no_one_predicts_noise, [8, 40, 1e-2], LooksAhead),
]


# What a newcomer is to read, by the mistake.
SAYS = {
    "ReturnsFloat64": ["ReturnsFloat64 returns torch.float64 for inputs of torch.float32"],
    "LooksAhead": ["masks, shifts"],
    "KnowsTheLength": ["the first 17 tokens alone and as a prefix of 199", "at token 0"],
    "ForgetsBetweenChunks": [
        "reading in chunks",
        "differs from reading whole",
        "first at token 1.",
    ],
    "StartsPositionsAnew": ["reading in chunks", "first at token 1.", "positions too"],
    "LosesItsLength": ["reading in chunks", "differs from reading whole", "the state"],
    "CutsTheGradientBetweenChunks": ["the gradient of", "detached"],
    "WritesIntoItsState": ["WritesIntoItsState changes the state it is given"],
    "AlwaysReturnsAState": ["AlwaysReturnsAState returns a state when none is given"],
    "MixesRows": ["dimension 0"],
    "ReadsMemoryInOrder": ["ReadsMemoryInOrder depends on how its arguments lie in memory"],
    "HasAnIdleParameter": ["parameter blocks.0.mixer.idle"],
    "DeclaresTooLittle": ["and state_bytes declares"],
    "CarriesItsGraph": ["in the graph"],
}


def tiny_model(mixer: type[Mixer]) -> Backbone:
    torch.manual_seed(0)
    parts = {"mixers": [mixer], "feed_forwards": [None]}
    return Backbone(vocab_size=contract.VOCABULARY, width=32, layers=2, **parts).double()


def swapped(property_test, arguments, model) -> list:
    """The test's arguments in the order it takes them."""
    first = property_test.__code__.co_varnames[: property_test.__code__.co_argcount]
    rest = iter(arguments)
    return [model if name == "model" else next(rest) for name in first]


@pytest.mark.parametrize(
    ("property_test", "arguments", "broken"), BREAKS, ids=[case[2].__name__ for case in BREAKS]
)
def test_a_model_that_breaks_a_property_fails_its_test(property_test, arguments, broken):
    property_test(*swapped(property_test, arguments, tiny_model(Sound)))
    with pytest.raises(pytest.fail.Exception) as caught:
        property_test(*swapped(property_test, arguments, tiny_model(broken)))
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(contract.WHERE)
    for word in SAYS.get(broken.__name__, ()):
        assert word in message


def test_every_property_of_the_contract_is_broken_here():
    tests = {name for name in vars(contract) if name.startswith("test_")}
    broken = {case[0].__name__ for case in BREAKS}
    assert {name for name in tests if "encoder" not in name} == broken
