"""A row has the largest error that layers found of themselves in the calls it was made of."""

from typing import ClassVar

import pytest
import torch
from building import train_config, train_on_text
from torch import nn

from zoo.cli.eval import main
from zoo.model.build import build_model
from zoo.runs.folder import RunFolder
from zoo.tasks.diagnostics import diagnosed


class Layer(nn.Module):
    diagnostics: ClassVar = {"error": "off"}
    off: float | None = None

    def forward(self, x: float) -> float:
        self.off = x
        return x


def test_the_largest_of_all_layers_and_calls_since_the_last_row_counts():
    model = nn.ModuleList([Layer(), Layer(), nn.Identity()])
    model[0](9.0)  # not yet watched
    with diagnosed(model) as found:
        for layer, value in ((0, 1.0), (1, 3.0), (0, 2.0)):
            model[layer](value)
        assert found.fields() == {"error": 3.0}
        assert found.fields() == {"error": 3.0}  # a second row of the same calls
        model[1](0.5)
        assert found.fields() == {"error": 0.5}
    model[0](7.0)
    assert found.fields() == {"error": 0.5}


def test_a_model_without_such_layers_has_no_such_fields():
    model, _ = build_model(train_config("model=mamba", "size=tiny"), vocab_size=8)
    with diagnosed(model) as found:
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert found.fields() == {}


@pytest.mark.slow
def test_softs_rows_say_how_far_newtons_inverse_was_from_one(tmp_path):
    few = ["model=soft", "objective=masked", "trainer.max_steps=1", "batch_tokens=64"]
    train_on_text(tmp_path, *few, f"runs={tmp_path}", "name=x")
    words = [f"run={tmp_path / 'x'}", "logger=none", "report=null", "task=perplexity"]
    assert main([*words, "task.perplexity.lengths=[32,64]", "task.perplexity.units=2"]) == 0
    rows = RunFolder.open(tmp_path / "x").rows()
    assert {row["length"] for row in rows} == {32, 64}
    assert all(0 < row["newton_residual"] < 10 for row in rows)
