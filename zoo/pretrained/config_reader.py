"""Reads the keys of a checkpoint's `config.json`, and refuses those that nothing has read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.errors import UserError

Config = Mapping[str, Any]
Layers = tuple[list[str], list[list[str]]]  # words of all layers, and further ones of each

# Keys about files, tokens, training or execution: none changes what the model computes.
SILENT = {
    *("_attn_implementation", "_name_or_path", "architectures", "auto_map", "dtype", "model_type"),
    *("torch_dtype", "transformers_version", "transformers.js_config", "is_llama_config"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
    *("attention_dropout", "hidden_dropout", "classifier_dropout"),
    *("initializer_range", "use_cache", "use_mambapy", "use_associative_scan", "is_decoder"),
    *("resid_pdrop", "embd_pdrop", "w_init_variance_scale", "final_w_init_variance_scale"),
    *("rescale_prenorm_residual", "residual_in_fp32", "chunk_size", "rescale_every"),
    *("time_step_floor", "time_step_init_scheme", "time_step_max", "time_step_min"),
    *("time_step_scale", "attn_mode", "fuse_norm", "fuse_cross_entropy", "use_l2warp"),
    "fuse_linear_cross_entropy",
}


@dataclass
class Reader:
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

    def optional(self, key: str, default: Any = None) -> Any:
        """A number, or what stands for one that is not given."""
        return default if self.get(key) is None else self.number(key)

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a key whose value needs what the zoo does not compute."""
        value = self.get(key)
        if value is not None and value not in allowed:
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
