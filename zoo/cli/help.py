"""What `--help` prints: examples, what can be chosen, every option with its default, the flags."""

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from zoo.cli.listing import summary
from zoo.config.compose import SCHEMAS
from zoo.config.groups import CONFIGS, choices, groups
from zoo.config.schema.data import DataPlace
from zoo.config.tree import leaves

WIDTH, COLUMN = 100, 36  # characters

# Every option of the schemas, by what it is about.
SECTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "Text and batches": ("seq_len", "batch_tokens", "batch_size", "objective", "state_passing"),
        "Model": ("hybrid", "match"),
        "Optimisation": (
            *("trainer.max_steps", "optim.lr", "optim.warmup_steps", "optim.min_lr_ratio"),
            *("optim.weight_decay", "optim.betas", "optim.eps", "optim.momentum", "optim.clip"),
            *("optim.continuation", "trainer.accumulate_grad_batches", "seed"),
            *("distil.teacher", "distil.temperature", "distil.weight"),
        ),
        "Run folder": (
            *("runs", "name", "resume", "fresh", "changed_code"),
            *("valid_every", "valid_windows", "save_every"),
            *("trainer.max_time", "trainer.log_every_n_steps", "trainer.enable_progress_bar"),
        ),
        "Fine-tuning": ("finetune", "lora.rank", "lora.alpha", "lora.targets"),
        "Hardware": (
            *(
                "trainer.accelerator",
                "trainer.devices",
                "trainer.num_nodes",
                "trainer.strategy",
                "trainer.checkpoint",
                "trainer.sequence_parallel",
                "trainer.precision",
            ),
            *("trainer.deterministic", "trainer.benchmark", "trainer.detect_anomaly"),
            *("checkpoint_activations", "threads", "workers", "allocator"),
        ),
    },
    "eval": {
        "What is measured": (
            *("run", "checkpoint", "split"),
            *(f"data.{name}" for name in DataPlace.model_fields),
        ),
        "Where and how": (
            "report",
            "against",
            "publish",
            "fresh",
            "runs",
            "device",
            "weights",
            "kv_cache",
            "threads",
            "sequence_parallel",
        ),
    },
}
FLAGS = {
    "-m, --multirun": "run every combination of values separated by commas",
    "--list [models ...]": "list every choice with one line about it",
    "--cfg job": "print the configuration and stop",
    "--explain": "train.py: print what a run would cost and stop",
    "-sc install=bash": "install TAB completion (also zsh, fish)",
    "-h, --help": "print this text",
}


def help_text(program: str, usage: str) -> str:
    """The text; `usage` is its beginning."""
    lines = [usage.strip(), "", "Choices: <group>=<name>, the default in brackets"]
    for group, chosen in groups(program).items():
        names = " ".join(f"[{name}]" if name == chosen else name for name in choices(group))
        lines += _wrapped(f"  {group}", names, 14)
    values = _defaults(program)
    for title, keys in SECTIONS[program].items():
        lines += ["", title]
        for key in keys:
            lines += _wrapped(f"  {_option(key, values.get(key))}", describe(program, key), COLUMN)
    if program == "eval":
        lines += [*_task_options()]
    more = "Any other key of the YAML files in configs/ is an option too, such as"
    example = "model.mixer.heads=4" if program == "train" else "extension.factor=8"
    lines += ["", f"{more} {example}.", "", "Flags"]
    for flag, does in FLAGS.items():
        lines += _wrapped(f"  {flag}", does, COLUMN)
    return "\n".join(lines) + "\n"


def describe(program: str, key: str) -> str:
    """What the schema says about an option."""
    if key == "hybrid":
        return "models by layer, repeated: [3*mamba,transformer]; null: as in model=hybrid"
    owner: Any = SCHEMAS[program]
    *sections, last = key.split(".")
    for section in sections:
        owner = owner.model_fields[section].annotation
    return owner.model_fields[last].description or ""


def _defaults(program: str) -> dict[str, Any]:
    """The value of every option where none is given, by its dotted path."""
    tree = yaml.safe_load((CONFIGS / f"{program}.yaml").read_text(encoding="utf-8"))
    for group, chosen in groups(program).items():
        file = CONFIGS / group / f"{chosen}.yaml"
        if file.exists():
            tree[group] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return dict(leaves(tree))


def _task_options() -> Iterator[str]:
    """Each task's options with their values, and what its YAML file says beside them."""
    for name in choices("task"):
        file = CONFIGS / "task" / f"{name}.yaml"
        text = file.read_text(encoding="utf-8")
        found = re.findall(r"^  ([a-z]\w*): ([^#\n]*?)(?: *# (.*))?$", text, re.MULTILINE)
        if found:
            yield from ["", *textwrap.wrap(f"task={name}: {summary(file)}", WIDTH)]
        for key, value, words in found:
            option = f"task.{name}.{key}={'' if value == '???' else value}"
            yield from _wrapped(f"  {option}", words, COLUMN + 2)


def _wrapped(head: str, text: str, column: int) -> list[str]:
    """Lines with `head` on the left and `text` from a column on."""
    first = f"{head:<{column - 2}}  "
    lines = textwrap.wrap(text, WIDTH - column, break_on_hyphens=False) or [""]
    return [(first + lines[0]).rstrip(), *(" " * column + line for line in lines[1:])]


def _option(key: str, value: Any) -> str:
    if isinstance(value, Mapping | list | bool) or value is None:
        value = json.dumps(value).replace(" ", "")
    return f"{key}=" if value == "???" else f"{key}={value}"
