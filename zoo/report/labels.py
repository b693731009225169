"""The labels of arms: rows that are not of one arm get labels that say what differs.

Rows are averaged over seeds of one and the same question only. Those that share an arm's name but
not its training (rate, size, budget, data, any other option), its extension's settings or their
task's settings get longer labels, by every setting that differs.
"""

import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from zoo.measurement import is_quantized, panel, question
from zoo.report.statistics import missing

Row = dict[str, Any]

# What splits one arm name into several, and the word that then goes before its value.
TRAINING = {
    **{"size": "size", "extension_factor": "factor", "train_length": "trained at"},
    **{"train_tokens": "train tokens", "match": "match", "state_passing": "states"},
    **{"data": "data", "fingerprint": "text", "tokenizer": "tokenizer"},
}
FOLLOWING = {"lr": "lr", "parameters": "parameters"}  # what mostly follows from other settings
READ_BY = {"device": "on", "dtype": "in", "threads": "threads"}  # of the measurement
FOUND = ("scaling.long_factors", "scaling.short_factors", "scaling.n_hat")  # by a search
MAX_SETTINGS = 4  # settings that a label names; of more, a hash
MAX_CHARACTERS = 24  # of a value that a label shows; of more, a hash


def lengthen(rows: Sequence[Row], runs: Sequence[Row]) -> None:
    """Distinguish by their labels the rows that are not one arm's, setting by setting.

    The rate that was best for an arm and the parameters that it has follow from its settings, so
    these go first.
    """
    trained = {run.get("run"): _but_rate(run["settings"]) for run in runs if run.get("settings")}
    for field, word in TRAINING.items():
        _split(rows, functools.partial(_named, field=field, word=word))
    _split(rows, lambda row: trained.get(row.get("run"), {}))
    for field, word in (*FOLLOWING.items(), *READ_BY.items()):
        _split(rows, functools.partial(_named, field=field, word=word))
    _split(rows, lambda row: {"ranks": row.get("ranks") or 1})
    _split(rows, lambda row: {"ignores": str(row.get("ignores") or "nothing").partition(":")[0]})
    for row in rows:  # fewer bits are said also where all arms have them
        if is_quantized(row.get("dtype")) and (word := f" · in {row['dtype']}") not in row["label"]:
            row["label"] += word
    _split_extensions(rows)
    _split_questions(rows)
    _split(_repeated(rows), lambda row: {"run": row.get("run")})


def settings_apart(runs: Sequence[Row], fields: Iterable[str]) -> dict[Any, str]:
    """Run -> its arm's name, longer by every setting but the rate in which runs of one differ, and
    by what their records have otherwise in these `fields`."""
    rows = [{"run": run["run"], "label": str(run.get("arm")), "of": run} for run in runs]
    for field, word in TRAINING.items():
        if field != "train_tokens":  # differs among the runs of one arm, some of which were pruned
            _split(rows, lambda row, f=field, w=word: _named(row["of"], field=f, word=w))
    _split(rows, lambda row: _but_rate(row["of"]["settings"]))
    for name in fields:
        _split(rows, lambda row, f=name: _named(row["of"], field=f, word=f.replace("_", " ")))
    return {row["run"]: row["label"] for row in rows}


def _but_rate(settings: Mapping[str, Any]) -> Row:
    """The settings of a run without its learning rate, the best of which stands for its arm."""
    return {name: value for name, value in settings.items() if name != "optim.lr"}


def _split_extensions(rows: Sequence[Row]) -> None:
    """Lengthen the labels under which an extension has several settings.

    What LongRoPE's search found for each run belongs to the run, as its weights do: it is no other
    setting unless one run was read under two.
    """
    for same in _grouped(rows, lambda row: row["label"]):
        own = {(row.get("run"), row.get("extension_settings")) for row in same}
        one_each = len(own) == len({run for run, _ in own})
        searched = FOUND if one_each and same[0].get("extension") == "longrope" else ()
        _split(same, functools.partial(_options, without=searched))
        if not searched:
            _split(same, functools.partial(_named, field="extension_settings", word="settings"))


def _options(row: Row, without: Container[str]) -> Row:
    """The settings of a row's extension but for some."""
    every = row.get("extension_options") or {}
    return {name: value for name, value in every.items() if name not in without}


def _named(row: Row, field: str, word: str) -> Row:
    """A row's value in that field under the word for it, or nothing."""
    return {} if missing(row.get(field)) else {word: row[field]}


def _split(rows: Iterable[Row], settings: Callable[[Row], Mapping[str, Any]]) -> None:
    """Lengthen the labels under which settings have several values by their names and values."""
    for same in _grouped(rows, lambda row: row["label"]):
        every = [settings(row) for row in same]
        names = _differing([own for own in every if own])
        for row, own in zip(same, every, strict=True):
            if own:  # a row that says nothing of them, as of a run that broke, stays as it is
                row["label"] += _words(names, own)


def _split_questions(rows: Iterable[Row]) -> None:
    """Lengthen the labels whose rows at one length answer different questions."""
    for same in _grouped(rows, lambda row: (row["label"], *_place(row))):
        names: dict[str, None] = {}
        for alike in _grouped(same, lambda row: row.get("length")):
            answers = [question(row) for row in alike if row["status"] == "ok"]
            names |= dict.fromkeys(_differing(answers))
        for row in same:
            row["label"] += _words([*names], row)


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return [*groups.values()]


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of those that do not have the same value everywhere; a missing one is None."""
    names = dict.fromkeys(name for own in settings for name in own)
    return [name for name in names if len({_text(own.get(name)) for own in settings}) > 1]


def _words(names: Sequence[str], settings: Mapping[str, Any]) -> str:
    """ " · name value" for each, or for many a hash of all; names without what precedes the dot."""
    if len(names) > MAX_SETTINGS:
        values = json.dumps([settings.get(name) for name in names], sort_keys=True, default=str)
        return f" · {len(names)} options {hashlib.sha256(values.encode()).hexdigest()[:6]}"
    short = [name.rpartition(".")[2] for name in names]
    words = ""
    for name, last in zip(names, short, strict=True):
        value = settings.get(name)
        words += f" · {last if short.count(last) == 1 else name} {_text(value)}"
    return words


def _text(value: Any) -> str:
    """A value as a label has it: thousands apart, long ones cut, 64 hexadecimal digits to 8."""
    if missing(value):
        return "default"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text.removesuffix(".0") if isinstance(value, float) else text
    if len(text) == 64 and not set(text) - set("0123456789abcdef"):
        return text[:8]
    cut = hashlib.sha256(text.encode()).hexdigest()[:6]
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 8]}..{cut}"


def _repeated(rows: Sequence[Row]) -> list[Row]:
    """The rows of the arms in which one measurement was made twice with one seed."""
    count: dict[tuple[Any, ...], int] = defaultdict(int)
    for row in rows:
        if row["status"] == "ok":
            count[row["label"], row.get("seed"), row.get("length"), *_place(row)] += 1
    twice = {label for (label, *_), times in count.items() if times > 1}
    return [row for row in rows if row["label"] in twice]


def _place(row: Row) -> tuple[Any, ...]:
    """The task, and which of its quantities a row has."""
    return row.get("task"), *panel(row).values()
