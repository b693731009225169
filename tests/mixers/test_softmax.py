"""Softmax attention with fewer heads of keys than of queries, and with each of its switches."""

import importlib
import math
from functools import partial

import pytest
import test_contract as contract
import torch
from building import write_text

from zoo.cli import train
from zoo.config.compose import compose
from zoo.config.groups import extensions
from zoo.config.schemes import declared, schemes
from zoo.errors import UserError
from zoo.mixers.base import count_bytes
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model.checkpoint import trained_weights
from zoo.model.extend import extend
from zoo.ops import attention
from zoo.positions.none import NoPositions
from zoo.runs.folder import RunFolder

INSIDE = [name for name, target in schemes().items() if not declared(target, "embedded", False)]


def scheme(name: str):
    module, _, cls = schemes()[name].rpartition(".")
    found = getattr(importlib.import_module(module), cls)
    return partial(found, window=6) if name == "xpos" else found  # which has no default


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("name", INSIDE)
def test_tokens_one_by_one_under_grouped_keys_are_those_of_the_whole(name, kv_heads):
    torch.manual_seed(0)
    mixer = SoftmaxAttention(width=32, heads=4, kv_heads=kv_heads, positions=scheme(name))
    mixer, x = mixer.double(), torch.randn(3, 9, 32, dtype=torch.float64)
    whole, state, parts = mixer(x), mixer.empty_state(3), []
    for token in x.split(1, 1):
        y, state = mixer(token, state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(whole.square().sum(), [*mixer.parameters()], allow_unused=True)
    found = torch.autograd.grad(
        torch.cat(parts, 1).square().sum(), [*mixer.parameters()], allow_unused=True
    )
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=0, atol=1e-10)


SWITCHES = [
    ("qk_norm=true",),
    ("logit_scale=true",),
    ("output_gate=true",),
    ("qkv_bias=true", "output_bias=true"),
    ("head_width=6",),
]
SWITCHES.append((*(word for words in SWITCHES for word in words), "kv_heads=2"))


