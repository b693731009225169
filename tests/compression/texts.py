"""Texts to compress, and a scorer of bytes in float64 with random weights."""

import random

import torch
from building import train_config

from zoo.compression.scorer import Scorer
from zoo.data.tokenizers import BYTE_TOKENIZER
from zoo.model.build import build_model
from zoo.model.language_model import LanguageModel

WORDS = """
the a of river and stone who went in to light, under. over; moved while it was still (dark)
morning! evening? carried from which house although nobody "spoke" for hours: then rain - finally
"""


def text(seed: int, paragraphs: int = 12, words: int = 40) -> str:
    """Paragraphs of words, the last ones not of one byte each."""
    draw = random.Random(seed)
    parts = (" ".join(draw.choices(WORDS.split(), k=words)) for _ in range(paragraphs))
    return "\n\n".join([*parts, "Zuletzt: größere Flüsse, ältere Häuser. 終わり"])


def scorer(model: str = "mamba", seed: int = 0) -> Scorer:
    """A scorer with random weights, large enough that its probabilities differ."""
    torch.manual_seed(seed)
    config = train_config(f"model={model}", "size=tiny", "match=none", "seq_len=64")
    backbone = build_model(config, 256)[0].double().eval().requires_grad_(False)
    for weight in backbone.parameters():
        weight.mul_(3)
    whole = LanguageModel(backbone=backbone, tokenizer=BYTE_TOKENIZER, train_length=64)
    return Scorer(whole, "runs/scorer")


def information(scored: Scorer, before: list[int], tokens: list[int]):
    """-log p of tokens after others by the definition: one reading, one softmax, no state."""
    whole = torch.tensor([[0, *before, *tokens]])
    with torch.no_grad():
        logits = scored.model.backbone(whole)[0, :-1]
    chances = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    found = -torch.log(chances.gather(-1, whole[0, 1:, None])[:, 0])
    return found[len(before) :].numpy()
