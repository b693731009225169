"""Translates a checkpoint's `config.json` into the options of `train.py` that build the same model.

A family is a table: which keys are read, which must have the one value that the zoo computes, and
which say nothing about the mathematics. A key in none of them is refused by name, so that nothing a
checkpoint needs is ever ignored. The first line of a
family's function is its row in README's table.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zoo.errors import UserError, choose
from zoo.pretrained.config_reader import Config, Reader, unsupported
from zoo.pretrained.rope_scaling import rotary


@dataclass
class Description:
    """A model as options of `train.py`: `words` such as `model.mixer.kv_heads=3`."""

    family: str
    words: list[str]
    vocab_size: int
    end_token: int | None  # ends a document
    own: dict[str, Any] | None = None  # sections of the zoo's configuration, of a model it exported


TRAINED = "zoo_training"  # the key of an exported config.json for what no family's keys can say
OWN_SECTIONS = ("model", "size", "match", "objective", "extension", "seq_len")


def describe(config: Config) -> Description:
    """The options that build a checkpoint's model.

    Args:
        config: the contents of its `config.json`.

    Raises:
        UserError: for an unknown family, and for a key or a value that cannot be honoured.
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("model_type"), str):
        raise UserError("config.json: names no model_type. Give the folder of a checkpoint.")
    if config["model_type"] == "zoo":
        return _own(Reader(config))
    name = choose("model_type", config["model_type"], FAMILIES)
    reader = Reader(config)
    words = FAMILIES[name](reader)
    words += _trained(reader, any(word.startswith("seq_len=") for word in words))
    vocab_size = reader.number("vocab_size")
    end = config.get("eos_token_id")
    if isinstance(end, list):
        end = end[0] if end else None
    reader.finish()
    return Description(name, ["match=none", *words], vocab_size, end)


def _own(read: Reader) -> Description:
    """A model that the zoo exported in its own form."""
    own, end = read.get("zoo"), read.get("eos_token_id")
    if not isinstance(own, dict) or {*own} != {*OWN_SECTIONS}:
        raise UserError(f"config.json: zoo: must have {', '.join(OWN_SECTIONS)}.")
    vocab_size, words = read.number("vocab_size"), _trained(read, own_length=True)
    read.finish()
    return Description("zoo", words, vocab_size, end, own)


def _trained(read: Reader, own_length: bool) -> list[str]:
    """How a model that the zoo exported was trained; the length, unless it has another key."""
    found = read.get(TRAINED, {})
    if not isinstance(found, dict) or not {*found} <= {"seq_len", "precision"}:
        raise UserError(f"config.json: {TRAINED}: must have seq_len and precision alone.")
    options = {"seq_len": "seq_len", "precision": "trainer.precision"}
    names = [name for name in found if not (own_length and name == "seq_len")]
    return [f"{options[name]}={found[name]}" for name in names]


def _llama(read: Reader) -> list[str]:
    """Llama 1 to 3 and its descendants under the same name."""
    return [*_transformer(read), *_feed_forward_bias(read), *_biases(read, "qkv", "output")]


def _mistral(read: Reader) -> list[str]:
    """Mistral, with a sliding window in all layers or none."""
    return _transformer(read)


def _qwen2(read: Reader) -> list[str]:
    """Qwen2 and Qwen2.5: biases of queries, keys and values."""
    return [*_transformer(read), "model.mixer.qkv_bias=true"]


def _qwen3(read: Reader) -> list[str]:
    """Qwen3: normalised queries and keys, heads of any width."""
    eps = read.number("rms_norm_eps")
    norms = ["model.mixer.qk_norm=true", f"model.mixer.norm_eps={eps}"]
    return [*_transformer(read), *norms, *_biases(read, "qkv", "output")]


def _biases(read: Reader, *which: str) -> list[str]:
    return [f"model.mixer.{one}_bias=true" for one in which if read.get("attention_bias", False)]


def _feed_forward_bias(read: Reader) -> list[str]:
    return ["model.feed_forward.bias=true"] if read.get("mlp_bias", False) else []


def _transformer(read: Reader) -> list[str]:
    """What the families that descend from Llama have in common."""
    width, heads = read.number("hidden_size"), read.number("num_attention_heads")
    read.only("hidden_act", "silu")
    read.only("pretraining_tp", 1)
    read.only("rope_interleaved", False)
    read.only("partial_rotary_factor", 1.0)
    head_width, length = read.get("head_dim"), read.number("max_position_embeddings")
    words = [
        "model=transformer",
        f"model.mixer.kv_heads={read.get('num_key_value_heads', heads)}",
        f"model.feed_forward.hidden_width={read.number('intermediate_size')}",
        *_backbone(read, width, heads, "rms_norm_eps", False),
        f"seq_len={length}",
        *rotary(read, length),
    ]
    if head_width is not None and head_width * heads != width:
        words += [f"model.mixer.head_width={head_width}"]
    window = _window(read)
    if window is not None and window < length:
        if any(word.startswith("extension=") for word in words):
            raise unsupported("sliding_window", window)
        words += ["extension=window", f"extension.attention.window={window}"]
    return words


