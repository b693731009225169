"""The Gemma families: local and global attention, capped logits, and Griffin's recurrence.

Each function translates a `config.json` into options of `train.py`; see zoo.pretrained.families.
"""

import struct

from zoo.pretrained.config_reader import Layers, Reader, unsupported
from zoo.pretrained.llama import backbone, biases, partial_rotary, transformer
from zoo.pretrained.rope_scaling import rotary

GELU_TANH = "gelu_pytorch_tanh"


def gemma(read: Reader) -> list[str]:
    """Gemma: GEGLU, scaled embeddings, norms whose weights are offsets from one."""
    read.only("use_bidirectional_attention", False)
    read.only("hidden_act", "gelu", GELU_TANH)  # gelu: what early checkpoints call the other
    read.only("hidden_activation", "gelu", GELU_TANH)  # of Gemma 2, where gelu is gelu
    exact = read.get("model_type") != "gemma" and read.get("hidden_activation") == "gelu"
    words = transformer(read, act=None)
    return [
        *words,
        *biases(read, "qkv", "output"),
        "model.norm=rms_norm_offset",
        f"model.feed_forward.activation={'gelu' if exact else 'gelu_tanh'}",
        f"model.embedding_scale={read.number('hidden_size') ** 0.5}",
    ]


def gemma2(read: Reader) -> Layers:
    """Gemma 2: windows in every other layer, capped scores and logits."""
    return _in_turn(read, 2)


def _in_turn(read: Reader, every: int) -> Layers:
    """Windows in all layers but each `every`-th, unless layer_types says which."""
    score_cap = read.optional("attn_logit_softcapping")
    cap = read.optional("final_logit_softcapping")
    scale = read.number("query_pre_attn_scalar")
    kinds = _local_layers(read, every)
    words = [*gemma(read), "model.post_norm=true", f"model.mixer.score_scale={scale**-0.5}"]
    words += [] if cap is None else [f"model.logit_softcap={float(cap)}"]
    words += [] if score_cap is None else [f"model.mixer.score_softcap={float(score_cap)}"]
    base = next(word for word in words if word.startswith("model.positions.rope_base="))
    local = [
        "model.positions=local_rope",
        f"model.positions.window={read.number('sliding_window')}",
    ]
    return words, [[*local, base] if is_local else [] for is_local in kinds]


def gemma3(read: Reader) -> Layers:
    """Gemma 3 (text): windows in five of six layers, of another rotary base; QK-norm."""
    rope = dict(read.get("rope_parameters", {}))
    local_rope = dict(rope.pop("sliding_attention", None) or {})
    base = local_rope.pop("rope_theta", None) or read.optional("rope_local_base_freq", 10000.0)
    kind = local_rope.pop("rope_type", None) or "default"
    if kind != "default" or any(value is not None for value in local_rope.values()):
        raise unsupported("rope_parameters.sliding_attention", {"rope_type": kind, **local_rope})
    whole = rope.pop("full_attention", None)
    if whole is None:
        whole = rope
    elif rope:
        raise unsupported("rope_parameters", rope)
    default = {"rope_theta": read.get("rope_theta", 1000000.0)}
    rope = {"rope_parameters": {**default, **whole}, "rope_theta": None}
    every = read.get("sliding_window_pattern", 6)
    other = read.get("_sliding_window_pattern", every)  # which `transformers` passes over
    if other != every and read.get("layer_types") is None:
        raise unsupported("_sliding_window_pattern", other)
    words, layers = _in_turn(read.changed(**rope), every)
    eps = read.number("rms_norm_eps")
    norms = ["model.mixer.qk_norm=true", "model.mixer.norm_offset=true"]
    local = [
        [*words[:-1], f"model.positions.rope_base={float(base)}"] * bool(words) for words in layers
    ]
    return [*words, *norms, f"model.mixer.norm_eps={eps}"], local


def _local_layers(read: Reader, every: int) -> list[bool]:
    """Which layers see a window alone."""
    count = read.number("num_hidden_layers")
    kinds = read.get("layer_types") or [
        "sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)
    ]
    if len(kinds) != count or not {*kinds} <= {"sliding_attention", "full_attention"}:
        raise unsupported("layer_types", kinds)
    return [kind == "sliding_attention" for kind in kinds]


def recurrent_gemma(read: Reader) -> Layers:
    """RecurrentGemma (Griffin): RG-LRU layers and attention to a window in turn."""
    width, heads = read.number("hidden_size"), read.number("num_attention_heads")
    share, inner = partial_rotary(read, read.get("partial_rotary_factor", 0.5))
    read.only("hidden_activation", GELU_TANH)
    read.only("head_dim", width // heads)
    scale = _bfloat16(width**0.5)  # as the model keeps it
    words = [
        "model=transformer",
        "model.feed_forward.bias=true",
        "model.feed_forward.activation=gelu_tanh",
        f"model.feed_forward.hidden_width={read.number('intermediate_size') // 2}",
        "model.norm=rms_norm_offset",
        f"model.embedding_scale={scale}",
        f"model.logit_softcap={float(read.number('logits_soft_cap'))}",
        *backbone(read, width, heads, "rms_norm_eps"),
        f"seq_len={GRIFFIN_LENGTH}",
    ]
    attention = [
        f"model.mixer.kv_heads={read.get('num_key_value_heads', heads)}",
        *biases(read, "qkv"),
        "model.mixer.output_bias=true",
        "model.positions=local_rope",
        f"model.positions.window={read.number('attention_window_size')}",
        *rotary(inner, GRIFFIN_LENGTH),
        f"model.positions.partial_rotary_factor={share}",
    ]
    recurrent = [
        "model=hawk",
        f"model.mixer.inner_width={read.get('lru_width', width)}",
        f"model.mixer.conv_width={read.number('conv1d_width')}",
        "model.mixer.bias=true",
        "model.mixer.first_token=whole",
        *[word for word in words if word.startswith("model.feed_forward")],
    ]
    kinds = {"recurrent": recurrent, "attention": attention}
    pattern = read.get("block_types")
    if not pattern or not {*pattern} <= {*kinds}:
        raise unsupported("block_types", pattern)
    count = read.number("num_hidden_layers")
    return words, [kinds[pattern[i % len(pattern)]] for i in range(count)]


GRIFFIN_LENGTH = 8192  # tokens that it was trained on (Botev 2024, section 2, arXiv 2404.07839)


def _bfloat16(value: float) -> float:
    """The nearest number in bfloat16, ties to even."""
    bits = int.from_bytes(struct.pack(">f", value), "big")
    bits += 0x7FFF + (bits >> 16 & 1)
    return struct.unpack(">f", (bits & 0xFFFF0000).to_bytes(4, "big"))[0]
