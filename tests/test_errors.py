"""Every message for a user's error is `<option>=<value>: <rule>. <what to do>.`"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from zoo.errors import FORM, UserError, below, choose, refuse, refuse_path

ROOT = Path(__file__).parents[1]
# ValueErrors that name a value and become no line of their own.
INSIDE = {
    "zoo/data/tokenizers.py": 1,  # ends with what _first_change says
    "zoo/runs/record.py": 4,  # in the brackets of "is damaged (..)"
}

# Calls whose line is not written in place, by file: each passes on one that has the form.
PASSED_ON: dict[str, int] = {
    "zoo/cli/recipe.py": 1,  # that of a stage, which it names
    "zoo/cli/chat.py": 1,  # the configuration's, under the program's short names
    "zoo/cli/shrink.py": 1,  # an option's, as it was written
    "zoo/config/validate.py": 2,  # made of pydantic's error
    "zoo/data/loader.py": 1,  # a worker's, without its traceback
    "zoo/data/store.py": 1,  # a tokenizer's, with the document it fails on
    "zoo/data/synthetic.py": 1,  # a task's, whose length is seq_len to the user
    "zoo/runs/folder.py": 1,  # a ValueError of the configuration, found at the first step
    "zoo/tasks/evaluate.py": 1,  # the reason of the only row
    "zoo/config/measurable.py": 2,  # sentences of its own, which are reasons of rows too
}


def skeleton(node: ast.expr) -> str | None:
    """A message with {} for what is filled in; None where it is not written in place."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return f"{skeleton(left) or '{}'}{skeleton(right) or '{}'}"
    return None


def by_hand(file: Path) -> Iterator[str]:
    """The messages of `UserError(...)` in a file that are not seen to have the form."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "UserError":
            if node.args and getattr(getattr(node.args[0], "func", None), "id", "") == "sentence":
                continue
            text = skeleton(node.args[0]) if node.args else None
            if text is None or not FORM.fullmatch(text):
                yield f"{file.relative_to(ROOT)}:{node.lineno}: {text}"


def test_user_errors_are_written_in_their_form():
    sources = [*ROOT.glob("zoo/**/*.py"), ROOT / "train.py", ROOT / "eval.py"]
    wrong = {}
    for file in sources:
        found = [*by_hand(file)] if file.name != "errors.py" else []
        if len(found) != PASSED_ON.get(str(file.relative_to(ROOT)), 0):
            wrong[str(file.relative_to(ROOT))] = found
    assert wrong == {}, "use zoo.errors.refuse or refuse_path"


def test_arguments_that_any_part_refuses_are_reported_in_the_same_form():
    """Whoever builds them puts the option's path in front."""
    wrong = {}
    for file in sorted(ROOT.glob("zoo/**/*.py")):
        found = []
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "ValueError":
                text = (skeleton(node.args[0]) if node.args else None) or ""
                if "=" in text and not FORM.fullmatch(text):
                    found.append(f"{node.lineno}: {text}")
        name = str(file.relative_to(ROOT))
        if len(found) != INSIDE.get(name, 0):
            wrong[name] = found
    assert wrong == {}


@pytest.mark.parametrize(
    "text",
    [
        "seq_len=0: must be at least 1.",
        "model=mmaba: unknown model. Did you mean 'mamba'? Use one of: aft, mamba.",
        "runs/x/run.json: is damaged (it ends early). Restore it, or train a new run.",
    ],
)
def test_the_form_holds_for(text):
    assert FORM.fullmatch(text)


@pytest.mark.parametrize(
    "text",
    [
        "seq_len=0: must be at least 1",
        "seq_len=0 must be at least 1.",
        "seq_len=0: is no good.",
        "window=4: takes none: leave it out.",
        "unknown model 'mmaba': Did you mean 'mamba'? Use one of: aft, mamba.",
    ],
)
def test_the_form_does_not_hold_for(text):
    assert not FORM.fullmatch(text)


def test_refusals_put_option_value_rule_and_advice_together():
    with pytest.raises(UserError) as error:
        refuse("sharing", None, "must be none, headwise or kv")
    assert str(error.value) == "sharing=null: must be none, headwise or kv."
    assert str(below("model.mixer", error.value)).startswith("model.mixer.sharing=null: must")
    with pytest.raises(UserError, match=r"^a: is damaged\. Restore it\.$"):
        refuse_path(Path("a"), "is damaged.", "Restore it")
    with pytest.raises(UserError, match=r"^lr=\[1,2\.5,true\]: is a list\. Give a number\.$"):
        refuse("lr", [1.0, 2.5, True], "is a list", "Give a number")
    with pytest.raises(AssertionError, match="what to do"):
        refuse("lr", 1, "is too large")


def test_names_are_chosen_from_a_list_or_refused_with_the_nearest():
    assert choose("model.kernel", "relu", ["relu", "gelu"]) == "relu"
    with pytest.raises(UserError) as error:
        choose("model.kernel", "rleu", ["relu", "gelu"])
    message = "model.kernel=rleu: unknown kernel. Did you mean 'relu'? Use one of: relu, gelu."
    assert str(error.value) == message
