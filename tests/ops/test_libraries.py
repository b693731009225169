"""Other people's kernels behind our ops, by stand-ins that hold the adapters to their contracts.

A stand-in refuses what the library's own checks refuse (its C++ or its asserts) and answers from
our reference. What it cannot show is that the real library computes what it says.
"""

import importlib.machinery
import sys
import types

import pytest
import torch

from zoo.cli import doctor
from zoo.errors import UserError
from zoo.mixers.gla import GLA
from zoo.mixers.mamba import Mamba
from zoo.mixers.retnet import RetNet
from zoo.mixers.rwkv6 import RWKV6
from zoo.ops import causal_conv as causal_conv_module
from zoo.ops import delta_rule_chunked
from zoo.ops import selective_scan as selective_scan_module
from zoo.ops.attention import Part, attend
from zoo.ops.causal_conv import causal_conv
from zoo.ops.delta_rule import delta_rule
from zoo.ops.linear_attention import linear_attention
from zoo.ops.runtime import dispatch, libraries
from zoo.ops.selective_scan import selective_scan

BF16 = torch.bfloat16


class ForgetsState(torch.autograd.Function):
    """mamba_ssm's backward takes `dout, *args` and ignores the state's part."""

    @staticmethod
    def forward(ctx, state):
        return state.clone()

    @staticmethod
    def backward(ctx, dstate):
        raise AssertionError("its gradient is lost here")


def selective_scan_fn(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
):
    (b, d, t), n = u.shape, A.shape[1]
    for a, shape in ((u, (b, d, t)), (delta, (b, d, t)), (B, (b, n, t)), (C, (b, n, t))):
        assert a.shape == shape
        assert a.dtype == u.dtype
        assert a.stride(-1) == 1
    assert z is None or (z.shape == u.shape and z.dtype == u.dtype and z.stride(-1) == 1)
    for a, shape in ((A, (d, n)), (D, (d,)), (delta_bias, (d,))):
        assert a is None or (a.shape == shape and a.dtype == torch.float32 and a.stride(-1) == 1)
    assert delta_softplus
    assert return_last_state
    transposed = [None if a is None else a.mT for a in (u, delta, B, C, z)]
    x, dt, B, C, z = transposed
    y, last = selective_scan(x, dt, A, B, C, D, z, delta_bias, backend="reference")
    return y.mT, ForgetsState.apply(last)


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, *, activation=None):
    (b, d, _), width = x.shape, weight.shape[1]
    assert x.dtype in libraries.DTYPES
    assert x.stride(1) == 1
    assert d % 8 == x.stride(0) % 8 == x.stride(2) % 8 == 0
    assert 2 <= width <= 4
    assert seq_idx is None
    assert bias is None or bias.dtype == weight.dtype
    state = initial_states
    if state is not None:
        assert state.shape == (b, d, width - 1)
        assert state.stride(1) == 1
        assert state.dtype == x.dtype
        state = state.mT
    return causal_conv(x.mT, weight, bias, activation, state, backend="reference")[0].mT


def of_fla(q, k, v, initial_state, scale):
    b, t, h, width = q.shape
    assert k.shape == q.shape
    assert v.shape[:3] == (b, t, h)
    assert q.dtype == k.dtype == v.dtype == BF16
    assert scale == 1.0
    shape = (b, h, width, v.shape[-1])
    assert initial_state is None or (
        initial_state.shape == shape and initial_state.dtype == torch.float32
    )
    return {"state": initial_state, "backend": "reference"}


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False
):
    assert g_gamma is None  # has no gradient
    assert output_final_state
    assert g is None or g.shape == q.shape[:3]
    return linear_attention(q, k, v, g, **of_fla(q, k, v, initial_state, scale))


def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
    assert output_final_state
    assert g.shape == q.shape
    return linear_attention(q, k, v, g, **of_fla(q, k, v, initial_state, scale))


def chunk_rwkv6(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False):
    assert output_final_state
    assert w.shape == r.shape
    assert u.shape == r.shape[2:]
    return linear_attention(r, k, v, w, bonus=u, **of_fla(r, k, v, initial_state, scale))


