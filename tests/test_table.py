"""A new architecture costs one file and one YAML, whose header says what it is."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MODELS = sorted(ROOT.glob("configs/model/*.yaml"))
SHARED = {
    "base",
    "parts",
    "short_conv",
    "feed_forward",
    "paged_cache",
    "quantized_cache",
    "__init__",
}  # not architectures


BEFORE_ARXIV = {"learned", "lstm"}


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_every_yaml_is_headed_by_a_sentence_its_source_and_what_it_costs(path):
    """What listings and README's catalogue are made of."""
    lines = [line for line in path.read_text().split("\n") if line.startswith("# ")]
    assert re.fullmatch(r"# [A-Za-z][^:].*\.", lines[0]), "the first line is a sentence"
    assert re.findall(r"^# ([A-Z]\w+)  +\S", "\n".join(lines[1:]), re.MULTILINE) == [
        "Source",
        "Time",
        "State",
        "Expect",
    ]
    header = " ".join(line.removeprefix("#").strip() for line in lines)
    source = re.search(r"Source +(.*?) +Time", header)
    assert source is not None
    assert re.search(r"\b(19|20)\d\d\b", source[1]), "no year"
    assert path.stem in BEFORE_ARXIV or re.search(r"arXiv \d{4}\.\d{5}", source[1])


def test_every_mixer_file_is_reached_by_some_yaml():
    named = "".join(path.read_text() for path in MODELS)
    for source in ROOT.glob("zoo/mixers/*.py"):
        if source.stem not in SHARED:
            assert f"zoo.mixers.{source.stem}." in named, f"no YAML names {source.name}"


def test_the_comparison_of_the_whole_zoo_names_every_architecture():
    experiment = yaml.safe_load((ROOT / "configs/experiment/zoo.yaml").read_text())
    named = experiment["hydra"]["sweeper"]["params"]["model"].replace(" ", "").split(",")
    assert sorted(named) == sorted(path.stem for path in MODELS)
