"""How much the learning rate matters to each arm: the table of all rates that were tried."""

from zoo.report.rates import Rate
from zoo.report.rows import Results
from zoo.report.tables import Table, Td


def rates_table(results: Results) -> Table | None:
    """Arms down, rates across: mean validation losses, the chosen rate of each arm marked."""
    rates = sorted({rate.lr for rate in results.rates})
    arms = dict.fromkeys(rate.arm for rate in results.rates)
    by_place = {(rate.arm, rate.lr): rate for rate in results.rates}
    caption = "Validation loss by learning rate; the best of each arm is reported above."
    table = Table(caption, [("arm", ""), *((f"{lr:g}", "") for lr in rates)])
    for arm in arms:
        tried = [lr for lr in rates if (arm, lr) in by_place]
        edges = {tried[0], tried[-1]}
        own = (_cell(by_place.get((arm, lr)), lr in edges) for lr in rates)
        table.rows.append([Td(arm), *own])
    return table if arms else None


def _cell(rate: Rate | None, edge: bool) -> Td:
    if rate is None:
        return Td("not tried", kind="reason")
    if rate.loss is None:
        return Td(rate.ended or "not finished", kind="reason")
    several = f"{len(rate.losses)} seeds, {min(rate.losses):.3g} to {max(rate.losses):.3g}"
    note = several if len(rate.losses) > 1 else "one seed"
    if rate.chosen and edge:
        note += "; best rate at the edge of the grid"
    return Td(f"{rate.loss:.4f}", note, "best" if rate.chosen else "")
