"""Which timings may be compared: those of one machine, one number of threads and one session.

A time depends on the machine, its threads, and on what else ran at that moment. The times of a
quantity are therefore ranked and drawn only among the arms that were timed like most others, the
latest of several such groups; a table keeps the others, each with the word for what differs.
A session is one call of the evaluation. Rows of before there was a field for it count as of
one session where they are of one day.
"""

from collections import Counter
from typing import NamedTuple

from zoo.measurement import Quantity
from zoo.report.rows import Cells, Results, Row, fine

# Of task=speed, whose declaration may be missing in older rows.
DECODING = Quantity(
    field="milliseconds",
    name="decoding",
    better="lower",
    unit="milliseconds per token",
    where={"phase": "decode"},
    cost=True,
)


class Setting(NamedTuple):
    """Where, how and when an arm's times were measured: the values of all of its rows."""

    device: frozenset[str]
    threads: frozenset[str]
    session: frozenset[str]


# The word for what differs first.
OTHER = {
    "device": "timed on another machine",
    "threads": "timed with other threads",
    "session": "timed in another session",
}


def incomparable(results: Results, task: str, quantity: Quantity) -> dict[str, str]:
    """Arm -> why its times may not be compared with those of most arms; of no time nothing."""
    if not quantity.timed:
        return {}
    rows = fine(results.where(task=task, **quantity.where), quantity.field)
    settings: dict[str, Setting] = {}
    latest: dict[Setting, str] = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        own = [row for row in rows if row["label"] == label]
        setting = settings[label] = _setting(own)
        newest = max(str(row.get("time") or "") for row in own)
        latest[setting] = max(newest, latest.get(setting, ""))
    if len(latest) < 2:
        return {}
    arms = Counter(settings.values())
    most = max(latest, key=lambda setting: (arms[setting], latest[setting]))
    return {label: _word(own, most) for label, own in settings.items() if own != most}


def apart(one: Row, other: Row) -> str:
    """Why the times of two rows may not be compared; nothing where they may."""
    settings = _setting([one]), _setting([other])
    return "" if settings[0] == settings[1] else _word(*settings)


def comparable(results: Results, task: str, quantity: Quantity) -> Cells:
    """What was measured of a quantity, without the arms whose times may not be compared."""
    without = incomparable(results, task, quantity)
    cells = results.measured(task, quantity)
    return {label: mine for label, mine in cells.items() if label not in without}


def _setting(rows: list[Row]) -> Setting:
    return Setting(
        frozenset(str(row.get("device")) for row in rows),
        frozenset(str(row.get("threads")) for row in rows),
        frozenset(map(_session, rows)),
    )


def _session(row: Row) -> str:
    return str(row.get("session") or str(row.get("time") or "")[:10])


def _word(own: Setting, most: Setting) -> str:
    fields = (name for name in OTHER if getattr(own, name) != getattr(most, name))
    return OTHER[next(fields)]
