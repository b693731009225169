"""Rows as `eval.py` would write them, with numbers made up to look like the real ones."""

import importlib
import itertools
import math
import random
from typing import Any

import yaml

from zoo.config.groups import CONFIGS
from zoo.tasks.passkey import Passkey
from zoo.tasks.perplexity import Perplexity
from zoo.tasks.speed import Speed
from zoo.tasks.stream import Stream
from zoo.tasks.task import Task

TRAIN = 512
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# arm -> (score at the training length, bits added per doubling beyond it, longest length)
ARMS = {
    "transformer": (1.92, 0.55, None),
    "transformer-alibi": (1.94, -0.004, None),
    "mamba": (1.88, 0.006, None),
    "transformer-learned": (1.95, 0.0, 512),
}


def identity(arm: str, seed: int = 0, **other: Any) -> dict[str, Any]:
    """The fields every row has."""
    return {
        **{"run": f"{arm}-{seed}", "arm": arm, "model": arm.split("-")[0], "size": "small"},
        **{"seed": seed, "extension": "none", "extension_factor": None, "parameters": 1_234_567},
        **{"flops_per_token": 7.4e6, "train_length": TRAIN, "train_tokens": 4_096_000},
        **{"train_steps": 500, "lr": 1e-3, "match": "params", "state_passing": "none"},
        **{"data": "stdlib", "fingerprint": "f00dfeed" * 8, "tokenizer": "bytes"},
        **{"commit": "0123456789abcdef", "device": "cpu", "dtype": "float32", "threads": 2},
        **{"audit": None, "audited": {"float64": 2048, "float32": 4096}},
        **{"status": "ok", "reason": None, "seconds": 1.5, "time": "2026-01-02T03:04:05"},
        **other,
    }


TASKS = {"perplexity": Perplexity, "speed": Speed, "stream": Stream, "passkey": Passkey}


def with_declaration(row: dict[str, Any]) -> dict[str, Any]:
    """The row as the driver writes it, with what its task declares."""
    return row | {"declares": TASKS[row["task"]].declares.plain(row)}


def score_row(arm: str, length: int, bits: float, **other: Any) -> dict[str, Any]:
    """A perplexity row: stretches differ by a bit, arms on a stretch by hundredths of it."""
    noise = random.Random(f"{arm} {length}")
    units = [bits + text + noise.gauss(0, 0.02) for text in (-0.5, -0.4, 0.1, 0.2, 0.2, 0.4)]
    shift = bits - sum(units) / len(units)
    row = identity(arm) | {
        **{"task": "perplexity", "protocol": "half_tail", "length": length, "units": len(units)},
        **{"split": "test", "documents": "joined", "unit": 16384, "count": 1000},
        **{"bits_per_byte": bits, "perplexity": 2**bits, "interval": [bits - 0.4, bits + 0.4]},
        **{"unit_bits": [unit + shift for unit in units]},
        **{"nll_sum": bits * 1000, "state_bytes": 65536},
    }
    row |= other
    return with_declaration(row) if row["task"] in TASKS else row


def arm_rows(arm: str, seed: int, start: float, slope: float, end: int | None) -> list[dict]:
    """Everything measured on one run."""
    who, rows = identity(arm, seed), []
    shift = 0.004 * math.sin(3 * seed)

    def at(position: float) -> float:
        steps = math.log2(max(position, 1) / TRAIN)
        return start + shift + (slope * steps if steps > 0 else -0.11 * steps)

    def state(length: int) -> int:
        return 147_456 if arm == "mamba" else 4096 * length

    for length in LENGTHS:
        beyond = end is not None and length > end
        status = {"status": "not_applicable", "reason": f"learned positions end at {end}"}
        status = status if beyond else {"status": "ok", "reason": None}
        for protocol, extra in (("half_tail", 0.0), ("blocks", 0.9 * (64 / length) ** 0.7)):
            bits = at(length) + extra
            row = score_row(arm, length, bits, protocol=protocol) | who | status
            row |= {"state_bytes": state(length)}
            if protocol == "blocks":
                edges = [0] + [2**k for k in range(int(math.log2(length)) + 1)]
                curve = [at(b) + 4.5 * (b + 1) ** -0.6 for b in edges[1:]]
                counts = [100.0 * (b - a) for a, b in itertools.pairwise(edges)]
                row["curve"] = {"edges": edges, "bits_per_byte": curve, "count": counts}
            rows.append(row | ({"bits_per_byte": None, "curve": None} if beyond else {}))
        quadratic = 0 if arm == "mamba" else length / 6000
        for phase, rate in (("forward", 52_000), ("decode", 900)):
            speed = {"task": "speed", "phase": phase, "length": length}
            per_second = (0.5 if arm == "mamba" else 1) * rate / (1 + quadratic)
            speed |= {"tokens_per_second": per_second, "milliseconds": 1000 / per_second}
            speed |= {"peak_bytes": 30_000_000 + 9000 * length, "state_bytes": state(length)}
            rows.append(with_declaration(who | speed | status))
    if arm == "mamba":
        edges = [2**k for k in range(21)]
        curve = {
            "edges": edges,
            "bits_per_byte": [at(2**9) + 4 * (b + 1) ** -0.6 for b in edges[1:]],
        }
        stream = {"task": "stream", "length": 2**20, "curve": curve, "tokens_per_second": 41_000.0}
        stream |= {"peak_bytes": 92_000_000, "state_bytes": 147_456, "bits_per_byte": 1.9}
        rows.append(with_declaration(who | stream))
    return rows


def experiment(arms: dict = ARMS, seeds: int = 1) -> list[dict[str, Any]]:
    """All rows of all arms."""
    return [
        row for a, shape in arms.items() for s in range(seeds) for row in arm_rows(a, s, *shape)
    ]


def run_records(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The run.json of every run in the rows."""
    return [{"run": run, "status": "done"} for run in dict.fromkeys(row["run"] for row in rows)]


def tasks() -> list[type[Task]]:
    """Every class that a YAML file of a task names."""
    found = {}
    for file in sorted((CONFIGS / "task").glob("*.yaml")):
        for options in yaml.safe_load(file.read_text(encoding="utf-8")).values():
            if isinstance(options, dict) and "_target_" in options:
                module, _, name = options["_target_"].rpartition(".")
                found[options["_target_"]] = getattr(importlib.import_module(module), name)
    return [*found.values()]