def randomised(model):
    """The model with vectors (norms, biases, scales) that are not what they start as."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("words", SWITCHES, ids=",".join)
def test_every_switch_keeps_the_contract_and_changes_the_model(words, tiny):
    options = [f"model.mixer.{word}" for word in words]
    model = randomised(tiny("transformer", "match=none", *options))
    tokens = contract.random_tokens(model, 41)
    whole, after = contract.read_in_chunks(model, tokens, [41])
    torch.testing.assert_close(model(tokens), whole, rtol=1e-9, atol=1e-9)
    for sizes in ([1] * 41, [2, 39], [35, 6]):
        logits, state = contract.read_in_chunks(model, tokens, sizes)
        torch.testing.assert_close(logits, whole, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(state, after, rtol=1e-8, atol=1e-9)
    assert count_bytes(after) == model.state_bytes(41, 2)
    contract.test_the_future_cannot_change_the_past(model, 17)
    contract.test_every_parameter_gets_a_finite_gradient_that_is_not_zero(model)
    plain = tiny("transformer", "match=none")
    assert {*dict(plain.named_parameters())} != {*dict(model.named_parameters())} or any(
        one.shape != other.shape
        for one, other in zip(plain.parameters(), model.parameters(), strict=True)
    )


def test_switches_compute_what_they_are_defined_as():
    torch.manual_seed(0)
    options = dict.fromkeys(("qkv_bias", "output_bias", "qk_norm"), True)
    options |= dict.fromkeys(("logit_scale", "output_gate"), True)
    sizes = {"width": 12, "heads": 4, "kv_heads": 2, "head_width": 6, "norm_eps": 0.1}
    mixer = randomised(SoftmaxAttention(**sizes, **options, positions=NoPositions).double())
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = (
        (x @ p.weight.T + p.bias).unflatten(-1, (-1, 6))
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    q, k = (
        y * (y.square().mean(-1, keepdim=True) + 0.1).rsqrt() * norm.weight
        for y, norm in ((q, mixer.q_norm), (k, mixer.k_norm))
    )
    outs = torch.zeros(2, 7, 4, 6, dtype=torch.float64)
    for t in range(7):
        for head in range(4):
            scores = torch.einsum("bd,bnd->bn", q[:, t, head], k[:, : t + 1, head // 2]) / 6**0.5
            weights = (mixer.logit_scale[head] * math.log(t + 1) * scores).softmax(-1)
            outs[:, t, head] = torch.einsum("bn,bnd->bd", weights, v[:, : t + 1, head // 2])
    gated = outs.flatten(-2) * torch.sigmoid(x @ mixer.gate_proj.weight.T)
    expected = gated @ mixer.o_proj.weight.T + mixer.o_proj.bias
    torch.testing.assert_close(mixer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("words", [[], ["model.mixer.logit_scale=true"]], ids=["", "logit_scale"])
@pytest.mark.parametrize("name", ["transformer", "alibi", "t5", "nope"])
def test_a_passed_state_of_few_keys_reads_as_the_text_that_begins_with_them(name, words, tiny):
    mixer = tiny(name, *words, "match=none").blocks[0].mixer
    x = torch.randn(2, 40, mixer.q_proj.in_features, dtype=torch.float64)
    _, state = mixer(x[:, :28], mixer.empty_state(2))
    state = mixer.truncate_state(state, 16)
    for start, stop in ((28, 33), (33, 34), (34, 40)):
        found, state = mixer(x[:, start:stop], state)
        expected = mixer(x[:, 12:])[:, start - 12 : stop - 12]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_the_logit_scale_counts_the_keys_that_a_window_keeps(tiny):
    """Of a text much longer than the window: the same scale for its last tokens as for earlier."""
    model = tiny("transformer", "model.mixer.logit_scale=true", "match=none")
    extension = compose("eval", ["run=x", "extension=streaming_llm"]).extension
    mixer = extend(model, extension, 16).blocks[0].mixer
    scales = mixer._scales(0, 200, torch.zeros(1, dtype=torch.float64))
    assert torch.equal(scales[100], scales[199])
    assert not torch.equal(scales[3], scales[4])
    tokens = contract.random_tokens(model, 60)
    whole, _ = contract.read_in_chunks(model, tokens, [60])
    pieces, _ = contract.read_in_chunks(model, tokens, [7, 1, 30, 1, 21])
    torch.testing.assert_close(pieces, whole, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", INSIDE)
def test_a_cap_reaches_every_score_or_the_scheme_refuses_it(name, monkeypatch):
    if name in ("alibi", "t5"):
        with pytest.raises(UserError, match=f"score_softcap=0.1: positions={name} adds a bias"):
            SoftmaxAttention(width=32, heads=4, positions=scheme(name), score_softcap=0.1)
        return
    check_caps(
        lambda: SoftmaxAttention(width=32, heads=4, positions=scheme(name), score_softcap=0.1),
        monkeypatch,
    )


@pytest.mark.parametrize(
    "name", [name for name, tree in extensions().items() if tree.get("attention")]
)
def test_a_cap_reaches_every_score_under_every_attention_pattern(name, tiny, monkeypatch):
    extension = compose("eval", ["run=x", f"extension={name}"]).extension
    model = tiny("transformer", "model.mixer.score_softcap=0.1")
    extend(model, extension, 16)
    check_caps(lambda: model.blocks[0].mixer, monkeypatch)


def test_keys_that_are_selected_by_scores_without_a_cap_are_refused(tiny):
    words = ["run=x", "extension=lm_infinite", "extension.attention.top_k=2"]
    model = tiny("transformer", "model.mixer.score_softcap=0.1")
    with pytest.raises(UserError, match=r"top_k=2: .*score_softcap"):
        extend(model, compose("eval", words).extension, 256)


def check_caps(build, monkeypatch) -> None:
    """Every part of every softmax is capped, read whole and in two chunks."""
    partial_of, caps = attention._partial, []

    def recorded(part, scale, softcap, backend):
        caps.append(softcap)
        return partial_of(part, scale, softcap, backend)

    monkeypatch.setattr(attention, "_partial", recorded)
    mixer = build()
    x = torch.randn(2, 40, mixer.k_proj.weight.shape[1], dtype=mixer.k_proj.weight.dtype)
    mixer(x)
    _, state = mixer(x[:, :30], mixer.empty_state(2))
    mixer(x[:, 30:], state)
    assert len(caps) > 2
    assert {*caps} == {0.1}


def test_a_norms_epsilon_without_a_norm_is_refused(capsys):
    assert train.main(["model.mixer.norm_eps=1e-5", "size=tiny", "logger=none"]) == 2
    assert "acts with qk_norm=true, and here it is null" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("switch", "weight"),
    {
        "qk_norm": "q_norm.weight",
        "logit_scale": "logit_scale",
        "output_gate": "gate_proj.weight",
    }.items(),
)
def test_a_switch_is_trained(switch, weight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"model.mixer.{switch}=true", "size=tiny", "seq_len=32", "batch_tokens=64"]
    words += ["trainer.max_steps=2", "optim.warmup_steps=1", "valid_every=2", "valid_windows=1"]
    words += ["data=text", f"data.path={write_text(tmp_path)}", "logger=none"]
    assert train.main(["model=transformer", *words]) == 0
    (folder,) = (tmp_path / "runs").glob("*")
    assert f"blocks.0.mixer.{weight}" in trained_weights(RunFolder.open(folder))
