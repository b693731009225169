"""Half of a block in one call is that half operation by operation, whatever it is made of."""

import copy
import functools
import itertools
from typing import Any

import fuzz
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.mixers.feed_forward import ACTIVATIONS, MLP, SwiGLU
from zoo.mixers.mamba import Mamba
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model.backbone import NORMS
from zoo.model.block import Block
from zoo.model.quantization import QuantizedWeight
from zoo.ops import decode_block
from zoo.ops.decode_block import Attention, FeedForward, HalfEnds, SelectiveState, half
from zoo.ops.linear import Linear
from zoo.ops.quantized_linear import restored
from zoo.ops.rms_norm import RMSNorm
from zoo.ops.runtime.checks import check
from zoo.ops.runtime.dispatch import reset, select_backend, used_backends
from zoo.positions.none import NoPositions
from zoo.positions.rope import Rope

WIDTH, HEADS = 96, 6  # the rotated half of a head fills no register, and weights cut into groups

ATTENTION = {
    "plain": {},
    "grouped keys": {"kv_heads": 2, "qkv_bias": True, "output_bias": True},
    "one key, no positions": {"kv_heads": 1, "positions": NoPositions, "score_scale": 0.3},
    "wide heads": {"head_width": 32, "qk_norm": True, "output_gate": True},
    "offset": {"qk_norm": True, "norm_offset": True, "head_width": 34},
    "partly rotated": {
        "positions": lambda *sizes: Rope(*sizes, partial_rotary_factor=0.25),
    },
}
FEED_FORWARDS = {
    **{
        f"gated {name}": (SwiGLU, {"activation": name, "hidden_width": 160}) for name in ACTIVATIONS
    },
    "odd, with biases": (SwiGLU, {"bias": True, "hidden_width": 37}),
    "not gated": (MLP, {"hidden_width": 64}),
}
CASES = [
    *itertools.product(ATTENTION, ["not gated"], ["rms_norm"], [False], [False]),
    *itertools.product(["plain"], FEED_FORWARDS, ["rms_norm"], [False], [False]),
    *itertools.product(["plain"], ["not gated"], NORMS, [False, True], [False, True]),
]
MAMBA = {
    "plain": {},
    "one state, two taps": {"state_size": 1, "conv_width": 2, "dt_rank": 1, "inner_width": 37},
    "odd, normalised": {"state_size": 21, "dt_rank": 5, "inner_width": 150, "input_norm_eps": 1e-5},
}
MAMBA_CASES = [
    *itertools.product(MAMBA, ["rms_norm"], [False]),
    *itertools.product(["odd, normalised"], NORMS, [False, True]),
]


def block_of(attention: str, feed_forward: str, norm: str, parallel: bool, post: bool) -> Any:
    torch.manual_seed(0)
    kind, options = FEED_FORWARDS[feed_forward]
    block = Block(
        width=WIDTH,
        mixer=SoftmaxAttention(width=WIDTH, heads=HEADS, **ATTENTION[attention]),
        feed_forward=kind(width=WIDTH, **options),
        norm=lambda width: NORMS[norm](width, eps=1e-5),
        parallel_residual=parallel,
        post_norm=post,
    )
    return with_random_vectors(block)


def mamba_of(mixer: str, norm: str, post: bool) -> Any:
    torch.manual_seed(0)
    block = Block(
        width=WIDTH,
        mixer=Mamba(width=WIDTH, **MAMBA[mixer]),
        feed_forward=None,
        norm=lambda width: NORMS[norm](width, eps=1e-5),
        post_norm=post,
    )
    return with_random_vectors(block)


def with_random_vectors(block: Any) -> Any:
    for parameter in block.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return block.double().requires_grad_(False)


BOTH = [
    pytest.param(lambda: block_of("offset", "gated silu", "layer_norm", False, True), id="both"),
    pytest.param(lambda: mamba_of("odd, normalised", "layer_norm", True), id="mamba"),
]


