"""Calls CUDA kernels of other libraries, where they are installed, through the ops' interfaces.

`mamba_ssm` (Dao & Gu), `causal_conv1d` (Dao), `fla` (flash-linear-attention, Yang & Zhang) and
`xformers` (Lefaudeux) are imported when requested by name and never chosen by `auto`, which has a
form of ours everywhere. What a library does not support is refused in one line. The adapters are
written to the libraries' published sources and tested with stand-ins that check shapes, types and
strides; none has been run against the real library on a GPU.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.errors import refuse

PACKAGES = {
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
    "fla": "fla-core",
    "xformers": "xformers",
}
OPS = {
    "mamba_ssm": "selective_scan",
    "causal_conv1d": "causal_conv",
    "fla": "linear_attention, delta_rule",
    "xformers": "attend",
}
DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_STATES = 256  # mamba_ssm, csrc/selective_scan/selective_scan.cpp
ALIGNED = 8  # xformers: heads and rows of a bias, a multiple of 16 bytes
MASKED_SCORE = -(2.0**15)  # for float16 too
MAX_KEY_WIDTH = 256  # fla, chunk_gated_delta_rule_fwd_h


def installed(name: str) -> bool:
    """Return whether a library is installed; imports nothing."""
    return importlib.util.find_spec(name) is not None


def usable(name: str, tensor: Tensor, *refusals: tuple[bool, str]) -> Callable[[], bool | str]:
    """For `select_backend`: whether a library takes inputs on the device of `tensor`.

    `refusals` are pairs: whether a call needs something, and why the library cannot do it.
    """
    return partial(_usable, name, tensor.device, refusals)


def _usable(name: str, device: torch.device, refusals: tuple[tuple[bool, str], ...]) -> bool | str:
    try:
        importlib.import_module(name)
    except (ImportError, OSError) as error:  # also one built for another PyTorch
        return f"{str(error).splitlines()[0]}; pip install {PACKAGES[name]}"
    if device.type not in DEVICES:
        return f"it takes CUDA tensors, not {device.type}"
    return next((reason for unmet, reason in refusals if unmet), True)


def _load(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(module), name)


def selective_scan(
    x: Float[Tensor, "b t d"],
    dt: Float[Tensor, "b t d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b t n"],
    C: Float[Tensor, "b t n"],
    D: Float[Tensor, " d"] | None,
    z: Float[Tensor, "b t d"] | None,
    dt_bias: Float[Tensor, " d"] | None,
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d n"]]:
    """Call mamba_ssm's `selective_scan_fn`: time last, sequences of one type, parameters float32.

    It forgets the gradient of the state it returns, so asking for that raises `UserError`.
    """
    selective_scan_fn = _load("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")

    u, delta, B, C = (a.mT.contiguous() for a in (x, dt, B, C))
    z = None if z is None else z.mT.contiguous()
    D, dt_bias = (None if a is None else a.float().contiguous() for a in (D, dt_bias))
    y, last = selective_scan_fn(
        u,
        delta,
        A.float().contiguous(),
        B,
        C,
        D,
        z,
        dt_bias,
        delta_softplus=True,
        return_last_state=True,
    )
    return y.mT, _NoGradient.apply(last.float().contiguous())


class _NoGradient(torch.autograd.Function):
    """Returns the state, and refuses its gradient, which would be lost."""

    @staticmethod
    def forward(ctx: Any, state: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> NoReturn:
        rule = "mamba_ssm passes no gradient through the outgoing state"
        refuse("backend", "mamba_ssm", rule, "Use another backend of selective_scan")


def causal_conv(
    x: Float[Tensor, "b t d"],
    weight: Float[Tensor, "d width"],
    bias: Float[Tensor, " d"] | None,
    state: Float[Tensor, "b width-1 d"] | None,
    activation: str | None,
) -> Float[Tensor, "b t d"]:
    """Call causal_conv1d's `causal_conv1d_fn`, channels last: the layout that takes a state."""
    causal_conv1d_fn = _load("causal_conv1d", "causal_conv1d_fn")

    before = None if state is None else state.contiguous().mT
    y = causal_conv1d_fn(
        x.contiguous().mT, weight, bias, initial_states=before, activation=activation
    )
    return y.mT


