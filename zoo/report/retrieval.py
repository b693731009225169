"""What perplexity hides: arms that read on evenly and no longer find what they read.

Three pictures of the rows there are. Change against change: bits per byte and what an arm finds
again (accuracy, passkeys), from its training length to the longest length that both were measured
at. Found by length and depth: where in a text a key may be. Found by state: what memory buys.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import altair as alt

from zoo.measurement import Quantity
from zoo.report.axes import Axis
from zoo.report.charts import Drawing, Spec, Style
from zoo.report.figures import Lines
from zoo.report.learned import dead
from zoo.report.protocols import SAME_TOKENS, headline
from zoo.report.rows import SHARE, Cell, Cells, Results
from zoo.report.tables import Table, Td, lengths_of, shown_quantities
from zoo.report.words import TIMES, plus_minus, share, short, signed, size

HIDDEN, BOUGHT = "What perplexity does not show", "What a larger state buys"
FORGETS = "reads on, has forgotten"  # the words for level perplexity and lost recall
LOST = 0.1  # of what was found at the training length: less is no loss worth a name
STEP = 22  # pixels of a depth


@dataclass(frozen=True)
class Change:
    """What an arm's score and what it finds change by, from the training length to `length`."""

    length: int
    bits: Cell
    at_home: float  # bits per byte at the training length
    found: Cell
    found_at_home: float

    @property
    def level(self) -> bool:
        """Whether bits per byte rise by no more than the share that effective context allows."""
        return self.bits.value is not None and self.bits.value <= SHARE * self.at_home

    @property
    def lost(self) -> bool:
        """Whether it finds less by a tenth of what it found, and the interval allows no gain."""
        value, high = self.found.value, self.found.high
        enough = value is not None and value <= -LOST * self.found_at_home
        return enough and (high is None or high < 0)


def recall_quantity(results: Results) -> tuple[str, Quantity] | None:
    """The first share over several lengths that a task has measured: what arms find again."""
    for task in results.tasks:
        if task != "perplexity" and len(lengths_of(results, task)) > 1:
            for quantity in shown_quantities(results, task):
                if quantity.form == "share":
                    return task, quantity
    return None


def changes_of_both(results: Results) -> dict[str, Change]:
    """Arm -> how its score and what it finds change; of those that have both and have learned."""
    protocol, recall = headline(results), recall_quantity(results)
    if protocol not in SAME_TOKENS or recall is None:
        return {}
    scores = results.cells("perplexity", "bits_per_byte", protocol=protocol)
    bits, found, without = results.changes(protocol), results.measured(*recall), dead(results)
    changes = {}
    for label in scores:
        home = results.train_length(label) or 0
        both = [n for n in bits[label] if n in found.get(label, {}) and n > home]
        both = [n for n in both if bits[label][n].seeds and found[label][n].seeds]
        start = scores[label].get(home), found.get(label, {}).get(home)
        if label in without or not both or not all(cell and cell.seeds for cell in start):
            continue
        far = max(both)
        before, after = found[label][home], found[label][far]
        assert before.value is not None
        assert after.value is not None
        ends = None, None
        if None not in (before.low, before.high, after.low, after.high):
            ends = after.low - before.high, after.high - before.low  # type: ignore[operator]
        apart = Cell(after.value - before.value, *ends, after.seeds, after.tried, "")
        changes[label] = Change(
            far, bits[label][far], scores[label][home].value or 0.0, apart, before.value
        )
    return changes


def forgetting(changes: Mapping[str, Change]) -> list[str]:
    """The arms whose perplexity is level while what they find falls."""
    return [label for label, change in changes.items() if change.level and change.lost]


def both_table(results: Results) -> Table | None:
    """Both changes of each arm, and the words for those that perplexity flatters."""
    changes, recall = changes_of_both(results), recall_quantity(results)
    if not changes or recall is None:
        return None
    title = f"Bits per byte against {recall[1].name}, from the training length on."
    heads = [("arm", ""), ("to", "tokens"), ("bits per byte", "change")]
    heads.append((recall[1].name, "change"))
    table, named = Table(title, [*heads, ("", "")]), forgetting(changes)
    for label, change in changes.items():
        assert change.bits.value is not None
        assert change.found.value is not None
        cells = [
            Td(f"{change.length:,}"),
            Td(signed(change.bits.value), plus_minus(change.bits)),
            Td(points(change.found.value), f"from {share(change.found_at_home)}"),
            Td(FORGETS if label in named else "", kind="lead"),
        ]
        table.rows.append([Td(label), *cells])
    return table


def points(change: float) -> str:
    """A change of a share, in points: -0.25 -> "-25 points"."""
    return f"{_tick(change)} points"


def _tick(change: float) -> str:
    return f"{100 * change:+.0f}" if abs(100 * change) >= 0.5 else "0"


