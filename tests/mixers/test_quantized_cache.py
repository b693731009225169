"""Keys and values in bits: a plain formulation in float64 agrees, and no chunking changes them."""

import numpy as np
import pytest
import torch
from building import train_config

from zoo.config.applicability import acts_on, declared_by
from zoo.config.compose import compose
from zoo.config.groups import choices, extensions, model_section
from zoo.errors import UserError
from zoo.mixers.base import count_bytes
from zoo.mixers.quantized_cache import RECENT, quantize, restore
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model.audit import audit
from zoo.model.backbone import Backbone
from zoo.model.build import build_model
from zoo.model.extend import extend
from zoo.model.quantization import quantize_cache
from zoo.positions.rope import Rope

LEVELS = {"int8": 255, "int4": 15}
TOKENS = 4 * RECENT + 17


def model_of(name: str, *words: str) -> Backbone:
    torch.manual_seed(0)
    length = [] if any("seq_len" in word for word in words) else ["seq_len=1024"]
    config = train_config(f"model={name}", "size=tiny", "match=none", *length, *words)
    return build_model(config, vocab_size=64)[0].eval().requires_grad_(False)


def rounded(x: np.ndarray, levels: int) -> np.ndarray:
    """The row x (n,) as numbers of so many levels between its least and its greatest."""
    scale = np.float16(max((x.max() - x.min()) / levels, 2.0**-24)).astype(np.float64)
    zero = np.float16(x.min()).astype(np.float64)
    return np.clip(np.rint((x - zero) / scale), 0, levels) * scale + zero


