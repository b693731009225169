"""The protocols of perplexity: their titles, what they score, and which is shown first."""

from zoo.report.rows import Results

PROTOCOLS = {  # the first that was measured is the headline
    "half_tail": "Same tokens at every length",
    "stride_tail": "Same few tokens, full windows",
    "blocks": "Average over whole blocks",
    "window_mean": "Mean over sliding windows",
    "masked": "Masked tokens, read from both sides",
}
EXPLAINED = {
    "half_tail": "Every length scores the same tokens, each with at least half that length of text "
    "before it: along a line only the model's view of the past changes.",
    "stride_tail": "Every length scores the same last tokens, each with nearly that length of text "
    "before it: along a line only the model's view of the past changes.",
    "blocks": "The text is cut into blocks of this length and every token is scored. The first "
    "tokens of a block know little of their past, and longer blocks have fewer of them: lines "
    "fall even where nothing is gained from far text.",
    "window_mean": "A window of this length slides over the text; every token in it is scored.",
    "masked": "For encoders. The text is cut into blocks of this length, and at every length the "
    "same hidden tokens are scored. Not comparable with models that read from one side.",
}
# A length's score and another's are of the same tokens.
SAME_TOKENS = ("half_tail", "stride_tail", "masked")


def headline(results: Results) -> str | None:
    """The protocol whose scores are shown first."""
    return next((p for p in PROTOCOLS if results.where(task="perplexity", protocol=p)), None)
