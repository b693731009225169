"""`zoo report` draws a published table from its rows alone."""

import pytest

from zoo.cli.report import OPTIONS, main
from zoo.report import published


def table(folder):
    about = {"run": "a", "arm": "lstm", "model": "lstm", "task": "accuracy", "status": "ok"}
    about["audited"] = {"float32": 64}
    rows = [about | {"length": n, "accuracy": 0.75, "seed": 0} for n in (16, 64)]
    runs = [{"run": "a", "arm": "lstm", "status": "done", "commit": "c"}]
    text = published.text(published.pack("state_tracking", rows, runs))
    (folder / "state_tracking.json").write_text(text)


def test_a_table_is_drawn_again_from_its_file(tmp_path, monkeypatch, capsys):
    table(tmp_path)
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    assert main([]) == 0
    assert "zoo tune experiment=state_tracking (" in capsys.readouterr().out
    assert main(["state_tracking", f"report={tmp_path}/page.html"]) == 0
    assert "lstm" in (tmp_path / "page.html").read_text()
    said = capsys.readouterr().out
    assert "0.75" in said
    assert f"report: {tmp_path}/page.html" in said
    assert main(["state_tracking", f"report={tmp_path}"]) == 2  # a folder
    assert f"report={tmp_path}: cannot be written" in capsys.readouterr().err
    assert main([str(tmp_path / "state_tracking.json"), f"report={tmp_path}/again.html"]) == 0


def test_a_report_replaces_a_report_and_no_other_file(tmp_path, monkeypatch, capfd):
    table(tmp_path)
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    page = tmp_path / "page.html"
    page.write_text("<html>mine</html>")
    assert main(["state_tracking", f"report={page}"]) == 2
    assert f"report={page}: is there already and is no report." in capfd.readouterr().err
    assert page.read_text() == "<html>mine</html>"
    page.unlink()
    for _ in range(2):
        assert main(["state_tracking", f"report={page}"]) == 0
        assert f"report: {page}" in capfd.readouterr().out


def test_an_unknown_table_is_refused_in_one_line(tmp_path, monkeypatch, capfd):
    table(tmp_path)
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    assert main(["state_trackin"]) == 2
    assert "Did you mean 'state_tracking'" in capfd.readouterr().err
    assert main(["a", "b"]) == 2
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["wandb=lab/lengths"],
            "wandb=lab/lengths: needs the runs to compare. Give run=<pattern>.",
        ),
        (["run=none/*", "wandb=lab"], "wandb=lab: must be <entity>/<project>."),
        (["run=none/*"], "run=none/*: no run folder matches."),
        (["html=x.html"], "zoo report: html=x.html: unknown option."),
        (["state_tracking", "run=x"], "must be one table or run="),
        (["report=a.html", "report=b.html"], "Give each option once"),
        (["run=a", "runs=gone"], "runs=gone: must be a folder that is there."),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(words, said, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_run_folders_hold_is_drawn_without_measuring(tmp_path, monkeypatch, capsys):
    rows = [{"run": "a", "arm": "lstm", "model": "lstm", "task": "accuracy", "status": "ok"}]
    rows = [rows[0] | {"length": n, "accuracy": 0.75, "seed": 0} for n in (16, 64)]
    monkeypatch.setattr("zoo.cli.report.find_distinct_runs", lambda pattern, _: [pattern])
    monkeypatch.setattr("zoo.tasks.known.all_known", lambda folders: (rows, []))
    assert main(["run=runs/*", f"report={tmp_path}/page.html"]) == 0
    assert "lstm" in (tmp_path / "page.html").read_text()
    monkeypatch.setattr("zoo.tasks.known.all_known", lambda folders: ([], []))
    assert main(["run=runs/*"]) == 2


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("words", ["", "state_tracking", "run=a"])
def test_every_option_acts_or_is_refused_by_name(words, option, tmp_path, monkeypatch, capfd):
    table(tmp_path)
    (tmp_path / "others").mkdir()
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    monkeypatch.setattr("zoo.cli.report.find_distinct_runs", lambda *place: place)
    monkeypatch.setattr("zoo.tasks.known.all_known", lambda place: ([{}], [str(place)]))
    monkeypatch.setattr("zoo.report.write_report", lambda _, runs, page: f"{page} of {runs}")
    monkeypatch.chdir(tmp_path)
    value = {"run": "b", "report": "b.html", "wandb": "lab", "runs": "others"}[option]
    given = [word for word in words.split() if not word.startswith(f"{option}=")]
    assert main(words.split()) == 0
    plain = capfd.readouterr().out
    code, printed = main([*given, f"{option}={value}"]), capfd.readouterr()
    if code:
        assert f"{option}={value}: " in printed.err
    else:
        assert printed.out != plain
