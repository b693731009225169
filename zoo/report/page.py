"""The report: one HTML file that needs nothing else, PNGs, and a table for the terminal."""

import functools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import vl_convert

from zoo.report import tables
from zoo.report.caveats import banners, failures, limits
from zoo.report.charts import Spec, Style, styles, themed
from zoo.report.claims import claims_table
from zoo.report.figures import (
    PICTURES,
    POOLED,
    Lines,
    changes,
    costs,
    drawn,
    drawn_words,
    pngs,
    positions,
    reach,
    retrieval,
    scores,
)
from zoo.report.headlines import one_text, tiles
from zoo.report.others import other_tables
from zoo.report.rows import Results, gather
from zoo.report.text import as_text
from zoo.report.validity import blind_guess


@dataclass(frozen=True)
class Block:
    """A figure and the table of the same numbers; either may be missing."""

    name: str
    title: str
    about: str
    spec: Spec | None
    table: tables.Table | None
    arms: list[str]  # drawn
    more: tuple["Block", ...] = ()


def write_report(
    rows: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    html: Path,
    figures: Path | None = None,
    title: str | None = None,
) -> str:
    """Write the page and the PNGs from rows and run records; return the table to print.

    Pictures that an earlier report of this name left in the folder, and this one has none of, go.

    Args:
        rows: the rows of `results.jsonl` of every run.
        runs: the contents of every `run.json`, with the run's name as "run".
        html: the file to write, replaced whole.
        figures: the folder for the PNGs; None: `pictures_folder`.
    """
    results = gather(rows, runs)
    look, figures = styles(results, drawn(results)), figures or pictures_folder(html)
    pictures = pngs(results, look)
    _write(html, render(results, look, title).encode())
    for name, picture in pictures.items():
        _write(figures / name, picture)
    for name in PICTURES:
        if name not in pictures:
            (figures / name).unlink(missing_ok=True)
    return terminal(results)


def pictures_folder(html: Path) -> Path:
    """The folder of a report's own PNGs, beside it: out/july.html has them in out/july/."""
    return html.with_suffix("") if html.suffix else html.with_name(f"{html.name}-pictures")


def terminal(results: Results) -> str:
    """The tables for a terminal, and what to beware of."""
    return "\n".join([as_text(results), *(f"! {line}" for line in banners(results))])


def render(results: Results, look: Mapping[str, Style], title: str | None = None) -> str:
    """The page as text."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    figure = functools.partial(_block, look=look)
    return env.get_template("page.html.j2").render(
        title=title or heading(results),
        facts=facts(results),
        banners=banners(results),
        tiles=tiles(results),
        look=look,
        partly=drawn_words(results),
        reach=[figure(lines, height=360) for lines in reach(results)],
        scores=score_blocks(results, look),
        explained={f"scores-{name}": words for name, words in tables.EXPLAINED.items()},
        claims=claims_table(results),
        contexts=tables.contexts(results),
        retrieval=retrieval_blocks(results, look),
        curve=figure(positions(results, "perplexity")),
        costs=cost_blocks(results, look),
        pooled=tables.plain(POOLED),
        blind=blind_guess(results.rows),
        stream=figure(positions(results, "stream"), table=tables.streams(results)),
        others=other_tables(results),
        budgets=tables.budgets(results),
        failures=failures(results),
        limits=limits(results),
        share=f"{tables.SHARE:.0%}",
        vega=vega(),
    )


@functools.cache
def vega() -> str:
    """The drawing scripts for the page; no text in them may close its script tag."""
    version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version).replace(
        "</script", "<\\/script"
    )


def heading(results: Results) -> str:
    """A title, where none is given."""
    train = results.train_length()
    longest = max((row.get("length") or 0 for row in results.where(task="perplexity")), default=0)
    if train and longest > train:
        return f"Trained at {train:,}, tested to {longest:,}"
    return "Length extrapolation"


def facts(results: Results) -> list[str]:
    """The line below the title: on what, how much, where, when."""
    arms = len(results.arms)
    said = [f"{arms} arm{'s' if arms != 1 else ''}"]
    for field, words in {
        **{"data": "data: {}", "tokenizer": "tokenizer: {}", "size": "size: {}"},
        **{"train_tokens": "{} train tokens", "device": "{}"},
    }.items():
        values = dict.fromkeys(tables.plain(row[field]) for row in results.rows if row.get(field))
        said += [words.format(" / ".join(values))] if values else []
    if days := sorted({str(row["time"])[:10] for row in results.rows if row.get("time")}):
        said.append(f"measured {' to '.join(dict.fromkeys([days[0], days[-1]]))}")
    return said


def score_blocks(results: Results, look: Mapping[str, Style]) -> list[Block]:
    """Bits per byte by length, once per protocol."""
    blocks = []
    for protocol, words in tables.PROTOCOLS.items():
        cells = results.cells("perplexity", "bits_per_byte", spread=True, protocol=protocol)
        caption, tied = f"Bits per byte. {words}.", tables.ties(results, protocol)
        best = min if one_text(results) else None
        table = tables.grid(results, cells, caption, tables.score, best, tied)
        block = _block(scores(results, protocol), words, table, look=look, named=True, height=380)
        blocks.append(replace(block, more=tuple(_compared(results, protocol, look))))
    return [block for block in blocks if block.table]


def retrieval_blocks(results: Results, look: Mapping[str, Style]) -> list[Block]:
    """Passkeys found by length: the choice drawn, the exact answers as a table."""
    blocks = []
    for answer, words in tables.ANSWERS.items():
        table = tables.found(results, answer)
        blocks.append(
            _block(retrieval(results, answer), words, table, look=look, named=True, height=240)
        )
    return [block for block in blocks if block.table]


def _compared(results: Results, protocol: str, look: Mapping[str, Style]) -> Iterator[Block]:
    """What the scores differ by: against an arm's own training length, against the reference."""
    if protocol in tables.SAME_TOKENS:
        title = "Change of bits per byte against the arm's own at its training length."
        table = tables.grid(results, results.changes(protocol), title, tables.signed)
        figure = changes(results, protocol)
        yield _block(figure, title, table, look=look, named=True, height=240)
    title = f"Bits per byte less those of {results.reference} on the same text."
    table = tables.grid(results, results.differences(protocol), title, tables.signed)
    yield Block(f"differences-{protocol}", title, "", None, table, [])


def cost_blocks(results: Results, look: Mapping[str, Style]) -> list[Block]:
    """Speed and memory by length."""
    blocks = []
    for name, (cells, figure) in costs(results).items():
        text = tables.size if name in ("peak", "state") else tables.count
        best = max if name == "forward" else min
        title = figure.y.title[0].upper() + figure.y.title[1:]
        table = tables.grid(results, cells, f"{title}.", text, best)
        blocks.append(_block(figure, title, table, look=look, height=230))
    return [block for block in blocks if block.table]


def _block(
    figure: Lines,
    title: str = "",
    table: tables.Table | None = None,
    *,
    look: Mapping[str, Style],
    **how: Any,
) -> Block:
    """A figure as it goes on the page, as wide as its box and in the theme's colours."""
    chart = figure.draw(look, **how)
    spec = themed(chart) if chart else None
    arms = list(dict.fromkeys(p["arm"] for p in figure.points if p["arm"] in look))
    return Block(figure.name, title, figure.about, spec, table, arms)


def _write(path: Path, content: bytes) -> None:
    """Replace a file whole: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
