"""Every option of every task: refused in one line before anything is opened, or what it says."""

import functools
import math
from typing import Any

import pytest
import yaml
from fakes import Remembers, make_context, random_text, text_store

from zoo.config.compose import compose
from zoo.config.groups import CONFIGS
from zoo.data import synthetic
from zoo.data.examples import open_synthetic
from zoo.errors import UserError
from zoo.tasks.accuracy import Accuracy
from zoo.tasks.passkey import Passkey
from zoo.tasks.perplexity import Perplexity
from zoo.tasks.speed import Speed
from zoo.tasks.stream import Stream

SMALL: dict[type, dict[str, Any]] = {  # a measurement of milliseconds
    Accuracy: {"lengths": [4], "examples": 2, "chunk": 64},
    Passkey: {"lengths": [80], "depths": 2, "repeats": 1, "chunk": 64},
    Perplexity: {"lengths": [8], "units": 2, "chunk": 64},
    Speed: {"lengths": [4], "decode_tokens": 1, "repeats": 1},
    Stream: {"tokens": 8, "chunk": 64},
}
VALUES = (0, -1, 1, 10**18, math.nan, math.inf, -math.inf, 0.5, "text", None, [], True)


def name_of(task: type) -> str:
    return task.__module__.rpartition(".")[2]


def options(name: str) -> list[str]:
    tree = yaml.safe_load((CONFIGS / f"task/{name}.yaml").read_text(encoding="utf-8"))[name]
    return [option for option in tree if option != "_target_"]


CASES = [(task, option) for task in SMALL for option in options(name_of(task))]


@pytest.mark.parametrize(
    ("task", "option"), CASES, ids=lambda part: getattr(part, "__name__", part)
)
def test_a_value_is_refused_in_one_line_or_measured_as_it_says(task, option, tmp_path):
    text = text_store(random_text(400))
    data = {"data": open_synthetic("parity", functools.partial(synthetic.parity), 16)}
    model = Remembers(memory=3)
    context = make_context(model, tmp_path, text, **(data if task is Accuracy else {}))
    for value in VALUES:
        try:
            given = task(**{**SMALL[task], option: value})
            given.check()
        except UserError as error:
            message = str(error)
            assert message.startswith(f"task.{name_of(task)}.{option}="), message
            assert ": must be " in message, message
            assert "\n" not in message, message
        else:
            assert value in (1, None) or (option == "seed" and value == 0)
            assert getattr(given, option) == value
            for row in given.rows(context):
                assert row["status"] == "ok" or row["reason"], row


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("accuracy lengths=[]", "must be one or more"),
        ("accuracy seed=4294967296", "must be an integer from 0 to 4294967295"),
        ("passkey candidates=1", "must be an integer from 2 to 10000"),
        ("passkey seed=4294967296", "must be an integer from 0 to 4294967295"),
        ("perplexity protocols=[block]", "Did you mean"),
        ("longrope factor=1", "must be a number > 1"),
        ("stream tokens=0", "must be an integer from 1"),
    ],
)
def test_the_program_refuses_before_a_model_is_opened(words, said):
    task, option = words.split()
    with pytest.raises(UserError) as refused:
        compose("eval", ["run=any", f"task={task}", f"task.{task}.{option}"])
    assert str(refused.value).startswith(f"task.{task}.{option.split('=')[0]}=")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "task",
    [
        Accuracy(lengths=[10**9]),
        Passkey(lengths=[10**10], repeats=1000),
        Perplexity(lengths=[10**11]),
        Speed(lengths=[10**12]),
    ],
)
def test_texts_larger_than_the_machines_memory_are_refused_with_the_numbers(task):
    with pytest.raises(UserError, match=r"lengths=1\d+: .* GiB, more than the machine's"):
        task.check()
