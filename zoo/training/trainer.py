"""Lightning's Trainer as a run's options make it."""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision

from zoo.config.schema.train import TrainConfig
from zoo.config.trainer_arguments import OWN_ARGUMENTS
from zoo.errors import UserError
from zoo.runs.folder import RunFolder
from zoo.training.callbacks import CheckpointReader
from zoo.training.partition import process_count, processes_here, sharded
from zoo.training.records import wandb_logger
from zoo.training.rehearse import check_devices

UNUSED_TOO = "ddp_find_unused_parameters_true"


def make_trainer(
    config: TrainConfig,
    folder: RunFolder,
    callbacks: list[Any],
    facts: Mapping[str, Any],
    until: int | None,
    alike: bool,
) -> lightning.Trainer:
    """Lightning's Trainer under the run's options. UserError where this machine lacks a device.

    `alike`: every weight has a gradient in every step of every process.
    """
    options = config.trainer.model_dump()
    options["max_steps"] = until or options["max_steps"]
    for own in OWN_ARGUMENTS:  # the learner's and the callbacks'
        options.pop(own, None)
    if options["devices"] == "auto":
        options["devices"] = processes_here(config)
    if not sharded(config):
        alone, ddp = process_count(config) == 1, "ddp" if alike else UNUSED_TOO
        options["strategy"] = "auto" if alone else ddp  # ddp of one process refuses unused weights
    defaults = {
        "max_epochs": -1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": 10,
    }

    def make(**more: Any) -> lightning.Trainer:
        own = _sharding(config) if sharded(config) else {"plugins": [CheckpointReader()]}
        always: dict[str, Any] = {"enable_checkpointing": False, "default_root_dir": folder.path}
        return lightning.Trainer(**{**defaults, **options, **own, **always, **more})

    try:
        make(callbacks=[*callbacks], logger=False)  # before W&B begins a run that is not possible
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        given = (f"trainer.{key}={options[key]}" for key in ("accelerator", "devices"))
        reason = str(error).split(". ")[0].rstrip(".")
        raise UserError(
            f"{' '.join(given)}: not available on this machine ({reason}). Use "
            "trainer.accelerator=auto or cpu, and trainer.devices=1."
        ) from None
    return make(callbacks=[*callbacks], logger=wandb_logger(config, folder, facts))


def _sharding(config: TrainConfig) -> dict[str, Any]:
    """The options of Lightning's Trainer for a model that is divided among processes."""
    from zoo.training.sharding import FullySharded  # a second to import

    found: dict[str, Any] = {"strategy": FullySharded(process_count(config))}
    precision = config.trainer.precision
    if precision == "bf16-mixed":  # which the strategy refuses by name: autocast is beside it
        kind = check_devices(config.trainer)
        found |= {"precision": None, "plugins": [MixedPrecision(precision, kind)]}
    return found


# Lightning's notes to itself; what matters here is printed by the callbacks.
for library in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(library).setLevel(logging.WARNING)
for noise in (
    ".*does not have many workers.*",
    ".*LeafSpec.*",
    ".*weights_only.*",
    ".*find_unused.*",
):
    warnings.filterwarnings("ignore", message=noise)
