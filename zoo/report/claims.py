"""What the literature promises, judged by the rows: holds, does not hold, not shown at this scale.

A claim is a list of comparisons. In each the score of an arm at a length, less `share` times
another's, must lie below or above 0 on the same tokens: of every seed, with its whole 95% interval
over the stretches of text. Other numbers than bits per byte (`MEASURES`) are compared seed by seed
as well, the nearer ends of their intervals with each other; one without interval counts as it is,
and a speed holds for this machine. (An interval over two or three seeds is wider than anything it
could distinguish; that the others repeat what one shows is required.) A claim holds where all do,
does not hold where one lies wholly on the other side for every seed, and is otherwise not shown,
for a reason that is given: fewer than two seeds, seeds that disagree, an interval that holds 0. It
is judged where all it compares was measured.
"""

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import yaml

from zoo.paths import shipped
from zoo.report.learned import dead
from zoo.report.rows import Cell, Results, Row, contrast, reference_arm
from zoo.report.statistics import finite
from zoo.report.timings import apart

Verdict = Literal["holds", "does not hold", "not shown at this scale"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold"
OPEN: Verdict = "not shown at this scale"
ORDER: list[Verdict] = ["does not hold", "not shown at this scale", "holds"]  # one is enough

SEEDS = 2  # at least
BITS = "bits per byte"
MEASURES: dict[str, Row] = {  # as a rule names it -> its rows; the field that they have it in
    BITS: {"task": "perplexity", "field": "bits_per_byte"},
    "accuracy": {"task": "accuracy", "field": "accuracy", "interval": "interval"},
    "labels": {"task": "many_shot", "field": "accuracy", "interval": "interval"},
    "passkeys": {"task": "passkey", "field": "accuracy", "interval": "interval"},
    "facts": {"task": "facts", "field": "accuracy", "interval": "interval"},
    "speed": {"task": "speed", "field": "tokens_per_second", "phase": "forward"},
    "state": {"task": "speed", "field": "state_bytes", "phase": "decode"},
}
SCORE = re.compile(
    rf"(?P<arm>.+?)(?: \(states (?P<states>none|carry)\))?(?: (?P<what>{'|'.join(MEASURES)}))?"
    r" at (?:(?P<times>\d+) )?L(?P<blocks> \(blocks\))?"
)
RULE = re.compile(
    r"(?P<one>.+ at .*?L(?: \(blocks\))?) (?P<side>above|below) (?:(?P<share>[\d.]+) times )?"
    r"(?P<other>.+)"
)


@dataclass(frozen=True)
class Score:
    """What an arm, by its name, scores on tests of `times` training lengths."""

    arm: str
    times: int
    protocol: str = "half_tail"
    what: str = BITS  # of MEASURES
    states: str | None = None  # state_passing in its training; None: whichever it had

    def __str__(self) -> str:
        states = f" (states {self.states})" if self.states else ""
        what = "" if self.what == BITS else f" {self.what}"
        where = "L" if self.times == 1 else f"{self.times} L"
        blocks = " (blocks)" if self.protocol == "blocks" else ""
        return f"{self.arm}{states}{what} at {where}{blocks}"

    @property
    def kind(self) -> Row:
        """The fields that distinguish rows of its measure."""
        return {k: v for k, v in MEASURES[self.what].items() if k not in ("field", "interval")}

    def rows(self, results: Results) -> list[Row]:
        """Its rows, one per seed; L is the training length of the reference arm."""
        length = (results.train_length() or 0) * self.times
        which = self.kind | ({"protocol": self.protocol} if self.what == BITS else {})
        which |= {"state_passing": self.states} if self.states else {}
        return results.where(arm=self.arm, length=length, status="ok", **which)

    def measured(self, results: Results) -> bool:
        """Whether the arm has a value of this kind at any length."""
        return bool(results.where(arm=self.arm, status="ok", **self.kind))

    def ends(self, row: Row) -> tuple[float, float, float]:
        """The row's value, and its interval where it has one."""
        known = MEASURES[self.what]
        low, high = row.get(known.get("interval", "")) or 2 * [row[known["field"]]]
        return row[known["field"]], low, high


@dataclass(frozen=True)
class Comparison:
    """`score` is below (or above) `share` times `other`."""

    score: Score
    side: Literal["below", "above"]
    other: Score
    share: float = 1.0

    def __str__(self) -> str:
        times = "" if self.share == 1 else f"{self.share:g} times "
        return f"{self.score} {self.side} {times}{self.other}"

    def cells(self, results: Results) -> list[Cell]:
        """The difference with its interval, of every seed that was measured."""
        rows, others = self.score.rows(results), self.other.rows(results)
        if self.score.what == BITS:
            found = [contrast([row], others, self.share) for row in rows]
        else:
            found = [
                self._apart(row, other)
                for row in rows
                for other in others
                if row.get("seed") == other.get("seed")
            ]
        return [cell for cell in found if cell.value is not None]

    def _apart(self, row: Row, other: Row) -> Cell:
        """The difference of two numbers that were not measured on the same tokens."""
        value, low, high = self.score.ends(row)
        less, least, most = (self.share * end for end in self.other.ends(other))
        return Cell(value - less, low - most, high - least, 1, 1, "")

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        """The verdict of this comparison alone."""
        return self.decide(cells)[0]

    def decide(self, cells: Sequence[Cell]) -> tuple[Verdict, str]:
        """The verdict, and why nothing is decided where that is so."""
        ends = [(c.low, c.high) for c in cells if c.low is not None and c.high is not None]
        if len(cells) < SEEDS:
            return OPEN, f"{_seeds(len(cells))}, at least {SEEDS} are needed"
        if len(ends) < len(cells):
            return OPEN, "a seed has no interval: its score by stretch of text is missing"
        if self.side == "below":
            ends = [(-high, -low) for low, high in ends]
        sides = {1 if low > 0 else -1 if high < 0 else 0 for low, high in ends}
        if sides == {1}:
            return HOLDS, ""
        if sides == {-1}:
            return FAILS, ""
        return OPEN, "the seeds disagree" if {1, -1} <= sides else "an interval holds 0"


@dataclass(frozen=True)
class Claim:
    """What is claimed, by whom, and what must be seen for it to hold."""

    number: int  # of the project's list of claims
    words: str
    source: str
    comparisons: tuple[Comparison, ...]  # none: its rule is not of bits per byte
    rows: str = ""  # the experiment whose runs it is judged on
    rule: str = ""  # in words, where there are no comparisons
    mind: str = ""  # what would change our mind
    where: tuple[tuple[str, str], ...] = ()  # fields of the rows that it is judged on, {"data": ..}

    def part(self, results: Results) -> Results:
        """The rows that it is judged on, as results of their own."""
        if not self.where:
            return results
        rows = [r for r in results.rows if all(r.get(name) == one for name, one in self.where)]
        return replace(results, rows=rows, reference=reference_arm(rows))

    def bears_on(self, results: Results) -> bool:
        """Whether the rows have, at any length, what one of its comparisons needs of an arm."""
        part = self.part(results)
        scores = (score for each in self.comparisons for score in (each.score, each.other))
        return any(score.measured(part) for score in scores)


@dataclass(frozen=True)
class Judged:
    claim: Claim
    verdict: Verdict
    why: str  # nothing was decided, if so
    cells: tuple[list[Cell], ...]  # one per seed of each comparison

    @property
    def too_few(self) -> bool:
        """Whether a comparison lacks the seeds without which no number could decide it."""
        return min(map(len, self.cells)) < SEEDS


def judge(results: Results) -> list[Judged]:
    """The claims that the rows can decide, in their order."""
    judged = []
    for claim in published():
        part = claim.part(results)
        cells = tuple(each.cells(part) for each in claim.comparisons)
        if not cells or not all(cells):
            continue
        if problem := _problem(part, claim):
            judged.append(Judged(claim, OPEN, problem, cells))
            continue
        pairs = zip(claim.comparisons, cells, strict=True)
        found = [each.decide(seeds) for each, seeds in pairs]
        verdict = ORDER[min(ORDER.index(one) for one, _ in found)]
        whys = dict.fromkeys(why for each, why in found if why and each == verdict)
        judged.append(Judged(claim, verdict, "; ".join(whys), cells))
    return judged


def _problem(results: Results, claim: Claim) -> str:
    """Why these runs cannot decide the claim whatever they scored, or nothing."""
    without = dead(results)
    for score in (score for each in claim.comparisons for score in (each.score, each.other)):
        rows = score.rows(results)
        labels = {row["label"] for row in rows}
        if len(labels) > 1:
            return f"{score.arm} was measured in {len(labels)} settings, which may not be mixed"
        # What an extension breaks is what claims compare; what learned nothing has nothing to lose.
        why = next((without[label] for label in labels if label in without), None)
        if why and not why.broken:
            return f"{score.arm} {why}"
        if score.times == 1 and rows and all(_at_chance(score, row) for row in rows):
            return f"{score.arm} has not learned: its {score.what} is what a guess would have"
    whys = (why for each in claim.comparisons if (why := _timed_apart(each, results)))
    return next(whys, "")


def _timed_apart(each: Comparison, results: Results) -> str:
    """Why the times that are compared may not be; nothing where they may, or are no times."""
    if each.score.what != "speed":
        return ""
    pairs = itertools.product(each.score.rows(results), each.other.rows(results))
    same = ((row, other) for row, other in pairs if row.get("seed") == other.get("seed"))
    why = next((why for pair in same if (why := apart(*pair))), "")
    return f"{each.score} was {why} than {each.other}" if why else ""


def _at_chance(score: Score, row: Row) -> bool:
    """Whether a row's interval reaches down to what guessing gives, by chance or by a rule."""
    levels = [level for name in ("chance", "guess") if finite(level := row.get(name))]
    return bool(levels) and score.ends(row)[1] <= max(levels)


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count != 1 else ''}"


