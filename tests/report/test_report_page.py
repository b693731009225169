"""The page: the facts are on it, nothing is fetched, nothing in a name or reason gets out."""

import json
import math
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from synthetic import ARMS, experiment, run_records, score_row

from zoo.report import write_report

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Everything on a page that a test reads."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.specs: dict[str, dict] = {}
        self.words: list[str] = []
        self.styles = ""
        self.within: tuple[str, dict] = ("", {})
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.within = (tag, dict(attrs))
        self.tags.append(self.within)

    def handle_endtag(self, tag):
        self.within = ("", {})

    def handle_data(self, data):
        tag, attributes = self.within
        if tag == "script" and attributes.get("type") == "application/json":
            self.specs[attributes["id"]] = json.loads(data)
        elif tag == "style":
            self.styles += data
        elif tag != "script":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def make(tmp_path, rows, runs=None, **how) -> tuple[Page, str]:
    runs = run_records(rows) if runs is None else runs
    printed = write_report(rows, runs, tmp_path / "report.html", tmp_path / "figures", **how)
    return Page((tmp_path / "report.html").read_text()), printed


@pytest.fixture(scope="module")
def page(report) -> Page:
    return Page((report[0] / "report.html").read_text())


def test_the_page_holds_the_results(page, report):
    assert "Trained at 512, tested to 16,384" in page.text
    for fact in (*ARMS, "1.910", "n/a: learned positions end at 512", "≥ 16,384", "f00dfeed"):
        assert fact in page.text
        assert fact in report[1] or fact == "f00dfeed"
    for section in ("Effective context", "Speed and memory", "Streaming", "Equal budgets?"):
        assert section in page.text
    assert "1,048,576" in page.text  # tokens streamed


def test_every_figure_has_its_specification_and_words_for_it(page):
    figures = [attributes for _, attributes in page.tags if "data-figure" in attributes]
    names = {figure["data-figure"] for figure in figures}
    assert names == {
        *(
            "scores-half_tail",
            "changes-half_tail",
            "gains-half_tail",
            "scores-blocks",
            "positions-perplexity",
            "positions-stream",
        ),
        "speed-tokens_per_second-forward",
        "speed-milliseconds-decode",
        "speed-peak_bytes-forward",
        "perplexity-state_bytes",
        *("overview-quality", "overview-state", "overview-speed"),
    }
    assert {f"spec-{name}" for name in names} == set(page.specs)
    assert all(figure["aria-label"] for figure in figures)


def test_nothing_is_fetched(page):
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action", "data", "poster"} & set(attributes), tag
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    for spec in page.specs.values():
        assert "url" not in json.dumps(spec).replace(spec["$schema"], "")


def test_charts_take_their_ink_from_the_theme(page):
    for spec in page.specs.values():
        assert spec["background"] == "transparent"
        assert spec["config"]["axis"]["labelColor"] == "currentColor"
    assert "prefers-color-scheme: dark" in page.styles


def test_pictures_are_written_for_the_readme(report):
    folder = report[0] / "figures"
    assert {path.name for path in folder.iterdir()} == {
        "bits_per_byte.png",
        "overview.png",
        "positions.png",
        "speed.png",
    }
    for path in folder.iterdir():
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", head[16:24])
        assert width > 800
        assert height > (400 if path.name == "overview.png" else 800)  # as high as it has arms


def test_a_reports_pictures_lie_beside_it_and_older_ones_go(tmp_path):
    rows = experiment()
    html = tmp_path / "july.html"
    write_report(rows, run_records(rows), html)
    folder = tmp_path / "july"
    assert {path.name for path in folder.iterdir()} == {
        "bits_per_byte.png",
        "overview.png",
        "positions.png",
        "speed.png",
    }
    (folder / "mine.png").write_text("mine")
    scores = [row | {"state_bytes": None} for row in rows if row["task"] == "perplexity"]
    write_report(scores, run_records(scores), html)
    assert {path.name for path in folder.iterdir()} == {
        "bits_per_byte.png",
        "mine.png",
        "overview.png",
        "positions.png",
    }
    write_report(rows, run_records(rows), tmp_path / "plain")
    assert (tmp_path / "plain-pictures" / "speed.png").is_file()
    assert (tmp_path / "plain").is_file()


def test_ninety_arms_make_a_page_of_less_than_five_megabytes(tmp_path):
    arms = {f"arm-{i:02d}": (1.8 + i / 50, 0.02 * (i % 4), None) for i in range(90)}
    rows = [row for row in experiment(arms) if row["task"] != "speed" or row["length"] < 1000]
    page, _ = make(tmp_path, rows)
    assert (tmp_path / "report.html").stat().st_size < 5e6
    assert "35 of 90 arms are drawn" in page.text
    assert all(arm in page.text for arm in arms)


def test_names_and_reasons_cannot_break_out(tmp_path):
    rows = [score_row(EVIL, 512, 2.0), score_row(EVIL, 1024, 2.0)]
    rows[1] |= {"status": "failed", "reason": EVIL}
    page, _ = make(tmp_path, rows, [{"run": EVIL, "status": "failed", "reason": EVIL}], title=EVIL)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 2 + len(page.specs)
    assert f"failed: {EVIL}" in page.text
    assert json.dumps(EVIL) in json.dumps(page.specs["spec-scores-half_tail"])


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [score_row("mamba", 512, 2.0)],
        [score_row("mamba", 512, math.nan), score_row("rwkv", 1024, math.inf)],
        [score_row("mamba", 512, 2.0) | {"status": "failed", "reason": None}],
        [{"task": "perplexity", "run": "old", "arm": "mamba"}],
    ],
    ids=["no rows", "one row", "not finite", "only failures", "fields missing"],
)
def test_poor_results_still_make_a_page(tmp_path, rows):
    page, printed = make(tmp_path, rows)
    assert "How to read this page" in page.text
    assert all(row["arm"] in page.text for row in rows)
    assert "NaN" not in json.dumps(page.specs)
    assert printed


def test_twenty_arms_with_three_seeds(tmp_path):
    arms = {f"arm-{i:02d}": (1.8 + i / 50, 0.02 * (i % 4), None) for i in range(20)}
    rows = [row for row in experiment(arms, 3) if row.get("protocol") == "half_tail"]
    page, printed = make(tmp_path, rows)
    assert all(arm in page.text and arm in printed for arm in arms)
    assert "One seed" not in page.text
    domain = page.specs["spec-scores-half_tail"]["layer"][4]["encoding"]["color"]["scale"]
    assert len(domain["domain"]) == len(domain["range"]) == 20


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make(tmp_path, [score_row("mamba", 512, 2.0)])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def test_the_report_needs_no_torch():
    code = "import sys, zoo.report, zoo.report.wandb; print({'torch', 'wandb'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
