"""Which options identify a run, and the folder's name that follows from them."""

import hashlib
import json
from typing import Any

from zoo.config.schema.train import TrainConfig
from zoo.config.stored import as_before, positions_as_before
from zoo.config.tree import leaves, within
from zoo.config.validate import plain

# Options that change neither weights nor figures: where and how a run is carried out.
INCIDENTAL = (
    *("runs", "name", "resume", "fresh", "logger", "workers", "threads", "allocator"),
    "changed_code",
    *("trainer.devices", "trainer.accelerator", "trainer.strategy", "trainer.max_time"),
    *("trainer.checkpoint", "trainer.num_nodes"),
    *(
        "trainer.sequence_parallel",
        "trainer.accumulate_grad_batches",
        "trainer.enable_progress_bar",
    ),
    *("trainer.enable_model_summary", "trainer.log_every_n_steps", "trainer.profiler"),
)


def identity(config: TrainConfig) -> dict[str, Any]:
    """The options that identify a run: {dotted path: value}."""
    return {path: value for path, value in leaves(plain(config)) if not within(path, INCIDENTAL)}


def run_name(config: TrainConfig) -> str:
    """The run folder's name: as given, otherwise made from the options that identify the run."""
    if config.name:
        return config.name
    tree = positions_as_before(plain(config))
    paths = zip(leaves(tree), leaves(as_before(tree)), strict=True)
    named = {old: value for (path, _), (old, value) in paths if not within(path, INCIDENTAL)}
    options = json.dumps(named, sort_keys=True)
    digest = hashlib.sha256(options.encode()).hexdigest()[:8]
    size, data = config.size.name, config.data.name
    return f"{config.model.name}-{size}-{config.seq_len}-{data}-s{config.seed}-{digest}"
