"""The options of train.py."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from zoo.config.applicability import check_applies, position_schemes
from zoo.config.schema.data import Data
from zoo.config.schema.model import Extension, Lora, Model, Shrunk, Size, Stage
from zoo.config.schema.optim import Optim
from zoo.config.schema.sections import Section
from zoo.config.schema.trainer import Logger, Trainer
from zoo.config.schema.values import (
    Name,
    Natural,
    Number,
    Path,
    Positive,
    Seed,
    Switch,
    SwitchOrTokens,
    Threads,
)
from zoo.errors import refuse

SEPARATE = "Use objective=causal and state_passing=none"  # windows


class Distil(Section):
    """What a run learns of another model's predictions (arXiv 1503.02531)."""

    unwritten: ClassVar[Mapping[str, Any]] = {"teacher": None, "temperature": 2.0, "weight": 0.5}
    teacher: Path | None = Field(
        default=None, description="run folder, or pretrained checkpoint, whose predictions to learn"
    )
    temperature: Annotated[Number, Field(ge=0.1, le=1000)] = Field(
        default=2.0, description="by which the logits of both are divided"
    )
    weight: Annotated[Number, Field(gt=0, le=1)] = Field(
        default=0.5, description="share of the loss that is the teacher's; the rest is the text's"
    )


class TrainConfig(Section):
    """A training run. Paths are relative to the working directory."""

    unwritten: ClassVar[Mapping[str, Any]] = {
        "checkpoint": None,
        "stages": [],
        "shrunk": None,
        "distil": {},
        "lora": {},
    }
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
    checkpoint_activations: SwitchOrTokens = Field(
        description="true: recompute each block in the backward pass, to save memory; a number: so "
        "many tokens at a time, to save more"
    )
    valid_every: Positive = Field(description="steps between validations")
    valid_windows: Positive = Field(description="windows that a validation reads")
    save_every: Positive = Field(description="steps between checkpoints")
    runs: Path = Field(description="folder that holds the run folders")
    name: Name | None = Field(description="name of the run folder; null: made from the options")
    resume: Path | None = Field(description="run folder whose training to continue")
    finetune: Path | None = Field(
        description="run folder, or pretrained checkpoint, whose model to train further, under "
        "extension=<name>"
    )
    checkpoint: Path | None = Field(
        default=None,
        description="pretrained checkpoint that the run was made of; eval.py checkpoint= sets it",
    )
    distil: Distil = Field(default_factory=Distil, description="a teacher's predictions")
    lora: Lora = Field(default_factory=Lora, description="adapters trained by finetune=")
    extension: Extension
    stages: list[Stage] = Field(
        default=[],
        description="trainings under extensions before this one, the first first; finetune= sets "
        "them",
    )
    shrunk: Shrunk | None = Field(
        default=None,
        description="trained run whose model was made smaller; zoo shrink sets it",
    )
    fresh: Switch = Field(description="true: train again, in a new folder")
    changed_code: Literal["refuse", "accept"] = Field(
        default="refuse", description="accept: continue a run that was trained by other code"
    )
    allocator: Literal["tuned", "system"] = Field(
        description="tuned: let the C library keep freed memory, which is faster (glibc); under "
        "trainer=fsdp return it, which saves weights"
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
        if acts or self.extension.positions is not None:
            check_applies(self.extension, position_schemes(self.model))
        if acts and not self.finetune and not self.checkpoint and not self.shrunk:
            name = self.extension.name
            refuse(
                "extension",
                name,
                "acts on a trained model",
                "Add finetune=<run folder>, or measure one: python eval.py run=<run folder> "
                f"extension={name}",
            )
        if self.lora.rank is not None and not self.finetune:
            advice = "Add finetune=<run or pretrained checkpoint>"
            refuse("lora.rank", self.lora.rank, "adapts a trained model", advice)
        if self.lora.rank is not None and self.shrunk is not None and self.shrunk.sparsity:
            rule = "adapters fill the zeros of a pruned model"
            refuse("lora.rank", self.lora.rank, rule, "Leave it out, or tune an unpruned run")
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
        ranks, again = self.trainer.sequence_parallel, self.checkpoint_activations
        if not isinstance(again, bool) and (self.objective != "causal" or (ranks or 1) > 1):
            rule = "reads each window in chunks, causally and in one process"
            advice = "Use checkpoint_activations=true"
            refuse("checkpoint_activations", again, rule, advice)
        if (ranks or 1) > 1 and (self.objective, self.state_passing) != ("causal", "none"):
            rule = "splits separate windows of causal models"
            refuse("trainer.sequence_parallel", ranks, rule, SEPARATE)
        if self.distil.teacher is not None and (
            (self.objective, self.state_passing) != ("causal", "none")
            or self.extension.positions is not None
            or self.data.task is not None
        ):
            rule = "acts on separate windows of a text, read at their own positions"
            refuse("distil.teacher", self.distil.teacher, rule, f"{SEPARATE}, and such a text")
        if self.distil.teacher is not None and (ranks or 1) > 1:
            rule = "reads each window in one process"
            refuse("distil.teacher", self.distil.teacher, rule, "Use trainer.sequence_parallel=1")
        if self.trainer.strategy == "fsdp":
            self._check_sharding()
        if self.objective == "masked" and self.state_passing != "none":
            rule = "objective=masked reads separate windows"
            refuse("state_passing", self.state_passing, rule, "Use state_passing=none")
        return self

    def _check_sharding(self) -> None:
        """Refuse fsdp with what acts on whole weights, or on some of a block's alone."""
        pruned = self.shrunk is not None and self.shrunk.sparsity is not None
        others = {
            "optim=muon": self.optim.name == "muon",
            "state_passing=carry": self.state_passing == "carry",
            "lora.rank": self.lora.rank is not None,
            "a pruned model": pruned,
            "checkpoint_activations=<tokens>": type(self.checkpoint_activations) is int,
        }
        for name in (name for name, given in others.items() if given):
            rule = f"cannot be combined with {name}"
            refuse("trainer.strategy", "fsdp", rule, "Use trainer=ddp")
