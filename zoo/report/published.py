"""Published results: the rows and run records of a table in one small file of the package.

    {"name": the experiment, "machine": that measured, "common": fields of all rows,
     "runs": [{fields of a run's record, "fields": of all its rows, "rows": [the rest of each]}]}

A report is drawn from such a file as from run folders: nothing is trained or measured again.
"""

import json
import os
import platform
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import choose, refuse, refuse_path
from zoo.measurement import replaces, wrong_field
from zoo.report.rates import choose_rates

Row = dict[str, Any]

FOLDER = Path(__file__).parent / "published"
FORMAT = 1
RECORD = (  # what is kept of a run's record: no path, no host, no list of files
    *("run", "arm", "model", "size", "seed", "lr", "settings", "status", "reason", "pruned"),
    *("step", "tokens_seen", "valid_loss", "valid_windows", "parameters"),
    *("fingerprint", "commit", "dirty"),
    *("sources", "versions", "device", "threads", "train_length"),
)
LOCAL = ("check", "positions_file", "requested")  # fields of a row that mean something at home only
# Published rows are shown beside others where they agree in these.
COMPARABLE = {
    "train_tokens": "training tokens",
    "train_length": "training length",
    "parameters": "parameters",
}
TOLERANCE = {"parameters": 0.01}  # as match=params leaves it


def pack(name: str, rows: Iterable[Row], runs: Iterable[Row]) -> dict[str, Any]:
    """The rows and records as the file's tree; fields that all rows share are written once."""
    grouped: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row.get("run")].append({k: v for k, v in row.items() if k not in LOCAL})
    common = _shared([row for own in grouped.values() for row in own])
    packed = []
    for run in runs:
        own = [_without(row, common) for row in grouped[run.get("run")]]
        fields = _shared(own)
        record = {key: run[key] for key in RECORD if run.get(key) is not None}
        packed.append(record | {"fields": fields, "rows": [_without(row, fields) for row in own]})
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    about = {"format": FORMAT, "name": name, "machine": machine}
    return about | {"common": common, "runs": packed}


def unpack(tree: Mapping[str, Any]) -> tuple[list[Row], list[Row]]:
    """The rows and the run records of a file's tree."""
    rows, runs = [], []
    for run in tree["runs"]:
        record = {key: value for key, value in run.items() if key not in ("fields", "rows")}
        runs.append(record)
        rows += [{**tree["common"], **run["fields"], **row} for row in run["rows"]]
    return rows, runs


def added(path: Path, rows: Iterable[Row], runs: Iterable[Row]) -> tuple[dict[str, Any], list[str]]:
    """The tree of a file that has these rows and records too, and the runs trained again since.

    What the file has stays in it, so that a long study is published arm by arm, but for rows that
    are measured again now, and for those of a run that was trained again.
    """
    new_rows: list[Row] = json.loads(json.dumps([*rows]))
    new_runs = [*runs]
    tree = read_file(path) if path.exists() else {"common": {}, "runs": []}
    kept_rows, kept = unpack(tree)
    trained = {run["run"]: _training(run) for run in new_runs}
    anew = {run["run"] for run in kept if trained.get(run["run"], _training(run)) != _training(run)}
    measured: dict[str, list[Row]] = defaultdict(list)
    for row in new_rows:
        measured[row["run"]].append(row)
    kept_rows = [
        row
        for row in kept_rows
        if row["run"] not in anew and not any(replaces(now, row) for now in measured[row["run"]])
    ]
    kept = [run for run in kept if run["run"] not in trained]
    packed = pack(path.stem, kept_rows + new_rows, kept + new_runs)
    machines = [tree["machine"], packed["machine"]] if kept_rows else [packed["machine"]]
    return packed | {"machine": "; ".join(dict.fromkeys(machines))}, sorted(anew)


def _training(run: Row) -> Row:
    """What a record says of how its weights came to be, as JSON has it."""
    said = ("arm", "status", "reason")
    found = {key: run[key] for key in RECORD if run.get(key) is not None and key not in said}
    return json.loads(json.dumps(found))


def check_names(path: Path, runs: Iterable[tuple[str, int, Row]]) -> None:
    """Refuse runs, each its name, seed and settings, of which two have one name, or one that of
    another run in the file."""
    known = {}
    if path.exists():
        theirs = unpack(read_file(path))[1]
        known = {run["run"]: (run.get("seed"), run.get("settings")) for run in theirs}
    own: set[str] = set()
    for name, seed, settings in runs:
        mine = (seed, json.loads(json.dumps(settings)))
        if name in own or known.get(name, mine) != mine:
            rule = f"would have two runs named {name}"
            refuse("publish", str(path), rule, "Rename the folder of one, or name another file")
        own.add(name)


