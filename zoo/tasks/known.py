"""Find what a run's results already hold beside what is requested now."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from zoo.config.groups import extensions
from zoo.config.schema.model import Extension
from zoo.errors import refuse
from zoo.measurement import agrees, is_quantized, panel, plain_numbers, question
from zoo.runs.folder import RunFolder
from zoo.runs.provenance import measured_by
from zoo.tasks.context import Row
from zoo.tasks.identity import EXTENDED, SHORTENED, row_identity, trained_settings
from zoo.tasks.leaks import is_leak

log = logging.getLogger("zoo")

MEASURED_BY = ("device", "dtype", "threads", "ranks")  # what may differ between answers


def all_known(
    folders: Sequence[RunFolder], other_code: bool = False
) -> tuple[list[Row], list[Row]]:
    """The latest answers that run folders hold, by the weights and code of now, and their records.

    Of questions that only other code has answered, the answers are among them with `other_code`,
    a field that says so; else their number is logged. Raises UserError for a damaged folder.
    """
    rows, runs = [], []
    none = Extension.model_validate(extensions()["none"])
    for folder in (RunFolder.open(folder.path) for folder in folders):
        about = row_identity(none, folder, torch.device("cpu"))
        runs.append(run_record(about, folder))
        weights = {k: v for k, v in about.items() if k not in MEASURED_BY}
        kept = folder.rows()
        _report_renamed(folder, kept)
        found = [*known_besides(folder, kept, weights, [])]
        of_now = [*map(_answered, found)]
        every = known_besides(folder, kept, weights, [], any_code=True)
        others = [row for row in every if row.get("other_code") and _answered(row) not in of_now]
        if other_code:
            found = [row | {"other_code": False} for row in found] + others
        elif others:
            rule = "rows that other code measured are left out"
            log.warning("%s: %d %s. Run zoo eval on it again.", folder.path, len(others), rule)
        rows += [{k: v for k, v in row.items() if k != "requested"} for row in found]
    return rows, runs


def _report_renamed(folder: RunFolder, rows: Sequence[Row]) -> None:
    """Say where a folder has another name than its rows, which are by that name no other run's."""
    named = [str(row["run"]) for row in rows if row.get("run") not in (None, folder.name)]
    for name in dict.fromkeys(named):
        rule = f"{named.count(name)} rows of the run {name} are left out, as this folder was called"
        log.warning("%s: %s. Call it so again, or run zoo eval on it.", folder.path, rule)


def every_current(folders: Sequence[RunFolder]) -> tuple[list[Row], list[Row]]:
    """All answers that run folders hold of the weights and code of now, whatever their settings,
    and the folders' records; none of a run that leaks."""
    rows, runs = [], []
    none = Extension.model_validate(extensions()["none"])
    for folder in (RunFolder.open(folder.path) for folder in folders):
        about = row_identity(none, folder, torch.device("cpu"))
        runs.append(run_record(about, folder))
        apart = (*EXTENDED, *SHORTENED, *MEASURED_BY)
        alike = {name: value for name, value in about.items() if name not in apart}
        kept = folder.rows()
        _report_renamed(folder, kept)
        every = [row for row in kept if row.keys() >= {"task", *EXTENDED}]
        if not _standing_leaks(every, alike):
            rows += _of_now(folder, every, alike)
    return rows, runs


def _of_now(
    folder: RunFolder, rows: Sequence[Row], weights: Row, any_code: bool = False
) -> list[Row]:
    """The successful rows of these weights that the code of now measured; with `any_code` those of
    all code, with a field that says whether it was other code."""
    rows = [row for row in rows if agrees(row, weights | {"status": "ok"})]
    now = {kind: measured_by(folder.config, *kind) for kind in set(map(_kind, rows))}
    if any_code:
        return [row | {"other_code": row.get("measured_by") != now[_kind(row)]} for row in rows]
    return [row for row in rows if row.get("measured_by") == now[_kind(row)]]


def _answered(row: Row) -> Row:
    """What a row answers: by which it and another's of other code are the same."""
    return {"task": row["task"], "place": _place(row), "question": question(row)}


def require_known(
    pattern: str | Sequence[str], folders: Sequence[RunFolder], option: str = "run"
) -> tuple[list[Row], list[Row]]:
    """What `all_known` finds. Raises UserError where that is nothing, as the value of `option`."""
    rows, runs = all_known(folders)
    if not rows:
        rule = "has nothing measured by the code of now"
        refuse(option, pattern, rule, "Run zoo eval on it first")
    return rows, runs


