"""Reads a GGUF file (llama.cpp) as what a `transformers` checkpoint folder would hold.

Its metadata becomes a `config.json`, its tensors are dequantised to float32 under the names of
`transformers`, its tokens and merges become a `tokenizers` JSON. llama.cpp lays out the rows of the
query and key projections so that a rotary pair is two neighbours (2i, 2i + 1); here and in
`transformers` it is (i, i + d/2), so that the rows are put back.

Source: the GGUF specification of ggml, and llama.cpp's converter for the permutation.
"""

import importlib
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from zoo.errors import UserError, refuse, shown
from zoo.pretrained.config_reader import is_text, whole_number

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
WHOLE = "Give a whole GGUF file"
REQUIRED = object()  # of a key without a default
NORMAL, SPECIAL = 1, (3, 4)  # token types; special are control and user-defined
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
ENDS = ("eos", "eot", "eom")  # of a text, a turn and a message
# Metadata that describes the file and not the model.
DESCRIPTIVE = re.compile(r"(GGUF|general|quantize|tokenizer)\.")


KINDS: dict[str, Callable[[Any], bool]] = {  # what a key's value must be
    "an integer >= 1": whole_number(1),
    "an integer >= 0": whole_number(0),
    "a number > 0": lambda value: type(value) is float and 0 < value < math.inf,
    "true or false": lambda value: type(value) is bool,
    "a text": is_text,
    "a list of texts": lambda value: all(map(is_text, _items(value))),
    "a list of integers": lambda value: all(type(one) is int for one in _items(value)),
}
COUNT, TOKEN, NUMBER, FLAG, TEXT, TEXTS, INTEGERS = KINDS
# The names of `transformers` -> the keys below `llama.`, what they must be and llama.cpp's default.
# None leaves it to the reader of config.json, whose default is the same.
HYPER_PARAMETERS = {
    "hidden_size": ("embedding_length", COUNT, REQUIRED),
    "num_hidden_layers": ("block_count", COUNT, REQUIRED),
    "num_attention_heads": ("attention.head_count", COUNT, REQUIRED),
    "num_key_value_heads": ("attention.head_count_kv", COUNT, None),
    "intermediate_size": ("feed_forward_length", COUNT, REQUIRED),
    "max_position_embeddings": ("context_length", COUNT, REQUIRED),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", NUMBER, REQUIRED),
    "rope_theta": ("rope.freq_base", NUMBER, 10000.0),
    "head_dim": ("rope.dimension_count", COUNT, None),
    "vocab_size": ("vocab_size", COUNT, None),
}


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
            self._reader = _reader(gguf, path)
        except Exception as error:  # another package's parser, which damage may stop anywhere
            line = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise UserError(f"checkpoint={path}: must be a whole GGUF file ({line}).") from None
        if (kind := self._value("general.architecture", TEXT)) != "llama":
            self._refuse(f"general.architecture={kind} is not read from GGUF", SAFETENSORS)
        self._check_places()

    def _refuse(self, rule: str, advice: str = WHOLE) -> NoReturn:
        refuse("checkpoint", self.path, rule, advice)

    def _value(self, key: str, kind: str, default: Any = REQUIRED) -> Any:
        """The value of a key, of one of KINDS, or the default where the file has none."""
        field = self._reader.get_field(key)
        if field is None:
            if default is REQUIRED:
                self._refuse(f"has no {key}")
            return default
        try:
            value = field.contents()
        except UnicodeDecodeError:
            self._refuse(f"{key} is damaged (it is not UTF-8)")
        if not KINDS[kind](value):
            self._refuse(f"{key}={shown(value)}, which must be {kind}")
        return value

    def _check_places(self) -> None:
        """Refuse tensors that do not lie one behind the other, as the format has them."""
        step = self._reader.alignment
        place = self._reader.data_offset
        for tensor in self._reader.tensors:
            if tensor.data_offset != place:
                self._refuse(f"{tensor.name} is damaged (its place in the file)")
            place += math.ceil(tensor.n_bytes / step) * step

    def config(self) -> dict[str, Any]:
        """The file's hyper-parameters under the names of `transformers`' LlamaConfig."""
        read = {f"llama.{name}" for name, _, _ in HYPER_PARAMETERS.values()}
        read |= {"llama.attention.key_length", "llama.attention.value_length"}
        for name in self._reader.fields:
            if name not in read and not DESCRIPTIVE.match(name):
                self._refuse(f"{name} is not supported", SAFETENSORS)
        config = {
            ours: self._value(f"llama.{name}", kind, default)
            for ours, (name, kind, default) in HYPER_PARAMETERS.items()
        }
        width = config["hidden_size"] // config["num_attention_heads"]
        config["head_dim"] = self._head_width(config["head_dim"], width)
        if config["vocab_size"] is None:
            config["vocab_size"] = len(self._value("tokenizer.ggml.tokens", TEXTS))
        # Stored in float32: 1e-5 comes back as 9.999999747378752e-06.
        for key in ("rms_norm_eps", "rope_theta"):
            config[key] = float(f"{config[key]:.6g}")
        names = {tensor.name for tensor in self._reader.tensors}
        return {
            "model_type": "llama",
            "tie_word_embeddings": "output.weight" not in names,
            "eos_token_id": [end for end in map(self._end, ENDS) if end is not None],
            **config,
        }

    def _end(self, kind: str) -> int | None:
        return self._value(f"tokenizer.ggml.{kind}_token_id", TOKEN, None)

    def _head_width(self, rotated: int | None, default: int) -> int | None:
        """The width of a head, of which all is `rotated`; None where the file does not say it."""
        lengths = {
            name: self._value(f"llama.attention.{name}_length", COUNT, None)
            for name in ("key", "value")
        }
        if not any(lengths.values()):
            return rotated
        keys, values = (length or default for length in lengths.values())
        if values != keys:
            self._refuse(f"values of {values} beside keys of {keys} are not read", SAFETENSORS)
        if rotated not in (None, keys):
            rule = f"llama.rope.dimension_count={rotated} of heads of {keys} is not read"
            self._refuse(rule, SAFETENSORS)
        return keys

    def weights(self) -> "dict[str, Tensor]":
        """Every tensor, dequantised to float32, under the names of LlamaForCausalLM."""
        heads = self._value("llama.attention.head_count", COUNT)
        groups = self._value("llama.attention.head_count_kv", COUNT, heads)
        return dict(self._tensors({"attn_q": heads, "attn_k": groups}))

    def _tensors(self, heads: dict[str, int]) -> "Iterator[tuple[str, Tensor]]":
        import torch

        for stored in self._reader.tensors:
            found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", stored.name)
            block, kind = found.groups("") if found else ("", "")
            if kind not in NAMES:
                self._refuse(f"the model has no tensor {stored.name}", SAFETENSORS)
            try:
                values = self._gguf.quants.dequantize(stored.data, stored.tensor_type)
            except NotImplementedError:
                form = stored.tensor_type.name
                self._refuse(f"{stored.name} is stored as {form}, which is not read", SAFETENSORS)
            tensor = torch.from_numpy(values.copy() if not values.flags.writeable else values)
            if kind in heads:
                if tensor.dim() != 2 or len(tensor) % (2 * heads[kind]):
                    sizes = [*tensor.shape]
                    self._refuse(f"{stored.name} of {sizes} has not {heads[kind]} heads")
                tensor = _halves_apart(tensor, heads[kind])
            place = f"model.layers.{block}." if block else ""
            yield f"{place}{NAMES[kind]}.weight", tensor

    def tokenizer(self) -> str:
        """The byte-level BPE of the file as a `tokenizers` JSON.

        Raises UserError for another kind of tokeniser, or another way to cut text before merging.
        """
        kind = self._value("tokenizer.ggml.model", TEXT)
        pre = self._value("tokenizer.ggml.pre", TEXT, "default")
        if kind != "gpt2" or pre not in PRE_TOKENIZERS:
            raise UserError(
                f"checkpoint={self.path}: tokenizer.ggml.model={kind}, pre={pre} is unknown. Give "
                "the model's own file: data.tokenizer=<tokenizer.json>."
            )
        tokens = self._value("tokenizer.ggml.tokens", TEXTS)
        types = self._value("tokenizer.ggml.token_type", INTEGERS, [NORMAL] * len(tokens))
        if len(types) != len(tokens):
            rule = f"tokenizer.ggml.token_type has {len(types)} values for {len(tokens)} tokens"
            self._refuse(rule)
        merges = [pair.split(" ") for pair in self._value("tokenizer.ggml.merges", TEXTS)]
        known = {*tokens}
        for pair in merges:
            if len(pair) != 2 or not {*pair, "".join(pair)} <= known:
                self._refuse(f"tokenizer.ggml.merges has {' '.join(pair)!r}, which are no tokens")
        special = [i for i, kind in enumerate(types) if kind in SPECIAL]
        bos = None
        if self._value("tokenizer.ggml.add_bos_token", FLAG, False):
            bos = self._value("tokenizer.ggml.bos_token_id", TOKEN)
            if bos >= len(tokens):
                rule = (
                    f"tokenizer.ggml.bos_token_id={bos}, which must be one of {len(tokens)} tokens"
                )
                self._refuse(rule)
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


def _reader(gguf: Any, path: Path) -> Any:
    """The package's reader, which refuses to read beyond the end of the file.

    Its own reads there give empty arrays: it would go on for as long as a damaged length says.
    """

    class BoundedReader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
            import numpy as np

            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}")
            return super()._get(offset, dtype, count, *rest, **named)

    return BoundedReader(path)


def _items(value: Any) -> list[Any]:
    """The items of a list; of what is none, itself, which is of another kind than any item."""
    return value if isinstance(value, list) else [None]


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
