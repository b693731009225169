"""Every experiment composes; its header says what it measures, after whom, how, at what cost."""

import re
from pathlib import Path

import pytest

from zoo.cli.arms import composed_arms
from zoo.cli.train import check

EXPERIMENTS = sorted((Path(__file__).parents[2] / "configs/experiment").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_its_header_has_the_claim_its_source_the_command_the_cost_and_what_to_expect(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert re.fullmatch(r"# [A-Z].*\.", header[1]), "a sentence says what it does"
    parts = re.findall(r"^# ([A-Z]\w+)  +\S", "\n".join(header[2:]), re.MULTILINE)
    assert parts[:4] == ["Claim", "Command", "Cost", "Expected"]
    text = " ".join(line.removeprefix("#").strip() for line in header)
    assert re.search(r"\b(19|20)\d\d\b|survey|configs/claims", text.partition("Command ")[0])


@pytest.mark.slow  # 40 s: short_conv alone has 288 runs
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_it_composes_into_arms_in_a_folder_of_its_own(path):
    arms = composed_arms("train", [f"experiment={path.stem}"], check)
    assert arms
    assert {config.runs for _, config in arms} == {f"runs/{path.stem}"}
