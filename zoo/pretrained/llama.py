"""The families that descend from Llama, and GPT-NeoX: rotary attention in every layer, alike.

Each function translates a `config.json` into options of `train.py`; see zoo.pretrained.families.
"""

from zoo.config.domains import MAX_WINDOW
from zoo.config.groups import extensions
from zoo.pretrained.config_reader import Reader, unsupported
from zoo.pretrained.rope_scaling import rope_type, rotary


def llama(read: Reader) -> list[str]:
    """Llama 1 to 3 and its descendants under the same name."""
    return [*transformer(read), *_feed_forward_bias(read), *biases(read, "qkv", "output")]


def mistral(read: Reader) -> list[str]:
    """Mistral, with a sliding window in all layers or none."""
    return transformer(read, window=read.get("sliding_window"))


def qwen2(read: Reader) -> list[str]:
    """Qwen2 and Qwen2.5: biases of queries, keys and values."""
    return [*transformer(read, window=_window(read)), "model.mixer.qkv_bias=true"]


def qwen3(read: Reader) -> list[str]:
    """Qwen3: normalised queries and keys, heads of any width."""
    eps = read.number("rms_norm_eps")
    norms = ["model.mixer.qk_norm=true", f"model.mixer.norm_eps={eps}"]
    return [*transformer(read, window=_window(read)), *norms, *biases(read, "qkv", "output")]


def biases(read: Reader, *which: str) -> list[str]:
    return [f"model.mixer.{one}_bias=true" for one in which if read.get("attention_bias", False)]


def _feed_forward_bias(read: Reader) -> list[str]:
    return ["model.feed_forward.bias=true"] if read.get("mlp_bias", False) else []


def phi3(read: Reader) -> list[str]:
    """Phi-3 and Phi-4: fused projections, a part of each head rotated."""
    share, inner = partial_rotary(read, read.get("partial_rotary_factor", 1.0))
    read.get("original_max_position_embeddings")  # counts with a scaling alone
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):  # of published files, read by none
        read.only(key, False)
    inner = inner.changed(partial_rotary_factor=None)
    words = transformer(inner, window=read.get("sliding_window"))
    return words if share == 1 else [*words, f"model.positions.partial_rotary_factor={share}"]


def transformer(read: Reader, act: str | None = "silu", window: int | None = None) -> list[str]:
    """What the families that descend from Llama have in common.

    `act` is the one that must be given, if the caller has not looked; `window` the sliding window
    of all layers, of a family that has one.
    """
    width, heads = read.number("hidden_size"), read.number("num_attention_heads")
    if act is not None:
        read.only("hidden_act", act)
    read.only("pretraining_tp", 1)
    read.only("rope_interleaved", False)
    read.only("partial_rotary_factor", 1.0)
    head_width, length = read.get("head_dim"), read.number("max_position_embeddings")
    words = [
        "model=transformer",
        f"model.mixer.kv_heads={read.get('num_key_value_heads', heads)}",
        f"model.feed_forward.hidden_width={read.number('intermediate_size')}",
        *backbone(read, width, heads, "rms_norm_eps"),
        f"seq_len={length}",
        *rotary(read, length),
    ]
    if head_width is not None and head_width * heads != width:
        words += [f"model.mixer.head_width={head_width}"]
    if window is None:
        return words
    scaled = any(word.startswith("extension=") for word in words)
    if scaled and window < length:
        return _windowed_and_scaled(words, window, length)
    if scaled or window > MAX_WINDOW:
        beside = "beside rope_scaling" if scaled else f"as it is over {MAX_WINDOW:,}"
        rule = f"does not act {beside}: longer texts than that are read with all keys"
        read.notes.append(f"sliding_window={window:,}: {rule}")
        return words
    if window <= length:
        return [*words, "extension=window", f"extension.attention.window={window}"]
    rule = (
        f"acts on texts of more than the {length:,} tokens trained on, and no extension beside it"
    )
    read.notes.append(f"sliding_window={window:,}: {rule}")
    return ["model.positions=local_rope", f"model.positions.window={window}", *words]


def _windowed_and_scaled(words: list[str], window: int, length: int) -> list[str]:
    """The options of a scaling, with a window of attention over it.

    Raises:
        UserError: the window is longer than the texts that the scaling is of, or the scaling
            depends on the length of the text.
    """
    given = dict(word.split("=", 1) for word in words)
    name, original = given["extension"], int(given.get("extension.original_length", length))
    if window > original or name not in ("pi", "yarn", "llama3"):
        raise unsupported("sliding_window", window)
    part = {key: str(value).lower() for key, value in extensions()[name]["scaling"].items()}
    section = ",".join(f"{key}:{value}" for key, value in part.items())
    own = [word for word in words if word != f"extension={name}"]
    return [
        "extension=window",
        f"extension.attention.window={window}",
        f"extension.scaling={{{section}}}",
        *own,
    ]


def _window(read: Reader) -> int | None:
    """The sliding window of all layers of a Qwen; None without one."""
    given = read.get("sliding_window")
    window = given if read.get("use_sliding_window", False) else None
    first, count = read.number("max_window_layers"), read.number("num_hidden_layers")
    kinds = read.get("layer_types")
    if kinds is not None:
        slides = kinds == ["sliding_attention"] * count
        if not (slides and window is not None) and kinds != ["full_attention"] * count:
            raise unsupported("layer_types", kinds)
        return window if slides else None
    if window is not None and 0 < first < count:  # before it, layers see all keys
        raise unsupported("max_window_layers", first)
    return window if first < count else None


def gpt_neox(read: Reader) -> list[str]:
    """GPT-NeoX and Pythia: parallel halves, a part of each head rotated, LayerNorm, biases."""
    width, heads = read.number("hidden_size"), read.number("num_attention_heads")
    length = read.number("max_position_embeddings")
    read.only("hidden_act", "gelu")
    share, inner = partial_rotary(read, read.number("rotary_pct"))
    return [
        "model=transformer",
        "model.norm=layer_norm",
        f"model.parallel_residual={_switch(read, 'use_parallel_residual')}",
        *[f"model.mixer.{which}_bias={_switch(read, 'attention_bias')}" for which in BIASES],
        "model.feed_forward._target_=zoo.mixers.feed_forward.MLP",
        f"model.feed_forward.hidden_width={read.number('intermediate_size')}",
        *backbone(read, width, heads, "layer_norm_eps"),
        f"seq_len={length}",
        *rotary(inner, length, "rotary_emb_base"),
        f"model.positions.partial_rotary_factor={share}",
    ]


BIASES = ("qkv", "output")


def _switch(read: Reader, key: str) -> str:
    return "true" if read.get(key, False) else "false"


def backbone(read: Reader, width: int, heads: int, eps: str) -> list[str]:
    return [
        f"size.width={width}",
        f"size.layers={read.number('num_hidden_layers')}",
        f"size.heads={heads}",
        f"model.norm_eps={read.number(eps)}",
        f"model.tied={_switch(read, 'tie_word_embeddings')}",
    ]


def partial_rotary(read: Reader, beside: float) -> tuple[float, Reader]:
    """The share of each head that is rotated, and a reader of the config without it.

    `beside` is the share that the config has beside its rotary settings, which count first.

    Of `proportional`, which depends on it, the reader keeps it.
    """
    parameters = dict(read.get("rope_parameters", {}) or read.get("rope_scaling", {}))
    share = parameters.pop("partial_rotary_factor", None) or beside
    if rope_type(parameters) == "proportional":
        parameters["partial_rotary_factor"] = share
    return float(share), read.changed(rope_parameters=parameters, rope_scaling=None)
