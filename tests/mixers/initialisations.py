"""What every parameter starts from and which escape weight decay: a table, class by class.

Written from the papers and the authors' programs that the mixers' docstrings name, not from the
code: `of_class[path](module, layer, layers)` gives a law for every parameter of that class,
its children's included. An outer class's word goes before that of a part (a norm, say). Where a
paper starts a matrix at zero, so that others would have no gradient at first, the mixers depart as
their docstrings say, and the departure is written here.

    linear maps     N(0, 1 / inputs); the last of a branch divided by sqrt(2 layers) (GPT-2, section
                    2.3: N residual branches add up to unit variance), in Mamba by sqrt(layers)
    depthwise       U(+- 1/sqrt(taps)): torch's Conv1d, which the authors leave as it is
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.positions.base import Positions
from zoo.positions.t5 import T5


@dataclass(frozen=True)
class Normal:
    std: float


@dataclass(frozen=True)
class Uniform:
    low: float
    high: float


@dataclass(frozen=True)
class Through:
    """`law` holds for what `function` makes of the parameter; named by the function."""

    function: Callable[[Tensor], Tensor]
    law: Uniform


@dataclass(frozen=True, eq=False)
class Exactly:
    values: Tensor | float


@dataclass(frozen=True)
class Orthonormal:
    """Columns of the same length `gain`, at right angles."""

    gain: float


Law = Normal | Uniform | Through | Exactly | Orthonormal
Laws = dict[str, Law]
of_class: dict[str, Callable[[nn.Module, int, int], Laws]] = {}


def states(*paths: str) -> Callable:
    def note(function: Callable) -> Callable:
        of_class.update(dict.fromkeys(paths, function))
        return function

    return note


def fan_in(module: nn.Module, *names: str, gain: float = 1.0) -> Laws:
    """N(0, gain^2 / inputs), for linear maps by the names of their modules."""
    layers = {name: module.get_submodule(name) for name in names}
    return {f"{n}.weight": Normal(gain * layer.in_features**-0.5) for n, layer in layers.items()}


def torch_linear(module: nn.Module, *names: str, gain: float = 1.0) -> Laws:
    """torch's own nn.Linear, U(+- gain / sqrt(inputs)), which Mamba's authors keep."""
    found: Laws = {}
    for name in names:
        bound = gain * module.get_submodule(name).in_features ** -0.5
        found[f"{name}.weight"] = Uniform(-bound, bound)
    return found


def branch(layers: int) -> float:
    return (2 * layers) ** -0.5


def log_softplus(x: Tensor) -> Tensor:
    return F.softplus(x).log()


def open_gate_decay(x: Tensor) -> Tensor:
    """Hawk's a^c where the recurrence gate is open."""
    return (-8 * F.softplus(x)).exp()


STEPS = Through(log_softplus, Uniform(math.log(1e-3), math.log(1e-1)))  # Mamba's dt: log-uniform


@states("zoo.ops.rms_norm.RMSNorm")
def ones(*_) -> Laws:
    return {"weight": Exactly(1.0)}


@states("torch.nn.modules.normalization.LayerNorm", "torch.nn.modules.normalization.GroupNorm")
def ones_and_zeros(*_) -> Laws:
    return {"weight": Exactly(1.0), "bias": Exactly(0.0)}


@states("zoo.model.backbone.Backbone")
def backbone(*_) -> Laws:
    """GPT-2, section 2.3: 0.02; the head is the embedding."""
    return {"embedding.weight": Normal(0.02)}


@states("zoo.positions.learned.Learned")
def learned(*_) -> Laws:
    """GPT-2's program has 0.01 for positions; nanoGPT and transformers 0.02, as here."""
    return {"weight": Normal(0.02)}


@states("zoo.positions.clex.Continuous")
def clex(m, *_) -> Laws:
    """W_down zero: theta(t) starts as NTK_t (Chen 2023, section 3.2)."""
    return torch_linear(m, "field.up") | {"field.down.weight": Exactly(0.0)}


