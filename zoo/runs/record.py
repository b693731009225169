"""A run's config.yaml and run.json: each is written with a hash of itself and checked when read."""

import functools
import hashlib
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from zoo.config.schema.train import TrainConfig
from zoo.config.stored import as_now
from zoo.config.validate import plain, validate
from zoo.errors import UserError, refuse_path
from zoo.runs.files import checked, one_line, parse_json, read_text, write_text

STATUSES = ("running", "done", "failed", "stopped")
# The fields of run.json that the programs rely on; others are only shown.
TEXT_FIELDS = ("reason", "fingerprint", "tokenizer", "device", "id", "sources", "commit")
COUNT_FIELDS = ("tokens_seen", "tokens_per_step", "parameters")
MAX_QUOTED = 300  # characters of a damaged file that an error quotes
HEADER = "# sha256 "  # the first line of config.yaml


def read_config(file: Path, run_id: str | None) -> TrainConfig:
    """Read a resolved configuration.

    Raises UserError where it is damaged, was altered since it was written, or belongs to another
    run than `run_id`.
    """
    text = read_text(file)
    header, _, rest = text.partition("\n")
    if header.startswith(HEADER) and header.split()[2] != _config_hash(run_id, rest):
        refuse_path(
            file,
            "was altered since the run began, or is another run's",
            "Restore it, or delete its first line to accept it as it is",
        )
    try:
        return _parsed(text).model_copy(deep=True)
    except RecursionError:
        reason = "it is nested too deeply"
    except UserError as error:
        reason = f"or of another version: {one_line(error)}"
    except (ValueError, yaml.YAMLError) as error:
        reason = one_line(error)
    raise _damaged(file, reason)


@functools.lru_cache(maxsize=8)
def _parsed(text: str) -> TrainConfig:
    """A config.yaml's text as options, for the few that are read time and again."""
    tree = yaml.safe_load(text)
    if not isinstance(tree, dict):
        raise ValueError("it holds no options")
    return validate(TrainConfig, as_now(tree))


def write_config(file: Path, config: TrainConfig, run_id: str | None) -> None:
    """Replace config.yaml.

    `resume` names the folder itself and `changed_code` holds for one command: neither is kept.
    """
    tree = {**plain(config), "resume": None, "fresh": False}
    tree.pop("changed_code", None)
    text = yaml.safe_dump(tree, sort_keys=False)
    write_text(file, f"{HEADER}{_config_hash(run_id, text)} of what follows\n{text}")


def _config_hash(run_id: str | None, text: str) -> str:
    return hashlib.sha256(f"{run_id}\n{text}".encode()).hexdigest()[:16]


def read_info(file: Path) -> dict[str, Any]:
    """Read run.json, its hash included. UserError where a field has the wrong type."""
    text = read_text(file)
    try:
        info = parse_json(text)
        if not isinstance(info, dict):
            raise ValueError("it holds no fields")
        if (status := info.get("status")) not in STATUSES:
            raise ValueError(f"status={status!r} must be one of {', '.join(STATUSES)}")
        if not _is_count(info.get("step")):
            raise ValueError(f"step={info.get('step')!r} must be a number of steps")
        for name in COUNT_FIELDS:
            if info.get(name) is not None and not _is_count(info[name]):
                raise ValueError(f"{name}={info[name]!r} must be a whole number or null")
        for name in TEXT_FIELDS:
            if info.get(name) is not None and not isinstance(info[name], str):
                raise ValueError(f"{name}={info[name]!r} must be text or null")
    except ValueError as error:
        raise _damaged(file, one_line(error)) from error
    return info


def write_info(file: Path, info: Mapping[str, Any]) -> None:
    """Replace run.json, with a hash of its fields."""
    write_text(file, json.dumps(checked(info), indent=2))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _damaged(file: Path, reason: str) -> UserError:
    reason = textwrap.shorten(reason, MAX_QUOTED)
    return UserError(
        f"{file}: is damaged ({reason}). Restore it, or train a new run with fresh=true."
    )
