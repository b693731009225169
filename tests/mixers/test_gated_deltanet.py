"""Gated DeltaNet is its paper's layer, token by token, and the public one."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from zoo.mixers.gated_deltanet import GatedDeltaNet

WIDTH, HEADS, TOKENS = 32, 2, 43
KEY, VALUE = 12, 24  # 3/4 of the width over two heads, and twice that


@pytest.fixture
def mixer() -> GatedDeltaNet:
    torch.manual_seed(0)
    mixer = GatedDeltaNet(width=WIDTH, heads=HEADS).double()
    torch.nn.init.uniform_(mixer.norm.weight, 0.5, 2.0)
    torch.nn.init.uniform_(mixer.dt_bias, -3.0, 0.0)  # decays strong enough to show
    return mixer


def by_hand(mixer: GatedDeltaNet, x: torch.Tensor) -> torch.Tensor:
    """The published layer on one sequence (t, d), in the paper's orientation: S is (v, k)."""
    projected = x @ mixer.qkv_proj.weight.T
    states, rows = [torch.zeros(VALUE, KEY).double() for _ in range(HEADS)], []
    for t in range(len(x)):
        u = sum(projected[t - i] * mixer.conv_weight[:, 3 - i] for i in range(min(4, t + 1)))
        q, k, v = F.silu(u).split([HEADS * KEY, HEADS * KEY, HEADS * VALUE])
        beta = mixer.largest_beta * torch.sigmoid(mixer.beta_proj.weight @ x[t])
        step = torch.log1p(torch.exp(mixer.a_proj.weight @ x[t] + mixer.dt_bias))
        alpha = torch.exp(-torch.exp(mixer.A_log) * step)
        gate, outs = F.silu(mixer.gate_proj.weight @ x[t]).view(HEADS, VALUE), []
        for h in range(HEADS):
            q_h, k_h = (y.view(HEADS, KEY)[h] for y in (q, k))
            q_h, k_h, v_h = q_h / q_h.norm(), k_h / k_h.norm(), v.view(HEADS, VALUE)[h]
            decayed = alpha[h] * (torch.eye(KEY).double() - beta[h] * torch.outer(k_h, k_h))
            states[h] = states[h] @ decayed + beta[h] * torch.outer(v_h, k_h)
            o = states[h] @ q_h
            outs.append(o / (o.square().mean() + 1e-5).sqrt() * mixer.norm.weight * gate[h])
        rows.append(mixer.o_proj.weight @ torch.cat(outs))
    return torch.stack(rows)


@pytest.mark.parametrize("negative", [False, True])
def test_the_layer_is_the_paper_token_by_token(mixer, negative):
    fresh = GatedDeltaNet(width=WIDTH, heads=HEADS, negative_eigenvalues=negative)
    mixer.largest_beta = fresh.largest_beta
    assert mixer.largest_beta == (2.0 if negative else 1.0)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    wanted = torch.stack([by_hand(mixer, row) for row in x])
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-10, atol=1e-11)


@pytest.fixture(params=["as it is here", "with fla"])
def public(request, monkeypatch, in_pytorch):
    """transformers' module of the layer; its kernels by fla, where that is there, need a GPU."""
    path = "transformers.models.olmo_hybrid.modeling_olmo_hybrid"
    if request.param == "with fla":
        fla = types.ModuleType("fla.ops.gated_delta_rule")
        fla.chunk_gated_delta_rule = lambda *_, **__: pytest.fail("a GPU kernel is called")
        for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
            monkeypatch.setitem(sys.modules, name, fla)
        fla.ops = fla.gated_delta_rule = fla
        pytest.importorskip(path)
        monkeypatch.delitem(sys.modules, path)  # it looks for fla while it is imported
    return in_pytorch(path)


def test_a_public_layer_with_the_same_weights_agrees(mixer, public):
    config = public.OlmoHybridConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        linear_allow_neg_eigval=False,
    )
    mixer.float()
    other = public.OlmoHybridGatedDeltaNet(config, 0)
    q, k, v = mixer.qkv_proj.weight.split(mixer.widths)
    mixer.norm.eps = 1e-5 * KEY  # there q is divided by the root of its width before the norm
    other.load_state_dict(
        {
            "q_proj.weight": q,
            "k_proj.weight": k,
            "v_proj.weight": v,
            "conv1d.weight": mixer.conv_weight[:, None],
            "a_proj.weight": mixer.a_proj.weight,
            "b_proj.weight": mixer.beta_proj.weight,
            "g_proj.weight": mixer.gate_proj.weight,
            "o_proj.weight": mixer.o_proj.weight,
            "o_norm.weight": mixer.norm.weight,
            "A_log": mixer.A_log,
            "dt_bias": mixer.dt_bias,
        }
    )
    x = torch.randn(2, TOKENS, WIDTH)
    torch.testing.assert_close(mixer(x), other(x), rtol=1e-3, atol=2e-5)


def test_sizes_are_the_published_ones():
    mixer = GatedDeltaNet(width=768, heads=12)
    state = mixer.empty_state(1)
    assert state.S.shape == (1, 12, 48, 96)
    matrices = sum(p.numel() for p in mixer.parameters() if p.shape[-1] >= 512)
    assert matrices == 6 * 768**2 + 2 * 12 * 768  # and those of beta and alpha
    assert GatedDeltaNet(width=768, heads=6, head_width=128).empty_state(1).S.shape[2:] == (
        128,
        256,
    )


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_backends_agree(mixer, backend):
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    wanted = mixer(x)
    mixer.backend = backend
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, "heads=0: must be an integer >= 1"),
        ({"heads": 25}, "heads=25: must be at most 24"),
        ({"heads": 2, "conv_width": 1}, "conv_width=1: must be an integer from 2 to 8"),
        ({"heads": 2, "head_width": 0}, "head_width=0: must be an integer >= 1"),
        ({"heads": 2, "value_factor": 0}, "value_factor=0: must be an integer >= 1"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        GatedDeltaNet(width=WIDTH, **arguments)
