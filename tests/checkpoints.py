"""Tiny checkpoints of every family, saved by `transformers`, and how they are opened here."""

from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.model.backbone import Backbone
from zoo.model.pretrained import load_pretrained
from zoo.pretrained.checkpoint import check_checkpoint
from zoo.pretrained.families import describe
from zoo.pretrained.options import pretrained_config
from zoo.pretrained.weights import read_json

transformers = pytest.importorskip("transformers")

VOCAB = 96
TEXT = {"name": "text", "path": "books", "tokenizer": "bytes", "cache": ".data"}
TEXT |= {"eval_documents": "whole", "passkey": 0.0}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
MAMBA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
}
NEOX = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
    **{"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": 0},
}
GEMMA2 = GEMMA | {"sliding_window": 17, "query_pre_attn_scalar": 10}
GRIFFIN = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 1, "attention_window_size": 17},
    **{"pad_token_id": 0},
}
PHI3 = LLAMA | {"pad_token_id": 0, "original_max_position_embeddings": 64}
RWKV = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}


def scaled(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


PAIRS = [1.0 + i / 4 for i in range(4)]  # of heads of 8 channels
SU = {"original_max_position_embeddings": 16, "short_factor": PAIRS, "long_factor": PAIRS}
SU_FACTORS = {"short_factor": PAIRS, "long_factor": PAIRS}
CASES = {
    "llama": ("Llama", LLAMA),
    "llama, all heads, untied": ("Llama", LLAMA | {"num_key_value_heads": 4}),
    "llama, tied": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "llama, another base": (
        "Llama",
        LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "llama, linear": (
        "Llama",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama, llama3": ("Llama", LLAMA | {"rope_parameters": LLAMA3}),
    "llama, yarn": ("Llama", LLAMA | {"rope_parameters": YARN}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": None}),
    "mistral, sliding": ("Mistral", LLAMA | {"sliding_window": 17}),
    "mistral, sliding over the trained length": ("Mistral", LLAMA | {"sliding_window": 64}),
    "mistral, sliding farther": ("Mistral", LLAMA | {"sliding_window": 100}),
    "llama, yarn, attention factor": (
        "Llama",
        LLAMA | {"rope_parameters": YARN | {"attention_factor": 1.3, "truncate": False}},
    ),
    "llama, yarn, mscale": (
        "Llama",
        LLAMA | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}},
    ),
    "llama, yarn, mscale alone": ("Llama", LLAMA | {"rope_parameters": YARN | {"mscale": 0.7}}),
    "llama, longrope of one set": ("Llama", LLAMA | scaled("longrope", factor=4.0, **SU)),
    "llama, longrope, attention factor": (
        "Llama",
        LLAMA | scaled("longrope", factor=4.0, attention_factor=1.0, **SU),
    ),
    "llama, proportional": ("Llama", LLAMA | scaled("proportional", factor=2.0)),
    "llama, biases and wide heads": (
        "Llama",
        LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 12},
    ),
    "qwen2": ("Qwen2", LLAMA),
    "qwen2, tied": ("Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen2, sliding": (
        "Qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16}),
    "qwen3, tied, with biases": (
        "Qwen3",
        LLAMA | {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "phi3": ("Phi3", PHI3),
    "phi3, sliding, a part rotated": (
        "Phi3",
        PHI3 | {"sliding_window": 17} | scaled("default", partial_rotary_factor=0.5),
    ),
    "phi3, longrope": (
        "Phi3",
        PHI3 | {"original_max_position_embeddings": 16} | scaled("longrope", **SU_FACTORS),
    ),
    "gemma": ("Gemma", GEMMA),
    "gemma, untied, with biases": (
        "Gemma",
        GEMMA | {"tie_word_embeddings": False, "attention_bias": True},
    ),
    "gemma2": ("Gemma2", GEMMA2),
    "gemma2, scores capped low": ("Gemma2", GEMMA2 | {"attn_logit_softcapping": 0.05}),
    "gemma2, exact gelu": ("Gemma2", GEMMA2 | {"hidden_activation": "gelu"}),
    "gemma2, uncapped": ("Gemma2", GEMMA2 | {"attn_logit_softcapping": None}),
    "gemma2, all layers whole": (
        "Gemma2",
        GEMMA2
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"layer_types": ["full_attention"] * 3},
    ),
    "gemma3": ("Gemma3Text", GEMMA2),
    "gemma3, scaled": (
        "Gemma3Text",
        GEMMA2
        | {
            "final_logit_softcapping": 5.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            }
        },
    ),
    "recurrent_gemma": ("RecurrentGemma", GRIFFIN),
    "recurrent_gemma, another pattern": (
        "RecurrentGemma",
        GRIFFIN
        | {"block_types": ["attention", "recurrent"], "attention_bias": True, "conv1d_width": 3}
        | {"logits_soft_cap": 3.0, "partial_rotary_factor": 1.0, "tie_word_embeddings": False},
    ),
    "gpt_neox": ("GPTNeoX", NEOX),
    "gpt_neox, in turn, tied, without biases": (
        "GPTNeoX",
        NEOX
        | {"use_parallel_residual": False, "tie_word_embeddings": True, "attention_bias": False},
    ),
    "gpt_neox, yarn": (
        "GPTNeoX",
        NEOX | {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
    ),
    "falcon_mamba": ("FalconMamba", MAMBA),
    "mamba": ("Mamba", MAMBA),
    "mamba, untied": ("Mamba", MAMBA | {"tie_word_embeddings": False, "time_step_rank": 3}),
    "mamba2": (
        "Mamba2",
        MAMBA | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "tie_word_embeddings": False},
    ),
    "mamba2, another epsilon": (
        "Mamba2",
        MAMBA | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "layer_norm_epsilon": 0.1},
    ),
    "rwkv": ("Rwkv", RWKV),
    "rwkv, tied": ("Rwkv", RWKV | {"tie_word_embeddings": True, "intermediate_size": 48}),
}


def save(folder: Path, case: str, **more) -> torch.nn.Module:
    """A model of random weights, saved as `transformers` saves it."""
    family, options = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    name = family.removesuffix("Text")  # of a configuration alone
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for name, weight in model.named_parameters():  # norms and biases start at one and zero
        if weight.dim() == 1 and "dt_bias" not in name and "A_log" not in name:
            weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder, **more)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return model


def opened(folder: Path, dtype: torch.dtype | None = torch.float32) -> Backbone:
    check_checkpoint(folder)
    described = describe(read_json(folder / "config.json"))
    config = pretrained_config(described, folder, TEXT, folder)
    return load_pretrained(config, dtype, described).eval().requires_grad_(False)