def read(block: Any, tokens: int = 4, dtype=None, given=torch.float64) -> list[Tensor]:
    """Outputs of a few tokens one by one, and what the mixer keeps behind them: keys and values, or
    the inputs of the convolution and the state."""
    dtype = dtype or block.mixer_norm.weight.dtype
    generator, state, found = torch.Generator().manual_seed(1), block.empty_state(1), []
    for _ in range(tokens):
        x = torch.randn(1, 1, WIDTH, generator=generator, dtype=torch.float64).to(given).to(dtype)
        y, state = block(x, state, {})
        found.append(y)
    return [*found, *state.mixer[:2]]


def in_one_call(block: Any, **more) -> list[Tensor]:
    with torch.no_grad():
        reset()
        found = read(block, **more)
        assert {"decode_block"} == {*used_backends()}
    return found


def one_by_one(block: Any, **more) -> list[Tensor]:
    reset()
    with torch.enable_grad():
        found = read(block, **more)
    assert "decode_block" not in used_backends()
    return found


def quantized(block: Any, bits: Any) -> Any:
    for layer in block.modules():
        if isinstance(layer, Linear):
            form = bits if layer.in_features % 32 == 0 else "int8"
            layer.weight = nn.Parameter(QuantizedWeight.of(layer.weight, form), False)
    return block


every_block = pytest.mark.parametrize(
    "made",
    [
        *(functools.partial(block_of, *case) for case in CASES),
        *(functools.partial(mamba_of, *case) for case in MAMBA_CASES),
    ],
    ids=lambda made: ", ".join(map(str, made.args)),
)


@every_block
def test_a_token_is_what_the_operations_one_by_one_make_of_it(made, poisoned):
    block = made()
    expected = one_by_one(block)
    torch.testing.assert_close(in_one_call(block), expected, rtol=1e-11, atol=1e-11)
    for y, exact in zip(in_one_call(block.float()), expected, strict=True):
        assert (y - exact).norm() <= 4e-6 * exact.norm()


@pytest.mark.parametrize("bits", [None, "int8", "int4"])
@every_block
def test_in_bfloat16_only_what_leaves_a_block_is_rounded(made, bits, poisoned):
    block = made().bfloat16()
    if bits is not None:
        quantized(block, bits)
    found = in_one_call(block)
    exact = one_by_one(made_exact(block), given=torch.bfloat16)
    by_operations = one_by_one(block)
    for y, operations, expected in zip(found, by_operations, exact, strict=True):
        assert y.dtype == operations.dtype
        error = (y - expected).norm()
        assert error <= 2.0**-8 * expected.norm()
        assert error <= 1.1 * (operations - expected).norm()