@states("zoo.mixers.feed_forward.SwiGLU")
def swiglu(m, _, layers: int) -> Laws:
    return fan_in(m, "gate_proj", "up_proj") | fan_in(m, "down_proj", gain=branch(layers))


@states("zoo.mixers.feed_forward.MLP")
def mlp(m, _, layers: int) -> Laws:
    found = fan_in(m, "up_proj") | fan_in(m, "down_proj", gain=branch(layers))
    return found | {"up_proj.bias": Exactly(0.0), "down_proj.bias": Exactly(0.0)}


@states("zoo.mixers.softmax.SoftmaxAttention")
def softmax(m, _, layers: int) -> Laws:
    found = fan_in(m, "q_proj", "k_proj", "v_proj") | fan_in(m, "o_proj", gain=branch(layers))
    if isinstance(m.positions, T5):
        found["positions.bias.weight"] = Exactly(0.0)
    if m.sink:  # Xiao 2023, section 3.3: softmax_1
        found |= {"sink_k": Exactly(0.0), "sink_v": Exactly(0.0)}
    for name, part in m.named_children():
        if isinstance(part, nn.Linear) and part.bias is not None:
            found[f"{name}.bias"] = Exactly(0.0)
    if m.gate_proj is not None:
        found |= fan_in(m, "gate_proj")
    if m.logit_scale is not None:  # Nakanishi 2025, figure 1
        found["logit_scale"] = Exactly(0.43)
    return found


@states("zoo.mixers.low_rank.LowRankAttention", "zoo.mixers.low_rank.LowRankFeedForward")
def low_rank(m, _, layers: int) -> Laws:
    """sd_E sd_D sqrt(rank) = sd_W: Var(E D x) = Var(W x)."""
    found: Laws = {}
    for name, unit in m.named_children():
        if isinstance(unit, Positions):
            continue
        last = name in ("o_proj", "down_proj")
        found |= fan_in(m, f"{name}.D")
        found |= fan_in(m, f"{name}.E", gain=branch(layers) if last else 1.0)
        assert unit.D.out_features == unit.E.in_features
    return found


@states("zoo.mixers.longformer.Longformer")
def longformer(m, _, layers: int) -> Laws:
    """Beltagy 2020, section 3.1: the global projections start as copies of the others."""
    found = fan_in(m, "q_proj", "k_proj", "v_proj") | fan_in(m, "o_proj", gain=branch(layers))
    if m.global_tokens:
        for kind in "qkv":
            copied = m.get_submodule(f"{kind}_proj").weight.detach()
            found[f"{kind}_global.weight"] = Exactly(copied)
    return found


@states("zoo.mixers.longnet.LongNet", "zoo.mixers.cosformer.CosFormer", "zoo.mixers.sima.SimA")
def multi_head(m, _, layers: int) -> Laws:
    return fan_in(m, "q_proj", "k_proj", "v_proj") | fan_in(m, "o_proj", gain=branch(layers))


@states("zoo.mixers.relu.ReLUAttention")
def relu(m, _, layers: int) -> Laws:
    found = multi_head(m, _, layers)
    return found | ({"gate": Exactly(0.0)} if m.gate is not None else {})


@states("zoo.mixers.linformer.Linformer")
def linformer(m, _, layers: int) -> Laws:
    """A slot of a full block has the variance of a key; of the paper's 1/rank, see the mixer."""
    many = m.block if m.causal else m.max_length
    kinds = ["E"] if m.E is m.F else ["E", "F"]
    return multi_head(m, _, layers) | {kind: Normal(many**-0.5) for kind in kinds}


@states("zoo.mixers.etc.ETC")
def etc(m, _, layers: int) -> Laws:
    labels = dict.fromkeys(["first_global", "l2l", "g2g", "l2g", "g2l"], Normal(0.02))
    return multi_head(m, _, layers) | labels


