"""The typed schema of the resolved configuration. Nothing heavy is imported."""

import functools
import importlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from zoo.config.introspect import check_types, is_target, target_parameters
from zoo.config.schemes import scheme
from zoo.config.sizes import read_count, read_sizes
from zoo.config.trainer_arguments import TRAINER_OWNED, TRAINER_REFUSED, trainer_parameters
from zoo.devices import resolve_precision
from zoo.errors import refuse, refuse_unknown, shown


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


MANY = (
    2**48
)  # more steps, tokens or windows than anyone counts; what fits the memory is asked later
Positive = Annotated[int, BeforeValidator(read_count), Field(ge=1, le=MANY)]
Natural = Annotated[int, BeforeValidator(read_count), Field(ge=0, le=MANY)]
Number = Annotated[float, BeforeValidator(_not_bool)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Switch = Annotated[bool, Field(strict=True)]
Seed = Annotated[int, BeforeValidator(read_count), Field(ge=0, lt=2**32)]  # as NumPy seeds
Threads = Annotated[Positive, Field(le=1024)]  # far more and the C library aborts
Path = Annotated[str, Field(min_length=1)]
ShortConv = Annotated[int, BeforeValidator(read_count), Field(ge=2, le=8)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    # Options that are left out of what is written at these values, which change nothing: runs of
    # before such an option existed keep the names that are made from what is written.
    unwritten: ClassVar[Mapping[str, Any]] = {}

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unwritten = self.unwritten
        return {k: v for k, v in write(self).items() if k not in unwritten or unwritten[k] != v}


class OpenSection(Section):
    """A section whose further keys belong to the code that reads it."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, value: Any) -> Any:
        return read_sizes(value)

    @property
    def options(self) -> dict[str, Any]:
        """The further keys."""
        return dict(self.model_extra or {})


SEPARATE = "Use objective=causal and state_passing=none"  # windows


class Part(OpenSection):
    """A constructor or function of the zoo and its arguments: `_target_` and whatever it takes."""

    home: ClassVar[str] = "zoo."
    target: str = Field(alias="_target_")

    @model_validator(mode="after")
    def _known(self) -> "Part":
        # A run folder may come from anywhere: it names what this package defines, nothing else.
        if not (is_target(self.target) and self.target.startswith(self.home)):
            refuse("_target_", self.target, f"must be in {self.home}*")
        allowed = target_parameters(self.target)
        for name in self.options if allowed is not None else ():
            if name not in (allowed or []):
                given = f"{name}={shown(self.options[name])}"
                refuse_unknown(given, "option", name, allowed or [])
        check_types(self.target, self.options)
        if isinstance(self.options.get("positions"), dict):
            scheme(self.options["positions"], "positions")
        return self

    def load(self) -> functools.partial[Any]:
        """What it names, its arguments bound; imports the module."""
        module, _, name = self.target.rpartition(".")
        options = {
            key: Part.model_validate(value).load() if _is_part(value) else value
            for key, value in self.options.items()
        }
        return functools.partial(getattr(importlib.import_module(module), name), **options)


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


class MixerPart(Part):
    home: ClassVar[str] = "zoo.mixers."


class TaskPart(Part):
    home: ClassVar[str] = "zoo.tasks."


class PositionsPart(Part):
    home: ClassVar[str] = "zoo.positions."


class BlockConfig(Section):
    unwritten: ClassVar[Mapping[str, Any]] = {"short_conv": None}
    mixer: MixerPart
    feed_forward: MixerPart | None
    short_conv: ShortConv | None = None  # taps of a convolution before the mixer


Matched = Annotated[str, Field(pattern=r"^(layers|(mixer|feed_forward)\.[a-z]\w*)$")]


class Model(Section):
    unwritten: ClassVar[Mapping[str, Any]] = {"norm_eps": 1e-6, "tied": True}
    name: Name
    blocks: list[BlockConfig] = Field(min_length=1)  # repeated over the layers
    embedding_positions: PositionsPart | None
    match: list[Matched]  # what match=params may change, in this order
    norm_eps: Annotated[Number, Field(gt=0, lt=1)] = Field(
        default=1e-6, description="added under the root of every normalisation"
    )
    tied: Switch = Field(default=True, description="true: the head is the embedding")


MAX_LAYERS = 256


class Size(Section):
    name: Name
    width: Annotated[Positive, Field(le=2**17)]
    layers: Annotated[Positive, Field(le=MAX_LAYERS)]
    heads: Annotated[Positive, Field(le=2**17)]


class DataPart(Part):
    home: ClassVar[str] = "zoo.data."


class Data(OpenSection):
    unwritten: ClassVar[Mapping[str, Any]] = {"passkey": 0.0, "task": None, "end_token": None}
    name: Name
    task: DataPart | None = Field(default=None, description="a synthetic task instead of text")
    passkey: Fraction = Field(
        default=0.0, description="share of the training windows that hold a passkey"
    )

    @model_validator(mode="after")
    def _texts(self) -> "Data":
        for key in ("path", "tokenizer", "cache", "eval_documents", "field", "dataset"):
            value = self.options.get(key, "")
            missing = value is None and key in ("path", "dataset")
            if not isinstance(value, str) and not missing:
                refuse(key, value, "must be text", "Quote a name of digits")
        return self


Momentum = Annotated[Number, Field(ge=0, lt=1)]


class Optim(Section):
    unwritten: ClassVar[Mapping[str, Any]] = {
        **{"name": "adamw", "momentum": None},
        **{"continuation": "cosine", "continued_at": None, "continued_from": None},
    }
    name: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[Number, Field(gt=0, le=1e3)] = Field(description="peak learning rate")
    weight_decay: Annotated[Number, Field(ge=0, le=1e3)] = Field(
        description="decoupled weight decay, of matrices alone"
    )
    betas: tuple[Momentum, Momentum] = Field(description="decay rates of AdamW's two averages")
    eps: Annotated[Number, Field(gt=0, le=1)] = Field(description="AdamW's epsilon")
    warmup_steps: Natural = Field(description="steps of linear warm-up")
    min_lr_ratio: Fraction = Field(description="learning rate at the last step, over the peak")
    clip: Annotated[Number, Field(gt=0)] = Field(description="largest norm of the gradient")
    momentum: Momentum | None = Field(default=None, description="momentum of optim=muon")
    # How a run goes on that is given more steps than it had; from which step, and at which rate
    # (over `lr`) it was there: see zoo.config.schedule.
    continuation: Literal["cosine", "constant", "rewarm"] = Field(
        default="cosine", description="the rate of a run that is given more steps (with resume=)"
    )
    continued_at: Natural | None = None
    continued_from: Fraction | None = None


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
    precision: Literal["32-true", "bf16-mixed"] = Field(
        description="auto, 32-true or bf16-mixed; auto: bf16-mixed on CUDA, else 32-true"
    )
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = Field(
        description="auto, cpu, gpu, cuda or mps"
    )
    devices: Annotated[int | str | list[int], BeforeValidator(_devices)] = Field(
        description="auto (one), a number, or a list such as [0,1]"
    )
    strategy: Literal["auto", "ddp"] | None = Field(
        default=None, description="auto or ddp: how several devices share a step"
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
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not given: Lightning's own defaults, and the names of earlier runs."""
        return {key: value for key, value in write(self).items() if value is not None}


class Logger(Section):
    name: Literal["wandb", "none"]
    project: Name = "zoo"
    mode: Literal["auto", "online", "offline"] = "auto"


class AttentionPart(Part):
    home: ClassVar[str] = "zoo.attention."


class Extension(Section):
    """How a model reads beyond the length of the windows it is trained on."""

    unwritten: ClassVar[Mapping[str, Any]] = {"positions": None}
    name: Name
    factor: Annotated[Number, Field(ge=1, le=2**20)] = Field(
        description="times the trained length, for scaling"
    )
    original_length: Positive | None = Field(description="trained length; null: the run's seq_len")
    scaling: PositionsPart | None = Field(description="of the rotary frequencies")
    attention: AttentionPart | None = Field(
        description="which keys a query sees, and at what distance"
    )
    positions: PositionsPart | None = Field(
        default=None, description="where the tokens of a training window stand; null: 0, 1, 2 ..."
    )


class TrainConfig(Section):
    """A training run. Paths are relative to the working directory."""

    unwritten: ClassVar[Mapping[str, Any]] = {"checkpoint": None}
    model: Model
    size: Size
    data: Data
    optim: Optim
    trainer: Trainer
    logger: Logger
    seq_len: Positive = Field(description="tokens in a training window")
    batch_tokens: Positive = Field(description="tokens in an optimiser step")
    batch_size: Positive = Field(
        description="windows in an optimiser step; null: batch_tokens / seq_len"
    )
    seed: Seed = Field(description="random seed of the initial weights and the data order")
    objective: Literal["causal", "masked"] = Field(
        description="causal: predict the next token; masked: predict masked tokens, for models "
        "published as encoders"
    )
    match: Literal["params", "none"] = Field(
        description="params: as many parameters as the transformer, within 1 %"
    )
    state_passing: Literal["none", "carry"] = Field(
        description="carry: start each window from the state that the window before left"
    )
    checkpoint_activations: Switch = Field(
        description="recompute activations in the backward pass, to save memory"
    )
    valid_every: Positive = Field(description="steps between validations")
    valid_windows: Positive = Field(description="windows that a validation reads")
    save_every: Positive = Field(description="steps between checkpoints")
    runs: Path = Field(description="folder that holds the run folders")
    name: Name | None = Field(description="name of the run folder; null: made from the options")
    resume: Path | None = Field(description="run folder whose training to continue")
    finetune: Path | None = Field(
        description="run folder whose model to train further, under extension=<name>"
    )
    checkpoint: Path | None = Field(
        default=None,
        description="pretrained checkpoint that the run was made of; eval.py checkpoint= sets it",
    )
    extension: Extension
    fresh: Switch = Field(description="true: train again, in a new folder")
    changed_code: Literal["refuse", "accept"] = Field(
        default="refuse", description="accept: continue a run that was trained by other code"
    )
    allocator: Literal["tuned", "system"] = Field(
        description="tuned: let the C library keep freed memory, which is faster (glibc)"
    )
    threads: Threads | None = Field(description="CPU threads; null: all cores")
    workers: Annotated[Natural, Field(le=64)] = Field(
        description="processes that load data; 0: none but the main one"
    )

    @field_validator("batch_size", mode="before")
    @classmethod
    def _fill_batch_size(cls, value: Any, info: ValidationInfo) -> Any:
        known = info.data  # the fields above, as far as they were good
        if value is None and "seq_len" in known and "batch_tokens" in known:
            return max(1, known["batch_tokens"] // known["seq_len"])
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainConfig":
        acts = self.extension.scaling is not None or self.extension.attention is not None
        if acts and not self.finetune and not self.checkpoint:
            name = self.extension.name
            refuse(
                "extension",
                name,
                "acts on a trained model",
                "Add finetune=<run folder>, or measure one: python eval.py run=<run folder> "
                f"extension={name}",
            )
        if self.extension.positions is not None:
            if self.extension.attention is not None:
                rule = "cannot be combined with a pattern of attention"
                refuse("extension.positions", self.extension.name, rule, "Leave one of them out")
            if (self.objective, self.state_passing) != ("causal", "none"):
                rule = "chooses the positions of separate windows"
                refuse("extension", self.extension.name, rule, SEPARATE)
        if self.data.task is not None and (self.objective, self.state_passing) != (
            "causal",
            "none",
        ):
            refuse("data", self.data.name, "has separate examples with labels", SEPARATE)
        if self.objective == "masked" and self.state_passing != "none":
            rule = "objective=masked reads separate windows"
            refuse("state_passing", self.state_passing, rule, "Use state_passing=none")
        return self


def _folders(value: Any) -> Any:
    if value is None:
        return value
    every = value if isinstance(value, list) else [value]
    if not every or not all(isinstance(one, str) and one for one in every):
        raise ValueError("must be a run folder, a pattern or a list of them")
    return value


class DataPlace(Section):
    """Where a run's text is now, if not where the run was trained on it; a checkpoint's text."""

    path: str | None = Field(
        default=None, description="where the runs' text is now; null: where they were trained on it"
    )
    cache: str | None = Field(default=None, description="where its tokens are kept; null: as then")
    tokenizer: str | None = Field(
        default=None, description="of the text for a checkpoint=; null: the checkpoint's own"
    )


class EvalConfig(Section):
    """A measurement of trained runs. Paths are relative to the working directory."""

    run: Annotated[str | list[str] | None, BeforeValidator(_folders)] = Field(
        description="run folder, a pattern such as 'runs/compare/*', or a list of them"
    )
    checkpoint: Path | None = Field(
        default=None,
        description="pretrained model: a folder of transformers, or a GGUF file; needs data.path",
    )
    data: DataPlace = Field(default_factory=DataPlace, description="where the runs' text is now")
    task: dict[str, TaskPart]
    extension: Extension
    logger: Logger
    runs: Path = Field(description="folder that holds the run folders")
    split: Literal["train", "valid", "test"] = Field(description="part of the corpus to measure on")
    fresh: Switch = Field(description="true: measure again what was measured before")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = Field(
        description="auto, cpu, mps, cuda, cuda:1 ..."
    )
    threads: Threads | None = Field(description="CPU threads; null: all cores")
    report: Path | None = Field(description="HTML file to write the report to; null: none")
    against: Literal["published"] | None = Field(
        default=None, description="published: beside the published results of the same data"
    )
    publish: Path | None = Field(
        default=None, description="file for these results, in the form of published ones"
    )

    @model_validator(mode="after")
    def _measures(self) -> "EvalConfig":
        if self.run is None and self.checkpoint is None:
            refuse("run", "", "must be given (run folder, or a pattern such as 'runs/compare/*')")
        if self.checkpoint is not None and self.data.path is None:
            refuse(
                "checkpoint",
                self.checkpoint,
                "must have a text to be measured on",
                "Add data.path=<folder of .txt files>",
            )
        if self.checkpoint is None and self.data.tokenizer is not None:
            refuse(
                "data.tokenizer",
                self.data.tokenizer,
                "a run keeps the tokenizer that it was trained with",
                "Leave it out",
            )
        if self.extension.positions is not None:
            name = self.extension.name
            refuse(
                "extension",
                name,
                "is a way to train",
                f"Train with it (python train.py finetune=<run folder> extension={name}), and "
                "measure that run with extension=none",
            )
        return self
