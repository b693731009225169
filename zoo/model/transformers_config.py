"""Which architecture of `transformers` computes what a model computes, and its config.json.

The converse of zoo.pretrained.families. Sizes are read from the model, since match=params chooses
some of them; what decides is read from its parts.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from torch import nn

from zoo.attention.streaming_llm import StreamingLLM
from zoo.config.schema.model import Model
from zoo.config.schema.sections import Component
from zoo.config.schema.train import TrainConfig
from zoo.config.schemes import short_name
from zoo.config.stages import (
    original_length,
    pattern_length,
    scalings,
    stages_of,
    trained_length,
)
from zoo.mixers.feed_forward import MLP, SwiGLU
from zoo.mixers.mamba import Mamba
from zoo.mixers.mamba2 import Mamba2
from zoo.mixers.rwkv4 import RWKV4, ChannelMixing
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model import convert
from zoo.model.backbone import Backbone
from zoo.model.block import Block
from zoo.positions.local_rope import LocalRope
from zoo.positions.rope import Rope


class Foreign(NamedTuple):
    """An architecture of `transformers`, its config.json, and the names of its weights."""

    architecture: str
    model_type: str
    config: dict[str, Any]
    names: convert.Names


class _DiffersError(Exception):
    """Why no architecture there computes the same."""


LAST_EPS = 1e-5  # of the norm before an RWKV-4's head, whatever its config.json says

# Options of a model and of a part that an architecture there has, or that are not of what it
# computes; at any other value than its default every other option, old or new, is a difference.
OF_THE_MODEL: dict[type, tuple[str, ...]] = {
    SoftmaxAttention: ("parallel_residual",),
    RWKV4: ("embedding_norm",),
}
OF_A_PART: dict[type, tuple[str, ...]] = {
    SoftmaxAttention: (
        *("heads", "kv_heads", "head_width", "positions", "backend"),
        *("qkv_bias", "output_bias", "qk_norm", "norm_eps"),
    ),
    SwiGLU: ("hidden_width", "bias"),
    MLP: ("hidden_width",),
    RWKV4: ("backend",),
    ChannelMixing: ("hidden_width",),
    Mamba: (
        *("inner_width", "state_size", "conv_width", "dt_rank"),
        *("input_norm_eps", "backend"),
    ),
    Mamba2: ("heads", "head_width", "state_size", "conv_width", "norm_eps", "backend"),
}


def foreign(model: Backbone, config: TrainConfig) -> Foreign | str:
    """The architecture of `transformers` that computes the same; why there is none, in words."""
    try:
        return _foreign(model, config)
    except _DiffersError as why:
        return str(why)


def _foreign(model: Backbone, config: TrainConfig) -> Foreign:
    options, parts = config.model, cast(Block, model.blocks[0]).named_sublayers()
    mixer, feed_forward = parts["mixer"], parts.get("feed_forward")
    _require(len(options.blocks) == 1, "its layers differ")
    block = options.blocks[0]
    _require(block.short_conv is None, "short_conv")
    _require(options.embedding_positions is None, "positions at the embedding")
    _require(model.causal, "it reads both ways")
    _require(model.frequencies is None, "its rotary frequencies are trained")
    _require_taken(options, "norm", "norm_eps", "tied", *OF_THE_MODEL.get(type(mixer), ()))
    common = {"hidden_size": model.width, "num_hidden_layers": len(model.blocks)}
    if type(mixer) is SoftmaxAttention and type(mixer.positions) in (Rope, LocalRope):
        _require_known(block.mixer, mixer, "attention")
        if block.feed_forward is not None and feed_forward is not None:
            _require_known(block.feed_forward, feed_forward, "its feed-forward")
        return _attention(model, config, mixer, feed_forward, common)
    if type(mixer) is SoftmaxAttention:
        kind = type(mixer.positions)
        raise _DiffersError(f"positions={short_name(f'{kind.__module__}.{kind.__name__}')}")
    _require(type(mixer) in (RWKV4, Mamba, Mamba2), type(mixer).__name__)
    _require_known(block.mixer, mixer, type(mixer).__name__)
    if type(mixer) is RWKV4:
        _require(type(feed_forward) is ChannelMixing, "its feed-forward")
        assert isinstance(feed_forward, ChannelMixing)
        norms = options.norm, options.embedding_norm, options.norm_eps
        words = "model.norm=layer_norm", "model.embedding_norm=true", f"model.norm_eps={LAST_EPS:g}"
        why = f"an RWKV-4 there has other norms; {trained_with(*words)}"
        _require(norms == ("layer_norm", True, LAST_EPS), why)
        sizes = {
            "attention_hidden_size": model.width,
            "intermediate_size": _rows(feed_forward.k_proj),
            "layer_norm_epsilon": LAST_EPS,
            "context_length": config.seq_len,
        }
        return Foreign("RwkvForCausalLM", "rwkv", common | sizes, convert.RWKV4)
    _require(feed_forward is None, "its feed-forward")
    _require(options.norm == "rms_norm", f"norm={options.norm}")
    common |= {"layer_norm_epsilon": options.norm_eps}
    if type(mixer) is Mamba:
        return _mamba(mixer, common, config.match == "params")
    assert type(mixer) is Mamba2
    inner, matched = mixer.heads * mixer.head_width, config.match == "params"
    if mixer.norm.eps != options.norm_eps:
        words = ["match=none"] * (matched and inner % model.width > 0)
        remedy = trained_with(f"model.norm_eps={mixer.norm.eps:g}", *words)
        raise _DiffersError(f"a Mamba-2 there has one norm_eps; {remedy}")
    sizes = {
        "expand": _whole(inner, model.width, matched),
        "num_heads": mixer.heads,
        "head_dim": mixer.head_width,
        "n_groups": 1,
        "state_size": mixer.state_size,
        "conv_kernel": mixer.conv_width,
    }
    return Foreign("Mamba2ForCausalLM", "mamba2", common | sizes, convert.MAMBA)


def _mamba(mixer: Mamba, common: Mapping[str, Any], matched: bool) -> Foreign:
    sizes = {
        **common,
        "expand": _whole(mixer.inner_width, common["hidden_size"], matched),
        "state_size": mixer.state_size,
        "conv_kernel": mixer.conv_width,
        "time_step_rank": mixer.dt_rank,
    }
    if mixer.input_norm_eps is None:
        return Foreign("MambaForCausalLM", "mamba", sizes, convert.MAMBA)
    sizes["mixer_rms_eps"] = mixer.input_norm_eps
    return Foreign("FalconMambaForCausalLM", "falcon_mamba", sizes, convert.MAMBA)


def _attention(
    model: Backbone,
    config: TrainConfig,
    mixer: SoftmaxAttention,
    feed_forward: nn.Module | None,
    common: Mapping[str, Any],
) -> Foreign:
    options, qkv, output = config.model, *_biases(mixer)
    window, scaling = _window(mixer, config), _scaling(mixer, config)
    sizes = {
        **common,
        "num_attention_heads": mixer.heads,
        "max_position_embeddings": trained_length(config.extension, config.seq_len),
        "rope_parameters": scaling,
    }
    if scaling["rope_type"] == "linear":  # beside it: within it transformers knows no such key
        sizes["original_max_position_embeddings"] = _length_before(config)
    if options.norm == "layer_norm":
        plain = mixer.kv_heads == mixer.heads and mixer.heads * mixer.head_width == model.width
        _require(
            plain and mixer.q_norm is None and window is None, "LayerNorm with a Llama's parts"
        )
        _require(type(feed_forward) is MLP and qkv == output, "LayerNorm with a Llama's parts")
        assert isinstance(feed_forward, MLP)
        assert isinstance(mixer.positions, Rope)
        share = mixer.positions.rotary_width / mixer.head_width
        more = {
            "intermediate_size": _rows(feed_forward.up_proj),
            "layer_norm_eps": options.norm_eps,
            "use_parallel_residual": options.parallel_residual,
            "attention_bias": qkv,
            "hidden_act": "gelu",
            "rope_parameters": scaling | {"partial_rotary_factor": share},
        }
        return Foreign("GPTNeoXForCausalLM", "gpt_neox", sizes | more, convert.GPT_NEOX)
    _require(options.norm == "rms_norm", f"norm={options.norm}")
    _require(not options.parallel_residual, "parallel_residual with RMSNorm")
    _require(type(feed_forward) is SwiGLU, "its feed-forward")
    assert isinstance(feed_forward, SwiGLU)
    assert isinstance(mixer.positions, Rope)
    _require(mixer.positions.rotary_width == mixer.head_width, "partial_rotary_factor with RMSNorm")
    sizes |= {
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_width,
        "intermediate_size": _rows(feed_forward.up_proj),
        "rms_norm_eps": options.norm_eps,
        "hidden_act": "silu",
    }
    name, more = _descendant(mixer, feed_forward, options.norm_eps, window)
    return Foreign(f"{name}ForCausalLM", name.lower(), sizes | more, convert.LLAMA)


def _descendant(
    mixer: SoftmaxAttention, feed_forward: SwiGLU, eps: float, window: int | None
) -> tuple[str, dict[str, Any]]:
    """Which of Llama's descendants has these parts, and what its config.json says of them."""
    (qkv, output), bias = _biases(mixer), feed_forward.up_proj.bias is not None
    if mixer.q_norm is not None:
        _require(mixer.q_norm.eps == eps and not bias and qkv == output, "qk_norm with other parts")
        name, more = "Qwen3", {"attention_bias": qkv}
    elif qkv and not output:
        _require(not bias, "biases")
        name, more = "Qwen2", {}
    elif window is not None:
        _require(not (qkv or output or bias), "a sliding window with biases")
        return "Mistral", {"sliding_window": window}
    else:
        _require(qkv == output, "biases")
        return "Llama", {"attention_bias": qkv, "mlp_bias": bias}
    if window is not None:
        more |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    return name, more