@states("zoo.mixers.star.Star")
def star(m, _, layers: int) -> Laws:
    found = multi_head(m, _, layers) | fan_in(m, "relay_q", "relay_k", "relay_v", "relay_o")
    found["places"] = Exactly(0.0)
    return found | ({"first_relay": Normal(1.0)} if m.causal else {})


@states("zoo.mixers.soft.Soft")
def soft(m, _, layers: int) -> Laws:
    found = fan_in(m, "q_proj", "v_proj") | fan_in(m, "o_proj", gain=branch(layers))
    return found | (fan_in(m, "convolution") if m.form != "exact" else {})


@states("zoo.mixers.aft.AFT")
def aft(m, _, layers: int) -> Laws:
    """Zhai 2021, section 3; conv: standard normal w, gamma 1 where the paper has 0."""
    found = multi_head(m, _, layers)
    if m.variant == "conv":
        found |= {"taps": Normal(1.0), "gamma": Exactly(1.0), "beta": Exactly(0.0)}
    if m.variant in ("local", "full"):
        found |= {"u": Normal(0.01), "v": Normal(0.01)}
    return found


@states("zoo.mixers.retnet.RetNet")
def retnet(m, _, layers: int) -> Laws:
    return fan_in(m, "q_proj", "k_proj", "v_proj", "gate_proj") | fan_in(
        m, "o_proj", gain=branch(layers)
    )


@states("zoo.mixers.gla.GLA")
def gla(m, _, layers: int) -> Laws:
    found = retnet(m, _, layers) | fan_in(m, "decay_proj.0", "decay_proj.1")
    return found | {"decay_proj.1.bias": Exactly(0.0)}


@states("zoo.mixers.short_conv.ShortConvolution")
def short_conv(m, _, layers: int) -> Laws:
    return {"weight": Uniform(-0.5, 0.5)}


@states("zoo.mixers.deltanet.DeltaNet")
def deltanet(m, _, layers: int) -> Laws:
    found = fan_in(m, "qkv_proj", "beta_proj") | fan_in(m, "o_proj", gain=branch(layers))
    return found | {"conv_weight": Uniform(-0.5, 0.5)}


@states("zoo.mixers.gated_deltanet.GatedDeltaNet")
def gated_deltanet(m, _, layers: int) -> Laws:
    """Yang 2024b, the authors' program: A uniform in (0, 16), steps as Mamba's."""
    found = deltanet(m, _, layers) | fan_in(m, "a_proj", "gate_proj")
    return found | {"A_log": Through(torch.exp, Uniform(0.0, 16.0)), "dt_bias": STEPS}


@states("zoo.mixers.hawk.Hawk")
def hawk(m, _, layers: int) -> Laws:
    """De 2024, section 2.4: a^c uniform in [0.9, 0.999], c = 8; gates N(0, 1 / block width)."""

    found = fan_in(m, "gate_proj", "x_proj") | fan_in(m, "out_proj", gain=branch(layers))
    for gate in ("decay_gate", "input_gate"):
        block = m.get_submodule(gate).weight.shape[-1]
        found |= {f"{gate}.weight": Normal(block**-0.5), f"{gate}.bias": Exactly(0.0)}
    found |= {"conv_weight": Uniform(-0.5, 0.5), "conv_bias": Exactly(0.0)}
    return found | {"decay": Through(open_gate_decay, Uniform(0.9, 0.999))}


@states("zoo.mixers.lstm.LSTM")
def lstm(m, _, layers: int) -> Laws:
    """torch's nn.LSTM; forget gates open at first, bias 1 (Jozefowicz 2015, section 5.1)."""
    width = m.lstm.hidden_size
    bias = torch.zeros(4, width)
    bias[1] = 1.0  # gates in the order i, f, g, o
    found: Laws = {"lstm.bias_ih_l0": Exactly(bias.flatten()), "lstm.bias_hh_l0": Exactly(0.0)}
    for name in ("lstm.weight_ih_l0", "lstm.weight_hh_l0"):
        found[name] = Uniform(-(width**-0.5), width**-0.5)
    return found | fan_in(m, "o_proj", gain=branch(layers))


