"""Published tables come back as packed, and are shown only beside what they compare with."""

import json
from pathlib import Path

import pytest

from zoo.errors import UserError
from zoo.report import published, write_report
from zoo.report.rows import gather


def run(name: str, **other) -> dict:
    record = {"run": name, "arm": "mamba", "lr": 1e-3, "status": "done", "valid_loss": 0.5}
    return record | {"settings": {"size": "tiny"}, "files": {"a.py": "hash"}} | other


def rows(name: str, **other) -> list[dict]:
    about = {"run": name, "arm": "mamba", "task": "accuracy", "status": "ok", "check": "x"}
    about |= {"fingerprint": "f", "train_tokens": 100, "train_length": 16, "parameters": 1000}
    return [about | {"length": n, "accuracy": 1 / n} | other for n in (16, 32)]


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    packed = published.pack("t", rows("a") + rows("b", arm="lstm"), [run("a"), run("b")])
    (tmp_path / "t.json").write_text(published.text(packed))
    return tmp_path / "t.json"


def test_rows_and_records_come_back(table):
    found, runs = published.unpack(published.read("t"))
    wanted = rows("a") + rows("b", arm="lstm")
    assert found == [{k: v for k, v in row.items() if k != "check"} for row in wanted]
    assert [each["run"] for each in runs] == ["a", "b"]
    assert "files" not in runs[0]


def test_runs_that_a_table_has_stay_in_it_and_those_measured_again_are_replaced(table):
    mine = rows("b", accuracy=0.5) + rows("c")
    tree, anew = published.added(table, mine, [run("b", lr=2e-3), run("c")])
    assert anew == ["b"]
    table.write_text(published.text(tree))
    found, runs = published.unpack(published.read("t"))
    assert [(each["run"], each["lr"]) for each in runs] == [("a", 1e-3), ("b", 2e-3), ("c", 1e-3)]
    wanted = rows("a") + mine
    assert found == [{k: v for k, v in row.items() if k != "check"} for row in wanted]
    assert tree["machine"] == published.pack("t", [], [])["machine"]
    other = published.read("t") | {"machine": "another"}
    table.write_text(published.text(other))
    assert published.added(table, rows("c"), [run("c")])[0]["machine"].startswith("another; ")


def test_earlier_rows_of_a_run_stay_unless_it_was_trained_again(table):
    plain = published.pack("t", rows("a", dtype="float32"), [run("a")])
    table.write_text(published.text(plain))
    again = rows("a", dtype="int8")[:1] + rows("a", dtype="float32", accuracy=0.75)[1:]
    table.write_text(published.text(published.added(table, again, [run("a")])[0]))
    found = [row for row in published.unpack(published.read("t"))[0] if row["run"] == "a"]
    numbers = [(row.get("dtype"), row["length"], row["accuracy"]) for row in found]
    assert numbers == [("float32", 16, 1 / 16), ("int8", 16, 1 / 16), ("float32", 32, 0.75)]
    tree, anew = published.added(table, again[1:], [run("a", valid_loss=0.4)])
    assert anew == ["a"]
    assert len([row for row in published.unpack(tree)[0] if row["run"] == "a"]) == 1


@pytest.mark.parametrize(
    ("names", "other"),
    [(["c", "c"], {}), (["c", "a"], {"size": "small"}), (["a"], {"seed": 1})],
)
def test_two_runs_of_one_name_are_refused(table, names, other):
    record = {"seed": None, "size": "tiny"} | other
    runs = [(name, record["seed"], {"size": record["size"]}) for name in names]
    with pytest.raises(UserError, match=f"publish={table}: would have two runs named [ac]"):
        published.check_names(table, runs)
    published.check_names(table, [("a", None, {"size": "tiny"}), ("c", 1, {})])