def chunk_delta_rule(q, k, v, beta, scale=None, initial_state=None, output_final_state=False):
    assert output_final_state
    assert beta.shape == q.shape[:3]
    return delta_rule(q, k, v, beta, **of_fla(q, k, v, initial_state, scale))


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False
):
    assert output_final_state
    assert beta.shape == g.shape == q.shape[:3]
    return delta_rule(q, k, v, beta, g, **of_fla(q, k, v, initial_state, scale))


class LowerTriangularMask:
    pass


def scores(q, k, v, attn_bias, scale):
    """As xformers' kernels form them, after what they refuse; heads before tokens."""
    (b, t, h, width), n = q.shape, k.shape[1]
    assert k.shape == (b, n, h, width)
    assert v.shape[:3] == (b, n, h)
    for a in (q, k, v):
        assert a.dtype in libraries.DTYPES
        assert a.dtype == q.dtype
        assert a.stride(-1) == 1
        assert a.shape[-1] % 8 == a.stride(-2) % 8 == 0
    q, k = (a.transpose(1, 2).float() for a in (q, k))
    s = q @ k.mT * scale
    if isinstance(attn_bias, LowerTriangularMask):
        return s.masked_fill(torch.ones(t, n).triu(1).bool(), -torch.inf)
    if attn_bias is not None:
        assert attn_bias.shape == (b, h, t, n)
        assert attn_bias.dtype == v.dtype
        assert attn_bias.stride(-1) == 1
        assert attn_bias.stride(-2) % 8 == 0
        assert attn_bias.isfinite().all()
        s = s + attn_bias.float()
    return s


def memory_efficient_attention_forward_requires_grad(
    query, key, value, attn_bias=None, p=0.0, scale=None
):
    assert p == 0.0
    s = scores(query, key, value, attn_bias, scale)
    out = torch.softmax(s, -1) @ value.transpose(1, 2).float()
    lse = torch.nn.functional.pad(s.logsumexp(-1), (0, -s.shape[2] % 32), value=torch.nan)
    return out.transpose(1, 2).to(value.dtype), lse


def memory_efficient_attention_backward(
    grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None
):
    """Knows no gradient of the lse, and takes what it is given for output and lse."""
    s = scores(query, key, value, attn_bias, scale)
    assert grad.shape == output.shape == (*query.shape[:3], value.shape[-1])
    assert lse.shape[-1] % 32 == 0
    q, k, v, g, o = (a.transpose(1, 2).float() for a in (query, key, value, grad, output))
    weights = torch.exp(s - lse[..., : s.shape[2], None])
    ds = weights * (g @ v.mT - (g * o).sum(-1, keepdim=True)) * scale
    grads = ds @ k, ds.mT @ q, weights.mT @ g
    return [a.transpose(1, 2).to(query.dtype) for a in grads]


XFORMERS = [
    LowerTriangularMask,
    memory_efficient_attention_forward_requires_grad,
    memory_efficient_attention_backward,
]
STAND_INS = {
    "xformers.ops": XFORMERS,
    "mamba_ssm.ops.selective_scan_interface": [selective_scan_fn],
    "causal_conv1d": [causal_conv1d_fn],
    "fla.ops.simple_gla": [chunk_simple_gla],
    "fla.ops.gla": [chunk_gla],
    "fla.ops.rwkv6": [chunk_rwkv6],
    "fla.ops.delta_rule": [chunk_delta_rule],
    "fla.ops.gated_delta_rule": [chunk_gated_delta_rule],
}


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(libraries, "DEVICES", ("cpu",))
    for path, functions in STAND_INS.items():
        names = path.split(".")
        for end in range(1, len(names) + 1):
            name = ".".join(names[:end])
            if name not in sys.modules or end == len(names):
                module = types.ModuleType(name)
                module.__spec__ = importlib.machinery.ModuleSpec(name, None)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, name, module)
        for function in functions:
            setattr(sys.modules[path], function.__name__, function)


def draw(dtype, **shapes) -> dict[str, torch.Tensor]:
    """Leaves that lie as no library accepts them: no two numbers of theirs are neighbours."""
    torch.manual_seed(0)
    drawn = {}
    for name, shape in shapes.items():
        a = torch.randn(shape) / 2
        if name in ("A", "w", "log_decay"):
            a = -a.abs()
        a = a.to(torch.float32 if name in FLOAT32 else dtype)
        drawn[name] = torch.stack([a, a], -1)[..., 0].requires_grad_()
    return drawn


