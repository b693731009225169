"""Find what a run's results already hold beside what is requested now."""

from collections.abc import Iterator, Sequence

from zoo.measurement import agrees, panel, question
from zoo.runs.folder import RunFolder
from zoo.runs.provenance import measured_by
from zoo.tasks.context import Row
from zoo.tasks.identity import EXTENDED


def known_besides(folder: RunFolder, about: Row, requested: Sequence[Row]) -> Iterator[Row]:
    """Yield the latest answers of the same weights and code to what was not requested now.

    These are the answers to the same questions under other extensions, and those to the questions
    of other tasks under the settings of their latest answer.
    """
    alike = {name: value for name, value in about.items() if name not in EXTENDED}
    alike |= {"status": "ok"}
    rows = [
        row for row in folder.rows() if agrees(row, alike) and row.keys() >= {"task", *EXTENDED}
    ]
    kinds = {(row["task"], row["extension"] != "none") for row in rows}
    now = {kind: measured_by(folder.config, *kind) for kind in kinds}
    rows = [r for r in rows if r.get("measured_by") == now[r["task"], r["extension"] != "none"]]
    others: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: str(row.get("time"))):
        if row["task"] not in {one["task"] for one in requested}:
            others.setdefault(row["task"], []).append(row)
    for one in requested:
        same = {row["extension_settings"]: row for row in rows if agrees(row, one)}
        for name, row in same.items():
            if name != about["extension_settings"]:
                yield row | {"requested": False}
    for answers in others.values():
        yield from (row | {"requested": False} for row in answers if _alike(row, answers[-1]))


def _alike(row: Row, latest: Row) -> bool:
    """Whether two rows of a task have the same settings, at whatever length."""
    one, other = question(row), question(latest)
    places = {"length", *panel(row), *panel(latest)}
    return all(one[name] == other[name] for name in one.keys() & other.keys() - places)
