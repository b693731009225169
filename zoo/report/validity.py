"""Which rows may not be ranked: those of models that read the future, that were not audited for
that, or that learned nothing.

Works on plain rows, before and after `gather` has named their arms.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from zoo.measurement import Quantity
from zoo.report.statistics import finite

Row = dict[str, Any]

LEAKS = "leaks"  # the status of a row whose model saw the tokens it was to predict
NOT_AUDITED = "not_audited"  # of one whose model may have
NOT_LEARNED, BROKEN = "has not learned", "is broken by its extension"
UNLEARNED = 0.05  # a score within this share of a guess without context shows no learning


def mark_audits(rows: Iterable[Row], runs: Iterable[Mapping[str, Any]]) -> None:
    """Give every row of a model that failed its leak audit the status `leaks` and the reason, and
    every other score without an audit the status `not_audited`.

    The audit's result is in the row itself, or in the run's record. Its scores stay in the row, but
    no table, figure or headline shows them.
    """
    records = {run.get("run"): run.get("audit") for run in runs}
    leaky = {name: reason for name, audit in records.items() if (reason := _leak(audit))}
    for row in rows:
        reason = _leak(row.get("audit")) or leaky.get(row.get("run"))
        if reason and row.get("status") in (None, "ok", "unfinished"):
            row |= {"status": LEAKS, "reason": reason}
        elif row.get("status") in (None, "ok") and not is_audited(row):
            row |= {"status": NOT_AUDITED, "reason": _why_not(records.get(row.get("run")))}


def is_audited(row: Mapping[str, Any]) -> bool:
    """Whether the row says what was compared before it was measured (see zoo/tasks/leaks.py)."""
    return isinstance(row.get("audited"), Mapping)


def audited_tokens(row: Mapping[str, Any]) -> int | None:
    """The tokens of the longest text that was compared; None for none, as of an encoder."""
    return max(row["audited"].values(), default=None) if is_audited(row) else None


def _why_not(audit: Any) -> str:
    """Why a row is without an audit, and what to do."""
    failed = isinstance(audit, Mapping) and audit.get("ok") is None and audit.get("reason")
    why = (
        f"nothing could be compared ({audit['reason']})" if failed else "no comparison is recorded"
    )
    return f"{why}; eval.py run=<this run> audits it"


def _leak(audit: Any) -> str | None:
    """The reason for which an audit failed; None where it passed or none was made."""
    if isinstance(audit, Mapping):
        failed = audit.get("ok") is False
        return str(audit.get("reason") or "the leak audit failed") if failed else None
    return str(audit) if audit else None


def spread_leaks(rows: Iterable[Row]) -> None:
    """Withdraw the other seeds of an arm of which one leaks, where the code was the same.

    One architecture leaks or does not, whatever its seed. Rows of other code keep their scores.
    """
    rows = [*rows]
    leaky = {(row["label"], row.get("sources")): row for row in rows if row["status"] == LEAKS}
    for row in rows:
        found = leaky.get((row["label"], row.get("sources")))
        if found and row["status"] == "ok":
            row |= {"status": LEAKS, "reason": f"{found['reason']} (found in {found.get('run')})"}


def drop_partial_budgets(rows: Iterable[Row], runs: Iterable[Mapping[str, Any]]) -> None:
    """Take the tokens and steps out of rows without a result of runs that did not finish.

    A run that diverged at step 3 is one of its arm, not another arm with another budget.
    """
    ended_early = {run.get("run") for run in runs if run.get("status") != "done"}
    for row in rows:
        if row.get("run") in ended_early and row.get("status") not in (None, "ok"):
            row |= {"train_tokens": None, "train_steps": None}


def baseline(row: Mapping[str, Any]) -> tuple[float, str] | None:
    """Bits per byte that a model must stay below to have learned, and whose score that is.

    The lowest of the levels that the row has, the more knowing of equals: a bigram model's, or 5 %
    below the entropy of single tokens or an even guess, which is 8 bits for bytes and
    log2(vocabulary) / bytes per token for other tokenisers. A bigram model of one text may score
    worse on another than a guess. None where none is known.
    """
    even = row.get("uniform_bits")
    levels = (
        (row.get("bigram_bits"), 0.0, "a bigram model scores"),
        (row.get("unigram_bits"), UNLEARNED, "token frequencies alone give"),
        (8.0 if row.get("tokenizer") == "bytes" else even, UNLEARNED, "a blind guess gives"),
    )
    known = [(float(value), below, words) for value, below, words in levels if finite(value)]
    if not known:
        return None
    value, below, words = min(known, key=lambda level: level[0])
    return (1 - below) * value, f"{words} {value:.3f}"


def blind_guess(rows: Iterable[Mapping[str, Any]]) -> str:
    """What an even guess scores, in words: bits per byte, by tokeniser where that is not bytes."""
    known: dict[str, Any] = {}
    for row in rows:
        if row.get("tokenizer"):
            name = str(row["tokenizer"])
            even = 8.0 if name == "bytes" else row.get("uniform_bits")
            known[name] = known.get(name) or even
    if set(known) <= {"bytes"}:
        return (
            "8 is a blind guess" if known else "log2(vocabulary) / bytes per token is a blind guess"
        )
    formula = "log2(vocabulary) / bytes per token"
    each = (
        f"{even:.3g} for {name}" if even else f"{formula} for {name}"
        for name, even in known.items()
    )
    return f"a blind guess is {', '.join(each)}"


class Unlearned(NamedTuple):
    """An arm whose scores show no learning, and whether only under its extension they do not."""

    score: str  # "5.428 bits per byte, where a bigram model scores 3.468"
    broken: bool  # the same weights show it under another extension, or without one

    @property
    def words(self) -> str:
        return BROKEN if self.broken else NOT_LEARNED

    def __str__(self) -> str:
        return f"{self.words}: {self.score}"


def unlearned(rows: Sequence[Row]) -> dict[str, Unlearned]:
    """Arm -> why its scores show no learning, for arms of which any seed shows none.

    `rows` are scores in bits per byte of one protocol. The best score of a seed at any length is
    compared with `baseline`: where it is no better, its being level at other lengths says nothing.
    """
    seeds: dict[tuple[str, Any], list[Row]] = defaultdict(list)
    for row in rows:
        seeds[row["label"], row.get("seed")].append(row)
    best = {key: min(own, key=lambda row: row["bits_per_byte"]) for key, own in seeds.items()}
    floors = {key: floor for key, row in best.items() if (floor := baseline(row))}
    dull = {key for key, floor in floors.items() if best[key]["bits_per_byte"] >= floor[0]}
    learned = {best[key].get("run") for key in floors if key not in dull} - {None}
    said: dict[str, Unlearned] = {}
    for label, seed in (key for key in floors if key in dull):
        row, words = best[label, seed], floors[label, seed][1]
        score = f"{row['bits_per_byte']:.3f} bits per byte, where {words}"
        others = label not in said or said[label].broken
        said[label] = Unlearned(score, broken=others and row.get("run") in learned)
    return said


class Guessing(NamedTuple):
    """The seeds of an arm whose answers are no better than guesses."""

    best: float  # the highest value among them
    seeds: int
    of: int  # seeds of the arm


def _is_guess(row: Row, quantity: Quantity) -> bool:
    ends, level = row.get(quantity.interval or ""), quantity.unlearned(row)
    return level is not None and (ends[0] if ends else row[quantity.field]) <= level


def at_chance(rows: Sequence[Row], quantity: Quantity) -> dict[str, Guessing]:
    """Arms with seeds that are no better than guessing.

    At no length is such a seed's value above what guessing gives there, nor all of its interval;
    see `Quantity.unlearned`. `rows` are the successful ones of the quantity's task.
    """
    seeds: dict[str, dict[Any, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        known = finite(row.get(quantity.field)) and finite(quantity.unlearned(row))
        if quantity.of(row) and known:
            seeds[row["label"]][row.get("seed")].append(row)
    found: dict[str, Guessing] = {}
    for label, by_seed in seeds.items():
        guessed = [own for own in by_seed.values() if all(_is_guess(row, quantity) for row in own)]
        values = [max(row[quantity.field] for row in own) for own in guessed]
        if values:
            found[label] = Guessing(max(values), len(values), len(by_seed))
    return found
