"""Quality at equal operations: columns of budgets, lines of families, what reads all among them."""

from typing import Any

from synthetic import identity, with_declaration

from zoo.report.equal_operations import figures, look_of, tables
from zoo.report.page import write_report
from zoo.report.rows import Results, gather
from zoo.report.text import as_text

BUDGETS = 175e6, 350e6


def row(arm: str, seed: int, found: float, flops: float, budget: float | None = None) -> dict:
    about: dict[str, Any] = identity(arm, seed) | {"task": "passkey", "length": 1024, "count": 50}
    about |= {"accuracy": found, "interval": [found - 0.1, found + 0.1], "chance": 0.1}
    about |= {"exact": 0.0, "exact_interval": [0, 0.1], "exact_chance": 1e-4, "state_bytes": 9}
    about |= {"prompt_flops": flops, "audited": {"float64": 2048, "float32": 4096}}
    if budget is not None:
        family = f"{arm}, prompts by cut"
        about |= {"arm": f"{family} to {budget:g}", "compression": "cut"}
        about |= {"compression_family": family, "compression_flops": budget}
    return with_declaration(about)


def results() -> Results:
    rows = []
    for seed, shift in enumerate((-0.02, 0.02)):
        rows += [row("transformer", seed, 0.4 + shift, 170e6, 175e6)]
        rows += [row("transformer", seed, 0.6 + shift, 345e6, 350e6)]
        rows += [row("transformer", seed, 0.9 + shift, 500e6)]
        rows += [row("mamba", seed, 0.7 + shift, 340e6)]
        rows += [row("mamba", seed, 0.3 + shift, 100e6, 175e6)]
    return gather(rows, [])


def test_a_column_has_who_was_given_its_operations_and_who_reads_all_within_them():
    (table,) = tables(results())
    assert [head for head, _ in table.head] == ["arm", "175 MFLOP", "350 MFLOP", "whole prompt"]
    shown = {arm.text: [cell.text for cell in cells] for arm, *cells in table.rows}
    assert shown == {
        "transformer, prompts by cut": ["40%", "60%", "\u2013"],
        "transformer": ["\u2013", "\u2013", "90%"],
        "mamba": ["\u2013", "70%", "70%"],
        "mamba, prompts by cut": ["30%", "\u2013", "\u2013"],
    }
    best = {(arm.text, n) for arm, *cells in table.rows for n, c in enumerate(cells) if c.kind}
    assert best == {("transformer, prompts by cut", 0), ("mamba", 1), ("transformer", 2)}
    notes = {(arm.text, n): c.note for arm, *cells in table.rows for n, c in enumerate(cells)}
    assert notes["mamba, prompts by cut", 0].endswith("57% of it")  # 100 of 175 MFLOP
    assert "of it" not in notes["transformer, prompts by cut", 0]
    assert notes["transformer", 2].endswith("500 MFLOP")


def test_a_figure_has_a_line_for_each_family_and_a_symbol_for_what_reads_all():
    (figure,) = figures(results())
    points = {(one["arm"], one["x"]): one["y"] for one in figure.points}
    assert {arm for arm, _ in points} == {*look_of(results())}
    assert len(points) == 5
    assert points["transformer, prompts by cut", 345e6] == 0.6
    assert all(0 <= one["low"] <= one["y"] <= one["high"] <= 1 for one in figure.points)
    assert figure.level == 0.1


def test_reports_have_both_where_prompts_were_compressed_and_neither_elsewhere(tmp_path):
    own = results()
    text = write_report(own.rows, [], tmp_path / "report.html")
    assert "at equal operations per prompt of 1,024 tokens" in text
    assert 'id="equal-operations"' in (tmp_path / "report.html").read_text()
    assert any(tmp_path.rglob("equal_operations.png"))
    plain = gather([one for one in own.rows if not one.get("compression")], [])
    assert tables(plain) == figures(plain) == []
    assert "equal operations" not in as_text(plain)
