"""Translates a checkpoint's `config.json` into the options of `train.py` that build the same model.

A family is a table: which keys are read, which must have the one value that the zoo computes, and
which say nothing about the mathematics. A key in none of them is refused by name, so that nothing a
checkpoint asks for is ever ignored.

    model_type              model=
    llama, mistral          transformer
    mamba                   mamba
    mamba2                  mamba2
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.errors import UserError, choose

Config = Mapping[str, Any]

# Keys about files, tokens, training or execution: none changes what the model computes.
SILENT = {
    *("_attn_implementation", "_name_or_path", "architectures", "auto_map", "dtype", "model_type"),
    *("torch_dtype", "transformers_version", "transformers.js_config", "is_llama_config"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
    *("attention_dropout", "initializer_range", "use_cache", "use_mambapy"),
    "use_associative_scan",
    *("rescale_prenorm_residual", "residual_in_fp32", "chunk_size"),
    *("time_step_floor", "time_step_init_scheme", "time_step_max", "time_step_min"),
    "time_step_scale",
}


@dataclass
class Description:
    """A model as options of `train.py`: `words` such as `model.mixer.kv_heads=3`."""

    family: str
    words: list[str]
    vocab_size: int
    end_token: int | None  # ends a document


@dataclass
class _Reader:
    """Reads a config's keys, and remembers which were read."""

    config: Config
    read: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def number(self, key: str) -> Any:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"config.json: {key}={value!r}: must be a number.")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a key whose value asks for what the zoo does not compute."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise _unsupported(key, value)

    def finish(self) -> None:
        """Refuse the first key that nothing has read."""
        for key, value in self.config.items():
            if key not in self.read and key not in SILENT and value is not None:
                raise _unsupported(key, value)


def _unsupported(key: str, value: Any) -> UserError:
    return UserError(
        f"config.json: {key}={value!r}: is not supported. Use a checkpoint whose settings are all "
        "supported."
    )


def describe(config: Config) -> Description:
    """The options that build a checkpoint's model.

    Args:
        config: the contents of its `config.json`.

    Raises:
        UserError: for an unknown family, and for a key or a value that cannot be honoured.
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("model_type"), str):
        raise UserError("config.json: names no model_type. Give the folder of a checkpoint.")
    name = choose("model_type", config["model_type"], FAMILIES)
    reader = _Reader(config)
    words = FAMILIES[name](reader)
    vocab_size = reader.number("vocab_size")
    end = config.get("eos_token_id")
    if isinstance(end, list):
        end = end[0] if end else None
    reader.finish()
    return Description(name, ["match=none", *words], vocab_size, end)


def _llama(read: _Reader) -> list[str]:
    width, heads = read.number("hidden_size"), read.number("num_attention_heads")
    read.only("hidden_act", "silu")
    read.only("attention_bias", False)
    read.only("mlp_bias", False)
    read.only("pretraining_tp", 1)
    read.only("rope_interleaved", False)
    read.only("head_dim", width // heads)
    window, length = read.get("sliding_window"), read.number("max_position_embeddings")
    words = [
        "model=transformer",
        f"model.mixer.kv_heads={read.get('num_key_value_heads', heads)}",
        f"model.feed_forward.hidden_width={read.number('intermediate_size')}",
        *_backbone(read, width, heads, "rms_norm_eps", False),
        f"seq_len={length}",
        *_rotary(read, length),
    ]
    if window is not None and window < length:
        if any(word.startswith("extension=") for word in words):
            raise _unsupported("sliding_window", window)
        words += ["extension=window", f"extension.attention.window={window}"]
    return words


def _backbone(read: _Reader, width: int, heads: int, eps: str, tied: bool) -> list[str]:
    """`tied` is what the family's config.json leaves out."""
    tied = read.get("tie_word_embeddings", tied)
    return [
        f"size.width={width}",
        f"size.layers={read.number('num_hidden_layers')}",
        f"size.heads={heads}",
        f"model.norm_eps={read.number(eps)}",
        f"model.tied={'true' if tied else 'false'}",
    ]


def _rotary(read: _Reader, length: int) -> list[str]:
    """The rotary base and the scaling it was trained under (rope_scaling, or rope_parameters)."""
    old, new = read.get("rope_scaling", {}), read.get("rope_parameters", {})
    scaling = {**old, **new}
    base = scaling.pop("rope_theta", None) or read.get("rope_theta", 10000.0)
    read.only("partial_rotary_factor", 1.0)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    words = [f"model.positions.rope_base={float(base)}"]
    if kind == "default":
        _nothing_left(scaling)
        return words
    if kind not in SCALINGS:
        raise _unsupported("rope_scaling.rope_type", kind)
    return words + SCALINGS[kind](scaling, length)


def _nothing_left(scaling: Mapping[str, Any]) -> None:
    for key, value in scaling.items():
        if value is not None:
            raise _unsupported(f"rope_scaling.{key}", value)


def _option(scaling: dict[str, Any], key: str, option: str) -> list[str]:
    value = scaling.pop(key, None)
    if isinstance(value, bool):
        value = str(value).lower()
    return [] if value is None else [f"{option}={value}"]


def _scaled(name: str, options: Mapping[str, str]) -> Callable[[dict[str, Any], int], list[str]]:
    """Reads one kind of rope_scaling as the zoo's extension of that `name`."""

    def read(scaling: dict[str, Any], length: int) -> list[str]:
        before = scaling.pop("original_max_position_embeddings", None)
        factor = scaling.pop("factor", None) or (length / before if before else None)
        if factor is None:
            raise UserError("config.json: must give rope_scaling.factor.")
        words = [f"extension={name}", f"extension.factor={factor}"]
        words += [f"extension.original_length={before}"] if before else []
        for key, option in options.items():
            words += _option(scaling, key, f"extension.scaling.{option}")
        _nothing_left(scaling)
        return words

    return read


SCALINGS = {
    "linear": _scaled("pi", {}),
    "llama3": _scaled("llama3", {key: key for key in ("low_freq_factor", "high_freq_factor")}),
    "yarn": _scaled(
        "yarn",
        {key: key for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")},
    ),
}


def _mamba(read: _Reader) -> list[str]:
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


def _mamba2(read: _Reader) -> list[str]:
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
        *_backbone(read, width, 1, "layer_norm_epsilon", True),
    ]


FAMILIES: dict[str, Callable[[_Reader], list[str]]] = {
    "llama": _llama,
    "mistral": _llama,
    "mamba": _mamba,
    "mamba2": _mamba2,
}