def text(tree: Mapping[str, Any]) -> str:
    """A file's text: a line for each run, so that changes of single runs can be read."""
    head = {key: value for key, value in tree.items() if key != "runs"}
    lines = ",\n".join(json.dumps(run, separators=(",", ":")) for run in tree["runs"])
    return json.dumps(head, separators=(",", ":"))[:-1] + f',"runs":[\n{lines}\n]}}\n'


def read(name: str) -> dict[str, Any]:
    """A published table by its name, or a file. UserError where there is none or it is damaged."""
    known = sorted(path.stem for path in FOLDER.glob("*.json"))
    file = Path(name) if name.endswith(".json") else FOLDER / f"{choose('table', name, known)}.json"
    return read_file(file)


def read_file(path: Path) -> dict[str, Any]:
    """A file of published rows. UserError where there is none or it is damaged."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if (type(tree["format"]), tree["format"]) != (int, FORMAT):  # True equals 1
            raise ValueError(f"it has format {tree['format']!r}, not {FORMAT}")
        _check(tree)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        refuse_path(path, f"is no published table ({error})", "Name one of zoo report's list.")
    return tree


def _check(tree: Mapping[str, Any]) -> None:
    """Raise one of several errors for a tree that is not of `pack`'s form."""
    if not isinstance(tree["machine"], str):
        raise ValueError("machine must be a text")
    parts = [tree["runs"], *(run["rows"] for run in tree["runs"])]
    if not all(isinstance(part, list) for part in parts):
        raise ValueError("runs and rows must be lists")
    rows, runs = unpack(tree)
    names = [run["run"] for run in runs]
    if len(names) != len({*names}):
        raise ValueError("it has two runs of one name")
    for parts, needed in ((rows, ("run", "task", "status")), (runs, ("run", "status"))):
        for part in parts:
            lacking = (f"{name} is missing" for name in needed if part.get(name) is None)
            if why := wrong_field(part) or next(lacking, None):
                raise ValueError(f"{why}, in {part.get('run')}")


def require(fingerprints: Container[Any]) -> None:
    """Refuse `against=published` where no published table has any of these data."""
    names = sorted(path.stem for path in FOLDER.glob("*.json"))
    known = {row["fingerprint"] for name in names for row in unpack(read(name))[0]}
    if not any(fingerprint in fingerprints for fingerprint in known):
        rule = "no published table has the data of these runs"
        refuse("against", "published", rule, f"Train on those of {', '.join(names) or 'none'}.")


def beside(rows: Sequence[Row]) -> tuple[list[Row], list[Row], list[str]]:
    """The published rows and records of the data and tasks of these rows, under names of their own.

    Also, for every table, what its budget differs in, in words.
    """
    found_rows, found_runs, said = [], [], []
    measured = {(row.get("task"), row.get("fingerprint")) for row in rows if row["status"] == "ok"}
    for path in sorted(FOLDER.glob("*.json")):
        theirs, runs = unpack(read(path.stem))
        theirs = [row for row in theirs if (row.get("task"), row.get("fingerprint")) in measured]
        if not theirs:
            continue
        data = {(row.get("task"), row.get("fingerprint")) for row in theirs}
        mine = [row for row in rows if (row.get("task"), row.get("fingerprint")) in data]
        compared, _, _ = choose_rates(theirs, runs)  # those of pruned rates have another budget
        said += [f"published {path.stem}: {words}" for words in differences(mine, compared)]
        kept = {row["run"] for row in theirs}
        found_rows += [row | _published(row, path.stem) for row in theirs]
        found_runs += [run | _published(run, path.stem) for run in runs if run.get("run") in kept]
    return found_rows, found_runs, said


def differences(mine: Sequence[Row], theirs: Sequence[Row]) -> list[str]:
    """What our rows have that none of theirs has, of what must be equal, in words."""
    found = []
    for field, words in COMPARABLE.items():
        ours, others = ({row.get(field) for row in part} - {None} for part in (mine, theirs))
        within = TOLERANCE.get(field, 0.0)
        if others and not all(any(_near(a, b, within) for b in others) for a in ours):
            shown = (", ".join(sorted(map(str, values))) for values in (ours, others))
            found.append(f"other {words} ({' here, '.join(shown)} there)")
    return found


def _near(a: Any, b: Any, within: float) -> bool:
    return a == b if not within else abs(a / b - 1) <= within


def _published(row: Row, table: str) -> Row:
    return {
        "run": f"published/{table}/{row['run']}",
        "arm": f"{row.get('arm')} (published {table})",
    }


def _shared(rows: Sequence[Row]) -> Row:
    """The fields that all rows have with one value."""
    if not rows:
        return {}
    return {k: v for k, v in rows[0].items() if all(k in r and r[k] == v for r in rows[1:])}


def _without(row: Row, shared: Mapping[str, Any]) -> Row:
    return {key: value for key, value in row.items() if key not in shared}
