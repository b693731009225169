"""The contract of `zoo.mixers.base`, kept by every architecture of configs/model/.

Cases are found from the folder, not listed. All but the bfloat16 test run in float64, so that a
difference is a difference and not rounding.
"""

import math

import pytest
import torch
from building import ENCODERS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zoo.mixers.base import count_bytes
from zoo.model.backbone import Backbone

VOCABULARY = 32
TRAINED = 256  # tokens, the training length of the fixture `tiny`
CHUNK = 64  # the largest chunk any op works in at these sizes
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7]
EXACT = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture
def model(architecture, tiny) -> Backbone:
    return tiny(architecture)


def random_tokens(model: Backbone, length: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, length), generator=generator)


def readable(model: Backbone, length: int) -> int:
    """`length`, or what the model can read of it."""
    return min(length, model.max_length or length)


def with_embeddings(model: Backbone, tokens: torch.Tensor):
    """Logits, and the embedded tokens to differentiate them by."""
    held = []
    hook = model.embedding.register_forward_hook(
        lambda _, __, out: held.append(out.detach().requires_grad_()) or held[-1]
    )
    try:
        return model(tokens), held[0]
    finally:
        hook.remove()


class FindsTransforms(TorchDispatchMode):
    """Whether a Fourier transform was taken, which spreads rounding over all it transforms."""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found |= "fft" in str(func)
        return func(*args, **kwargs or {})


def rounding(model: Backbone, tokens: torch.Tensor) -> float:
    """Share of the largest gradient that may reach what must not be reached: none, but of a Fourier
    transform 2^13 units of its rounding (each of n points has some log2 n). A leak of one millionth
    exceeds that 10^6 times."""
    with torch.no_grad(), FindsTransforms() as watch:
        model(tokens)
    return 2.0**-40 if watch.found else 0.0


def read_in_chunks(model: Backbone, tokens: torch.Tensor, sizes: list[int]):
    state, logits = model.empty_state(len(tokens)), []
    for chunk in tokens.split(sizes, 1):
        out, state = model(chunk, state)
        logits.append(out)
    return torch.cat(logits, 1), state


