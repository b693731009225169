"""How an answer is scored: the best over the right ones, by the metrics of well-kept libraries."""

import functools
from collections.abc import Callable, Sequence


def _rouge(written: str, answers: Sequence[str]) -> dict[str, float]:
    from torchmetrics.functional.text import rouge_score

    keys = ("rouge1", "rouge2", "rougeL")
    found = [rouge_score(written, one, rouge_keys=keys) for one in answers]
    best = {key: max(float(one[f"{key}_fmeasure"]) for one in found) for key in keys}
    return {"score": best.pop("rougeL"), **best}


def _squad(measure: str, written: str, answers: Sequence[str]) -> dict[str, float]:
    from torchmetrics.functional.text import squad

    right = {"answer_start": [0] * len(answers), "text": [*answers]}
    found = squad([{"prediction_text": written, "id": "0"}], [{"answers": right, "id": "0"}])
    return {"score": float(found[measure]) / 100}


def _found(written: str, answers: Sequence[str]) -> dict[str, float]:
    """The share of the answers that is written, in any case of letters (RULER, section 4)."""
    return {"score": sum(one.lower() in written.lower() for one in answers) / len(answers)}


METRICS: dict[str, Callable[[str, Sequence[str]], dict[str, float]]] = {
    "rouge": _rouge,
    "f1": functools.partial(_squad, "f1"),
    "exact": functools.partial(_squad, "exact_match"),
    "found": _found,
}