@functools.cache
def published() -> tuple[Claim, ...]:
    """The claims of `configs/claims/`, by their numbers. Raises ValueError for one without rule."""
    found = []
    for file in sorted((shipped("configs") / "claims").glob("*.yaml")):
        for one in yaml.safe_load(file.read_text(encoding="utf-8")):
            rules = tuple(map(comparison, one.get("holds_if", ())))
            words = (one.get("rule", ""), one["mind"], tuple(one.get("where", {}).items()))
            if bool(rules) == bool(words[0]):
                raise ValueError(f"claim {one['number']} must have either holds_if or rule")
            found.append(
                Claim(one["number"], one["claim"], one["source"], rules, one["rows"], *words)
            )
    return tuple(sorted(found, key=lambda claim: claim.number))


def comparison(rule: str) -> Comparison:
    """A comparison as it is written: "mamba at 8 L below 1.05 times mamba at L"."""
    match = RULE.fullmatch(rule)
    if match is None:
        raise ValueError(f"{rule!r} is no comparison such as 'a at 4 L above 1.05 times b at L'")
    one, side, share, other = match["one"], match["side"], match["share"], match["other"]
    first, second = _score(one), _score(other)
    if first.what != second.what:
        raise ValueError(f"{rule!r} is no comparison: {first.what} with {second.what}")
    return Comparison(first, "above" if side == "above" else "below", second, float(share or 1))


def _score(words: str) -> Score:
    match = SCORE.fullmatch(words)
    if match is None:
        raise ValueError(f"{words!r} is no comparison's score, such as 'mamba at 4 L'")
    protocol = "blocks" if match["blocks"] else "half_tail"
    what, states = match["what"] or BITS, match["states"]
    return Score(match["arm"], int(match["times"] or 1), protocol, what, states)