def _window(read: Reader) -> int | None:
    """The sliding window of all layers; None without one."""
    window, kinds = read.get("sliding_window"), read.get("layer_types", [])
    slides = read.get("use_sliding_window", True)
    first = read.get("max_window_layers", 0)  # before it, layers see all keys
    if kinds:
        if {*kinds} not in ({"full_attention"}, {"sliding_attention"}):
            raise unsupported("layer_types", kinds)
        slides = kinds[0] == "sliding_attention"
    elif slides and window is not None and first >= read.number("num_hidden_layers"):
        slides = False
    elif slides and window is not None and first > 0:
        raise unsupported("max_window_layers", first)
    return window if slides else None


def _gpt_neox(read: Reader) -> list[str]:
    """GPT-NeoX and Pythia: parallel halves, a part of each head rotated, LayerNorm, biases."""
    width, heads = read.number("hidden_size"), read.number("num_attention_heads")
    length = read.number("max_position_embeddings")
    read.only("hidden_act", "gelu")
    parameters = dict(read.get("rope_parameters", {}))
    share = parameters.pop("partial_rotary_factor", None) or read.get("rotary_pct", 0.25)
    parallel = read.get("use_parallel_residual", True)
    inner = Reader({**read.config, "rope_parameters": parameters}, read.read)
    return [
        "model=transformer",
        "model.norm=layer_norm",
        f"model.parallel_residual={'true' if parallel else 'false'}",
        *[f"model.mixer.{which}_bias={_switch(read, 'attention_bias')}" for which in BIASES],
        "model.feed_forward._target_=zoo.mixers.feed_forward.MLP",
        f"model.feed_forward.hidden_width={read.number('intermediate_size')}",
        *_backbone(read, width, heads, "layer_norm_eps", False),
        f"seq_len={length}",
        *rotary(inner, length, "rotary_emb_base"),
        f"model.positions.partial_rotary_factor={float(share)}",
    ]


BIASES = ("qkv", "output")


def _switch(read: Reader, key: str) -> str:
    return "true" if read.get(key, True) else "false"


def _backbone(read: Reader, width: int, heads: int, eps: str, tied: bool) -> list[str]:
    """`tied` is what the family's config.json leaves out."""
    tied = read.get("tie_word_embeddings", tied)
    return [
        f"size.width={width}",
        f"size.layers={read.number('num_hidden_layers')}",
        f"size.heads={heads}",
        f"model.norm_eps={read.number(eps)}",
        f"model.tied={'true' if tied else 'false'}",
    ]


def _mamba(read: Reader) -> list[str]:
    """Mamba."""
    width = read.number("hidden_size")
    inner = read.get("intermediate_size") or int(read.get("expand", 2) * width)
    read.only("expand", inner / width)
    rank = read.get("time_step_rank", "auto")
    read.only("use_bias", False)
    read.only("use_conv_bias", True)
    read.only("hidden_act", "silu")
    return [
        "model=mamba",
        f"model.mixer.inner_width={inner}",
        f"model.mixer.state_size={read.number('state_size')}",
        f"model.mixer.conv_width={read.number('conv_kernel')}",
        f"model.mixer.dt_rank={math.ceil(width / 16) if rank == 'auto' else rank}",
        *_backbone(read, width, 1, "layer_norm_epsilon", True),
    ]


INFINITY = {"__float__": "Infinity"}  # as transformers writes it into JSON


def _falcon_mamba(read: Reader) -> list[str]:
    """Falcon-Mamba: a Mamba that normalises dt, B and C."""
    return [*_mamba(read), f"model.mixer.input_norm_eps={read.get('mixer_rms_eps', 1e-6)}"]


def _rwkv(read: Reader) -> list[str]:
    """RWKV-4."""
    width = read.number("hidden_size")
    read.only("attention_hidden_size", width)
    return [
        "model=rwkv4",
        "model.norm=layer_norm",
        "model.embedding_norm=true",
        f"model.feed_forward.hidden_width={read.get('intermediate_size', 4 * width)}",
        *_backbone(read, width, 1, "layer_norm_epsilon", False),
        f"seq_len={read.number('context_length')}",
    ]


def _mamba2(read: Reader) -> list[str]:
    """Mamba-2, of one group."""
    width = read.number("hidden_size")
    heads, head_width = read.number("num_heads"), read.number("head_dim")
    read.only("expand", heads * head_width / width)
    read.only("n_groups", 1)
    read.only("use_bias", False)
    read.only("use_conv_bias", True)
    read.only("hidden_act", "silu")
    read.only("rms_norm", True)
    read.only("norm_before_gate", False)
    read.only("time_step_limit", *([0.0, end] for end in (math.inf, "Infinity", INFINITY)))
    read.get("time_step_rank")  # unused in this architecture
    return [
        "model=mamba2",
        f"model.mixer.heads={heads}",
        f"model.mixer.head_width={head_width}",
        f"model.mixer.state_size={read.number('state_size')}",
        f"model.mixer.conv_width={read.number('conv_kernel')}",
        f"model.mixer.norm_eps={read.number('layer_norm_epsilon')}",
        *_backbone(read, width, 1, "layer_norm_epsilon", True),
    ]


FAMILIES: dict[str, Callable[[Reader], list[str]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gpt_neox": _gpt_neox,
    "mamba": _mamba,
    "falcon_mamba": _falcon_mamba,
    "mamba2": _mamba2,
    "rwkv": _rwkv,
}
