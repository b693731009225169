"""What to beware of: unequal arms, unfinished runs, failures, and what the figures cannot show."""

from collections import defaultdict

from zoo.report.rows import Results, Row, finite, in_words, missing, unfinished
from zoo.report.tables import DASH, Table, Td, plain

DRAWN = ("perplexity", "passkey", "speed", "stream", None)


def banners(results: Results) -> list[str]:
    """What makes the arms unequal or the figures weak, to be read before any table."""
    said = []
    must_agree = {"fingerprint": "data", "tokenizer": "tokenizer"}
    must_agree |= {"train_tokens": "train tokens", "train_length": "train length"}
    for field, words in must_agree.items():
        groups = defaultdict(list)
        for label in results.arms:
            if not missing(value := results.known(label, field)):
                groups[plain(value)[:12]].append(label)
        if len(groups) > 1:
            parts = "; ".join(f"{value} ({', '.join(who)})" for value, who in groups.items())
            said.append(f"Not a fair comparison: the arms differ in {words}: {parts}.")
    base = results.known(results.reference, "parameters") if results.reference else None
    for label in results.arms:
        own = results.known(label, "parameters")
        if finite(own) and finite(base) and abs(own / base - 1) > 0.01:
            off = f"{own / base - 1:+.1%} against {results.reference}"
            said.append(f"Unequal size: {label} has {plain(own)} parameters, {off}.")
    for task in ("speed", "perplexity"):
        for field in ("device", "threads", "dtype"):
            values = {plain(row.get(field)) for row in results.where(task=task, status="ok")}
            if len(values) > 1 and (task == "speed" or field == "dtype"):
                said.append(f"The {task} rows differ in {field}: {', '.join(sorted(values))}.")
    if waiting := [
        f"{run.get('run')} ({unfinished(run)})" for run in results.runs if unfinished(run)
    ]:
        said.append(f"Runs that have not finished: {', '.join(waiting)}.")
    if lone := _single(results):
        who = "every arm" if len(lone) == len(results.arms) else ", ".join(lone)
        said.append(f"One seed only ({who}): a ranking may change with another training.")
    return said


def limits(results: Results) -> list[str]:
    """What these figures cannot show, derived from the rows."""
    said, lone = [], _single(results)
    if lone:
        who = "Every arm" if len(lone) == len(results.arms) else ", ".join(lone)
        said.append(
            f"{who}: one seed. The intervals are over text, not over seeds: they say how sure the "
            "score of this one training is, not whether another training would rank the same."
        )
    if len(lone) < len({row["label"] for row in results.where(status="ok")}):
        said.append("Several seeds: the interval is over seeds (Student's t), wide when few.")
    rates = defaultdict(set)
    for row in results.rows:
        if not missing(row.get("lr")):
            rates[row.get("model") or row["label"]].add(row["lr"])
    if fixed := [str(model) for model, tried in rates.items() if len(tried) == 1]:
        said.append(
            f"Learning rates are not tuned: one was tried for {', '.join(fixed)}. Architectures "
            "want different rates, so a small gap may be the rate's."
        )
    if not results.where(task="passkey"):
        said.append(
            "Bits per byte is not retrieval: a low score can hide that far text is not used."
        )
    if results.where(task="speed"):
        said.append("Speed is of one machine under its load: compare ratios, not absolute figures.")
    if other := sorted({row["task"] for row in results.rows if row.get("task") not in DRAWN}):
        said.append(f"Measured, but not drawn on this page: {', '.join(other)}.")
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
    told = {row.get("run") for row in results.rows if row.get("task") is None}
    for run in results.runs:
        if (state := unfinished(run)) and run.get("run") not in told:
            label = next((row["label"] for row in results.where(run=run.get("run"))), DASH)
            texts = [label, "training", state, plain(run.get("run"))]
            table.rows.append([Td(text, kind="words") for text in texts])
    return table if table.rows else None


def _single(results: Results) -> list[str]:
    """The arms measured with one seed."""
    seeds = defaultdict(set)
    for row in results.where(status="ok"):
        seeds[row["label"]].add(row.get("seed"))
    return [label for label, own in seeds.items() if len(own) == 1]
