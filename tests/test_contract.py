"""The contract of `zoo.mixers.base`, kept by every architecture of configs/model/.

Cases are found from the folder, not listed. All but the bfloat16 test run in float64, so that a
difference is a difference and not rounding.
"""

import math

import pytest
import torch
from building import ENCODERS, warnings_as_errors
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from zoo.mixers.base import count_bytes
from zoo.model.backbone import Backbone

VOCABULARY = 32
TRAINED = 256  # tokens, the training length of the fixture `tiny`
CHUNK = 64  # the largest chunk any op works in at these sizes
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7]
EXACT = {"rtol": 1e-9, "atol": 1e-10}
WHERE = "The contract is in zoo/mixers/base.py, counter-examples in tests/test_contract_breaks.py."


def same(
    found: torch.Tensor, wanted: torch.Tensor, promise: str, look: str, by_token=True, **close
) -> None:
    """Assert that two tensors agree; else say which promise is broken, and where.

    Args:
        promise: what differs from what, such as "reading in chunks [5, 2] differs from reading
            whole".
        look: what to look at in the mixer.
        by_token: whether the tensors are (b, t, ...), so that the first token can be named.
        close: the tolerances; `EXACT` by default.
    """
    close = close or EXACT
    kinds = [f"{x.dtype} of shape {tuple(x.shape)}" for x in (found, wanted)]
    assert kinds[0] == kinds[1], f"{promise}: {kinds[0]} instead of {kinds[1]}. {look} {WHERE}"
    if torch.allclose(found, wanted, **close):
        return
    apart = (found - wanted).detach().abs()
    wrong = ~torch.isclose(found, wanted, **close)
    by = float(apart[wrong].nan_to_num(nan=torch.inf).max())
    at = f", first at token {int(wrong.nonzero()[:, 1].min())}" if by_token else ""
    pytest.fail(f"{promise} by {by:.2g}{at}. {look} {WHERE}", pytrace=False)


# Where to look, by what is broken.
SHAPES = "`forward` takes (b, t, width) and returns the same shape in the same dtype."
FINITE = "Compute exponents and norms in `wide_dtype`, and subtract the maximum first."
IDLE = "Check that `forward` uses it, and that it does not start where its gradient vanishes."
FUTURE = "Output t may depend on inputs <= t alone: check masks, shifts, pooling and statistics."
STATE = "Check what `forward` reads from the state (positions too) and returns as the next one."
GRADIENT = "Check that the state is not detached between chunks."
PAIR = "`forward` returns (y, state) exactly when it is given a state, otherwise y."
UNCHANGED = "A state is read, never written: build a new one, and do not assign into its tensors."
ROWS = "Check reductions and reshapes over the batch, dimension 0."
SIZE = "Check `state_bytes`, `empty_state` and `recurrent`."
LAYOUT = "Index by strides, or call `contiguous()` first: inputs, states and gradients."
CUT = "See `truncate_state`: detach the state and shorten what grows."
LOOSER = {"rtol": 1e-8, "atol": 1e-9}


