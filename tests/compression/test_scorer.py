"""The information of tokens, whatever the chunks that they are read in."""

import numpy as np
import pytest
import torch
from building import write_byte_level
from checkpoints import LLAMA, transformers
from texts import information, scorer, text

from zoo.compression import scorer as module
from zoo.compression.scorer import Scorer
from zoo.errors import UserError
from zoo.model.language_model import load_language_model


@pytest.mark.parametrize("model", ["mamba", "transformer", "rwkv7"])
def test_the_information_is_minus_log_p_in_any_chunks_and_a_prefix_is_read_once(model, monkeypatch):
    scored, tokens = scorer(model), [*text(0, 1).encode()]
    expected = information(scored, [], tokens)
    for chunk in (7, 4096):
        monkeypatch.setattr(module, "CHUNK", chunk)
        start = scored.start()
        np.testing.assert_allclose(scored.information(start, tokens), expected, rtol=1e-8)
        prefix = scored.read(start, tokens[:50])
        for _ in range(2):  # a prefix is no place that a reading moves on
            found = scored.information(prefix, tokens[50:])
            np.testing.assert_allclose(found, expected[50:], rtol=1e-8)


def test_a_scorer_counts_the_operations_of_all_that_it_read(monkeypatch):
    scored = scorer("transformer")
    tokens = [*text(0, 1).encode()]
    prefix = scored.start()
    before = scored.flops
    assert before == scored.cost.of(1)
    for chunk in (7, 4096):  # in pieces, each behind those before it, as at once
        monkeypatch.setattr(module, "CHUNK", chunk)
        scored.flops = 0.0
        scored.information(prefix, tokens)
        assert scored.flops == pytest.approx(scored.cost.of(len(tokens), 1))
    scored.flops = 0.0
    scored.means([tokens[:20], tokens[:30]])  # side by side, padded to the longer
    assert scored.flops == pytest.approx(2 * scored.cost.of(30))


def test_a_scorer_that_cannot_read_so_far_is_refused_in_one_line():
    scored = scorer("learned")
    with pytest.raises(
        UserError, match=r"^by=runs/scorer: reads at most 64 tokens, and here are"
    ) as error:
        scored.information(scored.start(), [1] * 100)
    assert "\n" not in str(error.value)


def test_a_checkpoint_scores_also_with_quantized_weights(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA | {"vocab_size": 257})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    write_byte_level(tmp_path)
    tokens = [*range(0, 240, 5)]
    found = {}
    for weights in ("float32", "int8"):
        scored = Scorer(load_language_model(tmp_path, weights=weights), str(tmp_path))
        found[weights] = scored.information(scored.start(), tokens)
        with torch.no_grad():
            whole = torch.tensor([[scored.tokenizer.end, *tokens]])
            logits = scored.model.backbone(whole)[0, :-1].double()
        expected = -logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        np.testing.assert_allclose(found[weights], expected, rtol=1e-5)
    assert 0 < np.abs(found["int8"] - found["float32"]).max() < 0.05


def test_texts_that_are_read_side_by_side_have_the_information_they_have_alone(monkeypatch):
    scored = scorer()
    texts = [[*text(seed, 1, words).encode()] for seed, words in enumerate((1, 9, 3, 9, 20))]
    expected = [information(scored, [], one).mean() for one in texts]
    for chunk in (64, 300, 4096):
        monkeypatch.setattr(module, "CHUNK", chunk)
        np.testing.assert_allclose(scored.means(texts), expected, rtol=1e-8)
