"""Every extension's YAML: a sentence for listings, its source, what it costs, its limits."""

import re
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parents[2].glob("configs/extension/*.yaml"))
WITHOUT_ARXIV = {"rerope", "leaky_rerope"}  # published as a note


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_yaml_is_headed_by_a_sentence_its_source_cost_and_limits(path):
    lines = [line for line in path.read_text().split("\n") if line.startswith("# ")]
    assert re.fullmatch(r"# [A-Z][^:]+(: .+)?\.", lines[0]), "the first line is a sentence"
    if path.stem == "none":
        return
    keys = re.findall(r"^# ([A-Z]\w+)  +\S", "\n".join(lines[1:]), re.MULTILINE)
    assert [key for key in keys if key not in ("Search", "Read", "Train")] == [
        *("Source", "Cost", "Expect", "Limits"),
    ]
    source = re.search(r"Source +(.*?) +Cost ", " ".join(line[2:].strip() + " " for line in lines))
    assert source is not None
    assert re.search(r"\b(19|20)\d\d\b", source[1]), "no year"
    assert path.stem in WITHOUT_ARXIV or re.search(r"arXiv +\d{4}\.\d{5}", source[1])
