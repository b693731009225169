"""What a run is said to cost is what it costs."""

import re

import pytest
from building import train_config

import zoo.cli.explain
from zoo.cli.eval import main as eval_main
from zoo.cli.explain import PROBE, explain, peak, step_bytes
from zoo.cli.train import main as train_main
from zoo.config.groups import choices
from zoo.model.build import build_model, count_parameters
from zoo.report.words import size

CLOSE = 0.15  # of what is measured
COMMON = ("model=transformer", "size=tiny", "seq_len=64", "trainer.accelerator=cpu")


def ratio(name: str, rows: int, length: int) -> float:
    """Predicted bytes of a step by those it takes."""
    words = (f"model={name}", "size=tiny", f"seq_len={length}", "match=none")
    model, _ = build_model(train_config(*words), 256)
    return step_bytes(model, rows, length) / peak(model, rows, length)


@pytest.mark.parametrize("name", ["transformer", "mamba", "retnet"])
def test_memory_of_a_step_is_predicted_from_shorter_windows(name, monkeypatch):
    monkeypatch.setattr(zoo.cli.explain, "PROBE", 512)
    assert ratio(name, 3, 768) == pytest.approx(1, abs=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("length", [3 * PROBE // 2, 2 * PROBE])
@pytest.mark.parametrize("name", sorted(choices("model")))
def test_memory_of_a_step_of_every_architecture_is_predicted(name, length):
    assert ratio(name, 1, length) == pytest.approx(1, abs=CLOSE)


def test_the_numbers_are_those_of_the_run():
    words = ("model=transformer", "size=tiny", "seq_len=64", "batch_size=8", "trainer.devices=2")
    config = train_config(*words, "trainer.accelerator=cpu", "trainer.max_steps=10")
    text = explain(config)
    model, _ = build_model(config, 256)
    count = count_parameters(model)
    assert f"transformer, {count:,} parameters" in text
    assert "512 tokens: 2 processes x 1 micro-batch x 4 windows of 64" in text
    assert f"{4 * count / 1024:.0f} KiB a step by each process" in text  # 2 (n - 1) / n = 1
    sharded = explain(train_config(*words, "trainer=fsdp", "trainer.accelerator=cpu"))
    gathered = 2 * count + count_parameters(model.blocks)
    assert f"{size(4 * gathered / 2)} a step by each process, its share of weights" in sharded
    state = 2 * 64 * model.width * 4 * len(model.blocks) / 1024
    assert f"{state:.0f} KiB after 64 tokens" in text
    assert re.search(r"in all, \d+% of this machine's", text)


def test_memory_is_that_of_a_process_and_of_its_machine():
    def memory(*words: str) -> tuple[float, float, float]:
        text = explain(train_config(*COMMON, *words))
        line = next(line for line in text.splitlines() if line.startswith("memory"))
        found = re.findall(r"([\d.,]+) (KiB|MiB)", line)[:3]
        return tuple(float(n) * (1024 if unit == "MiB" else 1) for n, unit in found)

    one = memory("batch_size=1")
    held, step, machine = memory("batch_size=4", "trainer.devices=4")
    assert (held, step) == pytest.approx(one[:2], rel=0.02)
    assert machine == pytest.approx(4 * (held + step), rel=0.02)
    several = ["trainer=fsdp", "trainer.num_nodes=2", "trainer.devices=2", "batch_size=4"]
    held, step, machine = memory(*several)
    assert held == pytest.approx(one[0] / 4, rel=0.02)
    assert step == pytest.approx(one[1], rel=0.02)
    assert machine == pytest.approx(2 * (held + step), rel=0.02)


def test_what_split_windows_send_is_that_of_the_busiest_process():
    words = ("model=nope", "size=tiny", "seq_len=90", "batch_size=4", "trainer.accelerator=cpu")
    text = explain(train_config(*words, "trainer.sequence_parallel=3", "trainer.devices=6"))
    assert "6 processes x 1 micro-batch x 2 windows of 90, 3 processes to a window" in text
    model, _ = build_model(train_config(*words), 256)
    layers, width = len(model.blocks), model.width
    keys = 4 * 2 * 2 * width * layers  # bytes of a token's keys and values in both windows
    header = 3 * 64 * layers  # k, v and the number of tokens
    # The second process has chunks 1 and 4 of six: what it has read then, and what it began with.
    sent = keys * (30 + 75 + 15 + 60) + 2 * header
    assert f"up to {size(sent)} for states of split windows and their gradients" in text


def test_the_program_prints_it_and_writes_nothing(tmp_path, capfd):
    words = ["--explain", "-m", "model=mamba,rwkv4", "size=tiny"]
    assert train_main([*words, "seq_len=64", f"runs={tmp_path / 'runs'}"]) == 0
    said = capfd.readouterr()
    models = re.findall(r"^model +(\w+), [\d,]+ parameters", said.out, re.MULTILINE)
    assert models == ["mamba", "rwkv4"]
    assert "profiler" not in said.out + said.err
    assert not [*tmp_path.iterdir()]
    assert eval_main(["--explain"]) == 2
    said = capfd.readouterr()
    assert not said.out
    assert said.err.strip().endswith(
        "--explain: says what a training run costs. Use it with train.py."
    )
