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
    return transformer(read)


def qwen2(read: Reader) -> list[str]:
    """Qwen2 and Qwen2.5: biases of queries, keys and values."""
    return [*transformer(read), "model.mixer.qkv_bias=true"]


def qwen3(read: Reader) -> list[str]:
    """Qwen3: normalised queries and keys, heads of any width."""
    eps = read.number("rms_norm_eps")
    norms = ["model.mixer.qk_norm=true", f"model.mixer.norm_eps={eps}"]
    return [*transformer(read), *norms, *biases(read, "qkv", "output")]


def biases(read: Reader, *which: str) -> list[str]:
    return [f"model.mixer.{one}_bias=true" for one in which if read.get("attention_bias", False)]


def _feed_forward_bias(read: Reader) -> list[str]:
    return ["model.feed_forward.bias=true"] if read.get("mlp_bias", False) else []


def phi3(read: Reader) -> list[str]:
    """Phi-3 and Phi-4: fused projections, a part of each head rotated."""
    share, inner = partial_rotary(read, 1.0)
    read.get("original_max_position_embeddings")  # counts with a scaling alone
    words = transformer(inner)
    return words if share == 1 else [*words, f"model.positions.partial_rotary_factor={share}"]


def transformer(read: Reader, act: str | None = "silu", tied: bool = False) -> list[str]:
    """What the families that descend from Llama have in common.

    `act` is the one that must be given, if the caller has not looked; `tied` what is left out.
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
        *backbone(read, width, heads, "rms_norm_eps", tied),
        f"seq_len={length}",
        *rotary(read, length),
    ]
    if head_width is not None and head_width * heads != width:
        words += [f"model.mixer.head_width={head_width}"]
    window = _window(read)
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
    """The sliding window of all layers; None without one."""
    window, kinds = read.optional("sliding_window"), read.get("layer_types", [])
    slides = read.get("use_sliding_window", True)
    first = read.optional("max_window_layers") or 0  # before it, layers see all keys
    if kinds:
        if {*kinds} not in ({"full_attention"}, {"sliding_attention"}):
            raise unsupported("layer_types", kinds)
        slides = kinds[0] == "sliding_attention"
    elif slides and window is not None and first >= read.number("num_hidden_layers"):
        slides = False
    elif slides and window is not None and first > 0:
        raise unsupported("max_window_layers", first)
    return window if slides else None


def gpt_neox(read: Reader) -> list[str]:
    """GPT-NeoX and Pythia: parallel halves, a part of each head rotated, LayerNorm, biases."""
    width, heads = read.number("hidden_size"), read.number("num_attention_heads")
    length = read.number("max_position_embeddings")
    read.only("hidden_act", "gelu")
    share, inner = partial_rotary(read, read.get("rotary_pct", 0.25))
    parallel = read.get("use_parallel_residual", True)
    return [
        "model=transformer",
        "model.norm=layer_norm",
        f"model.parallel_residual={'true' if parallel else 'false'}",
        *[f"model.mixer.{which}_bias={_switch(read, 'attention_bias')}" for which in BIASES],
        "model.feed_forward._target_=zoo.mixers.feed_forward.MLP",
        f"model.feed_forward.hidden_width={read.number('intermediate_size')}",
        *backbone(read, width, heads, "layer_norm_eps", False),
        f"seq_len={length}",
        *rotary(inner, length, "rotary_emb_base"),
        f"model.positions.partial_rotary_factor={share}",
    ]


BIASES = ("qkv", "output")


def _switch(read: Reader, key: str) -> str:
    return "true" if read.get(key, True) else "false"


def backbone(read: Reader, width: int, heads: int, eps: str, tied: bool) -> list[str]:
    """`tied` is what the family's config.json leaves out."""
    tied = read.get("tie_word_embeddings", tied)
    return [
        f"size.width={width}",
        f"size.layers={read.number('num_hidden_layers')}",
        f"size.heads={heads}",
        f"model.norm_eps={read.number(eps)}",
        f"model.tied={'true' if tied else 'false'}",
    ]


def partial_rotary(read: Reader, default: float) -> tuple[float, Reader]:
    """The share of each head that is rotated, and a reader of the config without it.

    Of `proportional`, which depends on it, the reader keeps it.
    """
    parameters = dict(read.get("rope_parameters", {}) or read.get("rope_scaling", {}))
    share = parameters.pop("partial_rotary_factor", None)
    share = share or read.get("partial_rotary_factor", default)
    if rope_type(parameters) == "proportional":
        parameters["partial_rotary_factor"] = share
    without = {"rope_parameters": parameters, "rope_scaling": None, "partial_rotary_factor": None}
    return float(share), read.changed(**without)
