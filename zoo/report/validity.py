"""Which rows may not be ranked: those of models that read the future, or that learned nothing.

Works on plain rows, before and after `gather` has named their arms.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

LEAKS = "leaks"  # the status of a row whose model saw the tokens it was to predict
UNLEARNED = 0.05  # a score within this share of a guess without context shows no learning


def mark_leaks(rows: Iterable[Row], runs: Iterable[Mapping[str, Any]]) -> None:
    """Give every row of a model that failed its leak audit the status `leaks` and the reason.

    The audit's result is in the row itself, or in the run's record. Its scores stay in the row, but
    no table, figure or headline shows them.
    """
    audited = {run.get("run"): reason for run in runs if (reason := _leak(run.get("audit")))}
    for row in rows:
        reason = _leak(row.get("audit")) or audited.get(row.get("run"))
        if reason and row.get("status") in (None, "ok", "unfinished"):
            row |= {"status": LEAKS, "reason": reason}


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


def guess(row: Mapping[str, Any]) -> tuple[float, str] | None:
    """Bits per byte of the best guess that uses no context, and what guess that is.

    The entropy of single tokens where the row has it, otherwise an even guess over the vocabulary:
    8 for bytes, log2(vocabulary) / bytes per token for other tokenisers. None where unknown.
    """
    for field, words in (
        ("unigram_bits", "token frequencies alone give"),
        ("uniform_bits", "a blind guess gives"),
    ):
        value = row.get(field)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value), words
    return (8.0, "a blind guess gives") if row.get("tokenizer") == "bytes" else None


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


def unlearned(rows: Sequence[Row]) -> dict[str, str]:
    """Arm -> why its scores show no learning, for arms of which any seed shows none.

    `rows` are scores in bits per byte of one protocol. The best score of a seed at any length is
    compared with what a guess without context would have; within `UNLEARNED` of that, where the
    score ends to rise says nothing.
    """
    seeds: dict[tuple[str, Any], list[Row]] = defaultdict(list)
    for row in rows:
        seeds[row["label"], row.get("seed")].append(row)
    said: dict[str, str] = {}
    for (label, _), own in seeds.items():
        best = min(own, key=lambda row: row["bits_per_byte"])
        floor = guess(best)
        if floor and best["bits_per_byte"] > (1 - UNLEARNED) * floor[0]:
            bits = best["bits_per_byte"]
            said[label] = f"{bits:.3f} bits per byte, where {floor[1]} {floor[0]:.3f}"
    return said
