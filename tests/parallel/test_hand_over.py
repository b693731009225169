"""A window split over ranks is the whole window, in float64: outputs, loss and every gradient.

And what is sent is what `train.py --explain` predicts, to the byte.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from building import ARCHITECTURES, MODEL_OF

from zoo.config.groups import extensions

CLOSE = 1e-10
SEVERAL = [4, 5, 33, 64, 130]  # tokens; odd lengths recompute activations
MORE = {
    "longrope": [f"extension.scaling.long_factors={[1 + 0.2 * pair for pair in range(16)]}"],
    "lm_infinite": ["extension.attention.sinks=2"],
}


def every_case(
    lengths: list[int] | None = None,
) -> dict[str, tuple[list[str], list[str], list[int]]]:
    """Every architecture, and every extension as it is trained under: options of both."""
    found: dict[str, tuple[list[str], list[str], list[int]]] = {}
    for name in ARCHITECTURES:
        words = [f"model={name}"] + ["size.layers=3"] * (name == "hybrid")  # its pattern
        found[name] = words, [], lengths or [77]
    for name in ("transformer", "sinusoidal", "mamba"):
        words = [f"model={name}", "model.sink_token=true"]
        found[f"{name} with a sink token"] = words, [], lengths or [77]
    for name, tree in extensions().items():
        model, placed = [f"model={MODEL_OF.get(name, 'transformer')}"], tree.get("positions")
        words = [f"extension={name}", *MORE.get(name, [])]
        words += ["extension.factor=4"] * (tree["factor"] == "???" or bool(placed))
        words = ["train", "finetune=x", *words] if placed else ["eval", "run=x", *words]
        found[f"{model[0]} {name}"] = model, words, lengths or [40]
        if placed and name != "clex":  # which is a scaling itself
            scaled = [*words, "extension.scaling=dynamic_ntk"]
            found[f"{model[0]} {name} scaled"] = model, scaled, lengths or [40]
    return found


def check(folder: Path, count: int, lengths: list[int] | None = None) -> None:
    cases, report = every_case(lengths), folder / "report.json"
    program = Path(__file__).with_name("ranks.py")
    words = [sys.executable, str(program), str(count), str(report), json.dumps(cases)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert len(found) == sum(len(case[2]) for case in cases.values())
    apart = [
        f"{case}: {what} {value:.1e}"
        for case, values in found.items()
        for what, value in values.items()
        if not value < CLOSE
    ]
    assert not apart, "\n".join(apart)


def test_two_ranks_read_what_one_does_in_every_architecture_and_extension(tmp_path):
    check(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_ranks_reads_what_one_does_at_any_length(count, tmp_path):
    check(tmp_path, count, SEVERAL)
