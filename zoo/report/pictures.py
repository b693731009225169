"""The PNGs of a report, on white, for a README or a talk."""

from collections.abc import Mapping
from typing import Any

import altair as alt
import vl_convert

from zoo.report import equal_operations
from zoo.report.charts import Drawing, Style, themed
from zoo.report.figures import (
    INK,
    MANY,
    Lines,
    changes,
    cost_figures,
    drawn_words,
    gains,
    length_extension,
    quantization,
    scores,
    table,
    task_figures,
)
from zoo.report.headlines import heading
from zoo.report.overview import overview, overview_picture
from zoo.report.positions import positions
from zoo.report.protocols import PROTOCOLS, SAME_TOKENS, headline
from zoo.report.retrieval import (
    BOUGHT,
    FORGETS,
    HIDDEN,
    both_figure,
    changes_of_both,
    forgetting,
    retrieval_picture,
    state_figure,
)
from zoo.report.rows import Results

PAPER = "#ffffff"
SHADED = "orange: what is lost against the arm's own score at its training length, full at 1 bit"
TITLE: dict[str, Any] = {"fontSize": 17, "subtitlePadding": 5, "offset": 28}
PANEL = 440  # pixels across


def pictures(results: Results, look: Mapping[str, Style]) -> dict[str, bytes]:
    """File name -> PNG; what has no rows is left out."""
    found: dict[str, alt.TopLevelMixin | None] = {"bits_per_byte": _scores(results, look)}
    if whole := overview(results):
        said = whole.about.replace(". ", ".\n").splitlines()
        headed = heading(results)
        title = alt.Title(headed, subtitle=said, **TITLE)
        found["overview"] = overview_picture(whole, look, INK).properties(title=title)
    train, part = results.train_length(), [drawn_words(results)]
    headed = f"Trained at {train:,}, tested beyond" if train else "By test length"
    words = ["reading on, and finding what was read", *part]
    found["length_extension"] = _panels(length_extension(results), look, headed, words)
    for task, said in results.tasks.items():
        if task != "perplexity":
            figures = task_figures(results, task)
            found[task] = _panels(figures, look, said.title, [headed.lower(), *part])
    headed = "Bits per byte by position in the text"
    found["positions"] = _panels([positions(results, "perplexity")], look, headed, part)
    said = ["by length, and by depth from the start of the text (0%) to its end", *part]
    title = alt.Title("Passkeys found", subtitle=[line for line in said if line], **TITLE)
    found["depths"] = retrieval_picture(results, look, title)
    figures, words = [both_figure(results), state_figure(results)], part
    if figures[0].points:
        named = ", ".join(forgetting(changes_of_both(results))) or "no arm"
        words = [f"{FORGETS}: {named}", *part]
    headed = HIDDEN if figures[0].points else BOUGHT
    found["hidden"] = _panels(figures, look, headed, words)
    at_equal = equal_operations.figures(results)
    names = equal_operations.look_of(results)
    headed = "Quality at equal operations, compression included"
    found["equal_operations"] = _panels(at_equal, names, headed, ["per prompt"])
    found["speed"] = _panels(cost_figures(results), look, "Speed and memory", part)
    return {
        f"{name}.png": vl_convert.vegalite_to_png(themed(chart, INK, PAPER, padding=20), scale=2)
        for name, chart in found.items()
        if chart
    }


def _scores(results: Results, look: Mapping[str, Style]) -> alt.TopLevelMixin | None:
    """Bits per byte and what they change by; of many arms a table."""
    protocol, train = headline(results), results.train_length()
    if not protocol:
        return None
    headed = f"Trained at {train:,}, tested beyond" if train else "Bits per byte by test length"
    subtitle = f"bits per byte by test length, lower is better; {PROTOCOLS[protocol].lower()}"
    if len(results.arms) > MANY:
        title = alt.Title(headed, subtitle=[subtitle, SHADED], **TITLE)
        return table(results, protocol).properties(title=title)
    how: dict[str, Any] = {"width": 640, "named": True, "ink": INK}
    chart = scores(results, protocol).draw(look, height=400, **how)
    if chart is None:
        return None
    scale = [s for s in [chart.title.subtitle] if isinstance(s, str)]
    title = alt.Title(headed, subtitle=", ".join([subtitle, *scale]), **TITLE)
    panels = [chart.properties(title=title)]
    if protocol in SAME_TOKENS and (
        below := changes(results, protocol).draw(look, height=200, **how)
    ):
        panels.append(below)
    if gained := gains(results, protocol).draw(look, height=200, **how):
        panels.append(gained)
    if costs := quantization(results, protocol).draw(look, height=240, **how):
        panels.append(costs)
    return alt.vconcat(*panels, spacing=26)


def _panels(
    figures: list[Lines], look: Mapping[str, Style], title: str, subtitle: list[str]
) -> alt.TopLevelMixin | None:
    """Figures two abreast, with one legend whose columns fit below them."""
    across = min(2, len(figures))
    names = {point["arm"] for figure in figures for point in figure.points if point["arm"] in look}
    longest = max(map(len, names), default=0)
    columns = max(1, min(4, across * PANEL // (8 * longest + 40)))
    drawn = (
        figure.draw(look, width=PANEL, height=300, legend=columns, ink=INK) for figure in figures
    )
    panels: list[Drawing] = [chart for chart in drawn if chart]
    if not panels:
        return None
    said = alt.Title(title, subtitle=[line for line in subtitle if line], **TITLE)
    return alt.concat(*panels, columns=2, spacing=30, title=said)