def _biases(mixer: SoftmaxAttention) -> tuple[bool, bool]:
    return mixer.q_proj.bias is not None, mixer.o_proj.bias is not None


def _window(mixer: SoftmaxAttention, config: TrainConfig) -> int | None:
    """The window that is part of the model: of positions=local_rope, on which no extension acts, or
    of extension=window without kept first tokens: the last pattern of attention counts, over
    whatever frequencies come after it."""
    if isinstance(mixer.positions, LocalRope):
        assert isinstance(mixer.positions.pattern, StreamingLLM)
        return mixer.positions.pattern.window
    stages = stages_of(config)
    while stages and stages[-1][0].attention is None:
        stages.pop()
    if not stages:
        return None
    extension, pattern = stages[-1][0], stages[-1][0].attention
    assert pattern is not None
    given = pattern.options
    where = "" if len(stages) > len(config.stages) else " of an earlier stage"
    plain = extension.name == "window" and not given.get("sinks")
    _require(plain, f"extension={extension.name}{where}")
    return pattern_length(stages) if given.get("window") is None else given["window"]


def _scaling(mixer: SoftmaxAttention, config: TrainConfig) -> dict[str, Any]:
    """`rope_parameters` of the positions and of the scaling that the model was trained under."""
    assert isinstance(mixer.positions, Rope)
    base, in_force = mixer.positions.rope_base, scalings(stages_of(config))
    _require(len(in_force) <= 1, "scalings of several stages")
    if not in_force:
        return {"rope_type": "default", "rope_theta": base}
    (extension,) = in_force
    part, factor, length = extension.scaling, extension.factor, _length_before(config)
    assert part is not None
    _require(extension.step is None, "extension.step")
    kind = part.target.rpartition(".")[2]
    found: dict[str, Any] = {"rope_theta": base, "factor": factor}
    given, before = part.options, {"original_max_position_embeddings": length}
    if kind == "linear":
        return found | {"rope_type": "linear"}
    if kind == "dynamic_ntk":
        trained = trained_length(config.extension, config.seq_len)
        _require(length == trained, "dynamic_ntk of another length than the trained one")
        return found | {"rope_type": "dynamic"}
    if kind == "llama3":
        names = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return found | before | {"rope_type": kind, **_given(given, names)}
    if kind == "yarn":
        plain = given.get("ramp", "code") == "code" and given.get("mix", "arith") == "arith"
        _require(plain and not given.get("mscale_all_dim"), "a form of yarn that it has not")
        names = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
        scaled = part.load()(
            width=mixer.positions.rotary_width, factor=factor, original_length=length
        )
        more = _given(given, names) | {"attention_factor": scaled[1]}
        return found | before | {"rope_type": kind, **more}
    if kind == "longrope" and not given.get("n_hat"):
        scaled = part.load()(
            width=mixer.positions.rotary_width, factor=factor, original_length=length
        )
        pairs = mixer.positions.rotary_width // 2
        more = {
            "long_factor": list(given["long_factors"]),
            "short_factor": list(given.get("short_factors") or [1.0] * pairs),
            "attention_factor": scaled[1],
        }
        return found | before | {"rope_type": kind, **more}
    raise _DiffersError(f"extension.scaling={kind}")