def run_record(about: Row, folder: RunFolder) -> Row:
    """What the report needs to know of a run itself, beside the fields of its rows."""
    trained = {"arm": about["arm"], "settings": trained_settings(folder)}
    trained["valid_loss"] = folder.last_metric("valid_loss")
    trained["valid_windows"] = folder.config.valid_windows
    return about | folder.info | trained


def known_besides(
    folder: RunFolder,
    kept: Sequence[Row],
    about: Row,
    requested: Sequence[Row],
    any_code: bool = False,
) -> Iterator[Row]:
    """Yield the latest answers of the same weights and code, among the rows that a folder has
    `kept`, to what was not requested now.

    These are the answers to the same questions under other extensions, and those to the questions
    of other tasks, at each length under the settings of the latest answer there. Of an extension
    under which a leak was seen after the last answer, the row that says so stands for all. With
    `any_code` answers of all code are among them, and say whether it was other code. Where the
    weights or the cache have fewer bits now, the answers in plain numbers are among them.
    """
    apart, dtype = (*EXTENDED, *SHORTENED), about.get("dtype")
    alike = {name: value for name, value in about.items() if name not in apart}
    every = [row for row in kept if row.keys() >= {"task", *EXTENDED}]
    leaks = _standing_leaks(every, alike)
    now_known = {about["extension_settings"]} if requested else set()  # audited again
    yield from (leaks[name] | {"requested": False} for name in leaks.keys() - now_known)
    numbers = {dtype, plain_numbers(dtype)} if dtype else None  # None: any
    rows = [row for row in every if numbers is None or row.get("dtype") in numbers]
    rows = [row for row in rows if row["extension_settings"] not in leaks.keys() - now_known]
    rows = _of_now(folder, rows, {k: v for k, v in alike.items() if k != "dtype"}, any_code)
    others: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: str(row.get("time"))):
        requested_now = row["task"] in {one["task"] for one in requested}
        if not requested_now and dtype in (None, row.get("dtype")):
            others.setdefault(row["task"], []).append(row)
    for one in requested:
        same = {_reading(row): row for row in rows if agrees(row, one)}
        for reading, row in same.items():
            if reading != _reading(about):
                yield row | {"requested": False}
    for answers in others.values():
        yield from (row | {"requested": False} for row in _latest(answers))


def other_lengths(
    folder: RunFolder, kept: Sequence[Row], about: Row, requested: Sequence[Row]
) -> Iterator[Row]:
    """Yield the latest answers of the same weights, read in the same way, at lengths that were not
    requested now, under the task's settings and on the part of the corpus that were."""
    alike = {name: about[name] for name in ("extension_settings", "dtype")}
    for row in known_besides(folder, kept, about, []):
        if agrees(row, alike) and not any(agrees(row, one) for one in requested):
            places = {"length", "unit", "stride", *panel(row)}  # these follow from the lengths
            settings = ({k: v for k, v in one.items() if k not in places} for one in requested)
            if any(agrees(row, own) for own in settings):
                yield row


def _reading(row: Row) -> tuple[str, str | None]:
    """Under which extension and in which numbers a row was measured."""
    return row["extension_settings"], row.get("dtype")


def _latest(answers: Sequence[Row]) -> list[Row]:
    """A task's answers, the latest last, under the settings of the last one, and at lengths where
    those have none under the last settings that have."""
    found = [row for row in answers if _alike(row, answers[-1])]
    places = [*map(_place, found)]
    others = [row for row in answers if row.get("length") and _place(row) not in places]
    return found + (_latest(others) if others else [])


def _place(row: Row) -> tuple[Any, ...]:
    """The place of a row among those of its run and task."""
    return row["extension_settings"], row.get("dtype"), row.get("length"), panel(row)


def _standing_leaks(rows: Sequence[Row], weights: Row) -> dict[str, Row]:
    """extension_settings -> the leak that was seen under it after the last score."""
    found: dict[str, Row] = {}
    for row in rows:
        if is_leak(row, weights):
            found[row["extension_settings"]] = row
        elif agrees(row, weights | {"status": "ok"}):
            found.pop(row["extension_settings"], None)
    return found


def _kind(row: Row) -> tuple[str, bool, bool, bool]:
    """Which code measures a row: its task, whether extended, whether quantized, whether
    of shortened prompts."""
    quantized, shortened = is_quantized(row.get("dtype")), bool(row.get("compression"))
    return row["task"], row["extension"] != "none", quantized, shortened


def _alike(row: Row, latest: Row) -> bool:
    """Whether two rows of a task have the same settings, at whatever length."""
    one, other = question(row), question(latest)
    places = {"length", *panel(row), *panel(latest)}
    return all(one[name] == other[name] for name in one.keys() & other.keys() - places)