def holds(kept: bool | torch.Tensor, promise: str, look: str) -> None:
    """Assert a promise; else say that it is broken and where to look."""
    if not bool(kept):
        pytest.fail(f"{promise}. {look} {WHERE}", pytrace=False)


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
    """Ways to cut a sequence: token by token, in two at awkward places, in uneven chunks.

    Token by token a sequence of a chunk and one token also goes through those that are shorter.
    """
    uneven, rest = [], length
    for size in (1, 5, CHUNK, 2, CHUNK + 1, 13):
        if rest > size:
            uneven.append(size)
            rest -= size
    ways = [[*uneven, rest], [length - 1, 1], [1, length - 1], [length // 2, length - length // 2]]
    one_by_one = length <= CHUNK + 1 and length not in (CHUNK - 1, CHUNK)
    return [way for way in ways if min(way) > 0] + [[1] * length] * one_by_one


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_have_the_shape_and_dtype_requested(model, length):
    length = readable(model, length)
    logits = model(random_tokens(model, length))
    shape = (2, length, VOCABULARY)
    holds(logits.shape == shape, f"logits have shape {tuple(logits.shape)}, not {shape}", SHAPES)
    holds(logits.dtype == torch.float64, f"a float64 model gives {logits.dtype}", SHAPES)
    holds(logits.isfinite().all(), f"logits of {length} random tokens are not finite", FINITE)
    narrow = model.float()
    for half in narrow.sublayers():
        x = torch.randn(2, length, model.width)
        y, name = half(x), type(half).__name__
        holds(
            y.shape == x.shape, f"{name} returns shape {tuple(y.shape)} for {(*x.shape,)}", SHAPES
        )
        holds(y.dtype == x.dtype, f"{name} returns {y.dtype} for inputs of {x.dtype}", SHAPES)


def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(model):
    model.loss(random_tokens(model, 1 + max(49, model.min_window))).backward()
    check_gradients(model)


def check_gradients(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        holds(grad is not None, f"the loss does not depend on parameter {name}", IDLE)
        assert grad is not None
        holds(grad.isfinite().all(), f"the gradient of parameter {name} is not finite", FINITE)
        holds(grad.abs().sum() > 0, f"the gradient of parameter {name} is zero", IDLE)


def test_activations_computed_again_give_the_same_gradients(model):
    tokens = random_tokens(model, 1 + max(49, model.min_window))

    def gradients(again: bool | int):
        model.checkpoint_activations = again
        return torch.autograd.grad(model.loss(tokens), list(model.parameters()))

    names = [name for name, _ in model.named_parameters()]
    expected = gradients(False)
    for again in (True, 16) if model.causal else (True,):  # whole blocks, 16 tokens at a time
        for name, found, wanted in zip(names, gradients(again), expected, strict=True):
            promise = f"with checkpoint_activations={again} the gradient of {name} differs"
            look = "`forward` must give the same when it runs again."
            same(found, wanted, promise, look, by_token=False, **(LOOSER if again > 1 else {}))


@pytest.mark.parametrize("cut", [1, 17, CHUNK - 1, CHUNK])
def test_the_future_cannot_change_the_past(model, cut):
    length = readable(model, CHUNK + 9)
    cut = min(cut, length - 1)
    tokens = random_tokens(model, length)
    changed = tokens.clone()
    changed[:, cut:] = (changed[:, cut:] + 1) % VOCABULARY
    promise = f"changing tokens from {cut} on changes outputs before"
    same(model(changed)[:, :cut], model(tokens)[:, :cut], promise, FUTURE)

    logits, embedded = with_embeddings(model, tokens)
    weights = torch.randn(2, cut, VOCABULARY, dtype=logits.dtype)
    (grad,) = torch.autograd.grad((logits[:, :cut] * weights).sum(), embedded)
    leak = grad[:, cut:].abs().max() / grad.abs().max()
    promise = f"outputs before token {cut} have a gradient from later tokens ({leak:.2g} of all)"
    holds(leak <= rounding(model, tokens), promise, FUTURE)
    holds((grad[:, :cut] != 0).any(), f"outputs before token {cut} depend on no token", IDLE)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_prefix_gives_the_prefix_of_the_outputs(model, length):
    whole = readable(model, LENGTHS[-1])
    tokens = random_tokens(model, whole)
    length = min(length, whole)
    promise = f"the first {length} tokens alone and as a prefix of {whole} give outputs that differ"
    same(model(tokens[:, :length]), model(tokens)[:, :length], promise, FUTURE)


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

    expected = run([length])
    same(expected[0], model(tokens), "reading with an empty state differs from without", STATE)
    names = [name for name, _ in model.named_parameters()]
    for sizes in splits(length):
        how = "token by token" if set(sizes) == {1} else f"in chunks {sizes}"
        logits, leaves, gradients = run(sizes)
        whole = "differs from reading whole"
        same(logits, expected[0], f"reading {how} {whole}", STATE, **LOOSER)
        counts = len(leaves), len(expected[1])
        holds(counts[0] == counts[1], f"reading {how} leaves {counts[0]} tensors as state", STATE)
        for number, (found, wanted) in enumerate(zip(leaves, expected[1], strict=True)):
            promise = f"reading {how} leaves a state (its tensor {number}) that differs"
            same(found, wanted, promise, STATE, by_token=False, **LOOSER)
        for name, found, wanted in zip(names, gradients, expected[2], strict=True):
            promise = f"the gradient of {name} after reading {how} {whole}"
            same(found, wanted, promise, GRADIENT, by_token=False, **LOOSER)


def test_a_state_comes_back_exactly_when_one_is_given(model):
    for half in model.sublayers():
        name = type(half).__name__
        x = torch.randn(2, 5, model.width, dtype=torch.float64)
        alone, pair = half(x), half(x, half.empty_state(2))
        holds(isinstance(alone, torch.Tensor), f"{name} returns a state when none is given", PAIR)
        holds(isinstance(pair, tuple), f"{name} returns no state when one is given", PAIR)
        same(pair[0], alone, f"{name} with an empty state differs from without", STATE)
        before = [x.clone() for x in tree_leaves(pair[1]) if isinstance(x, torch.Tensor)]
        later = x.flip(1)
        first, again = half(later, pair[1])[0], half(later, pair[1])[0]
        after = [x for x in tree_leaves(pair[1]) if isinstance(x, torch.Tensor)]
        for one, other in zip(after, before, strict=True):
            same(one, other, f"{name} changes the state it is given", UNCHANGED, by_token=False)
        same(again, first, f"{name} reads differently from the same state a second time", UNCHANGED)
    tokens = random_tokens(model, 5)
    assert isinstance(model(tokens), torch.Tensor)
    logits, state = model(tokens, model.empty_state(2))
    assert isinstance(logits, torch.Tensor)
    assert state.tokens_seen == 5


def test_rows_of_a_batch_do_not_mix(model):
    tokens = random_tokens(model, 40, batch=3)
    logits = model(tokens)
    order = torch.tensor([2, 0, 1])
    same(model(tokens[order]), logits[order], "rows in another order give other outputs", ROWS)
    same(model(tokens[1:2]), logits[1:2], "a row alone and in a batch gives outputs apart", ROWS)
    out, embedded = with_embeddings(model, tokens)
    (grad,) = torch.autograd.grad(out[0].square().sum(), embedded)
    leak = grad[1:].abs().max() / grad.abs().max()
    promise = f"a row's outputs have a gradient from other rows ({leak:.2g} of all)"
    holds(leak <= rounding(model, tokens), promise, ROWS)
    holds((grad[0] != 0).any(), "a row's outputs do not depend on the row", IDLE)


def test_numbers_that_lie_apart_in_memory_are_read_as_if_side_by_side(model):
    for half in model.sublayers():
        generator = torch.Generator().manual_seed(0)
        drawn = {"generator": generator, "dtype": torch.float64}
        x, later = torch.randn(2, 2, 9, model.width, **drawn)
        state = tree_map(detached, half(x, half.empty_state(2))[1])
        found = []
        for layout in (lambda x: x, spread):
            inputs = tree_map(layout, (later, state))
            learns = [x for x in tree_leaves(inputs) if is_float(x)]
            for leaf in learns:
                leaf.requires_grad_()
            after = [x for x in tree_leaves(half(*inputs)) if isinstance(x, torch.Tensor)]
            outputs = [x for x in after if x.requires_grad]
            generator.manual_seed(1)
            gradients = [layout(torch.randn(x.shape, **drawn).to(x.dtype)) for x in outputs]
            learns += half.parameters()
            given = torch.autograd.grad(outputs, learns, gradients, allow_unused=True)
            found.append([*after, *given])
        promise = f"{type(half).__name__} depends on how its arguments lie in memory: it differs"
        for apart, together in zip(found[1], found[0], strict=True):
            holds((apart is None) == (together is None), promise, LAYOUT)
            if together is not None:
                same(apart, together, promise, LAYOUT, by_token=False)


def is_float(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def detached(x: object) -> object:
    return x.detach() if isinstance(x, torch.Tensor) else x


def spread(x: object) -> object:
    """The same numbers in memory between others."""
    if not isinstance(x, torch.Tensor):
        return x
    between = x.new_full([2 * n for n in x.shape], torch.nan if x.is_floating_point() else 1)
    apart = between[(slice(1, None, 2),) * x.dim()]
    return apart.copy_(x)


def test_eight_times_the_training_length_is_read_or_refused_by_number(model):
    length, limit = 8 * TRAINED, model.max_length
    if limit is None or limit >= length:
        finite = model(random_tokens(model, length)).isfinite().all()
        rule = f"at {length} tokens, eight times the training length, outputs are not finite"
        holds(finite, rule, f"{FINITE} A mixer that cannot read so far sets `max_length`.")
    if limit is not None:
        rule = f"max_length={limit} is below the training length of {TRAINED} tokens"
        holds(limit >= TRAINED, rule, "Derive it from the training length.")
        too_many = torch.zeros(1, 1, dtype=torch.long).expand(1, limit + 1)
        message = rf"at most {limit} tokens and was given {limit + 1}"
        with pytest.raises(ValueError, match=message):
            model(too_many)
        _, state = model(too_many[:, :1], model.empty_state(1))
        with pytest.raises(ValueError, match=message):
            model(too_many[:, :1], state._replace(tokens_seen=limit))


@pytest.mark.parametrize("tokens_read", [0, 1, 33, CHUNK])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_state_holds_the_bytes_it_declares(model, tokens_read, batch):
    state = model.empty_state(batch)
    if tokens_read:
        _, state = model(random_tokens(model, tokens_read, batch=batch), state)
    held, declared = count_bytes(state), model.state_bytes(tokens_read, batch)
    after = f"after {tokens_read} tokens in {batch} rows"
    rule = f"the state holds {held} bytes {after}, and state_bytes declares {declared}"
    holds(held == declared, rule, SIZE)
    if model.recurrent:
        fixed = model.state_bytes(10**6) == model.state_bytes(10**5)
        holds(fixed, "the declared state grows with the tokens of a recurrent mixer", SIZE)
    elif tokens_read:
        grows = model.state_bytes(2 * tokens_read) > model.state_bytes(tokens_read)
        holds(grows, "the declared state does not grow, and `recurrent` is False", SIZE)


# A norm precedes every mixer, so its inputs are at most sqrt(width) times the norm's gain:
# 8 at size tiny, 32 at large. A hundred in every channel is well beyond.
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 1e2])
def test_bfloat16_autocast_stays_finite_under_extreme_inputs(model, size):
    model = model.float()
    for half in model.sublayers():
        x = (size * torch.randn(2, 70, model.width)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16), warnings_as_errors():
            state = half.empty_state(2)
            y, state = half(x, state)
            y, _ = half(x, state)
        y.float().square().mean().backward()
        of = f"{type(half).__name__} in bfloat16, at inputs of size {size:g}"
        holds(y.isfinite().all(), f"the output of {of}, is not finite", FINITE)
        assert x.grad is not None
        holds(x.grad.isfinite().all(), f"the input's gradient of {of}, is not finite", FINITE)
        check_finite(half, of)


def check_finite(half: nn.Module, of: str) -> None:
    for name, parameter in half.named_parameters():
        grad = parameter.grad
        finite = grad is not None and grad.isfinite().all()
        holds(finite, f"the gradient of {name} of {of}, is not finite", FINITE)


def test_state_carried_between_windows_is_out_of_the_graph_and_bounded(model):
    window = 16
    state = model.empty_state(2)
    for start in range(0, 4 * window, window):
        _, state = model(random_tokens(model, window, seed=start), state)
        state = model.truncate_state(state, window)
        tensors = [x for x in tree_leaves(state) if isinstance(x, torch.Tensor)]
        attached = any(x.requires_grad for x in tensors)
        holds(not attached, "truncate_state leaves the state in the graph", CUT)
        held, most = count_bytes(state), model.state_bytes(window, 2)
        rule = f"truncate_state leaves {held} bytes for windows of {window} tokens, not {most}"
        holds(held <= most, rule, CUT)
    assert state.tokens_seen == 4 * window


def train(model: Backbone, batches, steps: int, rate: float, below: float = -math.inf) -> float:
    """The last loss of so many steps, or the first that is below `below`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    loss = torch.tensor(math.inf)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss(next(batches))
        if loss < below:
            break
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(loss.detach())


def test_it_overfits_one_batch(model):
    model = model.float()
    batch = random_tokens(model, 33, batch=4)
    start = float(model.loss(batch).detach())
    end = train(model, iter(lambda: batch, None), 80, 1e-2, below=0.2 * start)
    rule = f"80 steps on one batch bring the loss from {start:.2f} to {end:.2f}, not below a fifth"
    holds(end < 0.2 * start, rule, "Check that outputs depend on inputs, and the initialisation.")


def fresh_noise(seed: int, rows: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(VOCABULARY, (rows, 33), generator=generator)


def foreseen(model: Backbone) -> float:
    """By how many standard errors the logits of fresh uniform noise prefer the token that comes.

    Whatever else a model has learned of noise, it prefers each token alike to the mean of all.
    """
    noise, found = fresh_noise(2, 16), []
    with torch.no_grad():
        for _ in range(8):
            tokens = next(noise)
            logits = model(tokens[:, :-1])
            found.append(logits.gather(2, tokens[:, 1:, None])[..., 0] - logits.mean(-1))
    excess = torch.stack(found)
    return float(excess.mean() / excess.std() * excess.numel() ** 0.5)


# The longer training finds weaker leaks: an input that has a tenth of the next one in it.
@pytest.mark.parametrize(
    ("rows", "steps", "rate"), [(8, 40, 1e-2), pytest.param(16, 60, 3e-3, marks=pytest.mark.slow)]
)
def test_the_canary_lives_no_one_predicts_noise(model, rows, steps, rate):
    """A model trained on noise that foresees other noise sees the future."""
    train(model.float(), fresh_noise(1, rows), steps, rate)
    apart = foreseen(model)
    rule = f"noise is predicted: the token that comes is preferred by {apart:.3g} standard errors"
    holds(apart < 5, rule, FUTURE)


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
    check_gradients(encoder)


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
        with torch.autocast("cpu", torch.bfloat16), warnings_as_errors():
            y = half(x)
        y.float().square().mean().backward()
        assert y.isfinite().all()
        assert x.grad is not None
        assert x.grad.isfinite().all()
