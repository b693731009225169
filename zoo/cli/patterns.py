"""`zoo patterns [folder] [extension=...]`: draw which tokens each query attends to, as PNGs.

    extensions.png       the distance at which each query attends to each key, under every extension
                         that remaps distances: the figure of its paper, from the code that runs
    architectures.png    how much each output of an untrained layer depends on each input, for every
                         architecture in configs/model

Rows are queries, columns are keys, the first token at the top left. With options, as in
`extension=dca extension.attention.chunk=8`, it draws that one pattern beside plain attention, in
extension.png. The folder is `patterns` unless given.
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
from zoo.cli.guard import explains
from zoo.config.compose import compose
from zoo.config.groups import choices, extensions
from zoo.errors import UserError, refuse
from zoo.mixers.base import Mixer
from zoo.model.build import build_model
from zoo.model.extend import extend, rotary_positions
from zoo.report.charts import themed
from zoo.runs.files import check_place, one_line, replacing

TRAINED, READ = 24, 96  # tokens that an extended model was trained on and is drawn reading
LAYER_READ, CELL = 256, 4  # tokens that a layer reads, and how many of them one cell stands for
NO_INFLUENCE = 1e-6  # of the largest
INK, PAPER, PANEL = "#1d1f23", "#ffffff", 132  # pixels to a side
NEAR = ("#fde725", "#5ec962", "#21918c", "#3b528b")  # distances from 0 to the trained length
FAR = ("#f6b48f", "#b2182b")  # those beyond, which the model has not seen in training

DISTANCES = (
    f"Distance at which each query sees each key: red is beyond the {TRAINED} tokens trained"
)
Grid = Float[Tensor, "queries keys"]


def extension_grids() -> dict[str, Grid]:
    """Draw the distances of every extension that remaps them; NaN where a key is not attended to.

    Returns {extension: (96, 96) tokens}, with `none`, plain causal attention, first.
    """
    remaps = [name for name, tree in extensions().items() if tree["attention"]]
    return {"none": _plain()} | {name: _distances([f"extension={name}"]) for name in remaps}


def _plain() -> Grid:
    return distances(AttentionPattern(lambda _: ((), 1.0)), READ)


def _distances(options: Sequence[str]) -> Grid:
    train = compose("train", ["model=transformer", "size=tiny", f"seq_len={TRAINED}", "match=none"])
    model, _ = build_model(train, vocab_size=8)
    extension = compose("eval", ["run=none", *options]).extension
    if extension.attention is None:
        rule = "leaves distances as they are (it scales frequencies, or trains), so none are drawn"
        refuse("extension", extension.name, rule, "Choose one with a section `attention`")
    extend(model, extension, TRAINED)
    pattern = rotary_positions(model)[0].pattern
    assert pattern is not None
    return distances(pattern, READ)


def architecture_grids() -> dict[str, Grid]:
    """Measure how inputs influence outputs in the first layer of every architecture, by name."""
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
    """Measure how much of each output (row) comes from each input (column), by the Jacobian's norm.

    The largest is 1, NaN stands for less than `NO_INFLUENCE`. A cell is `CELL` inputs and the last
    of as many outputs. The norm over a token's
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
    """Color distances from yellow to blue up to the trained length, orange to red beyond it."""
    near = [TRAINED * i / (len(NEAR) - 1) for i in range(len(NEAR))]
    return alt.Scale(domain=[*near, TRAINED + 1e-3, READ], range=[*NEAR, *FAR])


def influence_colors() -> alt.Scale:
    """Color influences on a logarithmic scale, bright for much."""
    return alt.Scale(scheme="viridis", type="log", domain=[NO_INFLUENCE, 1])


def sheet(grids: dict[str, Grid], columns: int, title: str, colors: alt.Scale) -> bytes:
    """Draw the grids side by side in one PNG, white where a grid is NaN."""
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
    """Write the sheets; returns the exit code. UserError for arguments it does not know."""
    if explains(argv, f"{__doc__}"):
        return 0
    options = [word for word in argv if "=" in word]
    folders = [word for word in argv if "=" not in word]
    if len(folders) > 1 or (folders and folders[0].startswith("-")):
        raise UserError(
            f"zoo patterns {' '.join(argv)}: must be one folder and options. See --help."
        )
    folder = Path(folders[0] if folders else "patterns")
    check_place("folder", str(folder))
    if folder.is_dir():
        check_place("folder", str(folder / "extensions.png"))
    drawn = one_pattern(options) if options else sheets()
    try:
        for name, png in drawn:  # the first is drawn, or refused, before a folder is made
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / name) as file:
                file.write(png)
            sys.stdout.write(f"{folder / name}\n")
    except OSError as error:
        raise UserError(f"zoo patterns {folder}: {one_line(error)}. Name another folder.") from None
    return 0


def one_pattern(options: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Draw the pattern of an extension with these options, beside plain causal attention."""
    grids = {"none": _plain(), " ".join(options): _distances(options)}
    yield "extension.png", sheet(grids, 2, DISTANCES, distance_colors())


def sheets() -> Iterator[tuple[str, bytes]]:
    """Draw both sheets, one after the other: (file name, PNG)."""
    yield "extensions.png", sheet(extension_grids(), 5, DISTANCES, distance_colors())
    title = (
        f"How much each output of a first layer, untrained, takes from each of {LAYER_READ} inputs"
    )
    yield "architectures.png", sheet(architecture_grids(), 6, title, influence_colors())


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