FLOAT32 = ("A", "D", "dt_bias", "weight", "bias", "state", "w", "log_decay")
H, K, V = 3, 8, 5
TOKENS = (2, 7, H)
MATRICES = {"q": (*TOKENS, K), "k": (*TOKENS, K), "v": (*TOKENS, V)}
STATE = {"state": (2, H, K, V)}
SCAN = {"x": (2, 7, 6), "dt": (2, 7, 6), "A": (6, 4), "B": (2, 7, 4), "C": (2, 7, 4)}
CONV = {"x": (2, 7, 16), "weight": (16, 4)}
CASES = {
    "scan": (selective_scan, "mamba_ssm", SCAN),
    "scan with all": (
        selective_scan,
        "mamba_ssm",
        SCAN | {"D": (6,), "z": (2, 7, 6), "dt_bias": (6,)},
    ),
    "conv": (causal_conv, "causal_conv1d", CONV),
    "conv with all": (causal_conv, "causal_conv1d", CONV | {"bias": (16,), "state": (2, 3, 16)}),
    "conv, one token": (causal_conv, "causal_conv1d", CONV | {"x": (2, 1, 16)}),
    "linear": (linear_attention, "fla", MATRICES | STATE),
    "linear, one key head": (linear_attention, "fla", MATRICES | {"k": (2, 7, 1, K)}),
    "linear, fixed decay": (linear_attention, "fla", MATRICES | STATE | {"log_decay": (H,)}),
    "linear, by head": (linear_attention, "fla", MATRICES | {"log_decay": TOKENS}),
    "linear, by channel": (linear_attention, "fla", MATRICES | STATE | {"log_decay": (*TOKENS, K)}),
    "linear, bonus": (
        linear_attention,
        "fla",
        MATRICES | STATE | {"log_decay": (*TOKENS, K), "bonus": (H, K)},
    ),
    "delta": (delta_rule, "fla", MATRICES | STATE | {"beta": TOKENS}),
    "delta, by head": (delta_rule, "fla", MATRICES | STATE | {"beta": TOKENS, "log_decay": TOKENS}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_library_gives_the_reference_and_all_its_gradients(stand_ins, case):
    op, backend, shapes = CASES[case]
    found = []
    for name in (backend, "reference"):
        given = draw(BF16, **shapes)
        y, state = op(**given, backend=name)
        torch.manual_seed(1)
        loss = (y.float() * torch.randn(y.shape)).sum()
        if backend != "mamba_ssm":
            loss = loss + (state.float() * torch.randn(state.shape)).sum()
        found.append([y, state, *torch.autograd.grad(loss, list(given.values()))])
    for theirs, ours in zip(*found, strict=True):
        assert theirs.dtype == ours.dtype
        error = (theirs.float() - ours.float()).norm() / ours.float().norm()
        assert error <= 2**-8  # bfloat16 rounds by half of that


@pytest.mark.parametrize("pattern", ["all", "causal", "masked"])
@pytest.mark.parametrize("value_width", [8, 16])
def test_attention_in_parts_by_xformers(stand_ins, pattern, value_width):
    """Merged parts, of which one may show a query nothing: gradients flow through every lse."""
    n = 9 if pattern == "causal" else 13
    shapes = {"q": (2, 9, 3, 16), "k": (2, n, 3, 16), "v": (2, n, 3, value_width)}
    mask = torch.rand(9, n, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[4] = False
    found = []
    for backend in ("xformers", "reference"):
        torch.manual_seed(0)
        given = {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}
        part = Part(**given, causal=pattern == "causal", mask=mask if pattern == "masked" else None)
        out, lse = attend([part], backend=backend)
        more = {"k": torch.randn(2, 5, 3, 16), "v": torch.randn(2, 5, 3, value_width)}
        both, _ = attend([part, Part(given["q"], **more)], backend=backend)
        found.append(
            [out, lse, both, *torch.autograd.grad(loss_of(out, lse, both), given.values())]
        )
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


def loss_of(*tensors):
    torch.manual_seed(1)
    pattern = [a.masked_fill(a == -torch.inf, 0.0) for a in tensors]
    return sum((a * torch.randn(a.shape)).sum() for a in pattern)


def test_what_a_library_cannot_carry_is_refused(stand_ins):
    scan, matrices = draw(BF16, **SCAN), draw(BF16, **MATRICES)
    _, state = selective_scan(**scan, backend="mamba_ssm")
    with pytest.raises(UserError, match="no gradient through the outgoing state"):
        state.sum().backward()
    tall = draw(BF16, **MATRICES, beta=TOKENS, log_decay=(*TOKENS, K))
    refused = [
        ("empty state", selective_scan, "mamba_ssm", scan | {"state": state.detach()}),
        ("multiple of 8", causal_conv, "causal_conv1d", draw(BF16, x=(1, 5, 6), weight=(6, 4))),
        ("2 to 4 tokens", causal_conv, "causal_conv1d", draw(BF16, x=(1, 5, 8), weight=(8, 5))),
        ("normaliser", linear_attention, "fla", matrices | {"normalise": True}),
        ("bfloat16", linear_attention, "fla", draw(torch.float32, **MATRICES)),
        ("one decay per head", delta_rule, "fla", tall),
        ("multiple of 8 wide", attend, "xformers", {"parts": [Part(*torch.randn(3, 1, 4, 2, 12))]}),
        ("no float64", attend, "xformers", {"parts": [Part(*torch.randn(3, 1, 4, 2, 8).double())]}),
    ]
    for match, op, backend, given in refused:
        with pytest.raises(UserError, match=match):
            op(**given, backend=backend)


def test_a_library_that_is_not_there_is_reported_and_how_to_get_it(monkeypatch):
    for name, package in libraries.PACKAGES.items():
        monkeypatch.setitem(sys.modules, name, None)  # makes an import fail
        with pytest.raises(UserError, match=f"{name} is not available: .*pip install {package}"):
            {
                "mamba_ssm": lambda: selective_scan(**draw(BF16, **SCAN), backend="mamba_ssm"),
                "causal_conv1d": lambda: causal_conv(**draw(BF16, **CONV), backend="causal_conv1d"),
                "fla": lambda: linear_attention(**draw(BF16, **MATRICES), backend="fla"),
                "xformers": lambda: attend([Part(*torch.randn(3, 1, 4, 2, 8))], backend="xformers"),
            }[name]()


def test_auto_takes_ours_even_without_a_compiler(stand_ins, monkeypatch):
    for kernel in (selective_scan_module.KERNEL, causal_conv_module.KERNEL):
        monkeypatch.setattr(kernel, "usable", lambda: "no compiler")
    for module in (selective_scan_module, delta_rule_chunked):  # the first use of it imports a lot
        monkeypatch.setattr(module, "checkpoint", lambda form, *given, **_: form(*given))
    dispatch.reset()
    for case in ("scan", "conv", "linear", "delta"):
        op, _, shapes = CASES[case]
        op(**draw(BF16, **shapes))
    assert set(dispatch.used_backends().values()) == {"torch"}
    dispatch.reset()


@pytest.mark.parametrize("mixer", [Mamba, GLA, RetNet, RWKV6])
def test_a_model_trains_on_a_library_under_autocast(stand_ins, mixer):
    backend, options = ("mamba_ssm", {}) if mixer is Mamba else ("fla", {"heads": 2})
    dispatch.reset()
    layer = mixer(width=32, backend=backend, **options)
    with torch.autocast("cpu", BF16):
        y = layer(torch.randn(2, 9, 32))
    y.float().sum().backward()
    assert any(backend in names.split("+") for names in dispatch.used_backends().values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    dispatch.reset()


def test_the_doctor_names_what_is_there_and_how_to_get_the_rest(stand_ins, monkeypatch):
    absent = {"causal_conv1d"}
    monkeypatch.setattr(libraries, "installed", lambda name: name not in absent)
    text = "\n".join(doctor.report())
    assert "mamba_ssm      installed (selective_scan)" in text
    assert "causal_conv1d  pip install causal-conv1d (causal_conv)" in text