def made_exact(block: Any) -> Any:
    """The same block in float64, whose weights have the same numbers."""
    exact = copy.deepcopy(block)
    for layer in exact.modules():
        for name, weight in [*layer._parameters.items()]:
            if isinstance(weight, QuantizedWeight):
                wide = restored(*weight.parts, torch.float64)
                layer._parameters[name] = nn.Parameter(wide, False)
    return exact.double()


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("case", [*MAMBA])
def test_a_selective_state_reads_matrices_in_few_bits(case, bits):
    block = quantized(mamba_of(case, "rms_norm", False), bits)
    torch.testing.assert_close(in_one_call(block), one_by_one(block), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("name", ["grouped keys", "wide heads"])
def test_matrices_in_few_bits_are_read_as_by_products_of_their_own(name, bits):
    block = block_of(name, "odd, with biases", "rms_norm", False, False)
    block = quantized(block, bits)
    torch.testing.assert_close(in_one_call(block), one_by_one(block), rtol=1e-11, atol=1e-11)


def test_threads_do_not_change_a_bit():
    block = block_of("grouped keys", "gated silu", "rms_norm", False, False).float()
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(in_one_call(block))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


def assert_as_one_by_one(block: Any) -> None:
    expected = one_by_one(block)
    with torch.no_grad():
        torch.testing.assert_close(read(block), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("made", BOTH)
def test_whatever_happens_to_a_weight_is_in_the_next_token(made):
    block = made()
    assert_as_one_by_one(block)
    for name, parameter in [*block.named_parameters()]:
        owner = block.get_submodule(name.rpartition(".")[0])
        short = name.rpartition(".")[2]
        for change in (
            lambda parameter=parameter: parameter.mul_(1.5),
            lambda parameter=parameter: setattr(parameter, "data", parameter.data.flip(0)),
            lambda owner=owner, short=short, parameter=parameter: setattr(
                owner, short, nn.Parameter(parameter.roll(1, -1), False)
            ),
            lambda owner=owner, short=short, parameter=parameter: setattr(
                owner,
                short,
                nn.Parameter(parameter.clone().repeat_interleave(2, -1)[..., ::2], False),
            ),
        ):
            with torch.no_grad():
                change()
        before = read_without_gradient(block)
        assert_as_one_by_one(block)
        assert all(map(torch.equal, before, read_without_gradient(block)))
    block.mixer_norm.eps = 0.3
    assert_as_one_by_one(block)


@torch.no_grad()
def read_without_gradient(block: Any) -> list[Tensor]:
    return read(block)


@pytest.mark.parametrize("made", BOTH)
def test_every_hook_is_called_for_every_token(made):
    block = made()
    weights_alone = ("mixer.in_proj", "mixer.dt_proj")  # are read, the layers never called
    for name, module in block.named_modules():
        # the block itself; what no operation calls
        if not name or isinstance(module, Rope) or name in weights_alone:
            continue
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            called: list[str] = []
            handle = register(lambda *_, called=called, name=name: called.append(name))
            read_without_gradient(block)
            handle.remove()
            assert len(called) == 4, name
        forward = module.forward
        module.forward = lambda *given, forward=forward, **more: forward(*given, **more)
        assert_as_one_by_one(block)
        del module.forward
    everywhere: list[int] = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: everywhere.append(1))
    read_without_gradient(block)
    handle.remove()
    assert len(everywhere) > 4 * 5


def test_what_it_does_not_compute_is_left_to_the_operations():
    block, reset_backends = block_of("plain", "gated silu", "rms_norm", False, False), reset

    def used(function) -> bool:
        reset_backends()
        with torch.no_grad():
            function()
        return "decode_block" in used_backends()

    assert used(lambda: read(block))
    with torch.autocast("cpu", torch.bfloat16):
        assert not used(lambda: read(block.float()))
    block.double()
    names = [*dict(block.named_parameters())]
    x, state = torch.randn(1, 1, WIDTH, dtype=torch.float64), block.empty_state(1)

    def swapped(*weights: Tensor) -> Tensor:
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(block, given, (x, state, {}))[0]

    weights, tangents = [*block.parameters()], [torch.randn_like(w) for w in block.parameters()]
    assert not used(lambda: torch.func.jvp(swapped, tuple(weights), tuple(tangents)))
    with torch.no_grad():
        twice = [2 * w for w in weights]
        expected = swapped(*twice)
        for weight, double in zip(weights, twice, strict=True):
            weight.copy_(double)
        torch.testing.assert_close(block(x, state, {})[0], expected)
    two = torch.randn(2, 1, WIDTH, dtype=torch.float64)
    assert not used(lambda: block(two, block.empty_state(2), {}))
    assert not used(lambda: block(two.view(1, 2, WIDTH), state, {}))
    assert not used(lambda: block(x))
    nn.utils.parametrizations.weight_norm(block.mixer.o_proj)
    nn.utils.parametrizations.weight_norm(block.feed_forward.up_proj)
    assert not used(lambda: read(block, dtype=torch.float64))


def test_a_class_that_computes_something_else_is_not_taken_for_the_one_it_derives_from():
    class Doubled(SwiGLU):
        def forward(self, x, state=None):
            y = super().forward(x, state)
            return (2 * y[0], y[1]) if isinstance(y, tuple) else 2 * y

    class Backwards(Rope):
        def prepare(self, q, k, start, cross_layer=None):
            return self.rotate(q, -start), self.rotate(k, -start)

    block = block_of("plain", "gated silu", "rms_norm", False, False)
    for change in (
        lambda: setattr(block.feed_forward, "__class__", Doubled),
        lambda: setattr(block.mixer.positions, "__class__", Backwards),
    ):
        before = read_without_gradient(block)
        change()
        assert_as_one_by_one(block)
        assert not torch.equal(before[2], read_without_gradient(block)[2])


@pytest.mark.parametrize("made", BOTH)
def test_several_texts_that_go_on_from_one_state_have_each_its_own(made):
    block = made()
    x, y = torch.randn(2, 1, 1, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        _, state = block(x, block.empty_state(1), {})
        cached = [one.clone() for one in state.mixer[:2]]
        first, _ = block(x, state, {})
        other, _ = block(y, state, {})
        assert all(map(torch.equal, state.mixer[:2], cached))
        assert torch.equal(first, block(x, state, {})[0])
        assert torch.equal(other, block(y, state, {})[0])


@pytest.mark.mistyped
def test_keys_that_do_not_fit_are_refused():
    block = block_of("grouped keys", "gated silu", "rms_norm", False, False)
    mixer, x = block.mixer, torch.randn(1, 1, WIDTH, dtype=torch.float64)
    layers = mixer.q_proj, mixer.k_proj, mixer.v_proj
    with torch.no_grad():
        found = half(
            HalfEnds(x, x, block.mixer_norm), Attention(6, 2, 16, 8, 1.0), layers, mixer.o_proj
        )
        assert found is not None
        table = torch.ones(1, 1, 8, dtype=torch.float64)
        for keys, rotation in (
            (torch.ones(1, 0, 2, 16), table),
            (torch.ones(1, 3, 3, 16), table),
            (torch.ones(1, 3, 2, 16)[:, :, :, ::2].repeat(1, 1, 1, 2).mT.contiguous().mT, table),
            (torch.ones(1, 3, 2, 16), table[..., :7]),
        ):
            with pytest.raises(ValueError, match="must be"):
                found.attention(keys.double(), keys.double(), rotation, rotation)
        for sizes in ((6, 3, 16, 8, 1.0), (3, 2, 32, 8, 1.0), (6, 2, 16, 9, 1.0)):
            assert (
                half(HalfEnds(x, x, block.mixer_norm), Attention(*sizes), layers, mixer.o_proj)
                is None
            )
        assert (
            half(HalfEnds(x, x, block.mixer_norm), FeedForward("silu"), layers, mixer.o_proj)
            is None
        )


@pytest.mark.mistyped
def test_states_that_do_not_fit_are_refused():
    block, x = mamba_of("plain", "rms_norm", False), torch.randn(1, 1, WIDTH, dtype=torch.float64)
    mixer, inner = block.mixer, 2 * WIDTH
    within, layers = (mixer.x_proj, mixer.dt_proj, mixer), (mixer.in_proj,)
    ends = HalfEnds(x, x, block.mixer_norm)
    with torch.no_grad():
        found = half(ends, SelectiveState(16, 6, 4, 0.0), layers, mixer.out_proj, within)
        assert found is not None
        conv, h = torch.ones(1, 3, inner).double(), torch.ones(1, inner, 16).double()
        for states in (
            (conv[:, 1:], h),
            (conv, h[..., :15].contiguous()),
            (conv, h[:, 1:]),
            (conv.float(), h),
            (conv, h.mT.contiguous().mT),
        ):
            with pytest.raises(ValueError, match="must be"):
                found.selective_state(*states)
        for sizes in ((16, 5, 4), (15, 6, 4), (16, 6, 3), (16, 6, 1)):
            between = SelectiveState(*sizes, 0.0)
            assert half(ends, between, layers, mixer.out_proj, within) is None


def test_heads_beyond_the_most_are_left_to_the_operations():
    assert decode_block.KERNEL.constant("max_heads", torch.float32) == decode_block.MAX_HEADS


def requested(shapes: dict[str, str], *tensors: Tensor) -> None:
    """Refuse what an op with a backend would; `half` leaves it to its caller's operations."""
    check("decode_block", shapes, *tensors)
    available = {"native": decode_block.KERNEL.usable, "reference": True}
    select_backend("decode_block", "native", available)


def layer_of(weight: Tensor, bias: Tensor | None) -> Linear:
    layer = Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight.contiguous(), False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), False)
    return layer


