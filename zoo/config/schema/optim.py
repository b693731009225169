"""The options optim.*."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from zoo.config.schema.sections import Section
from zoo.config.schema.values import Fraction, Natural, Number

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
