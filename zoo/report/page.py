"""The report: one HTML file that needs nothing else, PNGs, and a table for the terminal."""

import functools
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import vl_convert

from zoo.report import equal_operations, tables
from zoo.report.caveats import banners, failures, limits
from zoo.report.charts import Spec, Style, styles, themed
from zoo.report.figures import (
    Lines,
    changes,
    drawn,
    drawn_words,
    gains,
    length_extension,
    quantity_figure,
    quantization,
    scores,
    task_figures,
)
from zoo.report.headlines import heading, one_text, tiles
from zoo.report.overview import draw, overview
from zoo.report.pictures import pictures
from zoo.report.positions import MIN_TOKENS, position_table, positions
from zoo.report.protocols import EXPLAINED, PROTOCOLS, SAME_TOKENS
from zoo.report.retrieval import (
    BOUGHT,
    FORGETS,
    HIDDEN,
    both_figure,
    both_table,
    changes_of_both,
    depth_maps,
    state_figure,
)
from zoo.report.rows import SHARE, Results, gather
from zoo.report.scores import (
    NEAR,
    context_gains,
    contexts,
    quantization_costs,
    score_noise,
    ties,
)
from zoo.report.sensitivity import rates_table
from zoo.report.text import as_text
from zoo.report.validity import blind_guess
from zoo.report.verdicts import claims_table
from zoo.report.words import plain, score, signed

APART = ("perplexity", "stream")  # tasks with a part of their own


@dataclass(frozen=True)
class FigureBlock:
    """A figure and the table of the same numbers; either may be missing."""

    name: str
    title: str
    about: str
    spec: Spec | None
    table: tables.Table | None
    arms: list[str]  # drawn
    more: tuple["FigureBlock", ...] = ()


@dataclass(frozen=True)
class TaskSection:
    """What the page shows of one task: a heading, a sentence or two, figures and tables."""

    name: str
    title: str
    about: str
    blocks: list[FigureBlock]
    tables: list[tables.Table]
    texts: list[tuple[str, str]]  # arm, and what it wrote


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
    made, before = pictures(results, look), picture_names(html)
    _write(html, render(results, look, title, [*made]).encode())
    for name, picture in made.items():
        _write(figures / name, picture)
    for name in before - made.keys():
        (figures / name).unlink(missing_ok=True)
    return terminal(results)


def picture_names(html: Path) -> set[str]:
    """The PNGs that a report says it has."""
    try:
        text = html.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return set()
    found = re.search(r'<meta name="pictures" content="([\w. -]*)">', text)
    return {name for name in found[1].split() if Path(name).name == name} if found else set()


def pictures_folder(html: Path) -> Path:
    """The folder of a report's own PNGs, beside it: out/july.html has them in out/july/."""
    return html.with_suffix("") if html.suffix else html.with_name(f"{html.name}-pictures")


def terminal(results: Results) -> str:
    """The tables for a terminal, and what to beware of."""
    return "\n".join([as_text(results), *(f"! {line}" for line in banners(results))])


def render(
    results: Results,
    look: Mapping[str, Style],
    title: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """The page as text; `pictures` are the names of the PNGs beside it."""
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
        overview=overview_blocks(results, look),
        look=look,
        partly=drawn_words(results),
        pictures=pictures,
        pair=[figure(lines, height=360) for lines in length_extension(results)],
        hidden=[figure(lines) for lines in (both_figure(results), state_figure(results))],
        both=both_table(results),
        forgets=FORGETS,
        hidden_title=HIDDEN if changes_of_both(results) else BOUGHT,
        maps=map_blocks(results, look),
        scores=score_blocks(results, look),
        explained={f"scores-{name}": words for name, words in EXPLAINED.items()},
        claims=claims_table(results),
        contexts=contexts(results),
        parts=[task_part(results, task, look) for task in results.tasks if task not in APART],
        curve=figure(positions(results, "perplexity")),
        by_position=position_table(results),
        costs=cost_blocks(results, look),
        at_equal=[
            _block(one, named=True, height=280, look=equal_operations.look_of(results))
            for one in equal_operations.figures(results)
        ],
        at_equal_tables=equal_operations.tables(results),
        pooled=plain(MIN_TOKENS),
        blind=blind_guess(results.rows),
        stream=stream_part(results, look),
        budgets=tables.budgets(results),
        rates=rates_table(results),
        failures=failures(results),
        limits=limits(results),
        share=f"{SHARE:.0%}",
        vega=vega(),
    )


@functools.cache
def vega() -> str:
    """The drawing scripts for the page; no text in them may close its script tag."""
    version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version).replace(
        "</script", "<\\/script"
    )


