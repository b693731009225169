"""Claims in words: the verdicts with what they rest on, and how many were not judged and why.

Only claims of which these runs measured an arm are shown: a report of private models is no place to
list what the literature says of others.
"""

from collections.abc import Sequence

from zoo.paths import shipped
from zoo.report.claims import FAILS, HOLDS, OPEN, Claim, Comparison, Judged, judge, published
from zoo.report.rows import Cell, Results
from zoo.report.tables import Table, Td
from zoo.report.words import PLUS_MINUS, signed

COUNTED = {HOLDS: "hold", FAILS: "do not hold", OPEN: "not shown at this scale"}


def claims_table(results: Results) -> Table | None:
    """The verdicts with what they rest on, then the claims that lack rows of some of their arms.

    None where no claim is judged.
    """
    head = [
        ("claim", ""),
        ("verdict", "source"),
        ("what was compared", "bits per byte to spare, by seed"),
    ]
    found = judge(results)
    table = Table(f"Published claims, judged on these runs: {counted(results, found)}.", head)
    for own in found:
        kind = {"holds": "best", "does not hold": "lead"}.get(own.verdict, "")
        said = f"{own.verdict}: {own.why}" if own.why else own.verdict
        verdict = Td(said, own.claim.source, kind)
        words = Td(
            "; ".join(evidence(own)), f"what would change our mind: {own.claim.mind}", "words"
        )
        table.rows.append([Td(f"{own.claim.number}. {own.claim.words}"), verdict, words])
    for claim in partly_measured(results, found) if found else ():
        verdict, why = Td("not judged", claim.source), Td(waits_for(claim), kind="words")
        table.rows.append([Td(f"{claim.number}. {claim.words}"), verdict, why])
    return table if found else None


def claims_text(results: Results) -> str:
    """For a terminal: each verdict and below it what was compared; in one line those of too few
    seeds. Nothing where no claim is judged."""
    found = judge(results)
    lines, short = [], [own for own in found if own.verdict == OPEN and own.too_few]
    for own in found:
        if own not in short:
            why = f" ({own.why})" if own.why else ""
            lines.append(f"claim {own.claim.number} {own.verdict}{why}: {own.claim.words}")
            lines += [f"    {line}" for line in evidence(own)]
    for why in dict.fromkeys(own.why for own in short):
        numbers = [str(own.claim.number) for own in short if own.why == why]
        word = "claim" if len(numbers) == 1 else "claims"
        lines.append(f"{word} {', '.join(numbers)} {OPEN}: {why}")
    return "\n".join([f"claims: {counted(results, found)}", *lines]) if lines else ""


def partly_measured(results: Results, found: Sequence[Judged]) -> list[Claim]:
    """The claims that are not among the judged `found`, though an arm of theirs was measured."""
    judged = {own.claim.number for own in found}
    every = [claim for claim in published() if claim.number not in judged]
    return [claim for claim in every if claim.bears_on(results)]


def counted(results: Results, found: Sequence[Judged]) -> str:
    """How many claims hold, do not, are not shown, and are not judged for which reason."""
    verdicts = [own.verdict for own in found]
    said = [f"{verdicts.count(one)} {words}" for one, words in COUNTED.items()]
    left, partly = len(published()) - len(found), len(partly_measured(results, found))
    whys = [f"{partly} lack an arm, a length or a measure that they compare"] if partly else []
    if left > partly:
        whys.append(f"of {left - partly} no arm was measured here")
    return ", ".join([*said, *([f"{left} not judged ({'; '.join(whys)})"] if left else [])])


def waits_for(claim: Claim) -> str:
    """What a claim that was not judged waits for."""
    by = f"its rule, which the report does not carry out yet: {claim.rule}" if claim.rule else ""
    by = by or "; ".join(map(str, claim.comparisons))
    known = (shipped("configs") / "experiment" / f"{claim.rows}.yaml").is_file()
    missing = "" if known else " (an experiment that is still to be written)"
    return f"waits for rows of experiment={claim.rows}{missing}; {by}"


def evidence(judged: Judged) -> list[str]:
    """Each comparison in words, with by how much each seed keeps it (or, below zero, misses it)."""
    pairs = zip(judged.claim.comparisons, judged.cells, strict=True)
    return [f"{each}: {', '.join(_spare(each, cell) for cell in cells)}" for each, cells in pairs]


def _spare(each: Comparison, cell: Cell) -> str:
    assert cell.value is not None
    by = signed(cell.value if each.side == "above" else -cell.value)
    return f"{by} {PLUS_MINUS} {cell.half:.3f}" if cell.half else by