DAMAGE = {
    "no machine": lambda tree: tree.pop("machine"),
    "machine": lambda tree: tree.update(machine=3),
    "version": lambda tree: tree.update(format="1"),
    "true": lambda tree: tree.update(format=True),
    "runs": lambda tree: tree.update(runs={}),
    "no run": lambda tree: tree["runs"][0].pop("run"),
    "rows": lambda tree: tree["runs"][0].update(rows={}),
    "no status": lambda tree: tree["common"].pop("status"),
    "twice": lambda tree: tree["runs"].append(tree["runs"][0]),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_table_is_refused(table, kind):
    tree = json.loads(table.read_text())
    DAMAGE[kind](tree)
    table.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="is no published table"):
        published.read("t")


def test_what_all_rows_share_is_written_once(table):
    assert table.read_text().count('"accuracy":') == 4
    assert table.read_text().count('"fingerprint"') == 1


def test_a_run_of_the_same_kind_is_shown_beside_all_published_ones(table):
    theirs, runs, said = published.beside(rows("mine", parameters=1004))
    assert {row["arm"] for row in theirs} == {"mamba (published t)", "lstm (published t)"}
    assert {each["run"] for each in runs} == {row["run"] for row in theirs}
    assert said == []


def test_arms_of_one_name_in_two_tables_of_the_same_data_stay_apart(table):
    other = published.text(published.pack("u", rows("c"), [run("c")]))
    table.with_name("u.json").write_text(other)
    theirs, _, _ = published.beside(rows("mine"))
    assert {"mamba (published t)", "mamba (published u)"} <= {row["arm"] for row in theirs}


@pytest.mark.parametrize(
    ("mine", "words"),
    [
        ({"train_tokens": 200}, "training tokens (200 here, 100 there)"),
        ({"parameters": 1200}, "parameters (1200 here, 1000 there)"),
        ({"train_length": 32}, "training length (32 here, 16 there)"),
    ],
)
def test_another_budget_is_said(table, mine, words):
    theirs, _, said = published.beside(rows("mine", **mine))
    assert theirs
    assert said == [f"published t: other {words}"]


def test_the_tokens_of_a_pruned_rate_are_no_budget_of_a_table(table):
    pruned = run("p", lr=2e-3, status="stopped", valid_loss=0.9)
    packed = published.pack("t", rows("a") + rows("p", train_tokens=50), [run("a"), pruned])
    table.write_text(published.text(packed))
    said = published.beside(rows("mine", train_tokens=50))[2]
    assert said == ["published t: other training tokens (50 here, 100 there)"]


def test_other_data_and_other_tasks_are_left_out(table):
    assert published.beside(rows("mine", fingerprint="g")) == ([], [], [])
    assert published.beside(rows("mine", task="speed")) == ([], [], [])


def test_where_no_table_has_the_data_the_comparison_is_refused(table):
    published.require({"f", "g"})
    with pytest.raises(UserError, match=r"against=published: no published table has the data"):
        published.require({"g"})


def test_a_file_that_is_no_table_is_refused_in_one_line(table):
    with pytest.raises(UserError, match=r"Did you mean|Use one of"):
        published.read("tt")
    table.write_text(json.dumps({"format": 0}))
    with pytest.raises(UserError, match=r"is no published table \(it has format 0, not 1\)"):
        published.read("t")


def test_the_shipped_tables_can_be_read():
    for path in published.FOLDER.glob("*.json"):
        found, runs = published.unpack(published.read(path.stem))
        assert found
        assert all(each.get("commit") for each in runs)


def test_a_table_differs_in_nothing_from_itself():
    for path in published.FOLDER.glob("*.json"):
        theirs, _ = published.unpack(published.read(path.stem))
        assert published.differences(theirs, theirs) == []


def test_rows_of_other_tasks_and_data_make_no_difference(table):
    mine = rows("mine") + [row | {"fingerprint": "other", "train_length": 9} for row in rows("x")]
    assert published.beside(mine)[2] == published.beside(rows("mine"))[2]