def both_figure(results: Results) -> Lines:
    """Change of what is found against change of bits per byte, a mark for each arm."""
    found = []
    for label, change in changes_of_both(results).items():
        assert change.bits.value is not None
        assert change.found.value is not None
        tip = {"to": f"{change.length:,} tokens", "bits per byte": signed(change.bits.value)}
        tip["found"] = points(change.found.value)
        times = 1 + change.bits.value / change.at_home
        where = {"x": times, "y": change.found.value, "low": None, "high": None}
        found.append({"arm": label, **where, **tip})
    recall = recall_quantity(results)
    name = recall[1].name if recall else ""
    return Lines(
        "perplexity-and-recall",
        found,
        Axis("bits per byte, times those at the training length", lambda v: f"{v:.3g}{TIMES}"),
        Axis(f"change of {name} in points (lower is worse)", _tick, signed=True),
        "Change of what is found against change of bits per byte, a mark for each arm. Level "
        "scores with lost recall are at the lower left.",
        level=0.0 if found else None,
    )


def _lengths(cells: Cells) -> list[int]:
    return [*next(iter(cells.values()), {})]


def state_figure(results: Results) -> Lines:
    """What arms find at the longest length against the bytes of their state there."""
    recall, found = recall_quantity(results), []
    if recall is not None:
        task, quantity = recall
        held = results.cells(task, "state_bytes", own=None, **quantity.where)
        cells = results.measured(task, quantity)
        seen = {n: sum(bool(mine[n].seeds) for mine in cells.values()) for n in _lengths(cells)}
        longest = max(seen, key=lambda n: (seen[n], n))  # that most arms were measured at
        for label, mine in cells.items():
            cell, bytes_ = mine[longest], held[label][longest].value
            if cell.value is None or not bytes_:
                continue
            tip = {quantity.name: share(cell.value), "state": size(bytes_)}
            ends: Spec = {"low": cell.low, "high": cell.high}
            if cell.low is not None and cell.high is not None:  # Student's knows no bounds
                ends = {"low": max(0.0, cell.low), "high": min(1.0, cell.high)}
            found.append({"arm": label, "x": bytes_, "y": cell.value, **ends, **tip})
        words = f"{quantity.name} at {short(longest)} (higher is better)"
    else:
        words = ""
    return Lines(
        "recall-by-state",
        found if len({point["x"] for point in found}) > 1 else [],
        Axis("state in bytes", size, base=2),
        Axis(words, share, signed=True, also=(0.0, 1.0)),
        f"{words} against the bytes of the state, a mark for each arm.",
    )


def depth_cells(results: Results) -> dict[str, list[Spec]]:
    """Arm -> the share of keys found at each length and depth, pooled over its runs.

    A depth is a share of the text: rows of two lengths may have other numbers of depths.
    """
    found: dict[str, dict[tuple[int, float], list[int]]] = {}
    for row in results.where(task="passkey", status="ok"):
        right = row.get("correct_by_depth") or []
        if not right or not row.get("count"):
            continue
        for place, hits in enumerate(right):
            depth = place / max(1, len(right) - 1)
            cell = found.setdefault(row["label"], {}).setdefault((row["length"], depth), [0, 0])
            cell[0] += hits
            cell[1] += row["count"] // len(right)
    return {
        label: [
            {"length": length, "depth": depth, "share": hits / count, "text": share(hits / count)}
            | {"keys": f"{hits} of {count}", "dark": hits / count < 0.5}
            for (length, depth), (hits, count) in sorted(cells.items())
        ]
        for label, cells in found.items()
    }


def depth_map(label: str, values: list[Spec], width: int | str = "container") -> Drawing:
    """One arm's keys by length and depth: the brighter the more were found."""
    depths = sorted({value["depth"] for value in values})
    digits = 0 if len({f"{depth:.2f}" for depth in depths}) == len(depths) else 2
    names = [f"{depth:.{digits}%}" for depth in depths]
    values = [
        value | {"depth": names[depths.index(value["depth"])], "at": short(value["length"])}
        for value in values
    ]
    order = list(dict.fromkeys(value["at"] for value in values))
    axis = alt.Axis(title="length in tokens", labelAngle=0, grid=False)
    across = alt.X("at:N", sort=order, axis=axis)
    up = alt.Y("depth:N", sort=names, axis=alt.Axis(title="depth of the key", grid=False))
    tip = [alt.Tooltip(field=name, type="nominal") for name in ("at", "depth", "keys")]
    shade = alt.Color("share:Q", legend=None, scale=alt.Scale(domain=[0, 1], scheme="cividis"))
    base = alt.Chart(alt.Data(values=values)).encode(across, up)
    ink = alt.condition("datum.dark", alt.value("#ffffff"), alt.value("#000000"))
    layers = (
        base.mark_rect().encode(color=shade, tooltip=tip),
        base.mark_text(fontSize=11).encode(text="text:N", color=ink),
    )
    about = f"Share of passkeys that {label} finds, by length and depth of the key."
    return alt.layer(*layers).properties(
        width=width, height=STEP * len(depths), title=label, description=about
    )


def depth_maps(results: Results, look: Mapping[str, Style]) -> Iterator[tuple[str, Drawing]]:
    """A map for each arm that is drawn and has passkeys measured."""
    for label, values in depth_cells(results).items():
        if label in look:
            yield label, depth_map(label, values)


def retrieval_picture(
    results: Results, look: Mapping[str, Style], title: alt.Title
) -> alt.ConcatChart | None:
    """The maps side by side for a PNG; None where no passkeys were measured."""
    maps = [
        depth_map(label, values, 210)
        for label, values in depth_cells(results).items()
        if label in look
    ]
    return alt.concat(*maps, columns=3, spacing=24, title=title) if maps else None
