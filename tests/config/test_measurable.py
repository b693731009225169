"""Options of eval.py that contradict one another are refused before torch is imported."""

import pytest
from building import ARCHITECTURES, train_config

from zoo.config.compose import compose
from zoo.config.groups import choices
from zoo.config.measurable import check_measurable, unmeasurable
from zoo.errors import FORM, UserError
from zoo.model.build import build_model
from zoo.model.extend import rotary_positions

RUNS = {
    "text": train_config("size=tiny"),
    "examples": train_config("data=parity", "size=tiny"),
    "both ways": train_config("model=linformer", "objective=masked", "size=tiny"),
}
SHORTER = compose("eval", ["run=any", "compress=truncation", "compress.rate=0.5"]).compress
REQUIRED = {"longrope": ["task.longrope.factor=8"]}


@pytest.mark.parametrize("task", choices("task"))
def test_a_task_is_refused_where_its_class_does_not_declare_it(task):
    words = ["run=any", f"task={task}", *REQUIRED.get(task, [])]
    config = compose("eval", words)
    classes = [part.load().func for part in config.task.values()]
    together = config.model_copy(update={"sequence_parallel": 2})
    shorter = config.model_copy(update={"compress": SHORTER})
    cases = [
        (config, "text", [one.reads != "examples" for one in classes]),
        (config, "examples", [one.reads != "text" for one in classes]),
        (config, "both ways", [one.both_ways and one.reads != "examples" for one in classes]),
        (shorter, "text", [one.compresses for one in classes]),
        (together, "text", [one.reads_together for one in classes]),
    ]
    for case, run, fits in cases:
        reasons = [unmeasurable(name, case, RUNS[run]) for name in case.task]
        assert [not why for why in reasons] == fits, (run, reasons)
        if all(fits) or (any(fits) and case is not together):  # of several tasks one is enough
            check_measurable(case, [RUNS[run]])
            continue
        for runs in ([run], [run, run]):
            with pytest.raises(UserError) as refused:
                check_measurable(case, [RUNS[one] for one in runs])
            assert FORM.fullmatch(str(refused.value)), refused.value
    check_measurable(config, [*RUNS.values()])  # each task measures one of them


def test_runs_that_cannot_be_opened_are_left_to_their_rows():
    check_measurable(compose("eval", ["run=any", "task=accuracy"]), [])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_frequencies_are_searched_of_models_that_have_some_which_a_scaling_acts_on(name):
    config = compose("eval", ["run=any", "task=longrope", *REQUIRED["longrope"]])
    trained = train_config(f"model={name}", "size=tiny", "size.layers=8", "match=none")
    ropes = rotary_positions(build_model(trained, 8)[0])
    scaled = any("zoo.positions.scaling" in rope.scaled_by for rope in ropes)
    why = unmeasurable("longrope", config, trained)
    assert bool(why) == (not scaled)
    assert not why or FORM.fullmatch(why)
    extended = compose("eval", ["run=any", "task=longrope", "extension=dca", *REQUIRED["longrope"]])
    assert unmeasurable("longrope", extended, trained)
