"""RetNet, GLA, cosFormer and Mamba-2 against their papers' formulas, token by token in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from zoo.errors import UserError
from zoo.mixers.cosformer import CosFormer
from zoo.mixers.gla import GLA
from zoo.mixers.mamba2 import Mamba2
from zoo.mixers.retnet import RetNet
from zoo.positions.cosine import angles

T, WIDTH = 23, 16


def built(kind, **options):
    torch.manual_seed(0)
    mixer = kind(width=WIDTH, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer, torch.randn(2, T, WIDTH, dtype=torch.float64)


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.unflatten(-1, (count, -1))


def root_mean_square(x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def test_retention_is_the_papers_parallel_form():
    """(Q K^T * D) V with D_nm = gamma^(n-m), eq. 5; rotation as multiplication by e^{i n theta}."""
    mixer, x = built(RetNet, heads=2)
    q, k, v = (heads(p(x), 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    theta = 10000.0 ** (-2 * torch.arange(4, dtype=torch.float64) / 8)
    turn = torch.exp(1j * torch.outer(torch.arange(T, dtype=torch.float64), theta))[:, None]
    q, k = (torch.complex(*a.chunk(2, -1)) * turn for a in (q, k))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k.conj()).real / math.sqrt(8)
    apart = torch.arange(T)[:, None] - torch.arange(T)
    gamma = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6], dtype=torch.float64)
    D = torch.where(apart >= 0, gamma[:, None, None] ** apart.clamp(min=0), 0.0)
    o = torch.einsum("bhnm,bmhv->bnhv", scores * D, v)
    y = mixer.o_proj(F.silu(mixer.gate_proj(x)) * root_mean_square(o).flatten(-2))
    torch.testing.assert_close(mixer(x), y)


def test_gated_linear_attention_is_the_papers_recurrence():
    mixer, x = built(GLA, heads=2)
    q, k, v, a = (
        heads(p(x), 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.decay_proj)
    )
    alpha = torch.sigmoid(a) ** (1 / 16)
    S, outs = torch.zeros(2, 2, 4, 8, dtype=torch.float64), []
    for t in range(T):
        S = alpha[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) / 2)
    o = root_mean_square(torch.stack(outs, 1)) * mixer.norm.weight
    y = mixer.o_proj(F.silu(mixer.gate_proj(x)) * o.flatten(-2))
    torch.testing.assert_close(mixer(x), y)


@pytest.mark.parametrize("causal", [True, False])
def test_cosformer_is_the_cosine_of_the_distance(causal):
    """s_ij = relu(q_i) . relu(k_j) cos(pi (i - j) / 2M), eq. 9, not split into two."""
    M = 40
    mixer, x = built(CosFormer, heads=2, reference_length=M, causal=causal)
    q, k, v = (heads(p(x), 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    apart = (torch.arange(T)[:, None] - torch.arange(T)).double()
    scores = torch.einsum("bihd,bjhd->bhij", q.relu(), k.relu())
    scores = scores * torch.cos(math.pi * apart / (2 * M))
    scores = scores.tril() if causal else scores
    weights = scores / scores.sum(-1, keepdim=True).clamp(min=1e-6)
    y = mixer.o_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2))
    torch.testing.assert_close(mixer(x), y)


def test_cosformer_refuses_what_lies_beyond_its_reference_length():
    mixer, x = built(CosFormer, heads=2, reference_length=T)
    _, state = mixer(x, mixer.empty_state(2))
    with pytest.raises(ValueError, match=f"at most {T} tokens and was given {T + 1}"):
        mixer(x[:, :1], state)


def test_mamba2_is_its_recurrence():
    mixer, x = built(Mamba2, heads=2, head_width=8, state_size=4)
    z, u, dt = mixer.in_proj(x).split([16, 24, 2], -1)
    padded = F.pad(u, (0, 0, 3, 0))
    taps = torch.stack([padded[:, i : i + T] for i in range(4)], -1)
    u = F.silu((taps * mixer.conv_weight).sum(-1) + mixer.conv_bias)
    values, Bs, Cs = u.split([16, 4, 4], -1)
    values = heads(values, 2)
    dt = torch.log1p(torch.exp(dt + mixer.dt_bias))
    h, outs = torch.zeros(2, 2, 8, 4, dtype=torch.float64), []
    for t in range(T):
        decay = torch.exp(-mixer.A_log.exp() * dt[:, t])[..., None, None]
        h = decay * h + dt[:, t, :, None, None] * values[:, t, :, :, None] * Bs[:, t, None, None]
        outs.append((h * Cs[:, t, None, None]).sum(-1) + mixer.D[:, None] * values[:, t])
    y = torch.stack(outs, 1).flatten(-2) * F.silu(z)
    y = mixer.out_proj(root_mean_square(y) * mixer.norm.weight)
    torch.testing.assert_close(mixer(x), y)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (RetNet, {"heads": 3}, "heads=3: must divide width=16"),
        (RetNet, {"heads": 2, "value_factor": 0}, "value_factor=0"),
        (GLA, {"heads": 3}, "heads=3: must divide width=16"),
        (GLA, {"heads": 2, "key_width": 7}, "key_width=7"),
        (GLA, {"heads": 2, "temperature": 0.0}, "temperature=0: must be a number > 0"),
        (CosFormer, {"heads": 3, "reference_length": 8}, "heads=3: must divide"),
        (CosFormer, {"heads": 2, "reference_length": 0}, "reference_length=0"),
        (Mamba2, {"heads": 0}, "heads=0"),
        (Mamba2, {"state_size": 0}, "state_size=0"),
        (Mamba2, {"conv_width": 9}, "conv_width=9"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(kind, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        kind(width=WIDTH, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("beyond", ["clamped", "periodic"])
def test_cosformer_goes_on_beyond_its_reference_length_in_any_chunks(beyond):
    """s_ij = relu(q_i) . relu(k_j) cos(pi (p_i - p_j) / 2M) of the places that the form gives."""
    M = 5
    mixer, x = built(CosFormer, heads=2, reference_length=M, beyond=beyond)
    q, k, v = (heads(p(x), 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    positions_read = torch.tensor(
        [min(i, M) if beyond == "clamped" else i % M for i in range(T)]
    ).double()
    scores = torch.einsum("bihd,bjhd->bhij", q.relu(), k.relu())
    scores = scores * torch.cos(math.pi * (positions_read[:, None] - positions_read) / (2 * M))
    assert (scores > -1e-12).all()
    weights = scores.tril() / scores.tril().sum(-1, keepdim=True).clamp(min=1e-6)
    y = mixer.o_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2))
    torch.testing.assert_close(mixer(x), y)
    one, state = mixer(x[:, :7], mixer.empty_state(2))
    two, _ = mixer(x[:, 7:], state)
    torch.testing.assert_close(torch.cat([one, two], 1), y)
    within = CosFormer(width=WIDTH, heads=2, reference_length=M).double()
    within.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(within(x[:, :M]), y[:, :M])


def test_mamba2_with_groups_has_their_own_maps_and_norm():
    mixer, x = built(Mamba2, heads=4, head_width=8, state_size=3, groups=2)
    z, u, dt = mixer.in_proj(x).split([32, 32 + 12, 4], -1)
    padded = F.pad(u, (0, 0, 3, 0))
    taps = torch.stack([padded[:, i : i + T] for i in range(4)], -1)
    u = F.silu((taps * mixer.conv_weight).sum(-1) + mixer.conv_bias)
    values, Bs, Cs = u.split([32, 6, 6], -1)
    values, Bs, Cs = heads(values, 4), heads(Bs, 2), heads(Cs, 2)
    dt = torch.log1p(torch.exp(dt + mixer.dt_bias))
    outs = torch.zeros(2, T, 4, 8, dtype=torch.float64)
    for head in range(4):
        h = torch.zeros(2, 8, 3, dtype=torch.float64)
        for t in range(T):
            decay = torch.exp(-mixer.A_log[head].exp() * dt[:, t, head])[:, None, None]
            step = dt[:, t, head, None, None] * values[:, t, head, :, None]
            h = decay * h + step * Bs[:, t, None, head // 2]
            outs[:, t, head] = (h * Cs[:, t, None, head // 2]).sum(-1)
            outs[:, t, head] += mixer.D[head] * values[:, t, head]
    y = outs.flatten(-2) * F.silu(z)
    y = torch.cat([root_mean_square(y[..., :16]), root_mean_square(y[..., 16:])], -1)
    torch.testing.assert_close(mixer(x), mixer.out_proj(y * mixer.norm.weight))
    one, state = mixer(x[:, :5], mixer.empty_state(2))
    two, _ = mixer(x[:, 5:], state)
    torch.testing.assert_close(torch.cat([one, two], 1), mixer(x))
    with pytest.raises(ValueError, match="groups=3: must divide heads=4"):
        Mamba2(width=WIDTH, heads=4, groups=3)


@pytest.mark.parametrize("beyond", ["refuse", "clamped", "periodic"])
def test_a_factor_stretches_cosformers_cosine_to_a_longer_text(beyond):
    """s_ij = relu(q_i) . relu(k_j) cos(pi (p_i - p_j) / (2 f M)), p the place up to f M."""
    factor, tokens = 2.5, 9
    mixer, x = built(CosFormer, heads=2, reference_length=4, beyond=beyond)
    x = x[:, :tokens]
    mixer.positions.scale(angles, factor, 4)
    last = factor * 4
    q, k, v = (mixer.by_head(proj(x)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    place = torch.arange(tokens).double()
    place = {"clamped": place.clamp(max=last), "periodic": place % last, "refuse": place}[beyond]
    scores = torch.einsum("bihd,bjhd->bhij", q.relu(), k.relu())
    scores = scores * torch.cos(math.pi / 2 * (place[:, None] - place) / last)
    weights = scores.tril() / scores.tril().sum(-1, keepdim=True)
    expected = mixer.o_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-7, atol=1e-9)
    assert mixer.max_length == (10 if beyond == "refuse" else None)
    state, outs = mixer.empty_state(len(x)), []
    for piece in x.split([4, 1, 4], 1):
        out, state = mixer(piece, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-7, atol=1e-9)
    with pytest.raises(UserError, match=r"^factor=0\.5: must be at least 1"):
        mixer.positions.scale(angles, 0.5, 4)
