"""The rule is its definition: every backend, every decay, every gradient, any chunking."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import UserError
from zoo.ops import delta_rule_chunked as module
from zoo.ops.delta_rule import delta_rule, diagonal_plus_rank_one, unit_length

BACKENDS = ["reference", "torch"]
CHUNK_TOKENS = 8  # small, so that short sequences have many chunks
LENGTHS = [1, 2, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS + 7]
DECAYS = ["none", "head", "channel"]
NAMES = ["q", "k", "v", "a", "b", "log_decay", "state"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_TOKENS", CHUNK_TOKENS)
    monkeypatch.setattr(module, "SEGMENT_TOKENS", 2 * CHUNK_TOKENS)


def arguments(
    tokens: int, decay: str = "none", *, rate: float = 1.0, erase: bool = True, dtype=torch.float64
) -> dict[str, Tensor]:
    """Random values, the same for any dtype; decays between 1 and exp(-rate) per token."""
    torch.manual_seed(0)
    b, h, k, v = 2, 3, 5, 4
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
    unit = F.normalize(draw(b, tokens, h, k), dim=-1)
    values = {"q": draw(b, tokens, h, k), "k": draw(b, tokens, h, k), "v": draw(b, tokens, h, v)}
    values["a"] = -unit
    values["b"] = torch.rand(b, tokens, h, k, dtype=torch.float64) * unit
    if decay != "none":
        shape = (b, tokens, h) if decay == "head" else (b, tokens, h, k)
        values["log_decay"] = -rate * torch.rand(shape, dtype=torch.float64)
    values["state"] = draw(b, h, k, v)
    if not erase:
        values["k"] = unit
        del values["b"]
    return {name: x.to(dtype).requires_grad_() for name, x in values.items()}


def rule_arguments(tokens: int, decay: str = "none", rate: float = 1.0) -> dict[str, Tensor]:
    """Those of `delta_rule`, for keys of length 1."""
    values = arguments(tokens, decay, rate=rate, erase=False)
    del values["a"]
    return values | {"beta": torch.rand(2, tokens, 3, dtype=torch.float64).requires_grad_()}


def everything(function, args: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """y, the last state and all gradients of a random function of both."""
    y, state = function(**args, **options)
    torch.manual_seed(1)
    weights = [torch.randn(x.shape, dtype=torch.float64).to(x.dtype) for x in (y, state)]
    loss = (y * weights[0]).sum() + (state * weights[1]).sum()
    gradients = torch.autograd.grad(loss, list(args.values()))
    return {"y": y, "last": state, **dict(zip(args, gradients, strict=True))}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, value in wanted.items():
        error = (found[name].double() - value).norm() / value.norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"  # NaN fails too


def by_token(step, q: Tensor, *sequences: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The papers' form of a recurrence, S (v, k) and o_t = S_t q_t, one step after the other."""
    S, out = state.mT, []
    for t in range(q.shape[1]):
        S = step(S, *(None if x is None else x[:, t] for x in sequences))
        out.append((S @ q[:, t, :, :, None]).squeeze(-1))
    return torch.stack(out, 1), S.mT


def outer(x: Tensor, y: Tensor) -> Tensor:
    return x[..., :, None] * y[..., None, :]


def deltanet(q, k, v, beta, state):
    """S_t = S_{t-1} (I - beta k k^T) + beta v k^T"""

    def step(S, k, v, beta):
        beta = beta[..., None, None]
        return S @ (torch.eye(k.shape[-1]).to(k) - beta * outer(k, k)) + beta * outer(v, k)

    return by_token(step, q, k, v, beta, state=state)


def gated_deltanet(q, k, v, beta, log_decay, state):
    """S_t = S_{t-1} alpha (I - beta k k^T) + beta v k^T, alpha of the head or diag of channels"""
    alpha = log_decay.exp()
    alpha = alpha[..., None].expand(k.shape) if alpha.ndim == 3 else alpha

    def step(S, k, v, beta, alpha):
        beta, identity = beta[..., None, None], torch.eye(k.shape[-1]).to(k)
        return S @ torch.diag_embed(alpha) @ (identity - beta * outer(k, k)) + beta * outer(v, k)

    return by_token(step, q, k, v, beta, alpha, state=state)


