"""The pictures of what every query sees."""

import pytest
import torch
from building import ARCHITECTURES, train_config

from zoo.__main__ import main
from zoo.cli import patterns
from zoo.config.groups import extensions
from zoo.model.build import build_model


@pytest.fixture(scope="module")
def remaps():
    return patterns.extension_grids()


def test_every_extension_that_remaps_distances_is_drawn(remaps):
    expected = {name for name, tree in extensions().items() if tree["attention"]} | {"none"}
    assert remaps.keys() == expected


def test_no_query_sees_a_later_key(remaps):
    for name, grid in remaps.items():
        later = torch.ones_like(grid, dtype=torch.bool).triu(1)
        assert grid[later].isnan().all(), name
        assert (grid.diagonal() == 0).all(), name


def test_the_model_alone_sees_distances_it_was_not_trained_on_and_dual_chunks_show_none(remaps):
    assert remaps["none"].nan_to_num(0).max() == patterns.READ - 1
    assert remaps["dca"].nan_to_num(0).max() == patterns.TRAINED - 1
    assert not remaps["dca"].tril().isnan().any()  # and every key is in sight


@pytest.mark.parametrize("name", ["longformer", "mamba"])
def test_a_layer_is_drawn_to_depend_on_its_window_and_on_nothing_later(name):
    config = train_config(f"model={name}", "size=tiny", "seq_len=256", "match=none")
    torch.manual_seed(0)
    layer = build_model(config, vocab_size=8)[0].blocks[0].mixer.eval()
    grid = patterns.influence(layer, config.size.width)
    cells = patterns.LAYER_READ // patterns.CELL
    apart = torch.arange(cells)[:, None] - torch.arange(cells)
    window = 32 // patterns.CELL if name == "longformer" else cells
    assert grid[apart < 0].isnan().all()
    assert not grid[(apart >= 0) & (apart < window)].isnan().any()
    assert grid[apart > window].isnan().all()


def test_a_sheet_is_a_png_and_an_unwritable_folder_is_one_line(tmp_path, capsys, monkeypatch):
    grid = torch.eye(3)
    png = patterns.sheet({"a": grid, "b": grid}, 1, "title", patterns.influence_colors())
    assert png.startswith(b"\x89PNG")
    monkeypatch.setattr(patterns, "sheets", lambda: [("x.png", png)])
    assert main(["patterns", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "x.png").read_bytes() == png
    monkeypatch.chdir(tmp_path)
    assert main(["patterns"]) == 0
    assert (tmp_path / "patterns" / "x.png").exists()  # not in the midst of a checkout
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    assert main(["patterns", str(tmp_path / "file")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_help_explains_and_other_arguments_are_refused_in_one_line(capsys, tmp_path):
    assert main(["patterns", "--help"]) == 0
    assert "extensions.png" in capsys.readouterr().out
    for words in ("--huge", "a b", f"{tmp_path} extension=yarn extension.factor=4"):
        assert main(["patterns", *words.split()]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_one_pattern_is_drawn_with_its_options(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(patterns, "sheet", lambda grids, *_: drawn.update(grids) or b"png")
    options = ["extension=dca", "extension.attention.chunk=8"]
    assert main(["patterns", str(tmp_path), *options]) == 0
    assert (tmp_path / "extension.png").read_bytes() == b"png"
    grid = drawn[" ".join(options)]
    assert not torch.equal(grid, patterns.extension_grids()["dca"])


@pytest.mark.slow
def test_every_architecture_is_drawn():
    assert patterns.architecture_grids().keys() == {*ARCHITECTURES}