def splits(length: int) -> list[list[int]]:
    """Ways to cut a sequence: token by token, in two at awkward places, in uneven chunks."""
    uneven, rest = [], length
    for size in (1, 5, CHUNK, 2, CHUNK + 1, 13):
        if rest > size:
            uneven.append(size)
            rest -= size
    ways = [[*uneven, rest], [length - 1, 1], [1, length - 1], [length // 2, length - length // 2]]
    return [way for way in ways if min(way) > 0] + ([[1] * length] if length <= CHUNK + 1 else [])


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_have_the_shape_and_dtype_asked_for(model, length):
    length = readable(model, length)
    logits = model(random_tokens(model, length))
    assert logits.shape == (2, length, VOCABULARY)
    assert logits.dtype == torch.float64
    assert logits.isfinite().all()


def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(model):
    model.loss(random_tokens(model, 1 + max(49, model.min_window))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_activations_computed_again_give_the_same_gradients(model):
    tokens = random_tokens(model, 1 + max(49, model.min_window))

    def gradients(again: bool):
        model.checkpoint_activations = again
        return torch.autograd.grad(model.loss(tokens), list(model.parameters()))

    torch.testing.assert_close(gradients(True), gradients(False), **EXACT)


@pytest.mark.parametrize("cut", [1, 17, CHUNK - 1, CHUNK])
def test_the_future_cannot_change_the_past(model, cut):
    length = readable(model, CHUNK + 9)
    cut = min(cut, length - 1)
    tokens = random_tokens(model, length)
    changed = tokens.clone()
    changed[:, cut:] = (changed[:, cut:] + 1) % VOCABULARY
    torch.testing.assert_close(model(changed)[:, :cut], model(tokens)[:, :cut], **EXACT)

    logits, embedded = with_embeddings(model, tokens)
    weights = torch.randn(2, cut, VOCABULARY, dtype=logits.dtype)
    (grad,) = torch.autograd.grad((logits[:, :cut] * weights).sum(), embedded)
    assert (grad[:, cut:].abs() <= rounding(model, tokens) * grad.abs().max()).all()
    assert (grad[:, :cut] != 0).any()


@pytest.mark.parametrize("length", LENGTHS)
def test_a_prefix_gives_the_prefix_of_the_outputs(model, length):
    whole = readable(model, LENGTHS[-1])
    tokens = random_tokens(model, whole)
    length = min(length, whole)
    torch.testing.assert_close(model(tokens[:, :length]), model(tokens)[:, :length], **EXACT)


@pytest.mark.parametrize("length", LENGTHS[1:])
def test_any_chunking_gives_the_whole(model, length):
    """Outputs, the final state, and every gradient through both."""
    length = readable(model, length)
    tokens = random_tokens(model, length)
    weights = torch.randn(2, length, VOCABULARY, dtype=torch.float64)

    def run(sizes):
        logits, state = read_in_chunks(model, tokens, sizes)
        leaves = [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]
        score = (logits * weights).sum() + sum(x.sin().sum() for x in leaves)
        return logits, leaves, torch.autograd.grad(score, list(model.parameters()))

    torch.testing.assert_close(run([length])[0], model(tokens), **EXACT)
    expected = run([length])
    for sizes in splits(length):
        for found, wanted in zip(run(sizes), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


def test_a_state_comes_back_exactly_when_one_is_given(model):
    tokens = random_tokens(model, 5)
    assert isinstance(model(tokens), torch.Tensor)
    logits, state = model(tokens, model.empty_state(2))
    assert isinstance(logits, torch.Tensor)
    assert state.tokens_seen == 5
    for half in model.sublayers():
        x = torch.randn(2, 5, model.width, dtype=torch.float64)
        assert isinstance(half(x), torch.Tensor)
        y, _ = half(x, half.empty_state(2))
        torch.testing.assert_close(y, half(x), **EXACT)


def test_rows_of_a_batch_do_not_mix(model):
    tokens = random_tokens(model, 40, batch=3)
    logits = model(tokens)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(tokens[order]), logits[order], **EXACT)
    torch.testing.assert_close(model(tokens[1:2]), logits[1:2], **EXACT)
    out, embedded = with_embeddings(model, tokens)
    (grad,) = torch.autograd.grad(out[0].square().sum(), embedded)
    assert (grad[1:].abs() <= rounding(model, tokens) * grad.abs().max()).all()
    assert (grad[0] != 0).any()


def test_eight_times_the_training_length_is_read_or_refused_by_number(model):
    length, limit = 8 * TRAINED, model.max_length
    if limit is None or limit >= length:
        assert model(random_tokens(model, length)).isfinite().all()
    if limit is not None:
        assert limit >= TRAINED
        too_many = torch.zeros(1, 1, dtype=torch.long).expand(1, limit + 1)
        told = rf"at most {limit} tokens and was given {limit + 1}"
        with pytest.raises(ValueError, match=told):
            model(too_many)
        _, state = model(too_many[:, :1], model.empty_state(1))
        with pytest.raises(ValueError, match=told):
            model(too_many[:, :1], state._replace(tokens_seen=limit))


@pytest.mark.parametrize("tokens_read", [0, 1, 33, CHUNK])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_state_holds_the_bytes_it_declares(model, tokens_read, batch):
    state = model.empty_state(batch)
    if tokens_read:
        _, state = model(random_tokens(model, tokens_read, batch=batch), state)
    assert count_bytes(state) == model.state_bytes(tokens_read, batch)
    if model.recurrent:
        assert model.state_bytes(10**6) == model.state_bytes(10**5)
    elif tokens_read:
        assert model.state_bytes(2 * tokens_read) > model.state_bytes(tokens_read)


# A norm stands before every mixer, so its inputs are at most sqrt(width) times the norm's gain:
# 8 at size tiny, 32 at large. A hundred in every channel is well beyond.
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 1e2])
def test_bfloat16_autocast_stays_finite_under_extreme_inputs(model, size):
    model = model.float()
    for half in model.sublayers():
        x = (size * torch.randn(2, 70, model.width)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            state = half.empty_state(2)
            y, state = half(x, state)
            y, _ = half(x, state)
        y.float().square().mean().backward()
        assert y.isfinite().all()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        for parameter in half.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()


def test_state_carried_between_windows_is_out_of_the_graph_and_bounded(model):
    window = 16
    state = model.empty_state(2)
    for start in range(0, 4 * window, window):
        _, state = model(random_tokens(model, window, seed=start), state)
        state = model.truncate_state(state, window)
        tensors = [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]
        assert not any(x.requires_grad for x in tensors)
        assert count_bytes(state) <= model.state_bytes(window, 2)
    assert state.tokens_seen == 4 * window


def train(model: nn.Module, batches, steps: int, rate: float = 3e-3) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss(next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(loss.detach())


def test_it_overfits_one_batch(model):
    model = model.float()
    batch = random_tokens(model, 33, batch=4)
    start = float(model.loss(batch).detach())
    assert train(model, iter(lambda: batch, None), 80, 1e-2) < 0.2 * start


def fresh_noise(model: Backbone, seed: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(VOCABULARY, (16, 49), generator=generator)


def canary(model: Backbone) -> float:
    """Loss on fresh uniform noise after training on uniform noise, less ln V, in nats."""
    train(model, fresh_noise(model, 1), 60)
    with torch.no_grad():
        test = fresh_noise(model, 2)
        return sum(float(model.loss(next(test))) for _ in range(8)) / 8 - math.log(VOCABULARY)


def test_the_canary_lives_no_one_predicts_noise(model):
    """Less than ln V on unpredictable tokens means that the model sees the future."""
    assert canary(model.float()) > -0.005


@pytest.fixture(params=ENCODERS)
def encoder(request, tiny) -> Backbone:
    """Each architecture that has one in its paper's bidirectional form."""
    return tiny(request.param, "objective=masked")


def test_an_encoder_reads_both_ways_and_every_parameter_learns(encoder):
    tokens = random_tokens(encoder, max(50, encoder.min_window))
    logits, embedded = with_embeddings(encoder, tokens)
    (grad,) = torch.autograd.grad(logits[:, 20].square().sum(), embedded, retain_graph=True)
    assert (grad[:, 21] != 0).any()
    assert (grad[:, 19] != 0).any()
    logits.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_an_encoders_activations_computed_again_give_the_same_gradients(encoder):
    test_activations_computed_again_give_the_same_gradients(encoder)


def test_rows_of_an_encoders_batch_do_not_mix_both_ways(encoder):
    test_rows_of_a_batch_do_not_mix(encoder)


def test_an_encoder_that_reads_both_ways_keeps_no_state(encoder):
    x = torch.randn(2, 40, encoder.width, dtype=torch.float64)
    for half in encoder.sublayers():
        assert half(x).shape == x.shape
        if not half.causal:
            with pytest.raises(ValueError, match="keeps no state"):
                half(x, half.empty_state(2))


@pytest.mark.parametrize("size", [0.0, 1.0, 1e2])
def test_an_encoder_stays_finite_in_bfloat16_both_ways(encoder, size):
    encoder = encoder.float()
    for half in encoder.sublayers():
        x = (size * torch.randn(2, 70, encoder.width)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = half(x)
        y.float().square().mean().backward()
        assert y.isfinite().all()
        assert x.grad is not None
        assert x.grad.isfinite().all()