def rwkv7(r, w, kappa, a, k, v, state):
    """S_t = S_{t-1} (diag(w) - kappa (a * kappa)^T) + v k^T"""

    def step(S, w, kappa, a, k, v):
        return S @ (torch.diag_embed(w) - outer(kappa, a * kappa)) + outer(v, k)

    return by_token(step, r, w, kappa, a, k, v, state=state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_tokens_by_hand(backend):
    q = torch.tensor([[1.0, 2.0], [3.0, 1.0]]).view(1, 2, 1, 2)
    k = torch.tensor([[1.0, 0.0], [0.6, 0.8]]).view(1, 2, 1, 2)
    v = torch.tensor([2.0, 5.0]).view(1, 2, 1, 1)
    half = torch.full((1, 2, 1), 0.5)
    y, S = delta_rule(q, k, v, half, backend=backend)
    # S_1 = (1, 0); k_2 reads 0.6 of it, so S_2 = (1, 0) + 0.5 (5 - 0.6) (0.6, 0.8)
    torch.testing.assert_close(S[0, 0], torch.tensor([[2.32], [1.76]]))
    torch.testing.assert_close(y[0, :, 0], torch.tensor([[1.0], [8.72]]))
    y, S = delta_rule(q, k, v, half, torch.full((1, 2, 1), math.log(0.5)), backend=backend)
    # decayed first to (0.5, 0), of which k_2 reads 0.3: S_2 = (0.5, 0) + 0.5 (5 - 0.3) (0.6, 0.8)
    torch.testing.assert_close(S[0, 0], torch.tensor([[1.91], [1.88]]))
    torch.testing.assert_close(y[0, :, 0], torch.tensor([[1.0], [7.61]]))


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_decay_and_with_beta_one_the_key_returns_its_value(backend, tokens):
    args = rule_arguments(tokens)
    _, S = delta_rule(**args | {"beta": torch.ones_like(args["beta"])}, backend=backend)
    found = (S.mT @ args["k"][:, -1, :, :, None]).squeeze(-1)
    torch.testing.assert_close(found, args["v"][:, -1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rule_is_deltanets(backend):
    args = rule_arguments(LENGTHS[-1])
    wanted = everything(deltanet, args)
    assert_close(everything(delta_rule, args, backend=backend), wanted, 1e-13)


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rule_with_decay_is_gated_deltanets(backend, decay):
    args = rule_arguments(LENGTHS[-1], decay)
    wanted = everything(gated_deltanet, args)
    assert_close(everything(delta_rule, args, backend=backend), wanted, 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_general_rule_is_rwkv7s(backend):
    args = arguments(LENGTHS[-1], "channel", rate=math.exp(-0.5))
    kappa, rate = -args["a"], -args["b"] / args["a"]  # b = a * kappa
    found = diagonal_plus_rank_one(**args, backend=backend)
    q, k, v, log_decay, state = (args[name] for name in ("q", "k", "v", "log_decay", "state"))
    wanted = rwkv7(q, log_decay.exp(), kappa, rate, k, v, state)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_float64_is_the_reference(tokens, decay, erase):
    args = arguments(tokens, decay, erase=erase)
    wanted = everything(diagonal_plus_rank_one, args, backend="reference")
    assert_close(everything(diagonal_plus_rank_one, args, backend="torch"), wanted, 1e-13)


# 1e-6 to 1 per token take one block to a chunk; then blocks of 4, 2 and 1; then e^-1000 underflows
@pytest.mark.parametrize("rate", [1e-6, 1.0, 4.0, 9.0, 30.0, 1000.0])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_any_decay_is_exact(decay, rate):
    args = arguments(LENGTHS[-1], decay)
    with torch.no_grad():
        args["log_decay"].mul_(0.01).sub_(rate)  # all near the strongest
    wanted = everything(diagonal_plus_rank_one, args, backend="reference")
    found = everything(diagonal_plus_rank_one, args, backend="torch")
    for name in ("log_decay", "state"):  # they vanish with the decay
        torch.testing.assert_close(found[name], wanted.pop(name), rtol=1e-11, atol=1e-15)
    assert_close(found, wanted, 1e-13)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_what_decays_to_nothing_is_forgotten(decay):
    args = arguments(LENGTHS[-1], decay)
    with torch.no_grad():
        args["log_decay"][:, 5::7] = -torch.inf
    wanted = everything(diagonal_plus_rank_one, args, backend="reference")
    found = everything(diagonal_plus_rank_one, args, backend="torch")
    assert found["log_decay"][:, 5::7].eq(0).all()
    assert_close(found, wanted, 1e-13)


def test_blocks_are_as_long_as_their_exponents_allow():
    def block(rate: float) -> int:
        return module._block(torch.full((1, 3, 1, 2), -rate), 32)

    assert [block(rate) for rate in (0.0, math.exp(-0.5), 1.0, 5.0, 11.0, math.inf)] == [
        32, 32, 16, 4, 1, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("rate", [1e-6, 0.6, 5.0, 50.0])
def test_float32_gradients_are_right_to_a_millionth(decay, rate, monkeypatch):
    monkeypatch.undo()  # the chunks that users have
    wanted = everything(
        diagonal_plus_rank_one, arguments(150, decay, rate=rate), backend="reference"
    )
    args = arguments(150, decay, rate=rate, dtype=torch.float32)
    assert_close(everything(diagonal_plus_rank_one, args), wanted, 1e-6)


@pytest.mark.parametrize(("chunk", "piece"), [(1, 1), (4, 4), (4, 32), (16, 16), (64, 64)])
@pytest.mark.parametrize("bound", [1e-3, 3.0, 100.0])
def test_chunk_piece_and_block_sizes_do_not_matter(chunk, piece, bound, monkeypatch):
    args = arguments(LENGTHS[-1], "channel")
    wanted = everything(diagonal_plus_rank_one, args, backend="reference")
    for name, value in (
        ("CHUNK_TOKENS", chunk),
        ("SEGMENT_TOKENS", piece),
        ("MAX_EXPONENT", bound),
    ):
        monkeypatch.setattr(module, name, value)
    assert_close(everything(diagonal_plus_rank_one, args, backend="torch"), wanted, 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_with_the_state_carried_are_the_whole(backend):
    args = arguments(LENGTHS[-1], "channel")
    sizes = [1, 2, CHUNK_TOKENS + 1, LENGTHS[-1] - CHUNK_TOKENS - 4]

    def in_chunks(state, **sequences):
        ys = []
        for parts in zip(*(x.split(sizes, 1) for x in sequences.values()), strict=True):
            chunk = dict(zip(sequences, parts, strict=True))
            y, state = diagonal_plus_rank_one(**chunk, state=state, backend=backend)
            ys.append(y)
        return torch.cat(ys, 1), state

    wanted = everything(diagonal_plus_rank_one, args, backend=backend)
    assert_close(everything(in_chunks, args), wanted, 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_gradcheck(backend, decay):
    args = {name: x[:1].detach().requires_grad_() for name, x in arguments(11, decay).items()}
    assert torch.autograd.gradcheck(
        lambda *x: diagonal_plus_rank_one(**dict(zip(args, x, strict=True)), backend=backend),
        tuple(args.values()),
        fast_mode=True,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_state_is_the_empty_one_and_no_decay_is_none(backend):
    args = arguments(11, "head")
    state, log_decay = torch.zeros_like(args.pop("state")), torch.zeros_like(args.pop("log_decay"))
    wanted = diagonal_plus_rank_one(**args, log_decay=log_decay, state=state, backend=backend)
    found = diagonal_plus_rank_one(**args, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def test_keys_that_repeat_stay_bounded():
    """The hardest system to solve: every key the same, each write erasing the one before it."""
    args = rule_arguments(200)
    args["k"] = args["k"][:, :1].expand(args["k"].shape)
    beta = torch.ones_like(args["beta"])
    y, S = delta_rule(**args | {"beta": beta})
    wanted = delta_rule(**args | {"beta": beta}, backend="reference")
    torch.testing.assert_close((y, S), wanted, rtol=1e-12, atol=1e-12)


def test_low_precision_comes_and_goes_while_arithmetic_stays_float32():
    args = {k: x.detach().bfloat16() for k, x in arguments(LENGTHS[-1], "channel").items()}
    args["state"] = args["state"].float()
    wanted, last = diagonal_plus_rank_one(**{k: x.double() for k, x in args.items()})
    with torch.autocast("cpu", torch.bfloat16):
        y, state = diagonal_plus_rank_one(**args)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close({"y": y}, {"y": wanted}, 4e-3)
    assert_close({"last": state}, {"last": last}, 1e-6)


def test_autocast_reaches_neither_the_forward_nor_the_recomputation():
    args = arguments(LENGTHS[-1], "channel", dtype=torch.float32)
    wanted = everything(diagonal_plus_rank_one, args)

    def under_autocast(**args):
        with torch.autocast("cpu", torch.bfloat16):
            return diagonal_plus_rank_one(**args)

    found = everything(under_autocast, args)
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


def test_unit_length_keeps_zero_and_its_gradient_finite():
    x = torch.zeros(2, 3, requires_grad=True)
    unit_length(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert unit_length(torch.tensor([3.0, 4.0], dtype=torch.bfloat16)).dtype == torch.float32
    torch.testing.assert_close(unit_length(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))


def test_the_triangular_systems_are_counted():
    args = {k: x.detach() for k, x in arguments(2 * CHUNK_TOKENS, "head", erase=False).items()}
    with FlopCounterMode(display=False) as counter:
        diagonal_plus_rank_one(**args)
    counts = counter.get_flop_counts()["Global"]
    systems, columns = 2 * 3 * 2, 5 + 4  # batch, heads, chunks; those of W and X
    assert (
        counts[torch.ops.aten.linalg_solve_triangular]
        == systems * CHUNK_TOKENS * CHUNK_TOKENS * columns
    )


def test_a_public_recurrence_with_a_decay_per_head_agrees(in_pytorch):
    public = in_pytorch("transformers.models.qwen3_next.modeling_qwen3_next")
    args = {name: x.detach().float() for name, x in rule_arguments(75, "head").items()}
    q, k, v, g, beta = (args[name] for name in ("q", "k", "v", "log_decay", "beta"))
    wanted = public.torch_recurrent_gated_delta_rule(
        q, k, v, g=g, beta=beta, initial_state=args["state"], output_final_state=True
    )
    found = delta_rule(**args | {"q": q * q.shape[-1] ** -0.5})
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.mistyped
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 5, 3, 4)}, "q is"),
        ({"k": (2, 5, 5)}, "k is"),
        ({"v": (2, 4, 3, 4)}, "v is"),
        ({"beta": (2, 5, 3, 5)}, "beta is"),
        ({"log_decay": (2, 5)}, "log_decay is"),
        ({"log_decay": (2, 5, 3, 1)}, "log_decay is"),
        ({"state": (2, 3, 4, 5)}, "state is"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    args = rule_arguments(5) | {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        delta_rule(**args)


@pytest.mark.mistyped
def test_no_tokens_and_unknown_backends_are_refused():
    args = arguments(5)
    empty = {k: x if k == "state" else x[:, :0] for k, x in args.items()}
    with pytest.raises(ValueError, match="no tokens"):
        diagonal_plus_rank_one(**empty)
    with pytest.raises(ValueError, match="a is"):
        diagonal_plus_rank_one(**args | {"a": args["a"][..., :2]})
    with pytest.raises(UserError, match="Did you mean 'torch'"):
        diagonal_plus_rank_one(**args, backend="touch")
