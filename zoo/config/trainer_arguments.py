"""Which arguments of Lightning's Trainer a run carries through, and what to use instead."""

import functools
import importlib.util
from pathlib import Path

from zoo.config.introspect import parameters
from zoo.errors import refuse_path

# Options of a run's trainer that Lightning's does not have.
OWN_ARGUMENTS = ("sequence_parallel", "checkpoint")
# Trainer arguments that are decided elsewhere, and where.
TRAINER_OWNED = {
    "logger": "the option logger",
    "callbacks": "the learner",
    "plugins": "the learner",
    "default_root_dir": "the option runs",
    "gradient_clip_val": "the option optim.clip",
    "val_check_interval": "the option valid_every",
    "enable_checkpointing": "the option save_every",
    "use_distributed_sampler": "the order of the data, which every process shares",
}
# Those that would do nothing here, or not what they say, and what to use. What neither these nor
# `schema.Trainer` names, such as an argument of a later Lightning, is refused as well.
_LENGTH = "a run is as long as trainer.max_steps or trainer.max_time says"
_VALIDATION = "validation reads valid_windows windows every valid_every steps"
TRAINER_REFUSED = {
    **dict.fromkeys(("max_epochs", "min_epochs", "min_steps", "limit_train_batches"), _LENGTH),
    **dict.fromkeys(("fast_dev_run", "overfit_batches"), f"{_LENGTH}, for a trial too"),
    **dict.fromkeys(("limit_val_batches", "check_val_every_n_epoch"), _VALIDATION),
    **dict.fromkeys(("num_sanity_val_steps", "inference_mode"), _VALIDATION),
    **dict.fromkeys(("limit_test_batches", "limit_predict_batches"), "eval.py measures"),
    "gradient_clip_algorithm": "gradients are clipped by their norm: optim.clip sets it",
    "sync_batchnorm": "no architecture normalises over a batch",
    "reload_dataloaders_every_n_epochs": "the order of the data follows from seed and step",
    "profiler": "its report is not written; torch.profiler or py-spy can watch the program",
    "enable_model_summary": "run.json has the number of parameters",
    "barebones": "metrics and checkpoints are always written",
    "enable_autolog_hparams": "config.yaml has every option",
    "model_registry": "the run folder is the record",
}


@functools.cache
def trainer_parameters() -> list[str]:
    """What a run's trainer takes: our own, and what Lightning's does in the installed version.

    Without what is decided above. Read from its source, which is not imported.
    """
    spec = importlib.util.find_spec("lightning")
    if spec is None or not spec.submodule_search_locations:
        refuse_path("lightning", "is not installed", "Run `make env`, or pip install lightning")
    file = Path(spec.submodule_search_locations[0]) / "pytorch" / "trainer" / "trainer.py"
    decided = {*TRAINER_OWNED, *TRAINER_REFUSED}
    theirs = [name for name in parameters(file, "Trainer") or {} if name not in decided]
    return [*theirs, *OWN_ARGUMENTS]
