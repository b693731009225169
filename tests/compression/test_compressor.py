"""A number of operations decides how much of a prompt is kept, the scorer's own among them."""

import pytest
from building import write_byte_level
from texts import scorer, text

from zoo.compression.compressor import CompressionError, Compressor
from zoo.config.compose import compose
from zoo.config.groups import choices
from zoo.data.tokenizers import BYTE_TOKENIZER, Tokenizer, open_tokenizer
from zoo.model.flops import ReadingCost

METHODS = [name for name in choices("compress") if name != "none"]
READER = ReadingCost(
    lambda tokens: 1e6 + 500.0 * tokens, 2**30
)  # more than the scorer, a quadratic part
QUESTION = BYTE_TOKENIZER.tokens("Where was the house?")


def compressor(method: str, flops: float, reader: Tokenizer = BYTE_TOKENIZER) -> Compressor:
    words = ["run=x", f"compress={method}", f"compress.flops={flops:.0f}"]
    scored = None if method.startswith("truncation") else scorer()
    words += ["compress.by=runs/scorer"] if scored else []
    return Compressor(compose("eval", words).compress, scored, reader, READER)


@pytest.mark.parametrize("method", METHODS)
def test_shortening_and_reading_take_the_operations_that_are_given(method):
    prompts = [BYTE_TOKENIZER.tokens(text(seed, 6))[:1000] for seed in range(3)]
    scores = not method.startswith("truncation")
    whole = READER.of(1000 + len(QUESTION))
    for share in (0.9, 1.2) if scores else (0.3, 0.7):
        budget = share * whole
        made = compressor(method, budget)
        sizes = [len(made(prompt, QUESTION)) for prompt in prompts]
        assert (made.scored > 0) == (scores and share < 1)
        row = made.row
        if share > 1:  # the reader alone has room for all
            assert sizes == [1000 + len(QUESTION)] * 3
            assert row["prompt_flops"] == pytest.approx(whole)
            continue
        assert max(sizes) < 1000
        assert row["prompt_flops"] == pytest.approx(budget, rel=0.05)
        total = row["reader_flops"] + row["compressor_flops"]
        assert row["prompt_flops"] * 3 == pytest.approx(total)
        if made.scorer:  # all that it read, in vain or not
            assert total - row["reader_flops"] + row["search_flops"] == pytest.approx(
                made.scorer.flops
            )
            assert row["search_flops"] > 0
    assert made.row["prompt_flops"] == 0  # the row took them


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("merges", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_no_prompt_takes_more_than_the_operations_that_are_given(method, tokenizer, tmp_path):
    """Whatever came before it: prompts of one length differ in what a scorer computes for them."""
    questions = ["Who?", "Where was the house when it rained?", "Was anybody in to light?"]
    shares = (0.2, 0.5, 0.8) if method.startswith("truncation") else (0.85, 0.95)
    shares = shares if tokenizer == "bytes" else shares[-1:]
    reader = BYTE_TOKENIZER
    if tokenizer == "merges":
        pytest.importorskip("tokenizers")
        write_byte_level(tmp_path, ("t", "h"), ("th", "e"), ("i", "n"), ("o", "u"), ("r", "e"))
        reader = open_tokenizer(str(tmp_path / "tokenizer.json"))
    prompts = []
    for seed, question in enumerate(questions):
        whole = reader.tokens(text(seed, 3 + 2 * seed, 60 // (1 + seed)))
        prompts.append((whole[: 500 - len(reader.tokens(question))], reader.tokens(question)))
    assert {len(prompt) + len(question) for prompt, question in prompts} == {500}
    for share in shares:
        budget = share * READER.of(500)
        made = compressor(method, budget, reader)
        for prompt, question in prompts:
            made(prompt, question)
            used = made.row["prompt_flops"]
            assert used <= budget
            assert used >= 0.85 * budget  # one paragraph more would take more than is left


def test_a_prompt_that_comes_again_took_as_much_again():
    prompt = BYTE_TOKENIZER.tokens(text(0, 6))[:600]
    made = compressor("llmlingua", 0.95 * READER.of(600))
    made(prompt)
    once = made.row
    made(prompt)
    assert made.row == once
    assert once["compressor_flops"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_operations_that_suffice_for_no_token_are_refused_by_name(method):
    made = compressor(method, 1e5)
    with pytest.raises(CompressionError, match=r"^compress\.flops=100000: is less than the "):
        made(BYTE_TOKENIZER.tokens(text(0, 6)), QUESTION)