def facts(results: Results) -> list[str]:
    """The line below the title: on what, how much, where, when."""
    arms = len(results.arms)
    said = [f"{arms} arm{'s' if arms != 1 else ''}"]
    for field, words in {
        **{"data": "data: {}", "tokenizer": "tokenizer: {}", "size": "size: {}"},
        **{"train_tokens": "{} train tokens", "device": "{}"},
    }.items():
        values = dict.fromkeys(plain(row[field]) for row in results.rows if row.get(field))
        said += [words.format(" / ".join(values))] if values else []
    if days := sorted({str(row["time"])[:10] for row in results.rows if row.get("time")}):
        said.append(f"measured {' to '.join(dict.fromkeys([days[0], days[-1]]))}")
    return said


def overview_blocks(results: Results, look: Mapping[str, Style]) -> list[FigureBlock]:
    """The panels of the picture above the fold; the first names the arms."""
    whole = overview(results)
    found = []
    for i, panel in enumerate(whole.panels if whole else ()):
        assert whole is not None
        spec = themed(draw(panel, whole, look, named=i == 0))
        found.append(FigureBlock(f"overview-{panel.name}", "", whole.about, spec, None, whole.arms))
    return found


def map_blocks(results: Results, look: Mapping[str, Style]) -> list[FigureBlock]:
    """Passkeys by length and depth, a map for each arm."""
    return [
        FigureBlock(f"depths-{i}", label, str(drawing.description), themed(drawing), None, [label])
        for i, (label, drawing) in enumerate(depth_maps(results, look))
    ]


def score_blocks(results: Results, look: Mapping[str, Style]) -> list[FigureBlock]:
    """Bits per byte by length, once per protocol."""
    blocks = []
    for protocol, words in PROTOCOLS.items():
        cells = results.cells("perplexity", "bits_per_byte", protocol=protocol)
        caption, tied = f"Bits per byte. {words}.", ties(results, protocol)
        best = min if one_text(results) else None
        noise = score_noise(results, protocol)
        table = tables.grid(results, cells, caption, score, best, tied, noise=noise)
        block = _block(scores(results, protocol), words, table, look=look, named=True, height=380)
        blocks.append(replace(block, more=tuple(_compared(results, protocol, look))))
    return [block for block in blocks if block.table]


def _compared(results: Results, protocol: str, look: Mapping[str, Style]) -> Iterator[FigureBlock]:
    """What the scores differ by: against an arm's own training length, against the reference."""
    if protocol in SAME_TOKENS:
        title = "Change of bits per byte against the arm's own at its training length."
        table = tables.grid(results, results.changes(protocol), title, signed)
        figure = changes(results, protocol)
        yield _block(figure, title, table, look=look, named=True, height=240)
        title = f"Gain from context: bits per byte saved against reading {NEAR:,} tokens."
        table = tables.grid(results, context_gains(results, protocol), title, signed, max)
        yield _block(gains(results, protocol), title, table, look=look, named=True, height=240)
    if costs := quantization_costs(results, protocol):
        title = "Cost of fewer bits: bits per byte less those of the same runs in plain numbers."
        table = tables.grid(results, costs, title, signed)
        yield _block(
            quantization(results, protocol), title, table, look=look, named=True, height=240
        )
    title = f"Bits per byte less those of {results.reference} on the same text."
    apart, noise = results.differences(protocol), score_noise(results, protocol)
    table = tables.grid(results, apart, title, signed, noise=noise, differences=True)
    yield FigureBlock(f"differences-{protocol}", title, "", None, table, [])


def task_part(results: Results, task: str, look: Mapping[str, Style]) -> TaskSection:
    """What any task has measured: figures by length and tables."""
    said = results.tasks[task]
    figures = task_figures(results, task)
    blocks = [_block(figure, look=look, named=True, height=240) for figure in figures]
    shown = tables.task_tables(results, task) if tables.shown_quantities(results, task) else []
    return TaskSection(task, said.title, said.about, blocks, shown, tables.written(results, task))


def stream_part(results: Results, look: Mapping[str, Style]) -> TaskSection | None:
    """One long text, by position."""
    if "stream" not in results.tasks:
        return None
    part = task_part(results, "stream", look)
    return replace(part, blocks=[_block(positions(results, "stream"), look=look)])


def cost_blocks(results: Results, look: Mapping[str, Style]) -> list[FigureBlock]:
    """Speed and memory by length."""
    blocks = []
    for task, quantity in tables.costs(results):
        table, figure = (
            tables.quantity_table(results, task, quantity),
            quantity_figure(results, task, quantity),
        )
        blocks.append(_block(figure, figure.y.title, table, look=look, height=230))
    return [block for block in blocks if block.table]


def _block(
    figure: Lines,
    title: str = "",
    table: tables.Table | None = None,
    *,
    look: Mapping[str, Style],
    **how: Any,
) -> FigureBlock:
    """A figure as it goes on the page, as wide as its box and in the theme's colours."""
    chart = figure.draw(look, **how)
    spec = themed(chart) if chart else None
    arms = list(dict.fromkeys(p["arm"] for p in figure.points if p["arm"] in look))
    return FigureBlock(figure.name, title, figure.about, spec, table, arms)


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
