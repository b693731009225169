"""Which arms have learned anything, by their scores in bits per byte."""

from collections import defaultdict
from typing import Any

from zoo.report.protocols import PROTOCOLS
from zoo.report.rows import Results, Row
from zoo.report.statistics import finite
from zoo.report.validity import Unlearned, unlearned


def dead(results: Results) -> dict[str, Unlearned]:
    """Arm -> why its scores show no learning, of those of which any seed shows none."""
    return unlearned(_by_first_protocol(results))


def _by_first_protocol(results: Results) -> list[Row]:
    """The scores of every arm under the first protocol that it was measured under: an encoder's is
    not a causal model's. Those of other tasks, such as of a stream, come after all of perplexity.
    """
    order = [*PROTOCOLS, None]
    first: dict[str, int] = {}
    found = []
    for row in results.where(status="ok"):
        of_text = row.get("task") == "perplexity"
        if not finite(row.get("bits_per_byte")) or (of_text and row.get("protocol") not in order):
            continue
        place = order.index(row.get("protocol")) if of_text else len(order)
        first[row["label"]] = min(place, first.get(row["label"], place))
        found.append((place, row))
    return [row for place, row in found if place == first[row["label"]]]


def never_learned(results: Results) -> set[str]:
    """The arms of which no seed has learned."""
    seeds: dict[tuple[str, Any], list[Row]] = defaultdict(list)
    for row in _by_first_protocol(results):
        seeds[row["label"], row.get("seed")].append(row)
    learned = {label for (label, _), own in seeds.items() if label not in unlearned(own)}
    return {label for label, _ in seeds} - learned