@states("zoo.mixers.mamba.Mamba")
def mamba(m, _, layers: int) -> Laws:
    """Gu & Dao 2023, section 3.6 and their program: S4D-real A = -(1 .. N), D = 1."""
    found = torch_linear(m, "in_proj", "x_proj", "dt_proj")
    found |= torch_linear(m, "out_proj", gain=layers**-0.5)
    rates = torch.arange(1, m.state_size + 1.0).log().expand(m.inner_width, -1)
    found |= {"A_log": Exactly(rates), "D": Exactly(1.0), "dt_proj.bias": STEPS}
    return found | {"conv_weight": Uniform(-0.5, 0.5), "conv_bias": Uniform(-0.5, 0.5)}


@states("zoo.mixers.mamba2.Mamba2")
def mamba2(m, _, layers: int) -> Laws:
    """Dao & Gu 2024, their program: A uniform in [1, 16]."""
    found = torch_linear(m, "in_proj") | torch_linear(m, "out_proj", gain=layers**-0.5)
    found |= {"A_log": Through(torch.exp, Uniform(1.0, 16.0)), "D": Exactly(1.0), "dt_bias": STEPS}
    return found | {"conv_weight": Uniform(-0.5, 0.5), "conv_bias": Uniform(-0.5, 0.5)}


def present(width: int, layer: int, layers: int, power: float = 1.0) -> Tensor:
    """RWKV's (i / C)^(p (1 - l / L)), the share of the present token."""
    return (torch.arange(width, dtype=torch.float64) / width) ** (power * (1 - layer / layers))


def rwkv_decay(width: int, low: float, high: float, layer: int, layers: int) -> Tensor:
    ramp = torch.arange(width, dtype=torch.float64) / (width - 1)
    return low + (high - low) * ramp ** (0.7 + 1.3 * layer / (layers - 1))


