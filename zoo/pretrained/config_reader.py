"""Reads the keys of a checkpoint's `config.json`, and refuses those that nothing has read."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.errors import UserError

Config = Mapping[str, Any]
WHOLE = "Put back the file as it was published"
Layers = tuple[list[str], list[list[str]]]  # words of all layers, and further ones of each

# Keys about files, tokens, training or execution: none changes what the model computes.
SILENT = {
    *("_attn_implementation", "_name_or_path", "architectures", "auto_map", "dtype", "model_type"),
    *("torch_dtype", "transformers_version", "transformers.js_config", "is_llama_config"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
    *("attention_dropout", "hidden_dropout", "classifier_dropout"),
    *(
        "initializer_range",
        "use_cache",
        "cache_implementation",
        "use_mambapy",
        "use_associative_scan",
        "is_decoder",
    ),
    *("resid_pdrop", "embd_pdrop", "w_init_variance_scale", "final_w_init_variance_scale"),
    *("rescale_prenorm_residual", "residual_in_fp32", "chunk_size", "rescale_every"),
    *("time_step_floor", "time_step_init_scheme", "time_step_max", "time_step_min"),
    *("time_step_scale", "attn_mode", "fuse_norm", "fuse_cross_entropy", "use_l2warp"),
    "fuse_linear_cross_entropy",
}


def _number(above: bool) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        return value > 0 if above else value >= 0

    return fits


def whole_number(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _list(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and all(map(fits, value))


def is_text(value: Any) -> bool:
    return type(value) is str


# What keys must be where they are there and not null, also those within rope_parameters. A key of
# none of these may have one of few values alone, or is read by nothing.
KINDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "an integer >= 1",
        whole_number(1),
        """
        hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size
        max_position_embeddings vocab_size head_dim num_heads sliding_window state_size conv_kernel
        lru_width conv1d_width attention_window_size context_length sliding_window_pattern
        _sliding_window_pattern decay_low_rank_dim a_low_rank_dim v_low_rank_dim gate_low_rank_dim
        original_max_position_embeddings""",
    ),
    ("an integer >= 0", whole_number(0), "max_window_layers"),
    (
        "a number > 0",
        _number(above=True),
        """
        rope_theta rotary_emb_base rope_local_base_freq partial_rotary_factor rotary_pct factor
        attention_factor beta_fast beta_slow low_freq_factor high_freq_factor expand hidden_ratio
        attn_logit_softcapping final_logit_softcapping logits_soft_cap""",
    ),
    (
        "a number from 1 to 1048576",  # a width of heads: scores are scaled by 1 / its root
        lambda value: _number(above=True)(value) and 1 <= value <= 2**20,
        "query_pre_attn_scalar",
    ),
    (
        "a number >= 0",
        _number(above=False),
        """
        rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps mixer_rms_eps mscale
        mscale_all_dim""",
    ),
    (
        "true or false",
        lambda value: type(value) is bool,
        """
        attention_bias mlp_bias tie_word_embeddings use_sliding_window use_parallel_residual
        truncate""",
    ),
    ("a text", is_text, "rope_type type"),
    (
        "a list of one text or more",  # an empty one says nothing of any layer
        lambda value: value != [] and _list(is_text)(value),
        "layer_types block_types",
    ),
    ("a list of numbers", _list(_number(above=True)), "short_factor long_factor"),
    (
        "an object",
        lambda value: type(value) is dict,
        "rope_scaling rope_parameters full_attention sliding_attention zoo zoo_training",
    ),
    (
        "an integer >= 1, or auto",
        lambda value: value == "auto" or whole_number(1)(value),
        "time_step_rank",
    ),
    (
        "an integer >= 0, or a list of them",
        lambda value: whole_number(0)(value) or _list(whole_number(0))(value),
        "eos_token_id",
    ),
)
KEYS = {key: (words, fits) for words, fits, keys in KINDS for key in keys.split()}


def check_kind(key: str, value: Any, inside: str = "", file: str = "config.json") -> None:
    """Refuse a value of another kind than the key's; `inside` is the object that has it."""
    words, fits = KEYS.get(key, ("", None))
    if fits is not None and value is not None and not fits(value):
        name = f"{inside}.{key}" if inside else key
        raise UserError(f"{file}: {name}={value!r}: must be {words}. {WHOLE}.")


@dataclass
class Reader:
    """Reads a config's keys, and remembers which were read.

    A key that `config` leaves out has its value in `absent`, null where it has none there.
    """

    config: Config
    absent: Config = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)  # where the zoo computes otherwise, in words

    def changed(self, **keys: Any) -> "Reader":
        """One that finds these in their keys' place, and remembers with this one."""
        return Reader({**self.config, **keys}, self.absent, self.read, self.notes)

    def get(self, key: str, default: Any = None) -> Any:
        """A key's value; `default` is what null means."""
        self.read.add(key)
        value = self.config[key] if key in self.config else self.absent.get(key)
        check_kind(key, value)
        for inner, one in value.items() if key.startswith("rope_") and type(value) is dict else ():
            check_kind(inner, one, key)
            for last, given in one.items() if type(one) is dict else ():
                check_kind(last, given, f"{key}.{inner}")
        return default if value is None else value

    def number(self, key: str) -> Any:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            if value is None:
                raise UserError(f"config.json: must give {key}, a number. {WHOLE}.")
            raise UserError(f"config.json: {key}={value!r}: must be a number. {WHOLE}.")
        return value

    def optional(self, key: str, default: Any = None) -> Any:
        """A number, or what stands for one that is not given."""
        return default if self.get(key) is None else self.number(key)

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a key whose value needs what the zoo does not compute."""
        value = self.get(key)
        same = [one for one in allowed if isinstance(one, bool) is isinstance(value, bool)]
        if value is not None and value not in same:
            raise unsupported(key, value)

    def finish(self) -> None:
        """Refuse the first key that nothing has read."""
        for key, value in self.config.items():
            if key not in self.read and key not in SILENT and value is not None:
                raise unsupported(key, value)


def unsupported(key: str, value: Any, rule: str = "is not supported") -> UserError:
    return UserError(
        f"config.json: {key}={value!r}: {rule}. Use a checkpoint whose settings are all supported."
    )
