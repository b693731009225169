"""The options of eval.py."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from zoo.config.groups import corpora
from zoo.config.schema.data import DataPlace
from zoo.config.schema.model import Extension
from zoo.config.schema.sections import CompressionPart, Section, TaskPart
from zoo.config.schema.trainer import Logger
from zoo.config.schema.values import Name, Number, Path, Positive, Switch, Threads, spelt
from zoo.errors import refuse

MAX_RANKS = 256


def _folders(value: Any) -> Any:
    if value is None:
        return value
    every = value if isinstance(value, list) else [value]
    if not every or not all(isinstance(one, str) and one for one in every):
        raise ValueError("must be a run folder, a pattern or a list of them")
    return value


class Compress(Section):
    """How the prompts that a task has a model read are shortened."""

    name: Name = "none"
    by: Path | None = Field(default=None, description="run or checkpoint that scores the tokens")
    rate: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        default=None, description="tokens kept over tokens there are"
    )
    flops: Annotated[Number, Field(gt=0)] | None = Field(
        default=None,
        description="instead of rate: the operations that shortening a prompt and reading it take",
    )
    method: CompressionPart | None = None


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
    compress: Compress = Field(default_factory=Compress, description="of prompts")
    logger: Logger
    runs: Path = Field(description="folder that holds the run folders")
    split: Literal["train", "valid", "test"] = Field(description="part of the corpus to measure on")
    fresh: Switch = Field(description="true: measure again what was measured before")
    device: Annotated[
        str, spelt(r"auto|cpu|mps|cuda(:\d+)?", "must be auto, cpu, mps, cuda or cuda:<n>")
    ] = Field(description="auto, cpu, mps, cuda, cuda:1 ...")
    weights: Literal["stored", "float32", "bfloat16", "float16", "int8", "int4"] | None = Field(
        default=None,
        description="dtype of the weights; stored: the checkpoint's; int8 or int4: quantized; "
        "null: float32 on a CPU, else as stored",
    )
    kv_cache: Literal["int8", "int4"] | None = Field(
        default=None,
        description="bits of the keys and values that softmax attention caches; null: as computed",
    )
    threads: Threads | None = Field(
        description="CPU threads of each process; null: all cores, divided among them"
    )
    sequence_parallel: Annotated[Positive, Field(le=MAX_RANKS)] | None = Field(
        default=None,
        description="processes that read one text together, a part of it each, on the CPU; of "
        "task=perplexity|passkey|facts",
    )
    report: Path | None = Field(description="HTML file to write the report to; null: none")
    against: Literal["published"] | None = Field(
        default=None, description="published: beside the published results of the same data"
    )
    publish: Path | None = Field(
        default=None,
        description="file for these results, in the form of published ones; runs that it has stay",
    )

    @model_validator(mode="after")
    def _measures(self) -> "EvalConfig":
        if self.run is None and self.checkpoint is None:
            refuse("run", "", "must be given (run folder, or a pattern such as 'runs/compare/*')")
        placed = "path" in corpora()[self.data.name or "text"]
        if self.checkpoint is not None and self.data.path is None and placed:
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
        return self
