"""Parts that a configuration names: what cannot be imported is one line that says where."""

import sys

import pytest

import zoo.tasks
from zoo.config import introspect
from zoo.config.schema.sections import TaskPart
from zoo.errors import FORM, UserError

BROKEN = {
    "from zoo.errors import NoSuchError": "ImportError: cannot import name 'NoSuchError'",
    "import no_such_package": "ModuleNotFoundError: No module named 'no_such_package'",
    "settings = undefined": "NameError: name 'undefined' is not defined",
    "x = (": "'(' was never closed",
}


@pytest.mark.parametrize(("line", "said"), BROKEN.items())
def test_a_file_that_cannot_be_imported_is_one_line(line, said, tmp_path, monkeypatch):
    folder = tmp_path / "zoo/tasks"
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text(f"{line}\nclass Mine:\n    def __init__(self): ...\n")
    monkeypatch.setattr(zoo.tasks, "__path__", [*zoo.tasks.__path__, str(folder)])
    monkeypatch.setattr(introspect, "ROOT", tmp_path)
    try:
        with pytest.raises(UserError) as refused:
            TaskPart.model_validate({"_target_": "zoo.tasks.mine.Mine"}).load()
    finally:
        sys.modules.pop("zoo.tasks.mine", None)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert FORM.fullmatch(str(refused.value))
