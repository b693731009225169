"""A position scheme is one class and one YAML that uses it: everything else finds it."""

import sys
from pathlib import Path

import pytest
import torch

import zoo.positions
from zoo.config import groups, introspect, schemes
from zoo.config.applicability import check_applies, position_schemes
from zoo.config.compose import compose
from zoo.errors import UserError
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model.build import build_model
from zoo.model.extend import extend

KERPLE = '''
"""Kernelised relative positions (Chi 2022, arXiv 2205.09921), logarithmic: -r log(1 + (i - j))."""

from typing import ClassVar

import torch
from torch import nn

from zoo.ops.attention import Part, attention
from zoo.positions.base import Positions


class Kerple(Positions):
    one_sided: ClassVar[bool] = True
    takes_sink: ClassVar[bool] = False

    def __init__(self, heads: int, head_width: int, /, *, start: float = 1.0) -> None:
        super().__init__(heads, head_width)
        self.r = nn.Parameter(torch.full((heads,), start))

    def attend(self, q, k, v, start, cross_layer=None, *, causal=True, sinks=(), backend="auto"):
        at = torch.arange(k.shape[1])
        apart = at[-q.shape[1] :, None] - at
        bias = -self.r[:, None, None] * apart.clamp(min=0).add(1).log()
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5 + bias
        weights = scores.masked_fill(apart < 0, -torch.inf).softmax(-1)
        return torch.einsum("bhij,bjhe->bihe", weights, v)
'''
YAML = """
# Transformer with KERPLE's logarithmic distances.
defaults: [transformer, _self_]
name: kerple
positions:
  _target_: zoo.positions.kerple.Kerple
  start: 0.5
"""


@pytest.fixture
def kerple(tmp_path, monkeypatch):
    """A tree with one more class and one more YAML, seen by what reads sources and by Python."""
    root = Path(introspect.ROOT)
    (tmp_path / "kernels").symlink_to(root / "kernels")  # whichever are still to be built
    for part in ("zoo", "configs"):
        (tmp_path / part).mkdir()
        for entry in (root / part).iterdir():
            if entry.name not in ("positions", "model"):
                (tmp_path / part / entry.name).symlink_to(entry)
    for folder, name, text in (
        ("zoo/positions", "kerple.py", KERPLE),
        ("configs/model", "kerple.yaml", YAML),
    ):
        (tmp_path / folder).mkdir()
        for entry in (root / folder).iterdir():
            (tmp_path / folder / entry.name).symlink_to(entry)
        (tmp_path / folder / name).write_text(text)
    caches = [
        value
        for module in (schemes, groups, introspect)
        for value in vars(module).values()
        if hasattr(value, "cache_clear")
    ]
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("zoo."):
            for name, new in (("ROOT", tmp_path), ("CONFIGS", tmp_path / "configs")):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, new)
    monkeypatch.setattr(
        zoo.positions, "__path__", [*zoo.positions.__path__, str(tmp_path / "zoo/positions")]
    )
    for cached in caches:
        cached.cache_clear()
    yield
    monkeypatch.undo()
    sys.modules.pop("zoo.positions.kerple", None)
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("kerple")
def test_a_scheme_in_a_folder_is_named_configured_built_and_judged():
    assert schemes.schemes()["kerple"] == "zoo.positions.kerple.Kerple"
    for words in (["model=kerple"], ["model.positions=kerple", "model.positions.start=0.5"]):
        config = compose("train", [*words, "size=tiny", "match=none"])
        model, _ = build_model(config, 32)
        mixer = model.sublayers()[0]
        assert isinstance(mixer, SoftmaxAttention)
        assert mixer.positions.name == "kerple"
        assert (mixer.positions.r == 0.5).all()
        tokens = torch.randint(32, (2, 20))
        one, state = model(tokens[:, :7], model.empty_state(2))
        two, _ = model(tokens[:, 7:], state)
        torch.testing.assert_close(torch.cat([one, two], 1), model(tokens))
        extension = compose("eval", ["run=x", "extension=dca"]).extension
        refused = r"dca: acts on positions=alibi, rope, t5, and this model has positions=kerple\."
        with pytest.raises(UserError, match=refused):
            check_applies(extension, position_schemes(config.model))
        with pytest.raises(UserError, match=refused):
            extend(model, extension, 64)
    with pytest.raises(UserError, match="positions=kerple: is defined for causal attention alone"):
        build_model(compose("train", ["model.positions=kerple", "objective=masked"]), 32)
    with pytest.raises(UserError, match=r"model.positions.start=abc: must be a number"):
        compose("train", ["model=kerple", "model.positions.start=abc"])


def test_a_class_attribute_is_read_as_the_class_has_it():
    """From the source, through the classes it derives from."""
    import importlib

    names = ["embedded", "one_sided", "takes_sink", "takes_pattern", "takes_patterns", "placeable"]
    names.append("scaled_by")
    for target in schemes.schemes().values():
        module, _, name = target.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        for attribute in names:
            assert schemes.declared(target, attribute) == getattr(kind, attribute), (
                target,
                attribute,
            )
    assert schemes.declared("zoo.mixers.low_rank.LowRankAttention", "extendable") is True
    assert schemes.declared("zoo.mixers.mamba.Mamba", "extendable", False) is False
