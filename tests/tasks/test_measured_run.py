"""What a row says is of its own measurement alone."""

from collections.abc import Iterator

import numpy as np
import pytest
from fakes import Remembers, make_context, text_store

from zoo.compression.compressor import Compressor
from zoo.config.compose import compose
from zoo.data.tokenizers import BYTE_TOKENIZER
from zoo.measurement import Declaration
from zoo.model.flops import ReadingCost
from zoo.tasks.context import EvalContext
from zoo.tasks.measured_run import _answers
from zoo.tasks.task import Task

TEXT = BYTE_TOKENIZER.tokens("There was a house. It had a door. The door was green. " * 30)


class Reads(Task):
    """Reads prompts of several lengths, the longer of which cannot be read."""

    declares = Declaration(title="", about="", quantities=())

    def questions(self, context: EvalContext) -> Iterator[dict]:
        yield from ({"length": length} for length in (1000, 500, 500))

    def measure(self, context: EvalContext, question: dict) -> dict:
        assert context.compress
        context.compress(TEXT[: question["length"]])
        if question["length"] > 500:
            raise MemoryError
        return context.prompt_row([])


@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_what_a_failed_answer_has_read_is_no_part_of_the_next_ones_cost(rate, tmp_path):
    options = compose("eval", ["run=x", "compress=truncation", f"compress.rate={rate}"]).compress
    made = Compressor(options, None, BYTE_TOKENIZER, ReadingCost(lambda n: 500.0 * n, 2**30))
    store = text_store(np.zeros(8, np.int64))
    context = make_context(Remembers(memory=3), tmp_path, store, compress=made)
    task = Reads()
    (_, lost, _), (_, one, _), (_, other, _) = _answers(task, context, [*task.questions(context)])
    assert (lost.row["status"], one.value) == ("out_of_memory", other.value)