def plainly(layer: SoftmaxAttention, x: np.ndarray, levels: int) -> np.ndarray:
    """Attention of one sequence (t, width), query by query, keys and values rounded one by one."""
    q, k, v = (
        (x @ proj.weight.numpy().T).reshape(len(x), -1, layer.head_width)
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    if isinstance(layer.positions, Rope):
        half = layer.head_width // 2
        angle = np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(half) / half)
        unit = np.exp(1j * angle)
        for one in (q, k):
            rotated_pairs = (one[..., :half] + 1j * one[..., half:]) * unit
            one[...] = np.concatenate([rotated_pairs.real, rotated_pairs.imag], -1)
    k_old, v_old = k.copy(), v.copy()
    for head in range(k.shape[1]):
        for first in range(0, len(x) - 31, 32):
            for channel in range(layer.head_width):
                row = slice(first, first + 32), head, channel
                k_old[row] = rounded(k[row], levels)
        for token in range(len(x)):
            for first in range(0, layer.head_width, 32):
                row = token, head, slice(first, first + 32)
                v_old[row] = rounded(v[row], levels)
    y = np.zeros_like(q)
    for i in range(len(x)):
        old = max(i // 128 - 1, 0) * 128
        for head in range(q.shape[1]):
            of = head * k.shape[1] // q.shape[1]
            keys = np.concatenate([k_old[:old, of], k[old : i + 1, of]])
            values = np.concatenate([v_old[:old, of], v[old : i + 1, of]])
            scores = keys @ q[i, head] / layer.head_width**0.5
            weights = np.exp(scores - scores.max())
            y[i, head] = weights @ values / weights.sum()
    return y.reshape(len(x), -1) @ layer.o_proj.weight.numpy().T


@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize("options", [(), ("model.mixer.kv_heads=1",)], ids=["", "grouped"])
def test_attention_is_that_of_keys_and_values_rounded_one_by_one(bits, options):
    model = model_of("transformer", "size.width=128", "size.layers=1", *options).double()
    quantize_cache(model, bits)
    layer = model.blocks[0].mixer
    assert layer.head_width == 64  # two groups of channels
    x = torch.randn(1, TOKENS, 128, dtype=torch.float64)
    expected = plainly(layer, x[0].numpy(), LEVELS[bits])
    np.testing.assert_allclose(layer(x)[0].numpy(), expected, rtol=0, atol=1e-9)
    layer.kv_cache = None
    assert abs(layer(x)[0].numpy() - expected).max() > 1e-4  # rounding is seen


def test_a_number_is_within_half_a_step_and_constants_stay():
    x = torch.randn(50, 32) * torch.logspace(-3, 3, 50)[:, None] + 3
    for bits, levels in LEVELS.items():
        found = restore(*quantize(x, levels), torch.float32)
        step = (x.amax(1) - x.amin(1)) / levels
        rough = 2.0**-11 * (x.abs().amax(1) + levels * step)  # s and z are float16
        assert ((found - x).abs() <= (0.5 * step + rough)[:, None]).all(), bits
    same = torch.full((1, 32), 0.75)
    assert torch.equal(restore(*quantize(same, 15), torch.float32), same)
    huge = restore(*quantize(torch.tensor([[1e6, -1e6]]), 15), torch.float32)
    assert torch.isfinite(huge).all()


def parts(name: str) -> list[str]:
    """The models that make up one, itself or those of its pattern; read, as all workers collect."""
    pattern = model_section(name).get("pattern", [name])
    return [entry.rpartition("*")[2] for entry in pattern]


def is_softmax(name: str) -> bool:
    return model_section(name)["mixer"]["_target_"].endswith(".SoftmaxAttention")


def cases() -> list[tuple[str, str]]:
    """Every model with such a cache, and every extension that needs no training on one."""
    models = [(name, "none") for name in choices("model") if any(map(is_softmax, parts(name)))]
    acting = [name for name, tree in extensions().items() if not tree.get("positions")]
    rotary = declared_by("zoo.positions.rope.Rope")
    on_rope = [name for name in acting if acts_on(extensions()[name], rotary)]
    return [*models, *(("transformer", name) for name in on_rope), ("alibi", "streaming_llm")]


@pytest.mark.parametrize(("name", "extension"), cases())
def test_no_chunking_changes_outputs_and_the_state_has_the_declared_bytes(name, extension):
    layers = "size.layers=3" if name == "hybrid" else "size.layers=1"
    model = model_of(name, layers).double()
    words = [f"extension={extension}"]
    words += ["extension.factor=2"] * (extensions()[extension]["factor"] == "???")
    if extension == "longrope":
        words.append(f"extension.scaling.long_factors={[1.5] * 16}".replace(" ", ""))
    extend(model, compose("eval", ["run=x", *words]).extension, 160)
    tokens = torch.randint(64, (2, TOKENS))
    exact = model(tokens)
    quantize_cache(model, "int4")
    whole = model(tokens)
    assert (whole - exact)[:, : 2 * RECENT].abs().max() < 1e-9  # nothing was rounded yet
    assert (whole - exact)[:, 2 * RECENT :].abs().max() > 1e-6
    state, parts = model.empty_state(2), []
    for chunk in tokens.split([1, RECENT, 3, RECENT - 2, 1, 126, TOKENS - 2 * RECENT - 129], 1):
        logits, state = model(chunk, state)
        parts.append(logits)
        assert count_bytes(state) == model.state_bytes(state.tokens_seen, 2)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)


def test_a_long_cache_takes_the_bits_that_its_name_says():
    model = model_of("transformer")
    plain = model.state_bytes(2**15)
    for bits, most in (("int8", 0.33), ("int4", 0.21)):
        quantize_cache(model, bits)
        assert model.state_bytes(2**15) < most * plain


@pytest.mark.parametrize("bits", LEVELS)
def test_an_audit_finds_no_leak_in_what_rounding_does(bits):
    model = quantize_cache(model_of("transformer"), bits)
    found = audit(model, torch.randint(64, (TOKENS,)))
    assert found.ok, found.reason


@pytest.mark.parametrize(
    ("name", "words", "bits", "rule"),
    [
        ("mamba", [], "int8", "this model's are of Mamba"),
        ("relu", [], "int4", "this model's are of ReLUAttention"),
        ("transformer", ["objective=masked"], "int8", "reads both ways caches none"),
        ("xpos", ["seq_len=64"], "int8", "leaves the last 128 tokens as they are"),
        ("nope", ["model.mixer.head_width=5"], "int4", "packs channels in pairs"),
    ],
)
def test_a_model_without_such_a_cache_is_refused(name, words, bits, rule):
    with pytest.raises(UserError, match=rf"kv_cache={bits}: .*{rule}"):
        quantize_cache(model_of(name, *words), bits)
