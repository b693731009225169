"""The options model.*, size.* and extension.*."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from zoo.config.schema.sections import AttentionPart, MixerPart, PositionsPart, Section
from zoo.config.schema.values import Name, Number, Path, Positive, ShortConv, Switch, spelt


class BlockConfig(Section):
    unwritten: ClassVar[Mapping[str, Any]] = {"short_conv": None}
    mixer: MixerPart
    feed_forward: MixerPart | None
    short_conv: ShortConv | None = None  # taps of a convolution before the mixer


Matched = Annotated[
    str,
    spelt(
        r"layers|(mixer|feed_forward)\.[a-z]\w*",
        "must be layers, mixer.<option> or feed_forward.<option>",
    ),
]


class Model(Section):
    unwritten: ClassVar[Mapping[str, Any]] = {
        **{"norm": "rms_norm", "norm_eps": 1e-6, "embedding_norm": False},
        **{"parallel_residual": False, "post_norm": False, "tied": True},
        **{"embedding_scale": None, "logit_softcap": None, "sink_token": False},
    }
    name: Name
    blocks: list[BlockConfig] = Field(min_length=1)  # repeated over the layers
    embedding_positions: PositionsPart | None
    match: list[Matched]  # what match=params may change, in this order
    norm: Literal["rms_norm", "rms_norm_offset", "layer_norm"] = Field(
        default="rms_norm", description="normalisation before every half of a block and the head"
    )
    norm_eps: Annotated[Number, Field(gt=0, lt=1)] = Field(
        default=1e-6, description="added under the root of these normalisations"
    )
    embedding_norm: Switch = Field(
        default=False, description="true: the embedded tokens are normalised too"
    )
    parallel_residual: Switch = Field(
        default=False, description="true: mixer and feed-forward read the same input"
    )
    post_norm: Switch = Field(
        default=False, description="true: what a half of a block adds is normalised too"
    )
    embedding_scale: Annotated[Number, Field(gt=0, le=2**20)] | None = Field(
        default=None, description="of the embedded tokens; null: none"
    )
    logit_softcap: Annotated[Number, Field(gt=0, le=2**20)] | None = Field(
        default=None, description="bound of the logits, approached as tanh; null: none"
    )
    tied: Switch = Field(default=True, description="true: the head is the embedding")
    sink_token: Switch = Field(
        default=False, description="true: a learned token is before every text"
    )


MAX_LAYERS = 256


class Size(Section):
    name: Name
    width: Annotated[Positive, Field(le=2**17)]
    layers: Annotated[Positive, Field(le=MAX_LAYERS)]
    heads: Annotated[Positive, Field(le=2**17)]


Layer = Annotated[
    str, spelt(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", "must be a layer's name, such as mixer.q_proj")
]


class Extension(Section):
    """How a model reads beyond the length of the windows it is trained on."""

    unwritten: ClassVar[Mapping[str, Any]] = {
        **{"positions": None, "composition": "replace", "step": None},
    }
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
        default=None, description="positions of the tokens of a training window; null: 0, 1, 2 ..."
    )
    composition: Literal["replace", "on_top"] = Field(
        default="replace",
        description="of a scaling with the one that the run was tuned under: replace (of the "
        "model's own frequencies, times the original length) or on_top (of the scaled ones, times "
        "the length that they were tuned at)",
    )
    step: Positive | None = Field(
        default=None,
        description="tokens after which a scaling by the length changes; 1: at every token; null: "
        "the original length",
    )


PAIRS: Literal["2:4"] = "2:4"  # two of every four inputs


class Shrunk(Section):
    """How a run's model was made smaller after training, see zoo.model.shrink."""

    unwritten: ClassVar[Mapping[str, Any]] = {"rank": None, "sparsity": None}
    run: Path
    rank: Positive | None = None
    sparsity: Annotated[Number, Field(gt=0, lt=1)] | Literal["2:4"] | None = None


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685), which finetune= trains in place of the weights."""

    unwritten: ClassVar[Mapping[str, Any]] = {"rank": None, "alpha": None, "targets": None}
    rank: Annotated[Positive, Field(le=2**14)] | None = Field(
        default=None, description="rank of the adapters; null: the weights themselves are trained"
    )
    alpha: Annotated[Number, Field(gt=0, le=2**20)] | None = Field(
        default=None, description="scale of the adapters times their rank; null: twice the rank"
    )
    targets: Annotated[list[Layer], Field(min_length=1)] | None = Field(
        default=None, description="linear layers, such as [q_proj,v_proj]; null: all of the blocks"
    )

    @property
    def alpha_or_default(self) -> float:
        assert self.rank is not None
        return 2 * self.rank if self.alpha is None else self.alpha


class Stage(Section):
    """An earlier training of a run's model: where it lies, its windows, its extension."""

    run: Path
    seq_len: Positive
    extension: Extension