def norm_of(weight: Tensor) -> RMSNorm:
    norm = RMSNorm(len(weight), 1e-5)
    norm.weight = nn.Parameter(weight.contiguous(), False)
    return norm


def random_decode_block_call(draw: fuzz.Draw) -> fuzz.Call:
    width = draw.size(16, zero=False)
    kinds = (_random_attention, _random_feed_forward, _random_selective_state)
    return draw.random.choice(kinds)(draw, width)


def _random_feed_forward(draw: fuzz.Draw, width: int) -> fuzz.Call:
    hidden, gated = draw.size(32, zero=False), draw.chance(0.5)
    name = draw.random.choice([*ACTIVATIONS])
    shapes = [(1, 1, width), (1, 1, width), (width,), (width, hidden), (width,), (hidden, width)]
    shapes += [(hidden, width)] if gated else []

    def run(backend, x, onto, weight, down, bias, *first):
        if backend == "native":
            shapes = {"x": "1 1 d", "onto": "1 1 d", "weight": "d", "down": "d n", "bias": "d"}
            shapes |= {f"first{i}": "n d" for i in range(len(first))}
            requested(shapes, x, onto, weight, down, bias, *first)
            ends = HalfEnds(x.contiguous(), onto.contiguous(), norm_of(weight))
            layers = [layer_of(one, None) for one in first]
            found = half(ends, FeedForward(name), layers, layer_of(down, bias))
            assert found is not None
            return (found.feed_forward(),)
        u = F.rms_norm(x, weight.shape, weight, 1e-5)
        up, *gate = (F.linear(u, one) for one in first)
        hidden = ACTIVATIONS[name](gate[0]) * up if gate else ACTIVATIONS[name](up)
        return (onto + F.linear(hidden, down, bias),)

    return fuzz.Call(run, [draw.layout(draw.values(*s)) for s in shapes], gradients=False)