def thirds(width: int) -> Tensor:
    """RWKV's zigzag: 0, 1, -1, 0, 1, -1 ..."""
    return torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64).repeat(width // 3 + 1)[:width]


@states("zoo.mixers.rwkv4.RWKV4")
def rwkv4(m, layer: int, layers: int) -> Laws:
    """Peng 2023 and the authors' program; K and R (zero there) small, O as every branch's last."""
    width = m.width
    deep = layer / (layers - 1)
    found = fan_in(m, "v_proj") | fan_in(m, "k_proj", "r_proj", gain=0.1)
    found |= fan_in(m, "o_proj", gain=branch(layers))
    return found | {
        "mix_k": Exactly(present(width, layer, layers)),
        "mix_v": Exactly(present(width, layer, layers) + 0.3 * deep),
        "mix_r": Exactly(present(width, layer, layers, 0.5)),
        "decay": Exactly(rwkv_decay(width, -5, 3, layer, layers)),
        "bonus": Exactly(math.log(0.3) + 0.5 * thirds(width)),
    }


@states("zoo.mixers.rwkv4.ChannelMixing")
def rwkv4_channel(m, layer: int, layers: int) -> Laws:
    share = Exactly(present(m.width, layer, layers))
    found = fan_in(m, "k_proj") | fan_in(m, "r_proj", gain=0.1)
    return found | fan_in(m, "v_proj", gain=branch(layers)) | {"mix_k": share, "mix_r": share}


@states("zoo.mixers.rwkv6.RWKV6")
def rwkv6(m, layer: int, layers: int) -> Laws:
    """Peng 2024, their program; the low-rank maps' first factors (zero there) as the second."""
    width, deep = m.width, layer / (layers - 1)
    even = 1 - present(width, layer, layers)
    half = 1 - present(width, layer, layers, 0.5)
    ramp = torch.arange(width, dtype=torch.float64) / (width - 1)
    bonus = deep * (1 - ramp) + 0.1 * thirds(width)
    found = fan_in(m, "v_proj", "r_proj") | fan_in(m, "k_proj", "g_proj", gain=0.1)
    found |= fan_in(m, "o_proj", gain=branch(layers))
    for name in ("mix_down", "mix_up", "decay_down", "decay_up"):
        found[name] = Uniform(-0.01, 0.01)
    return found | {
        "mix_x": Exactly(even),
        "mix": Exactly(torch.stack([even, even, even - 0.3 * deep, half, half])),  # w k v r g
        "decay": Exactly(rwkv_decay(width, -6, -1, layer, layers)),
        "bonus": Exactly(bonus.unflatten(0, (m.heads, -1))),
    }


@states("zoo.mixers.rwkv7.RWKV7")
def rwkv7(m, layer: int, layers: int) -> Laws:
    """Peng 2025, appendix, and their program; first low-rank factors 0.01 instead of zero."""
    width, deep = m.o_proj.out_features, layer / (layers - 1)
    ramp = torch.arange(width, dtype=torch.float64) / (width - 1)
    head = width // m.heads
    zigzag = (torch.arange(width) % head - (head - 1) / 2) / ((head - 1) / 2)
    zigzag = (zigzag * zigzag.abs()).double()
    powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
    shifts = torch.stack([1 - present(width, layer, layers, p) for p in powers.values()])
    found: Laws = {
        "mu": Exactly(shifts),
        "w_0": Exactly(-6 + 6 * ramp ** (1 + deep**0.3) + 0.5 + 2.5 * zigzag),
        "a_0": Exactly(-0.19 + 0.3 * zigzag + 0.4 * (ramp - 0.5)),
        "k_k": Exactly(0.71 - 0.1 * (ramp - 0.5)),
        "k_a": Exactly(1.02),
        "r_k": Exactly(-0.04),
        "norm.weight": Exactly(((1 + layer) / layers) ** 0.7),
        "norm.bias": Exactly(0.0),
    }
    maps = ["w_map", "a_map", "g_map"]
    if layer:
        found["v_0"] = Exactly(0.73 - 0.4 * (ramp - 0.5))
        maps.append("v_map")
    for name in maps:
        found |= fan_in(m, f"{name}.down", gain=0.01) | {f"{name}.up.weight": Orthonormal(0.1)}
    found |= torch_linear(m, "r_proj", "v_proj", gain=0.5) | torch_linear(m, "k_proj", gain=0.05)
    return found | fan_in(m, "o_proj", gain=branch(layers))


@states("zoo.mixers.rwkv7.RWKV7ChannelMixing")
def rwkv7_channel(m, layer: int, layers: int) -> Laws:
    width = m.v_proj.out_features
    mu = 1 - (torch.arange(width, dtype=torch.float64) / width) ** ((1 - layer / layers) ** 4)
    found = torch_linear(m, "k_proj", gain=0.5) | fan_in(m, "v_proj", gain=branch(layers))
    return found | {"mu": Exactly(mu)}


# Matrices that weight decay leaves alone: it pulls to zero, which for these is no neutral place.
# Vectors (biases, norms, gates) are never decayed, all other matrices are.
NOT_DECAYED = {
    "zoo.mixers.softmax.SoftmaxAttention": {"positions.bias.weight", "sink_k", "sink_v"},
    "zoo.mixers.etc.ETC": {"l2l", "g2g", "l2g", "g2l"},
    "zoo.mixers.star.Star": {"places"},
    "zoo.mixers.mamba.Mamba": {"A_log"},  # the authors': A_log and D, here a vector
    "zoo.mixers.rwkv6.RWKV6": {"mix", "mix_down", "mix_up", "decay_down", "decay_up", "bonus"},
    "zoo.mixers.rwkv7.RWKV7": {"mu", "r_k"},
}
