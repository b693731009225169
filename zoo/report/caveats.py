"""What to beware of: unequal arms, unfinished runs, failures, and what the figures cannot show."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

from zoo.measurement import Quantity, panel, question
from zoo.report.learned import dead
from zoo.report.rows import Results, Row, in_words, unfinished
from zoo.report.statistics import finite, missing
from zoo.report.tables import Table, Td, shown_quantities
from zoo.report.validity import LEAKS, NOT_AUDITED, at_chance, audited_tokens
from zoo.report.words import DASH, plain, share

NAMED = 6  # arms that a sentence lists


def banners(results: Results) -> list[str]:
    """What makes the arms unequal or the figures weak, to be read before any table."""
    said = [*_invalid(results)]
    must_agree = {"fingerprint": "data", "tokenizer": "tokenizer", "commit": "code (commit)"}
    must_agree |= {"train_tokens": "train tokens", "train_length": "train length"}
    for field, words in must_agree.items():
        groups = defaultdict(list)
        for label in results.arms:
            if not missing(value := results.known(label, field)):
                groups[plain(value)].append(label)
        if len(groups) > 1:
            hashed = field in ("fingerprint", "commit")
            shown = {value: value[:12] if hashed else value for value in groups}
            parts = "; ".join(f"{shown[value]} ({names(who)})" for value, who in groups.items())
            said.append(f"Not a fair comparison: the arms differ in {words}: {parts}.")
    for label in results.arms:
        for what in dict.fromkeys(r["ignores"] for r in results.by_arm[label] if r.get("ignores")):
            said.append(f"Not as its checkpoint is configured: {label} ignores {what}.")
    said += _unequal_sizes(results)
    for task in ("speed", "perplexity"):
        for field in ("device", "threads", "dtype"):
            arms = defaultdict(set)
            for row in results.where(task=task, status="ok"):
                arms[plain(row.get(field))].add(row["label"])
            if len(arms) > 1 and (task == "speed" or field == "dtype"):
                parts = (f"{value} ({names(sorted(arms[value]))})" for value in sorted(arms))
                said.append(f"The {task} rows differ in {field}: {'; '.join(parts)}.")
    said += _unequal_settings(results)
    if waiting := [
        f"{run.get('run')} ({unfinished(run)})" for run in results.runs if unfinished(run)
    ]:
        said.append(f"Runs that have not finished: {names(waiting)}.")
    lost = {row.get("run"): row["lost_steps"] for row in results.rows if row.get("lost_steps")}
    if lost:
        who = [f"{run} (its last {steps:,} steps)" for run, steps in lost.items()]
        said.append(f"Measured without steps whose checkpoints are lost: {names(who)}.")
    if lone := _single(results):
        who = _who(lone, _measured(results))
        said.append(
            f"One seed only ({who}): a ranking may change with another training, and what the seed "
            "alone changes is not known of them."
        )
    if fixed := _untuned(results):
        who = _who(fixed, {_model(row) for row in results.rows})
        said.append(f"Untuned learning rates: one was tried for {who}. {RATES}")
    return said


UNSEEN = "A leak that shows only beyond would not be seen."
RATES = "Architectures differ in their best rate, so a gap may be due to the rate."


def _invalid(results: Results) -> list[str]:
    """Arms whose scores are withdrawn, mean nothing or mix two versions of the code."""
    said = []
    leaky = {row["label"]: row.get("reason") for row in results.where(status=LEAKS)}
    for label, why in leaky.items():
        said.append(f"Leak: {label} sees the tokens it is to predict, and is not ranked: {why}.")
    without = dict.fromkeys(row["label"] for row in results.where(status=NOT_AUDITED))
    if without:
        why = "they may see the tokens that they are to predict"
        said.append(f"Not audited for leaks, and not ranked, as {why}: {names([*without])}.")
    for (read, length), arms in _beyond_audit(results, briefly=True).items():
        said.append(
            f"Audited for leaks to {read:,} of {length:,} tokens only: {names(arms)}. {UNSEEN}"
        )
    for label, why in dead(results).items():
        kind = "Broken by its extension" if why.broken else "Not learned"
        said.append(f"{kind}: {label} scores {why.score}.")
    said += _guessing(results)
    for label in results.arms:
        codes = {row["sources"] for row in results.by_arm[label] if row.get("sources")}
        if len(codes) > 1:
            runs = {row["sources"]: row.get("run") for row in results.by_arm[label]}
            which = ", ".join(f"{code[:8]} ({runs[code]})" for code in sorted(codes))
            said.append(f"Mixed code: the runs of {label} come from different sources: {which}.")
    return said


def _guessing(results: Results) -> list[str]:
    """Arms whose answers are no better than guesses, by task."""
    said = []
    for task, declared in results.tasks.items():
        first: dict[str, Quantity] = {}  # of each kind of row
        for one in declared.quantities:
            if one.chance:
                first.setdefault(str(one.where), one)
        for quantity in first.values():
            arms = at_chance(results.where(task=task, status="ok"), quantity)
            if not arms:
                continue
            chance = ", ".join(map(share, results.chances(task, quantity)))
            best = f"{share(max(arm.best for arm in arms.values()))} at best, chance is {chance}"
            if guesses := results.guesses(task, quantity):
                span = DASH.join(dict.fromkeys(map(share, (guesses[0], guesses[-1]))))
                best += f", a guess without association has {span}"
            named = [
                label if arm.seeds == arm.of else f"{label} ({arm.seeds} of its {arm.of} seeds)"
                for label, arm in arms.items()
            ]
            said.append(f"No better than guessing at {quantity.name}: {names(named)} ({best}).")
    return said


def _beyond_audit(results: Results, briefly: bool) -> dict[tuple[int, int], list[str]]:
    """(tokens read by the audit, longest length measured beyond) -> arms.

    `briefly`: those of which it did not even read twice the training length.
    """
    found: dict[tuple[int, int], list[str]] = defaultdict(list)
    for label in results.arms:
        rows = [row for row in results.by_arm[label] if row["status"] == "ok"]
        pairs = [(audited_tokens(row), row.get("length")) for row in rows]
        beyond = [(read, length) for read, length in pairs if read and finite(length)]
        beyond = [(read, int(length)) for read, length in beyond if length > read]
        if beyond:
            least, most = min(read for read, _ in beyond), max(length for _, length in beyond)
            if (least < min(most, 2 * (results.train_length(label) or 0))) == briefly:
                found[least, most].append(label)
    return found


def _unequal_settings(results: Results) -> list[str]:
    """Settings in which the rows of a task differ at one length."""
    said = []
    for task in results.tasks:
        places: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for row in results.where(task=task, status="ok"):
            fields, place = question(row), {"length": row.get("length"), **panel(row)}
            for name in fields.keys() - place.keys():
                if not missing(fields[name]):
                    places[str(place)][name].add(plain(fields[name]))
        differing: dict[str, set[str]] = defaultdict(set)
        for settings in places.values():
            for name, values in settings.items():
                differing[name] |= values if len(values) > 1 else set()
        for name, values in sorted(differing.items()):
            if values:
                said.append(f"The {task} rows differ in {name}: {', '.join(sorted(values))}.")
        said += _by_length(results, task)
    return said


def _by_length(results: Results, task: str) -> Iterator[str]:
    """The settings in which the lengths of one arm's line differ."""
    found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for label in results.arms:
        lines: dict[tuple[str, str], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        for row in results.where(task=task, label=label, status="ok"):
            for name, value in question(row).items():
                setting = name.startswith("task.") or name == "split"
                if setting and not missing(value) and finite(row.get("length")):
                    lines[name, str(panel(row))][plain(value)].add(row["length"])
        for (name, _), values in lines.items():
            if len(values) > 1 and len({frozenset(at) for at in values.values()}) > 1:
                for value, at in values.items():
                    found[name][value] |= at
    for name, values in sorted(found.items()):
        parts = (f"{value} at {', '.join(map(plain, sorted(at)))}" for value, at in values.items())
        yield f"The {task} rows of one line differ in {name}: {'; '.join(parts)}."


def _unequal_sizes(results: Results) -> list[str]:
    """Name the arms whose parameter count differs from the reference arm's by over 1 %."""
    base = results.known(results.reference, "parameters") if results.reference else None
    off = {}
    for label in results.arms:
        own = results.known(label, "parameters")
        if finite(own) and finite(base) and base and abs(own / base - 1) > 0.01:
            off[label] = (own, own / base - 1)
    against = f"against {results.reference}"
    if len(off) <= NAMED:
        each = (f"{label} has {plain(n)} parameters, {by:+.1%}" for label, (n, by) in off.items())
        return [f"Unequal size: {words} {against}." for words in each]
    least, most = min(by for _, by in off.values()), max(by for _, by in off.values())
    span = f"from {least:+.1%} to {most:+.1%}"
    return [f"Unequal size: {len(off)} arms differ by {span} in parameters {against}."]


def names(who: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = len(who) - NAMED
    return ", ".join(who) if more < 2 else f"{', '.join(who[:NAMED])} and {more} more"


def _who(some: Sequence[str], every: Collection[str]) -> str:
    return "every arm" if len(some) == len(every) else names(some)


def _measured(results: Results) -> set[str]:
    """The arms that were trained here and measured."""
    return {row["label"] for row in filter(_trained, results.where(status="ok"))}


def _trained(row: Row) -> bool:
    """Whether the weights took a step here: a checkpoint as it came has neither rate nor seed."""
    return row.get("train_steps") != 0


def _model(row: Row) -> str:
    return str(row.get("model") or row["label"])


def _untuned(results: Results) -> list[str]:
    """The models that were trained at one learning rate only."""
    rates = defaultdict(set)
    tuned = {run for rate in results.rates for run in rate.runs}
    for row in results.rows:
        if not missing(row.get("lr")) and row.get("run") not in tuned and _trained(row):
            rates[_model(row)].add(row["lr"])
    return [model for model, tried in rates.items() if len(tried) == 1]


def limits(results: Results) -> list[str]:
    """What these figures cannot show, derived from the rows."""
    said, lone = [], _single(results)
    if lone:
        who = _who(lone, _measured(results))
        said.append(
            f"{who[0].upper()}{who[1:]}: one seed. The intervals are over text, not over seeds: "
            "they say how sure the score of this one training is, not whether another training "
            "would rank the same."
        )
    if len(lone) < len(_measured(results)):
        said.append(
            "Several seeds: the interval is over seeds (Student's t), wide when few. Of two it is "
            "12.7 standard errors either way: it says little more than that there are two."
        )
    if fixed := _untuned(results):
        said.append(f"Learning rates are not tuned: one was tried for {names(fixed)}. {RATES}")
    if several := _chosen(results):
        said.append(
            f"The best of several trainings of {names(several)} is named by its test score: that "
            "choice flatters it by a little."
        )
    for (read, length), arms in _beyond_audit(results, briefly=False).items():
        read_to = f"reads {read:,} of the {length:,} tokens that are measured ({names(arms)})"
        said.append(f"The audit for leaks {read_to}. {UNSEEN}")
    rows = results.where(task="accuracy", status="ok")
    if older := [*dict.fromkeys(row["label"] for row in rows if missing(row.get("guess")))]:
        said.append(
            f"Accuracies of {names(older)} were measured before rows had what a guess without "
            "association scores: they are held to chance, which such a guess exceeds."
        )
    every = [quantity for task in results.tasks for quantity in shown_quantities(results, task)]
    if not any(quantity.form == "share" for quantity in every):
        said.append(
            "Bits per byte is not retrieval: a low score can hide that far text is not used."
        )
    if results.where(task="speed"):
        said.append(
            "Speed is of one machine under its load, and without an interval: compare ratios, not "
            "absolute figures, and trust no small one."
        )
    return said


def failures(results: Results) -> Table | None:
    """Every row without a result and every run that has not finished, with the reason."""
    table = Table("Everything without a result.", [(h, "") for h in ("arm", "what", "why", "run")])
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in (row for row in results.rows if row["status"] != "ok"):
        groups[row["label"], in_words(row), plain(row.get("run"))].append(row)
    for (label, why, run), rows in groups.items():
        lengths = sorted({row["length"] for row in rows if finite(row.get("length"))})
        span = DASH.join(f"{length:,}" for length in sorted({*lengths[:1], *lengths[-1:]}))
        what = ", ".join(dict.fromkeys(row.get("task") or "training" for row in rows))
        texts = [label, f"{what} at {span}" if span else what, why, run]
        table.rows.append([Td(text, kind="words") for text in texts])
    listed = {row.get("run") for row in results.rows if row.get("task") is None}
    for run in results.runs:
        if (state := unfinished(run)) and run.get("run") not in listed:
            label = next((row["label"] for row in results.where(run=run.get("run"))), DASH)
            texts = [label, "training", state, plain(run.get("run"))]
            table.rows.append([Td(text, kind="words") for text in texts])
    return table if table.rows else None


def _chosen(results: Results) -> list[str]:
    """The architectures with several arms, of which headlines name the best."""
    arms = defaultdict(set)
    for row in results.where(status="ok"):
        arms[str(row.get("arm") or row["label"])].add(row["label"])
    return [arm for arm, labels in arms.items() if len(labels) > 1]


def _single(results: Results) -> list[str]:
    """The arms that were trained and measured with one seed."""
    seeds = defaultdict(set)
    for row in filter(_trained, results.where(status="ok")):
        seeds[row["label"]].add(row.get("seed"))
    return [label for label, own in seeds.items() if len(own) == 1]