def _random_selective_state(draw: fuzz.Draw, width: int) -> fuzz.Call:
    inner, states = draw.size(32, zero=False), draw.size(16, zero=False)
    rank, taps = draw.size(zero=False), draw.random.randint(2, 8)
    eps = draw.random.choice([0.0, 1e-5])
    shapes = [(1, 1, width), (1, 1, width), (width,), (2 * inner, width), (width, inner)]
    shapes += [(rank + 2 * states, inner), (inner, rank), (inner,), (inner, taps), (inner,)]
    shapes += [(inner, states), (inner,), (1, taps - 1, inner), (1, inner, states)]

    def run(backend, x, onto, weight, w_in, w_out, w_x, w_dt, b_dt, *more):
        *parameters, conv, h = more
        if backend == "native":
            shapes = {"x": "1 1 d", "onto": "1 1 d", "weight": "d", "w_in": "i2 d"}
            shapes |= {"w_out": "d i", "w_x": "r2n i", "w_dt": "i r", "b_dt": "i"}
            requested(shapes, x, onto, weight, w_in, w_out, w_x, w_dt, b_dt)
            ends = HalfEnds(x.contiguous(), onto.contiguous(), norm_of(weight))
            holder = nn.Module()
            names = ("conv_weight", "conv_bias", "A_log", "D")
            for name, one in zip(names, parameters, strict=True):
                holder.register_parameter(name, nn.Parameter(one.contiguous(), False))
            within = (layer_of(w_x, None), layer_of(w_dt, b_dt), holder)
            between = SelectiveState(states, rank, taps, eps)
            found = half(ends, between, (layer_of(w_in, None),), layer_of(w_out, None), within)
            assert found is not None
            return found.selective_state(conv.contiguous(), h.contiguous())
        conv_weight, conv_bias, A_log, D = parameters
        p, z = F.linear(F.rms_norm(x, weight.shape, weight, 1e-5), w_in).chunk(2, -1)
        inputs = torch.cat([conv, p], 1)
        c = F.silu((inputs.mT * conv_weight).sum(-1) + conv_bias)
        parts = F.linear(c, w_x).split([rank, states, states], -1)
        if eps:
            parts = [F.rms_norm(one, one.shape[-1:], eps=eps) for one in parts]
        r, B, C = parts
        dt = F.softplus(F.linear(r, w_dt, b_dt))
        h = torch.exp(-dt[..., None] * A_log.exp()) * h + (dt * c)[..., None] * B[:, None]
        y = ((h * C[:, None]).sum(-1) + D * c)[None] * F.silu(z)
        return onto + F.linear(y, w_out), inputs[:, 1:], h

    products = range(3, 7)  # of numbers about one, so that the next one's are not far from it
    values = [
        draw.values(*s) / (s[-1] ** 0.5 if i in products else 1) for i, s in enumerate(shapes)
    ]
    return fuzz.Call(run, [*map(draw.layout, values)], gradients=False)


