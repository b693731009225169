"""Which extensions act on which models, told from configurations: nothing heavy is imported.

An extension is for kinds of positions: a rotary scaling or a remap of distances for rotary ones,
slopes for linear biases, places in a training window for all that can stand where we choose.
"""

from collections.abc import Mapping, Set
from typing import Any

from zoo.config.groups import extensions
from zoo.config.schema import Extension, Model
from zoo.errors import UserError

ROTARY, LINEAR, PLACED = ("rope",), ("alibi",), ("rope", "alibi", "sinusoidal", "learned")
SOFTMAX = ("zoo.mixers.softmax.SoftmaxAttention", "zoo.mixers.low_rank.LowRankAttention")
SLOPES = "zoo.positions.alibi.slopes"
NAMES = {
    (): "no",
    ROTARY: "rotary",
    LINEAR: "linear-bias",
    PLACED: "rotary, linear-bias, sinusoidal or learned",
}


def acts_on(tree: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of positions that an extension, as its YAML has it, is for; () for none."""
    if isinstance(tree["scaling"], dict) and tree["scaling"]["_target_"] == SLOPES:
        return LINEAR
    if tree["scaling"] or tree["attention"]:
        return ROTARY
    return PLACED if tree.get("positions") else ()


def positions_of(model: Model) -> set[str]:
    """The kinds of positions in a model's softmax attention and at its embedding."""
    mixers = [block.mixer for block in model.blocks]
    softmax = [part for part in mixers if part.target in SOFTMAX]
    kinds = {part.options.get("positions", "rope") for part in softmax}
    return kinds | ({model.embedding_positions} if model.embedding_positions else set())


def check_applies(extension: Extension, kinds: Set[str], before: str | None) -> tuple[str, ...]:
    """The kinds of positions that an extension acts on, of which a model with `kinds` has some.

    `before` names the extension it was trained under; LongRoPE may follow LongRoPE, with factors
    that were searched for anew. Raises UserError where it has nothing to act on.
    """
    wanted = acts_on(extension.model_dump(by_alias=True))
    if not wanted:
        return wanted
    if before not in (None, "none") and {before, extension.name} != {"longrope"}:
        raise UserError(
            f"extension={extension.name}: this model was trained under an extension of its own, "
            "which extension=none measures"
        )
    if not kinds & {*wanted}:
        raise UserError(
            f"extension={extension.name} acts on {NAMES[wanted]} positions, and this model has "
            f"none: {_applicable(kinds)}"
        )
    return wanted


def _applicable(kinds: Set[str]) -> str:
    """Which extensions act on such positions, in words."""
    found: dict[bool, list[str]] = {False: ["none"], True: []}
    for name, tree in extensions().items():
        if kinds & {*acts_on(tree)}:
            found[bool(tree.get("positions"))].append(name)
    told = f"it takes extension={', '.join(found[False])}"
    return told + (f"; to train with, {', '.join(found[True])}" if found[True] else "")
