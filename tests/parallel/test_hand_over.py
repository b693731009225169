"""A window split over ranks is the whole window, in float64: outputs, loss and every gradient.

And what is sent is what `train.py --explain` predicts, to the byte.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from building import ARCHITECTURES, MODEL_OF

from zoo.config.groups import extensions
from zoo.config.resolve import model_section
from zoo.config.schemes import declared
from zoo.mixers.quantized_cache import CacheBits

CLOSE = 1e-10
MAX_MEMORY = (
    0.6  # of one process's memory in either of two ranks: half, and keys that both have read
)
SEVERAL = [4, 5, 33, 64, 130]  # tokens; odd lengths recompute activations
MORE = {
    "longrope": {"scaling": {"long_factors": [1 + 0.2 * pair for pair in range(16)]}},
    "lm_infinite": {"attention": {"sinks": 2}},
}
ROUNDED = 300  # tokens, of which a quantized cache rounds some
Cases = dict[str, tuple[Any, ...]]  # the arguments of chunks.composed


def every_case(lengths: list[int] | None = None) -> Cases:
    """Every architecture, and every extension as it is trained under.

    At the lengths of the ordinary suite without those that scale frequencies by constants.
    """
    found: Cases = {}
    for name in ARCHITECTURES:
        words = [f"model={name}"] + ["size.layers=3"] * (name == "hybrid")  # its pattern
        mixer = model_section(name).get("mixer")
        first = mixer is not None and declared(mixer["_target_"], "publishes_first", False)
        found[name] = words, None, lengths or [76 if first else 77]  # odd lengths recompute
    for name in ("transformer", "sinusoidal", "mamba"):
        words = [f"model={name}", "model.sink_token=true"]
        found[f"{name} with a sink token"] = words, None, lengths or [77]
    losses = ["normalise=root", "norm_loss=0.1", "entropy_loss=0.1", "entropy_margin=1.0"]
    words = ["model=relu", *(f"model.mixer.{one}" for one in losses)]
    found["relu with losses of its layers"] = words, None, lengths or [77]
    for name, tree in extensions().items():
        model, placed = [f"model={MODEL_OF.get(name, 'transformer')}"], tree.get("positions")
        if lengths is None and not (placed or tree["attention"]):
            continue
        tree |= {part: tree[part] | more for part, more in MORE.get(name, {}).items()}
        tree["factor"] = 4 if tree["factor"] == "???" or placed else tree["factor"]
        if isinstance(tree["scaling"], str):
            tree["scaling"] = extensions()[tree["scaling"]]["scaling"]
        found[f"{model[0]} {name}"] = model, tree, lengths or [40]
        if placed and name != "clex":  # which is a scaling itself
            scaled = {**tree, "scaling": extensions()["dynamic_ntk"]["scaling"]}
            found[f"{model[0]} {name} scaled"] = model, scaled, lengths or [40]
    for bits in get_args(CacheBits):
        for name, tree in ("all", None), ("some", extensions()["streaming_llm"]):
            case = ["model=transformer"], tree, [ROUNDED], bits
            found[f"{name} keys in {bits}"] = case
    return found


def check(folder: Path, count: int, lengths: list[int] | None = None) -> float:
    """Check every case in so many ranks; return a rank's share of one process's memory."""
    cases, report = every_case(lengths), folder / "report.json"
    program = Path(__file__).with_name("ranks.py")
    words = [sys.executable, str(program), str(count), str(report), json.dumps(cases)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads(report.read_text())
    found = written["cases"]
    assert len(found) == sum(len(lengths) for _, _, lengths, *_ in cases.values())
    apart = [
        f"{case}: {what} {value:.1e}"
        for case, values in found.items()
        for what, value in values.items()
        if not value < CLOSE
    ]
    assert not apart, "\n".join(apart)
    assert not written["waits"]
    return written["memory"]


def test_two_ranks_read_what_one_does_in_every_architecture_and_extension(tmp_path):
    assert check(tmp_path, 2) < MAX_MEMORY


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_ranks_reads_what_one_does_at_any_length(count, tmp_path):
    check(tmp_path, count, SEVERAL)