def _random_attention(draw: fuzz.Draw, width: int) -> fuzz.Call:
    g, shared, d = (
        draw.random.choice([1, 2, 3]),
        draw.random.choice([1, 2, 5]),
        draw.size(zero=False),
    )
    h, keys = g * shared, draw.size(128, zero=False)
    pairs = draw.random.randint(0, d // 2)
    shapes = [(1, 1, width), (1, 1, width), (width,), (width, h * d)]
    shapes += [(h * d, width), (g * d, width), (g * d, width)]
    shapes += [(1, keys, g, d), (1, keys, g, d), (1, 1, pairs), (1, 1, pairs)]

    def run(backend, x, onto, weight, output, w_q, w_k, w_v, k, v, cos, sin):
        if backend == "native":
            shapes = {"x": "1 1 d", "onto": "1 1 d", "weight": "d", "output": "d i"}
            shapes |= {"w_q": "i d", "w_k": "g d", "w_v": "g d", "k": "1 n h e", "v": "1 n h e"}
            shapes |= {"cos": "1 1 pairs", "sin": "1 1 pairs"}
            requested(shapes, x, onto, weight, output, w_q, w_k, w_v, k, v, cos, sin)
        k, v = k.clone().contiguous(), v.clone().contiguous()
        if backend == "native":
            ends = HalfEnds(x.contiguous(), onto.contiguous(), norm_of(weight))
            between = Attention(h, g, d, pairs, 0.3)
            layers = [layer_of(one, None) for one in (w_q, w_k, w_v)]
            found = half(ends, between, layers, layer_of(output, None))
            assert found is not None
            return found.attention(k, v, cos.contiguous(), sin.contiguous()), k, v
        u = F.rms_norm(x, weight.shape, weight, 1e-5)
        q, k_own, v_own = (F.linear(u, one).view(-1, d) for one in (w_q, w_k, w_v))

        def rotated(heads: Tensor) -> Tensor:
            a, b, rest = heads[:, :pairs], heads[:, pairs : 2 * pairs], heads[:, 2 * pairs :]
            c, s = cos.view(-1), sin.view(-1)
            return torch.cat([a * c - b * s, a * s + b * c, rest], 1)

        q, k[0, -1], v[0, -1] = rotated(q), rotated(k_own), v_own
        all_k, all_v = (one[0].repeat_interleave(shared, 1) for one in (k, v))
        chances = torch.einsum("hd,nhd->hn", q, all_k).mul(0.3).softmax(-1)
        y = torch.einsum("hn,nhd->hd", chances, all_v)
        return onto + F.linear(y.view(1, 1, -1), output), k, v

    return fuzz.Call(run, [draw.layout(draw.values(*s)) for s in shapes], gradients=False)
