"""`python -m zoo.cli.patterns [FOLDER]`: draw what every query sees, on two sheets of pictures.

    extensions.png       which keys a remap of distances shows to each query, and at what distance:
                         the picture that its paper draws, from the code that attention runs
    architectures.png    how far each output of one untrained layer depends on each input, for every
                         architecture in configs/model

Rows are queries, columns are keys, the first token at the top left.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import altair as alt
import torch
import vl_convert
from jaxtyping import Float
from torch import Tensor

from zoo.attention.pattern import AttentionPattern, distances
from zoo.config.compose import compose
from zoo.config.groups import choices, extensions
from zoo.errors import UserError
from zoo.mixers.base import Mixer
from zoo.model.build import build_model
from zoo.model.extend import extend, rotary_mixers
from zoo.report.charts import themed
from zoo.runs.files import one_line, replacing

TRAINED, READ = 24, 96  # tokens that an extended model was trained on and is drawn reading
LAYER_READ, CELL = 256, 4  # tokens that a layer reads, and how many of them one cell stands for
NO_INFLUENCE = 1e-6  # of the largest
INK, PAPER, PANEL = "#1d1f23", "#ffffff", 132  # pixels to a side
NEAR = ("#fde725", "#5ec962", "#21918c", "#3b528b")  # distances from 0 to the trained length
FAR = ("#f6b48f", "#b2182b")  # those beyond, which the model has not seen in training

Grid = Float[Tensor, "queries keys"]


def extension_grids() -> dict[str, Grid]:
    """The distances of every extension that remaps them, by name; NaN where a key is not seen."""
    remaps = [name for name, tree in extensions().items() if tree["attention"]]
    plain = AttentionPattern(
        lambda _: ((), 1.0)
    )  # a model under no extension: every key, true distances
    return {"none": distances(plain, READ)} | {name: _distances(name) for name in remaps}


def _distances(extension: str) -> Grid:
    train = compose("train", ["model=transformer", "size=tiny", f"seq_len={TRAINED}", "match=none"])
    model, _ = build_model(train, vocab_size=8)
    config = compose("eval", ["run=none", f"extension={extension}"])
    extend(model, config.extension, TRAINED)
    remap = rotary_mixers(model)[0].reach
    assert remap is not None
    return distances(remap, READ)


def architecture_grids() -> dict[str, Grid]:
    """The influence of inputs on outputs in the first layer of every architecture, by name."""
    grids = {}
    for name in choices("model"):
        config = compose(
            "train", [f"model={name}", "size=tiny", f"seq_len={LAYER_READ}", "match=none"]
        )
        torch.manual_seed(0)
        model, _ = build_model(config, vocab_size=8)
        layer = model.blocks[0].mixer
        assert isinstance(layer, Mixer)
        grids[name] = influence(layer.eval(), config.size.width)
    return grids


def influence(layer: Mixer, width: int) -> Grid:
    """How much of each output (rows) comes from each input: norms of the Jacobian, largest 1, NaN
    below `NO_INFLUENCE`.

    A cell stands for `CELL` inputs and the last of as many outputs. The norm over a token's
    channels is estimated from one random direction of the output.
    """
    x = torch.randn(1, LAYER_READ, width, requires_grad=True)
    y, _ = layer(x, layer.empty_state(1))
    direction = torch.randn(width)
    rows = []
    for query in range(CELL - 1, LAYER_READ, CELL):
        (grad,) = torch.autograd.grad(y[0, query] @ direction, x, retain_graph=True)
        rows.append(grad[0].norm(dim=-1).unflatten(0, (-1, CELL)).norm(dim=-1))
    grid = torch.stack(rows)
    grid = grid / grid.max()
    return grid.masked_fill(grid < NO_INFLUENCE, torch.nan)


def distance_colors() -> alt.Scale:
    """From yellow to blue up to the trained length, from orange to red beyond it."""
    near = [TRAINED * i / (len(NEAR) - 1) for i in range(len(NEAR))]
    return alt.Scale(domain=[*near, TRAINED + 1e-3, READ], range=[*NEAR, *FAR])


def influence_colors() -> alt.Scale:
    """Bright for much, on a logarithmic scale."""
    return alt.Scale(scheme="viridis", type="log", domain=[NO_INFLUENCE, 1])


def sheet(grids: dict[str, Grid], columns: int, title: str, colors: alt.Scale) -> bytes:
    """A PNG of the grids side by side; white where a grid is NaN."""
    panels = [_panel(name, grid, colors) for name, grid in grids.items()]
    rows = [alt.hconcat(*panels[i : i + columns]) for i in range(0, len(panels), columns)]
    chart = alt.vconcat(*rows, title=title)
    return vl_convert.vegalite_to_png(themed(chart, INK, PAPER, padding=20), scale=1.3)


def _panel(name: str, grid: Grid, colors: alt.Scale) -> alt.Chart:
    size = len(grid)
    seen = (~grid.isnan()).nonzero().tolist()
    cells = [{"q": q, "k": k, "v": grid[q, k].item()} for q, k in seen]
    color = alt.Color("v:Q", scale=colors, legend=None)
    return (
        alt.Chart(alt.Data(values=cells), title=alt.Title(name, anchor="start", fontSize=12))
        .mark_rect(strokeWidth=0.4)  # of the cell's own color: no hairlines between cells
        .encode(
            x=alt.X("k:Q", scale=alt.Scale(domain=[0, size], nice=False), axis=None),
            x2=alt.X2("k2:Q"),
            y=alt.Y("q:Q", scale=alt.Scale(domain=[size, 0], nice=False), axis=None),
            y2=alt.Y2("q2:Q"),
            color=color,
            stroke=alt.Stroke("v:Q", scale=colors, legend=None),
        )
        .transform_calculate(k2="datum.k + 1", q2="datum.q + 1")
        .properties(width=PANEL, height=PANEL)
    )


def main(argv: Sequence[str]) -> int:
    """Write both sheets into the folder named in `argv`, the working directory by default."""
    if len(argv) > 1 or (argv and argv[0].startswith("-")):
        sys.stderr.write("usage: python -m zoo.cli.patterns [folder for the two pictures]\n")
        return 0 if argv[0] in ("-h", "--help") else 2
    folder = Path(argv[0] if argv else ".")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, png in sheets():
            with replacing(folder / name) as file:
                file.write(png)
            sys.stdout.write(f"{folder / name}\n")
    except (UserError, OSError) as error:
        sys.stderr.write(f"zoo.cli.patterns: {one_line(error)}\n")
        return 2
    return 0


def sheets() -> Iterator[tuple[str, bytes]]:
    """(file name, PNG) of both sheets, as they are drawn."""
    title = (
        f"Distance at which each query sees each key: red is beyond the {TRAINED} tokens trained"
    )
    yield "extensions.png", sheet(extension_grids(), 5, title, distance_colors())
    title = (
        f"How much each output of a first layer, untrained, takes from each of {LAYER_READ} inputs"
    )
    yield "architectures.png", sheet(architecture_grids(), 6, title, influence_colors())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
