"""lm-evaluation-harness has the same numbers of our model as of `transformers` for its export."""

from types import SimpleNamespace

import pytest
from building import counting, train_on_text, write_byte_level, write_harness_task

from zoo.errors import UserError
from zoo.model.export import export
from zoo.model.language_model import load_language_model
from zoo.model.lm_harness import harness_model
from zoo.runs.folder import RunFolder

transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'zoo[eval]'")

CONTEXTS = [
    "1 and then 1, 2 and",
    "1 and then 1, 2 and ",
    "",
    "37 and then 11, 38 and then",
    "\u00e9",
]
RESTS = [" then 4,", " then", "4, 3 and then 9,", " \u00e9"]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "begins with a token"])
def both(request, tmp_path_factory) -> tuple:
    """A tiny model that was trained here, and the harness's own of its export."""
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("harness")
    write_byte_level(folder, ("a", "n"), ("an", "d"), begins=request.param)
    end = ["data.end_token=258"] + ["data.bos_token=258"] * request.param
    options = [f"data.tokenizer={folder / 'tokenizer.json'}", *end, "trainer.max_steps=40"]
    train_on_text(folder, *options, f"runs={folder / 'runs'}", "optim.warmup_steps=2")
    (run,) = (path.parent for path in (folder / "runs").glob("*/run.json"))
    export(RunFolder.open(run), folder / "out")
    theirs = HFLM(pretrained=str(folder / "out"), device="cpu", dtype="float32", max_length=32)
    return harness_model(load_language_model(run, device="cpu"), rows=3), theirs


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=one, task_name=None) for one in arguments]


def test_continuations_are_as_likely_as_for_transformers(both):
    ours, theirs = both
    requested = requests(*[(context, rest) for context in CONTEXTS for rest in RESTS])
    found, expected = (one.loglikelihood(requested, disable_tqdm=True) for one in both)
    for request, one, other in zip(requested, found, expected, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4), request.args
        assert one[1] == other[1]
    assert ours.prefix_token_id == theirs.prefix_token_id == 258


def test_whole_texts_are_as_likely_as_for_transformers(both):
    """Also those longer than the model's windows."""
    requested = requests(
        *[(counting(start, count),) for start, count in ((0, 1), (7, 9), (50, 40))]
    )
    found, expected = (one.loglikelihood_rolling(requested, disable_tqdm=True) for one in both)
    assert found == pytest.approx(expected, abs=1e-4 * 40)
    assert abs(found[2] - expected[2]) < 1e-3


def test_texts_are_written_as_by_transformers(both):
    settings = {"until": [","], "max_gen_toks": 12, "do_sample": False}
    longer = {"until": ["zzz"], "max_gen_toks": 15}
    prompts = ["1 and then", "3 and then", "12 and then 47, 13 and", "5"]
    requested = requests(*[(prompt, how) for prompt in prompts for how in (settings, longer)])
    found, expected = (one.generate_until(requested, disable_tqdm=True) for one in both)
    assert found == expected
    assert any(found)


def test_a_generation_setting_that_is_not_known_is_refused(both):
    ours, _ = both
    with pytest.raises(UserError, match="num_beams=4"):
        ours.generate_until(requests(("1", {"until": [], "num_beams": 4})))


def test_a_continuation_longer_than_the_windows_is_refused(both):
    ours, _ = both
    with pytest.raises(UserError, match="max_length=32"):
        ours.loglikelihood(requests(("a", "1 " * 40)), disable_tqdm=True)


def test_the_harness_itself_has_the_same_results(both, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    write_harness_task(tmp_path)
    results = []
    for model in both:
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = lm_eval.simple_evaluate(model=model, tasks=["squares"], task_manager=manager)
        results.append(found["results"]["squares"])
    assert results[0] == results[1]
