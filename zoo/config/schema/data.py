"""The options data.*; further keys belong to the corpus that reads them."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from zoo.config.groups import corpora
from zoo.config.schema.sections import DataPart, OpenSection, Section
from zoo.config.schema.values import Fraction, Name, Positive
from zoo.errors import choose, refuse


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class Data(OpenSection):
    unwritten: ClassVar[Mapping[str, Any]] = {
        **{"passkey": 0.0, "passkey_facts": 1, "task": None},
        **{"end_token": None, "bos_token": None, "stop_tokens": None},
    }
    name: Name
    task: DataPart | None = Field(default=None, description="a synthetic task instead of text")
    passkey: Fraction = Field(
        default=0.0, description="share of the training windows that hold a passkey"
    )
    passkey_facts: Annotated[Positive, Field(le=16)] = Field(
        default=1, description="most keys of such a window, each behind a sign of its own"
    )

    @model_validator(mode="after")
    def _texts(self) -> "Data":
        for key in ("path", "tokenizer", "cache", "eval_documents", "field", "dataset"):
            value = self.options.get(key, "")
            missing = value is None and key in ("path", "dataset")
            if not isinstance(value, str) and not missing:
                refuse(key, value, "must be text", "Quote a name of digits")
        for key in ("end_token", "bos_token", "stop_tokens"):  # null is as one that is not there
            if self.options.get(key, 0) is None and self.model_extra is not None:
                del self.model_extra[key]
        for key in ("end_token", "bos_token"):
            if key in self.options and not _is_token(self.options[key]):
                refuse(key, self.options[key], "must be the number of a token, 0 or more")
        stops = self.options.get("stop_tokens", [])
        if not isinstance(stops, Sequence) or not all(map(_is_token, stops)):
            refuse("stop_tokens", stops, "must be numbers of tokens", "Write them as [2,7]")
        if self.passkey_facts > 1 and not self.passkey:
            rule = "no window holds a passkey with data.passkey=0"
            refuse("passkey_facts", self.passkey_facts, rule, "Set data.passkey, or leave it out")
        return self


class DataPlace(Section):
    """Where a run's text is now, if not where the run was trained on it; a checkpoint's text."""

    name: Name | None = Field(
        default=None,
        description="the corpus, written data=<name>, a checkpoint is measured on; null: text",
    )
    path: str | None = Field(
        default=None, description="where the runs' text is now; null: where they were trained on it"
    )
    cache: str | None = Field(default=None, description="where its tokens are kept; null: as then")
    tokenizer: str | None = Field(
        default=None, description="of the text for a checkpoint=; null: the checkpoint's own"
    )
    field: str | None = Field(
        default=None, description="a checkpoint's: which field of its records holds the text"
    )
    dataset: str | None = Field(default=None, description="a checkpoint's: that of data=hf")
    documents: Positive | None = Field(
        default=None, description="a checkpoint's: the first so many of data=hf or pg19"
    )

    @model_validator(mode="after")
    def _is_corpus(self) -> "DataPlace":
        if self.name is not None:
            choose("name", self.name, corpora(), kind="corpus")
        return self