def attention(
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    bias: Float[Tensor, "*#bh t n"] | None,
    causal: bool,
    scale: float,
) -> tuple[Float[Tensor, "b h t d"], Float[Tensor, "b h m"]]:
    """Call xformers' fused attention; some of its kernels fill up the length of the lse."""
    forward = _load("xformers.ops", "memory_efficient_attention_forward_requires_grad")

    blind = _blind(bias)
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    out, lse = forward(q, k, v, attn_bias=_xformers_bias(q, k, bias, causal), scale=scale)
    out = out.transpose(1, 2)
    return out if blind is None else out.masked_fill(blind, 0.0), lse


def attention_backward(
    d_out: Float[Tensor, "b h t d"],
    q: Float[Tensor, "b h t d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    out: Float[Tensor, "b h t d"],
    lse: Float[Tensor, "b h m"],
    bias: Float[Tensor, "*#bh t n"] | None,
    causal: bool,
    scale: float,
) -> list[Tensor]:
    """Return the gradients of q, k and v, from what `attention` returned."""
    backward = _load("xformers.ops", "memory_efficient_attention_backward")

    blind = _blind(bias)
    d_out = d_out if blind is None else d_out.masked_fill(blind, 0.0)
    d_out, q, k, v, out = (a.transpose(1, 2) for a in (d_out, q, k, v, out))
    given = _xformers_bias(q, k, bias, causal)
    grads = backward(d_out, out, lse, q, k, v, attn_bias=given, scale=scale)
    return [grad.transpose(1, 2) for grad in grads]


def _blind(bias: Tensor | None) -> Tensor | None:
    """Find queries that see no key, (b h t 1): kernels differ on a row of -inf."""
    return None if bias is None else bias.amax(-1, keepdim=True) == -torch.inf


def _xformers_bias(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool) -> Any:
    """Return a mask by name, or a finite tensor of full shape whose rows begin aligned."""
    if causal:
        return _load("xformers.ops", "LowerTriangularMask")()
    if bias is None:
        return None
    keys = k.shape[1]
    rows = F.pad(bias.clamp(min=MASKED_SCORE), (0, -keys % ALIGNED))[..., :keys]
    return rows.expand(q.shape[0], q.shape[2], q.shape[1], keys)


def linear_attention(
    q: Float[Tensor, "b t #h k"],
    k: Float[Tensor, "b t #h k"],
    v: Float[Tensor, "b t h v"],
    w: Float[Tensor, "b t h #k"] | None,
    bonus: Float[Tensor, "h k"] | None,
    state: Float[Tensor, "b h k v"] | None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """Call fla's kernel for the decay: none or one per head, per channel, or with a bonus."""
    shape = (*v.shape[:3], k.shape[-1])
    q, k = (a.to(v.dtype).expand(shape) for a in (q, k))
    options = {"scale": 1.0, "initial_state": state, "output_final_state": True}
    if bonus is not None:
        chunk_rwkv6 = _load("fla.ops.rwkv6", "chunk_rwkv6")

        w = k.new_zeros(shape, dtype=torch.float32) if w is None else w.float().expand(shape)
        return chunk_rwkv6(q, k, v, w, bonus.to(v.dtype), **options)
    if w is None or w.shape[-1] == 1:
        chunk_simple_gla = _load("fla.ops.simple_gla", "chunk_simple_gla")

        return chunk_simple_gla(q, k, v, g=None if w is None else w[..., 0].float(), **options)
    chunk_gla = _load("fla.ops.gla", "chunk_gla")

    return chunk_gla(q, k, v, g=w.float(), **options)


def delta_rule(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b t h k"],
    v: Float[Tensor, "b t h v"],
    beta: Float[Tensor, "b t h"],
    log_decay: Float[Tensor, "b t h"] | None,
    state: Float[Tensor, "b h k v"] | None,
) -> tuple[Float[Tensor, "b t h v"], Float[Tensor, "b h k v"]]:
    """Call fla's `chunk_delta_rule`, or with a decay per head `chunk_gated_delta_rule`."""
    q, k, beta = (a.to(v.dtype) for a in (q, k, beta))
    options = {"scale": 1.0, "initial_state": state, "output_final_state": True}
    if log_decay is None:
        chunk_delta_rule = _load("fla.ops.delta_rule", "chunk_delta_rule")

        return chunk_delta_rule(q, k, v, beta, **options)
    chunk_gated_delta_rule = _load("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")

    return chunk_gated_delta_rule(q, k, v, log_decay.float(), beta, **options)
