"""What tests of several stages of training share."""

import sys
from importlib import import_module

import pytest
from building import ROOT


@pytest.fixture
def program(trained, monkeypatch, capfd):
    """program("train", *words) -> (exit code, last line of stderr), in the directory `trained`."""
    monkeypatch.chdir(trained)
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.syspath_prepend(ROOT)

    def call(name: str, *words: str) -> tuple[int, str]:
        capfd.readouterr()
        code = import_module(f"zoo.cli.{name}").main([*words, "logger=none"])
        return code, (capfd.readouterr().err.splitlines() or [""])[-1]

    return call