def test_the_readme_has_the_published_numbers_of_mqar():
    rows, runs = published.unpack(published.read("mqar"))
    results = gather(rows, runs)
    (accuracy, *_) = results.tasks["accuracy"].quantities
    cells = results.measured("accuracy", accuracy)
    text = (Path(published.__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    table = text.partition("| trained at 32 |")[2].partition("\n\n")[0].splitlines()[2:]
    shown = {line.split("|")[1].split()[0]: line.split("|")[2:7] for line in table}
    assert set(shown) == set(cells)
    for arm, values in shown.items():
        numbers = [cell.value for cell in cells[arm].values()]
        assert [value.strip() for value in values] == [f"{100 * n:.0f} %" for n in numbers if n]


ODD = (None, [], {}, "x", -1, 0, 1e300, True, [None], "absent")


DRAWN = (None, 0, 1e300, "absent")  # of these a field may have most; a report takes a second


def odd(part: dict, key: str, value) -> dict:
    found = part | {key: value}
    if value == "absent":
        del found[key]
    return found


def fewer_rows(rows: list[dict], runs: list[dict]) -> tuple[list[dict], list[dict]]:
    """Two runs of a table, of its first arms, with rows of two lengths."""
    arms = list(dict.fromkeys(run["arm"] for run in runs))[:2]
    runs = [next(run for run in runs if run["arm"] == arm) for arm in arms]
    names = {run["run"] for run in runs}
    return [row for row in rows if row["run"] in names and row["length"] in (512, 1024)], runs


def kept(value, parts: dict[str, list[dict]], tmp_path) -> list[tuple[str, str]]:
    """The fields of records and rows that may have a value; others are refused in one line."""
    found = []
    for kind, key in {
        (kind, key): None for kind, own in parts.items() for part in own for key in part
    }:
        part = odd(next(part for part in parts[kind] if key in part), key, value)
        one = part if kind == "runs" else {"run": part.get("run"), "status": "done"}
        rows = [part] if kind == "rows" else []
        tree = {
            "format": 1,
            "machine": "m",
            "common": {},
            "runs": [one | {"fields": {}, "rows": rows}],
        }
        (tmp_path / "t.json").write_text(json.dumps(tree))
        try:
            published.read_file(tmp_path / "t.json")
        except UserError as error:
            said = str(error)
        else:
            found.append((kind, key))
            continue
        assert "\n" not in said, key
        assert "is no published table" in said, key
    return found


def fields_of_text() -> dict[str, list[dict]]:
    rows, runs = fewer_rows(*published.unpack(published.read("text")))
    return {"rows": rows, "runs": runs}


@pytest.mark.parametrize("value", ODD, ids=json.dumps)
def test_a_field_of_another_kind_is_refused_in_one_line(value, tmp_path):
    parts = fields_of_text()
    every = {(kind, key) for kind, own in parts.items() for part in own for key in part}
    assert {*kept(value, parts, tmp_path)} < every


@pytest.mark.parametrize(
    "value",
    [pytest.param(v, marks=[] if v in DRAWN else pytest.mark.slow) for v in ODD],
    ids=json.dumps,
)
def test_a_value_that_a_field_may_have_is_drawn(value, tmp_path):
    """All fields together, each of another record or row."""
    parts = fields_of_text()
    changed = {kind: [*part] for kind, part in parts.items()}
    for number, (kind, key) in enumerate(kept(value, parts, tmp_path)):
        having = [i for i, part in enumerate(parts[kind]) if key in part]
        if key != "run":
            i = having[number % len(having)]
            changed[kind][i] = odd(changed[kind][i], key, value)
    assert write_report(changed["rows"], changed["runs"], tmp_path / "report.html")


def test_a_row_that_names_no_run_is_refused_before_anything_is_measured(tmp_path):
    row = {"task": "accuracy", "status": "ok"}
    tree = {"format": 1, "machine": "x", "common": {}}
    tree["runs"] = [{"run": "a", "status": "done", "fields": {}, "rows": [row]}]
    (tmp_path / "t.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"is no published table \(run is missing, in None\)"):
        published.check_names(tmp_path / "t.json", [])
