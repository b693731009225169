"""The options trainer.* and logger.*."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from zoo.config.schema.sections import OpenSection, Section
from zoo.config.schema.values import Name, Positive, Switch, spelt
from zoo.config.trainer_arguments import TRAINER_OWNED, TRAINER_REFUSED, trainer_parameters
from zoo.devices import resolve_precision
from zoo.errors import refuse, refuse_unknown, shown


def _devices(value: Any) -> Any:
    """The devices as Lightning takes them; -1 is a word of its own, `auto`."""
    if value == "auto":
        return value
    every = value if isinstance(value, list) else [value]
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in every)
    least = 0 if isinstance(value, list) else 1
    if not every or not whole or min(every) < least or len({*every}) < len(every):
        raise ValueError("must be auto, a number of devices from 1 on, or a list such as [0,1]")
    return value


def _duration(value: Any) -> Any:
    """A time as Lightning takes it: 00:08:00:00 (days to seconds) or {hours: 8}."""
    if value is None:
        return value
    if isinstance(value, str) and re.fullmatch(r"\d+(:\d\d){3}", value) and value.strip("0:"):
        return value
    units = {"weeks", "days", "hours", "minutes", "seconds"}
    numbers = [*value.values()] if isinstance(value, dict) and {*value} <= units else []
    if all(type(one) in (int, float) and 0 <= one < 1e6 for one in numbers) and any(numbers):
        return value
    raise ValueError(
        "must be a time above 0, as days:hours:minutes:seconds such as 00:08:00:00, or {hours:8}"
    )


def _determinism(value: Any) -> Any:
    if isinstance(value, bool) or value in (None, "warn"):
        return value
    raise ValueError("must be true, false or warn")


class Trainer(OpenSection):
    """The arguments of Lightning's Trainer that a run carries through; others are refused."""

    max_steps: Positive = Field(description="optimiser steps")
    precision: Annotated[
        str, spelt("32-true|bf16-mixed", "must be auto, 32-true or bf16-mixed")
    ] = Field(description="auto, 32-true or bf16-mixed; auto: bf16-mixed on CUDA, else 32-true")
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = Field(
        description="auto, cpu, gpu, cuda or mps"
    )
    devices: Annotated[int | str | list[int], BeforeValidator(_devices)] = Field(
        description="auto (one; with ddp and fsdp every GPU, or 2 on the CPU), a number, or a list "
        "such as [0,1]"
    )
    num_nodes: Positive | None = Field(
        default=None, description="machines, each with so many devices; see trainer=multi_node"
    )
    strategy: Literal["auto", "ddp", "fsdp"] | None = Field(
        default=None,
        description="ddp: each device has the whole model; fsdp: a part of every weight; auto: ddp",
    )
    sequence_parallel: Positive | None = Field(
        default=None, description="processes that read one window together, a chunk of it each"
    )
    checkpoint: Literal["whole", "sharded"] | None = Field(
        default=None,
        description="whole: tensors put together; sharded: with fsdp, each process writes its part",
    )
    accumulate_grad_batches: Positive | None = Field(
        default=None, description="micro-batches that a step is read in, to save memory"
    )
    max_time: Annotated[str | dict[str, float] | None, BeforeValidator(_duration)] = Field(
        default=None, description="longest training, as days:hours:minutes:seconds: 00:08:00:00"
    )
    log_every_n_steps: Positive | None = Field(
        default=None, description="steps between rows of metrics.csv"
    )
    deterministic: Annotated[bool | str | None, BeforeValidator(_determinism)] = Field(
        default=None, description="true or warn: deterministic algorithms alone"
    )
    benchmark: Switch | None = Field(default=None, description="let cuDNN try its algorithms")
    detect_anomaly: Switch | None = Field(
        default=None, description="name the operation that first gives NaN (slow)"
    )
    enable_progress_bar: Switch | None = Field(default=None, description="print progress")

    @model_validator(mode="before")
    @classmethod
    def _precision(cls, value: Any) -> Any:
        """A run's configuration says which precision it has, not `auto`: it may change machines."""
        if isinstance(value, dict) and value.get("precision") == "auto":
            return {**value, "precision": resolve_precision(value.get("accelerator"))}
        return value

    @model_validator(mode="after")
    def _known(self) -> "Trainer":
        for name in self.options:
            value = self.options[name]
            known = [*trainer_parameters(), *TRAINER_OWNED, *TRAINER_REFUSED]
            if name not in known:
                refuse_unknown(f"{name}={shown(value)}", "option", name, known)
            if name in TRAINER_OWNED:
                refuse(name, value, f"is set by {TRAINER_OWNED[name]}", "Leave it out")
            why = TRAINER_REFUSED.get(name, "a run does not carry it through")
            refuse(name, value, f"not accepted, {why}", "Leave it out")
        if self.checkpoint == "sharded" and self.strategy != "fsdp":
            rule, advice = "weights are divided by trainer=fsdp alone", "Add it, or use whole"
            refuse("checkpoint", "sharded", rule, advice)
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not given: Lightning's own defaults, and the names of earlier runs."""
        return {key: value for key, value in write(self).items() if value is not None}


class Logger(Section):
    name: Literal["wandb", "none"]
    project: Name = "zoo"
    mode: Literal["auto", "online", "offline"] = "auto"
