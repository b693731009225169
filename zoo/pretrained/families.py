"""Translates a checkpoint's `config.json` into the options of `train.py` that build the same model.

A family is a table: which keys are read, which must have the one value that the zoo computes, and
which say nothing about the mathematics. A key in none of them is refused by name, so that nothing a
checkpoint needs is ever ignored. A key that the file leaves out has the default of that family's
configuration in `transformers` (ABSENT), and is refused where each checkpoint has its own: sizes,
epsilons of norms. The first line of a family's function is its row in README's table.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zoo.errors import UserError, choose
from zoo.pretrained import gemma, llama
from zoo.pretrained.config_reader import Config, Layers, Reader, check_kind
from zoo.pretrained.llama import backbone


@dataclass
class Description:
    """A model as options of `train.py`: `words` such as `model.mixer.kv_heads=3`."""

    family: str
    words: list[str]
    vocab_size: int
    end_tokens: Sequence[int]  # end what the model writes; the first ends a document
    layers: list[list[str]] | None = None  # further words of each layer, where layers differ
    own: dict[str, Any] | None = None  # sections of the zoo's configuration, of a model it exported
    notes: Sequence[str] = ()  # where the zoo computes otherwise, in words

    @property
    def end_token(self) -> int | None:
        """The token that ends a document; None where the checkpoint names none."""
        return self.end_tokens[0] if self.end_tokens else None


TRAINED = "zoo_training"  # the key of an exported config.json for what no family's keys can say
OWN_SECTIONS = ("model", "size", "match", "objective", "extension", "seq_len")
STAGES = "stages"  # of a run that was tuned more than once, beside these sections


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
    reader = Reader(config, ABSENT.get(name, {}))
    words, layers = FAMILIES[name](reader), None
    if not isinstance(words, list):
        words, layers = words
    words += _trained(reader, any(word.startswith("seq_len=") for word in words))
    vocab_size = reader.number("vocab_size")
    ends = end_tokens(reader)
    reader.finish()
    words = ["match=none", *words]
    return Description(name, words, vocab_size, ends, layers, notes=[*reader.notes])


def end_tokens(read: Reader) -> list[int]:
    """The tokens that end what a model writes."""
    return _listed(read.get("eos_token_id"))


def _listed(ends: int | list[int] | None) -> list[int]:
    """An `eos_token_id`, which is one token, several or null, as a list."""
    if ends is None:
        return []
    return ends if isinstance(ends, list) else [ends]


def with_generation(described: Description, generation: Config, file: str) -> Description:
    """A description with the ends that a `generation_config.json` names, which count before those
    of config.json, but for the one that ends a document."""
    found = generation.get("eos_token_id")
    check_kind("eos_token_id", found, file=file)
    if found is None:
        return described
    ends = [*described.end_tokens[:1], *_listed(found)]
    return replace(described, end_tokens=[*dict.fromkeys(ends)])


def _own(read: Reader) -> Description:
    """A model that the zoo exported in its own form."""
    own, ends = read.get("zoo"), end_tokens(read)
    if not isinstance(own, dict) or {*own} - {STAGES} != {*OWN_SECTIONS}:
        raise UserError(f"config.json: zoo: must have {', '.join(OWN_SECTIONS)}.")
    vocab_size, words = read.number("vocab_size"), _trained(read, own_length=True)
    read.finish()
    return Description("zoo", words, vocab_size, ends, own=own)


def _trained(read: Reader, own_length: bool) -> list[str]:
    """How a model that the zoo exported was trained; the length, unless it has another key."""
    found = read.get(TRAINED, {})
    if not isinstance(found, dict) or not {*found} <= {"seq_len", "precision"}:
        raise UserError(f"config.json: {TRAINED}: must have seq_len and precision alone.")
    options = {"seq_len": "seq_len", "precision": "trainer.precision"}
    names = [name for name in found if not (own_length and name == "seq_len")]
    return [f"{options[name]}={found[name]}" for name in names]


def _mamba(read: Reader) -> list[str]:
    """Mamba."""
    width = read.number("hidden_size")
    inner = read.get("intermediate_size") or int(read.number("expand") * width)
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
        *backbone(read, width, 1, "layer_norm_epsilon"),
    ]


INFINITY = {"__float__": "Infinity"}  # as transformers writes it into JSON


def _falcon_mamba(read: Reader) -> list[str]:
    """Falcon-Mamba: a Mamba that normalises dt, B and C."""
    return [*_mamba(read), f"model.mixer.input_norm_eps={read.number('mixer_rms_eps')}"]


def _rwkv(read: Reader) -> list[str]:
    """RWKV-4."""
    width = read.number("hidden_size")
    read.only("attention_hidden_size", width)
    return [
        "model=rwkv4",
        "model.norm=layer_norm",
        "model.embedding_norm=true",
        f"model.feed_forward.hidden_width={read.get('intermediate_size', 4 * width)}",
        *backbone(read, width, 1, "layer_norm_epsilon"),
        f"seq_len={read.number('context_length')}",
    ]


def _rwkv7(read: Reader) -> list[str]:
    """RWKV-7, by the names of flash-linear-attention."""
    width, eps = read.number("hidden_size"), read.number("norm_eps")
    if read.get("head_dim") is None:
        head = width / read.number("num_heads")
    else:  # which counts first
        head = read.number("head_dim")
        read.get("num_heads")
    read.only("attn")  # layers of softmax attention
    read.only("hidden_act", "sqrelu")
    read.only("norm_bias", True)
    read.only("norm_first", True)
    read.only("value_dim", width, [width] * read.number("num_hidden_layers"))
    hidden = 32 * math.ceil(width * read.get("hidden_ratio", 4) / 32)
    ranks = {"decay": "decay", "a": "rate", "v": "value", "gate": "gate"}
    return [
        "model=rwkv7",
        "model.norm=layer_norm",
        "model.embedding_norm=true",
        *[
            f"model.mixer.{ours}_rank={read.number(f'{theirs}_low_rank_dim')}"
            for theirs, ours in ranks.items()
        ],
        f"model.mixer.norm_eps={head * eps}",
        f"model.feed_forward.hidden_width={read.get('intermediate_size', hidden)}",
        *backbone(read, width, int(width // head), "norm_eps"),
        f"seq_len={read.number('max_position_embeddings')}",
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
        *backbone(read, width, 1, "layer_norm_epsilon"),
    ]


FAMILIES: dict[str, Callable[[Reader], list[str] | Layers]] = {
    "llama": llama.llama,
    "mistral": llama.mistral,
    "qwen2": llama.qwen2,
    "qwen3": llama.qwen3,
    "phi3": llama.phi3,
    "gemma": gemma.gemma,
    "gemma2": gemma.gemma2,
    "gemma3_text": gemma.gemma3,
    "recurrent_gemma": gemma.recurrent_gemma,
    "gpt_neox": llama.gpt_neox,
    "mamba": _mamba,
    "falcon_mamba": _falcon_mamba,
    "mamba2": _mamba2,
    "rwkv": _rwkv,
    "rwkv7": _rwkv7,
    "rwkv7_fla": _rwkv7,  # its name in early checkpoints
}

SLIDING = {"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32}
TIED = {"tie_word_embeddings": True}
LOCAL = {"num_key_value_heads": 4, "sliding_window": 4096, "query_pre_attn_scalar": 256}
MAMBA = {"expand": 2, **TIED}
ABSENT: dict[str, dict[str, Any]] = {  # what a key is that a family's config.json leaves out
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": SLIDING,
    "qwen3": {"head_dim": 128, **SLIDING},
    "phi3": {"original_max_position_embeddings": 4096},
    "gemma": {"num_key_value_heads": 16, "head_dim": 256, **TIED},
    "gemma2": {
        **{"head_dim": 256, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
        **LOCAL,
        **TIED,
    },
    "gemma3_text": {"head_dim": 256, **LOCAL, **TIED},
    "recurrent_gemma": {
        "block_types": ["recurrent", "recurrent", "attention"],
        "logits_soft_cap": 30.0,
        **TIED,
    },
    "gpt_neox": {"attention_bias": True, "use_parallel_residual": True, "rotary_pct": 0.25},
    "mamba": MAMBA,
    "falcon_mamba": {"mixer_rms_eps": 1e-6, **MAMBA},
    "mamba2": {"expand": 2, "n_groups": 8},
    "rwkv7": {"head_dim": 64},
    "rwkv7_fla": {"head_dim": 64},
}
