"""Reads a GGUF file (llama.cpp) as what a `transformers` checkpoint folder would hold.

Its metadata becomes a `config.json`, its tensors are dequantised to float32 under the names of
`transformers`, its tokens and merges become a `tokenizers` JSON. llama.cpp lays out the rows of the
query and key projections so that a rotary pair is two neighbours (2i, 2i + 1); here and in
`transformers` it is (i, i + d/2), so that the rows are put back.

Source: the GGUF specification of ggml, and llama.cpp's converter for the permutation.
"""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import UserError, refuse

if TYPE_CHECKING:  # torch takes seconds, and what is refused is refused at once
    from torch import Tensor

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SAFETENSORS = "Use the model's safetensors"
SPECIAL = (3, 4)  # token types: control, user-defined
DIGITS = {"type": "Digits", "individual_digits": True}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
PRE_TOKENIZERS = {  # tokenizer.ggml.pre -> how text is cut before merging
    "default": [BYTE_LEVEL],
    "gpt-2": [BYTE_LEVEL],
    "smollm": [DIGITS, BYTE_LEVEL],
}
# Metadata that describes the file and not the model.
DESCRIPTIVE = re.compile(r"(GGUF|general|quantize|tokenizer)\.")


class GGUFFile:
    """One GGUF file, opened once and mapped.

    Raises UserError where the package `gguf` is not installed, the file is damaged or it holds
    another architecture than a Llama.
    """

    def __init__(self, path: Path) -> None:
        try:
            gguf: Any = importlib.import_module("gguf")
        except ImportError:
            raise UserError(
                f"checkpoint={path}: GGUF files need the package gguf. Run pip install gguf."
            ) from None
        self.path, self._gguf = path, gguf
        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            line = (str(error).splitlines() or [""])[0]
            raise UserError(f"checkpoint={path}: must be a whole GGUF file ({line}).") from None
        if (kind := self._field("general.architecture")) != "llama":
            raise UserError(
                f"checkpoint={path}: general.architecture={kind} is not read from GGUF. "
                "Use the model's safetensors."
            )

    def _field(self, name: str, default: Any = None) -> Any:
        field = self._reader.get_field(name)
        return default if field is None else field.contents()

    def config(self) -> dict[str, Any]:
        """The file's hyper-parameters under the names of `transformers`' LlamaConfig."""
        known = {
            "hidden_size": "embedding_length",
            "num_hidden_layers": "block_count",
            "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv",
            "intermediate_size": "feed_forward_length",
            "max_position_embeddings": "context_length",
            "rms_norm_eps": "attention.layer_norm_rms_epsilon",
            "rope_theta": "rope.freq_base",
            "head_dim": "rope.dimension_count",
            "vocab_size": "vocab_size",
        }
        read = {f"llama.{name}" for name in known.values()}
        for name in self._reader.fields:
            if name not in read and not DESCRIPTIVE.match(name):
                refuse("checkpoint", self.path, f"{name} is not supported", SAFETENSORS)
        config = {ours: self._field(f"llama.{name}") for ours, name in known.items()}
        config = {key: value for key, value in config.items() if value is not None}
        # Stored in float32: 1e-5 comes back as 9.999999747378752e-06.
        for key in ("rms_norm_eps", "rope_theta"):
            config[key] = float(f"{config[key]:.6g}")
        names = {tensor.name for tensor in self._reader.tensors}
        return {
            "model_type": "llama",
            "tie_word_embeddings": "output.weight" not in names,
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
            **config,
        }

    def weights(self) -> "dict[str, Tensor]":
        """Every tensor, dequantised to float32, under the names of LlamaForCausalLM."""
        heads = self._field("llama.attention.head_count")
        groups = self._field("llama.attention.head_count_kv", heads)
        return dict(self._tensors({"attn_q": heads, "attn_k": groups}))

    def _tensors(self, heads: dict[str, int]) -> "Iterator[tuple[str, Tensor]]":
        import torch

        for stored in self._reader.tensors:
            found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", stored.name)
            block, kind = found.groups("") if found else ("", "")
            if kind not in NAMES:
                rule = f"the model has no tensor {stored.name}"
                refuse("checkpoint", self.path, rule, SAFETENSORS)
            values = self._gguf.quants.dequantize(stored.data, stored.tensor_type)
            tensor = torch.from_numpy(values.copy() if not values.flags.writeable else values)
            if kind in heads:
                tensor = _halves_apart(tensor, heads[kind])
            place = f"model.layers.{block}." if block else ""
            yield f"{place}{NAMES[kind]}.weight", tensor

    def tokenizer(self) -> str:
        """The byte-level BPE of the file as a `tokenizers` JSON.

        Raises UserError for another kind of tokeniser, or another way to cut text before merging.
        """
        kind, pre = (
            self._field("tokenizer.ggml.model"),
            self._field("tokenizer.ggml.pre", "default"),
        )
        if kind != "gpt2" or pre not in PRE_TOKENIZERS:
            raise UserError(
                f"checkpoint={self.path}: tokenizer.ggml.model={kind}, pre={pre} is unknown. Give "
                "the model's own file: data.tokenizer=<tokenizer.json>."
            )
        tokens, types = (
            self._field("tokenizer.ggml.tokens"),
            self._field("tokenizer.ggml.token_type"),
        )
        merges = [pair.split(" ") for pair in self._field("tokenizer.ggml.merges")]
        special = [i for i, kind in enumerate(types) if kind in SPECIAL]
        bos = self._field("tokenizer.ggml.bos_token_id")
        bos = bos if self._field("tokenizer.ggml.add_bos_token", False) else None
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added = [{"id": i, "content": tokens[i], "special": True, **flags} for i in special]
        model = {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        }
        return json.dumps(
            {
                "version": "1.0",
                "added_tokens": added,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
                "post_processor": None if bos is None else _before(tokens[bos], bos),
                "decoder": BYTE_LEVEL,
                "model": model,
            },
            ensure_ascii=False,
        )


def _before(token: str, number: int) -> dict[str, Any]:
    """The post-processor that puts a token before every text."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    one, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, one],
        "pair": [special, one, other],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _halves_apart(weight: "Tensor", heads: int) -> "Tensor":
    """Rows (2i, 2i + 1) of each head as rows (i, i + d/2)."""
    pairs = weight.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()