def _length_before(config: TrainConfig) -> int:
    """L of the scaling in force, which what takes its place counts from: where stages differ in it,
    what takes theirs counts from the first's, and a file says one."""
    stages = stages_of(config)
    lengths = [
        original_length(extension, stages[:number], seq_len)
        for number, (extension, seq_len) in enumerate(stages)
        if extension.scaling is not None
    ]
    _require(lengths[0] == lengths[-1], "another original length than that of an earlier stage")
    return lengths[-1]


def _given(options: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options.get(name, default) for name, default in names.items()}


def _rows(layer: nn.Linear) -> int:
    return layer.out_features


def _whole(inner: int, width: int, matched: bool) -> int:
    """How many times the width; MambaConfig knows whole ones alone. `matched`: match=params set the
    inner width."""
    remedy = f"; {trained_with('match=none')}" if matched else ""
    why = f"an inner width of {inner}, no multiple of width={width}{remedy}"
    _require(inner % width == 0, why)
    return inner // width


def trained_with(*words: str) -> str:
    """The settings, in words, that a run needs for an architecture there."""
    return f"trained with {' '.join(words)} it is exported so"


def _require_taken(options: Model, *names: str) -> None:
    """Every option of a model that is not among the names is at its default."""
    for name, default in Model.unwritten.items():
        _require(name in names or getattr(options, name) == default, name)


def _require_known(part: Component, made: nn.Module, what: str) -> None:
    """Every option of a part that is not in OF_A_PART is at its default."""
    defaults = inspect.signature(type(made)).parameters
    for name, value in part.options.items():
        known = name in OF_A_PART.get(type(made), ()) or value == defaults[name].default
        _require(known, f"{name} of {what}")


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise _DiffersError(why)
