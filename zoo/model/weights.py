"""In what form a model's weights are kept while it is measured: the option `weights=`; and
its cached keys and values: the option `kv_cache=`.

    float32, bfloat16, float16    as numbers of that dtype, in which the model computes
    stored                        as the checkpoint has them
    int8, int4                    quantized (zoo.model.quantization), from float32

Without it a checkpoint's weights stay as they are stored on an accelerator, whose products are
made for them, and are widened to float32 on a CPU, whose are not. Weights that a run was trained
with are float32.
"""

import logging
from pathlib import Path
from typing import Literal

import torch

from zoo.config.schema.train import TrainConfig
from zoo.measurement import BITS
from zoo.model.backbone import Backbone
from zoo.model.pretrained import dtype_on_disk
from zoo.model.quantization import quantize, quantize_cache

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Weights = Literal["stored", "float32", "bfloat16", "float16", "int8", "int4"]

log = logging.getLogger("zoo")


def choose_weights(weights: str | None, config: TrainConfig, device: torch.device) -> str:
    """What `weights=` comes to for a run's model on a device: a name of DTYPES or BITS.

    Says in one line what is done with weights that are stored in less than float32.
    """
    if weights in BITS or weights in DTYPES:
        return str(weights)
    stored = dtype_on_disk(Path(config.checkpoint)) if config.checkpoint else "float32"
    if stored not in DTYPES or stored == "float32":
        return "float32"
    if weights == "stored":
        return stored
    if device.type == "cpu":
        log.info("weights widened from %s to float32; weights=stored keeps them", stored)
        return "float32"
    log.info("weights in %s, as they are stored; weights=float32 widens them", stored)
    return stored


def loaded_in(weights: str) -> torch.dtype:
    """The dtype that a model is loaded in, for what `choose_weights` gave."""
    return DTYPES.get(weights, torch.float32)


def quantize_as(model: Backbone, weights: str, kv_cache: str | None = None) -> Backbone:
    """Quantize a model that was loaded and extended, where the options say so; return it.

    Raises UserError for a `kv_cache` of a model that caches no keys and values.
    """
    if kv_cache is not None:
        quantize_cache(model, kv_cache)  # type: ignore[arg-type]
    return quantize(model, weights) if weights in BITS else model  # type: ignore[arg-type]
