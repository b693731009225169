"""The results in a few words: which architecture is best at what, as far as the rows show it.

A headline compares architectures, each by its best arm, and none that leaks or has not learned.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from zoo.report import scores
from zoo.report.caveats import names
from zoo.report.learned import dead
from zoo.report.protocols import headline
from zoo.report.rows import Cells, Results
from zoo.report.statistics import missing
from zoo.report.tables import Tied
from zoo.report.timings import DECODING, comparable
from zoo.report.words import count, score, times

Best = Callable[[Iterable[float]], float]


@dataclass(frozen=True)
class Tile:
    """A result in a few words."""

    title: str
    arm: str
    value: str
    detail: str


def tiles(results: Results) -> list[Tile]:
    """The results in a few words."""
    said: list[Tile | None] = []
    protocol, without = headline(results), dead(results)
    cells = results.cells("perplexity", "bits_per_byte", protocol=protocol) if protocol else {}
    kinds = architectures(results)
    if protocol and cells and one_text(results):
        tied = scores.ties(results, protocol)
        train, longest = results.train_length(), max(next(iter(cells.values())))
        learned = {label: mine for label, mine in cells.items() if label not in without}
        for length in dict.fromkeys([train or longest, longest]):
            multiple = "" if length == train else f"{times(length, train)} "
            where = f"at {length:,} tokens, {multiple}the training length"
            titles = f"Best {where}", f"Bits per byte {where}"
            said.append(_best(titles, learned, length, min, score, "bits/byte", kinds, tied))
    if protocol:
        said.append(_longest_context(results, cells, kinds))
    decode = comparable(results, "speed", DECODING)
    if decode := {label: mine for label, mine in decode.items() if label not in without}:
        longest = max(next(iter(decode.values())))
        where = f"after {longest:,} tokens"
        titles = f"Fastest decoding {where}", f"Decoding {where}"
        said.append(_best(titles, decode, longest, min, count, "ms/token", kinds))
    return [tile for tile in said if tile]


def architectures(results: Results) -> dict[str, str]:
    """Arm -> what headlines compare: architectures, or the ways in which a single one is read.

    Arms that differ in their training alone, such as in the learning rate, are one.
    """
    models = {label: str(results.known(label, "model") or label) for label in results.arms}
    if len(set(models.values())) > 1:  # hybrids share a name, and are different architectures
        return {k: k if model == "hybrid" else model for k, model in models.items()}
    return {label: str(results.known(label, "arm") or label) for label in results.arms}


def one_text(results: Results) -> bool:
    """Whether all arms that one tokeniser reads were scored on the same corpus."""
    corpora: dict[Any, set[Any]] = {}
    for row in results.where(task="perplexity", status="ok"):
        if not missing(row.get("fingerprint")):
            corpora.setdefault(row.get("tokenizer"), set()).add(row["fingerprint"])
    return all(len(prints) == 1 for prints in corpora.values())


def _best(
    titles: tuple[str, str],
    cells: Cells,
    length: int,
    best: Best,
    text: Callable[[float], str],
    unit: str,
    kinds: Mapping[str, str],
    tied: Tied | None = None,
) -> Tile | None:
    """The best architecture of a column, what does not differ from it, how many have no result.

    Each architecture is as good as its best arm. Of one alone, which is best of nothing, the second
    title is used.
    """
    column = {label: mine[length] for label, mine in cells.items() if length in mine}
    every = {label: cell.value for label, cell in column.items() if cell.value is not None}
    if not every:
        return None
    values: dict[str, float] = {}  # of each architecture's best arm
    for kind in dict.fromkeys(kinds[label] for label in every):
        own = {label: value for label, value in every.items() if kinds[label] == kind}
        top = best(own.values())
        values[next(label for label, value in own.items() if value == top)] = top
    top = best(values.values())
    who = next(label for label, value in values.items() if value == top)
    others = [label for label in values if label != who]
    close = [label for label in others if tied and tied(label, who, length)]
    detail = [f"not distinguished from {names(close)}"] if close else []
    if others and not close:
        second = next(label for label in others if values[label] == best(values[o] for o in others))
        detail = [f"then {second}, {text(values[second])}"]
    if (several := sum(kinds[label] == kinds[who] for label in every)) > 1:
        detail.append(f"the best of {several} arms of {kinds[who]}")
    if column[who].seeds < column[who].tried:
        detail.append(f"{column[who].seeds} of its {column[who].tried} seeds have a result")
    if len(every) < len(column):
        detail.append(f"{len(column) - len(every)} of {len(column)} arms have no result")
    return Tile(titles[not others], who, f"{text(top)} {unit}", "; ".join(detail))


def _longest_context(results: Results, cells: Cells, kinds: Mapping[str, str]) -> Tile | None:
    """The architectures whose best arm keeps its quality longest."""

    def at_home(label: str) -> float:
        value = cells[label][results.train_length(label) or 0].value
        return math.inf if value is None else value

    contexts = {label: own for label, own in scores.effective_contexts(results).items() if own}
    if not contexts:
        return None
    first: dict[str, str] = {}  # the best arm of each architecture
    for label in sorted(contexts, key=at_home):
        first.setdefault(kinds[label], label)
    far = max(contexts[label].length for label in first.values())
    who = [label for label in first.values() if contexts[label].length == far]
    surely = min(contexts[label].low for label in who)
    close = [k for k in first.values() if k not in who and contexts[k].high >= surely]
    arms = " and ".join(who) if len(who) < 3 else f"{len(who)} architectures"
    detail = f"{times(far, results.train_length(who[0]))} the training length"
    if len(who) > 2:
        detail += f": {names(who)}"
    if close:
        detail += f"; not distinguished from {names(close)}"
    fewer = [f"{label}: {contexts[label].fewer}" for label in who if contexts[label].fewer]
    if fewer:
        detail += f"; of the seeds that have a score ({names(fewer)})"
    title = "Longest effective context" if len(first) > 1 else "Effective context"
    return Tile(title, arms, f"{contexts[who[0]]}{contexts[who[0]].ends} tokens", detail)


def heading(results: Results) -> str:
    """A title, where none is given."""
    train = results.train_length()
    scored = results.where(task="perplexity") or results.rows
    longest = max((row.get("length") or 0 for row in scored), default=0)
    if train and longest > train:
        return f"Trained at {train:,}, tested to {longest:,}"
    return "Length extrapolation"
