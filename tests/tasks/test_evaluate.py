"""The driver: every run keeps its place, nothing known is measured twice, rows say who and how."""

import io
import json
import math
import re

import pytest
import torch
from building import ROOT
from fakes import Remembers, make_context, random_text, text_corpus, text_store

import zoo.tasks.evaluate
import zoo.tasks.measured_run
from zoo.config.compose import compose
from zoo.errors import FORM, UserError
from zoo.measurement import question
from zoo.model.audit import Audit
from zoo.report import published
from zoo.report.published import unpack
from zoo.report.rows import gather
from zoo.runs.folder import RunFolder
from zoo.tasks.context import Outcome
from zoo.tasks.evaluate import evaluate
from zoo.tasks.known import all_known
from zoo.tasks.leaks import Leaks
from zoo.tasks.measured_run import MeasuredRun
from zoo.tasks.perplexity import Perplexity
from zoo.tasks.progress import Progress

TASKS = sorted(
    path.stem
    for path in (ROOT / "configs/task").glob("*.yaml")
    if (ROOT / f"zoo/tasks/{path.stem}.py").is_file()
)
REQUIRED = {"longrope": ["task.longrope.factor=8"]}  # options without a default
CORPUS = text_corpus(text_store(random_text(2000)))
IDENTITY = {
    *("task", "run", "arm", "model", "size", "seed", "extension", "extension_factor"),
    *(
        "extension_settings",
        "parameters",
        "flops_per_token",
        "train_length",
        "train_tokens",
        "train_steps",
        "lr",
    ),
    *("match", "state_passing", "data", "fingerprint", "tokenizer", "commit", "device", "dtype"),
    *("threads", "status", "reason", "seconds", "time"),
}
SMALL = ["run=any", "task=perplexity", "report=null"]
PERPLEXITY = ["task.perplexity.lengths=[32,64]", "task.perplexity.units=4"]


@pytest.fixture
def model(monkeypatch) -> Remembers:
    """What every run's checkpoint holds."""
    model = Remembers(memory=5)
    monkeypatch.setattr(zoo.tasks.measured_run, "load", lambda folder, *_: model)
    monkeypatch.setattr(zoo.tasks.measured_run, "open_data", lambda data, seq_len: CORPUS)
    return model


def run_folder(path, *words: str, **info) -> RunFolder:
    config = compose("train", ["size=tiny", "seq_len=32", *words])
    done = {
        "status": "done",
        "step": 300,
        "tokens_seen": 9600,
        "parameters": 1552,
        "commit": "c0ffee",
    }
    about = {"fingerprint": CORPUS.fingerprint, "tokenizer": "bytes", "flops_per_token": 1e4}
    return RunFolder.create(path, config, done | about | info)


def run_eval(folders, *words: str, fresh: bool = False) -> tuple[int, str, list[dict]]:
    """The exit code, what was said, and all rows of the folders."""
    mirrored = f"runs={folders[0].path.parent}"
    alone = {"task=passkey", "task=stream", "task=generate"} & {*words}
    small = SMALL if alone else SMALL + PERPLEXITY
    options = {word.split("=")[0]: word for word in (*small, mirrored, *words)}
    said: list[str] = []
    config = compose("eval", list(options.values()))
    code = evaluate(config, folders, say=said.append, progress=Progress(), fresh=fresh)
    return code, "\n".join(said), [row for folder in folders for row in folder.rows()]


def test_every_row_says_who_was_measured_and_how(model, tmp_path):
    folder = run_folder(tmp_path / "a", "seed=3", "optim.lr=0.002")
    code, said, rows = run_eval([folder])
    assert code == 0
    assert rows
    for row in rows:
        assert row.keys() >= IDENTITY
        assert (row["run"], row["arm"], row["task"]) == ("a", "transformer", "perplexity")
        assert (row["seed"], row["lr"], row["train_steps"]) == (3, 0.002, 300)
        assert (row["device"], row["dtype"], row["status"]) == ("cpu", "float32", "ok")
        assert (folder.path / row["positions_file"]).is_file()
    assert "transformer" in said


def test_wandbs_files_are_beside_the_runs_wherever_they_are(model, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(zoo.tasks.evaluate, "mirror", lambda *given, **_: found.append(given[2]))
    one, two = (run_folder(tmp_path / place / "a") for place in ("here", "there"))
    words = [f"runs={tmp_path / 'runs'}", "logger=wandb"]
    run_eval([one], *words)
    run_eval([one, two], *words)  # which have no folder in common
    assert found == [tmp_path / "here", tmp_path / "runs"]


def test_what_is_known_is_reused_and_reported(model, tmp_path):
    folder = run_folder(tmp_path / "a")
    _, first, rows = run_eval([folder])
    read = model.read
    code, second, again = run_eval([folder])
    assert code == 0
    assert model.read == read
    assert again == rows
    assert second == first
    run_eval([folder], fresh=True)
    assert model.read == 2 * read


def test_what_is_published_has_every_length_measured_so_far(model, tmp_path):
    folder, table = run_folder(tmp_path / "a"), tmp_path / "t.json"

    def lengths() -> set[int]:
        return {row["length"] for row in unpack(json.loads(table.read_text()))[0]}

    run_eval([folder], "task.perplexity.units=3", "task.perplexity.lengths=[128]")
    run_eval([folder])
    _, said, _ = run_eval([folder], "task.perplexity.lengths=[256]", f"publish={table}")
    assert lengths() == {32, 64, 256}  # not that of other settings
    run_eval([folder], "task.perplexity.lengths=[32]", f"publish={table}")
    assert lengths() == {32, 64, 256}
    _, said, _ = run_eval([folder], "task.perplexity.lengths=[32]")
    assert "256" not in said


def test_other_settings_or_another_checkpoint_are_measured_anew(model, tmp_path):
    folder = run_folder(tmp_path / "a")
    run_eval([folder])
    read = model.read
    run_eval([folder], "task.perplexity.stride=8")
    assert model.read > read
    read = model.read
    folder.update(step=400)
    _, _, rows = run_eval([folder], "task.perplexity.stride=8")
    assert model.read > read
    assert {row["train_steps"] for row in rows} == {400}


def test_rows_of_an_older_kind_are_measured_anew(model, tmp_path):
    folder = run_folder(tmp_path / "a")
    _, said, rows = run_eval([folder])
    fewer = [{k: v for k, v in row.items() if k not in ("documents", "unit_bits")} for row in rows]
    old = run_folder(tmp_path / "b")
    for row in fewer:
        old.append_row(row)
    code, again, found = run_eval([old])
    assert code == 0
    assert all(row["unit_bits"] for row in found)
    assert again == said


def test_a_failure_is_tried_again(model, tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "a")
    monkeypatch.setattr(model, "forward", lambda *_: 1 / 0)
    code, _, rows = run_eval([folder])
    assert code == 1
    (reason,) = {row["reason"] for row in rows}
    assert re.fullmatch(r"ZeroDivisionError: division by zero \(zoo/tasks/\w+.py:\d+\)", reason)
    monkeypatch.undo()
    monkeypatch.setattr(zoo.tasks.measured_run, "load", lambda folder, *_: model)
    monkeypatch.setattr(zoo.tasks.measured_run, "open_data", lambda data, seq_len: CORPUS)
    code, _, rows = run_eval([folder])
    assert code == 0
    assert {row["status"] for row in rows} == {"ok"}


def test_runs_that_cannot_be_measured_keep_their_place_and_the_others_go_on(
    model, tmp_path, monkeypatch
):
    def load(folder, *_):
        if folder.name == "gone":
            raise UserError(f"{folder.name}: has no checkpoint yet. Train it first.")
        return model

    monkeypatch.setattr(zoo.tasks.measured_run, "load", load)
    reported = []
    monkeypatch.setattr(
        zoo.tasks.evaluate, "write_report", lambda rows, *_: reported.extend(rows) or "table"
    )
    folders = [
        run_folder(tmp_path / "young", status="running", step=7),
        run_folder(tmp_path / "broken", status="failed", reason="loss is nan at step 9"),
        run_folder(tmp_path / "gone"),
        run_folder(tmp_path / "other", fingerprint="f" * 64),
        run_folder(tmp_path / "good", "model=mamba"),
    ]
    code, said, _ = run_eval(folders, f"report={tmp_path}/report.html")
    assert code == 1
    assert said == f"table\n\nreport: {tmp_path}/report.html"
    found = {row["run"]: (row["status"], row["reason"]) for row in reported}
    assert found["young"] == ("unfinished", "training is running at step 7")
    assert found["broken"] == ("failed", "loss is nan at step 9")
    assert found["gone"] == ("failed", "gone: has no checkpoint yet. Train it first.")
    assert found["other"][0] == "failed"
    assert "is not the text that the run was trained on" in found["other"][1]
    assert found["good"] == ("ok", None)


def test_nothing_measured_is_no_success(model, tmp_path):
    code, said, _ = run_eval([run_folder(tmp_path / "young", status="running")])
    assert code == 1
    assert said


def test_a_task_that_breaks_leaves_the_other_tasks_alone(model, tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.tasks.perplexity.evaluation_text", None)
    monkeypatch.setattr("zoo.tasks.perplexity.run_guarded", None)  # breaks outside any measurement
    monkeypatch.setattr(zoo.tasks.evaluate, "write_report", lambda rows, *_: json.dumps(rows))
    words = ["task=extrapolation", "task.speed.lengths=[16]", f"report={tmp_path}/report.html"]
    code, said, _ = run_eval([run_folder(tmp_path / "a")], *words)
    statuses = {row["task"]: row["status"] for row in json.loads(said.splitlines()[0])}
    assert code == 1
    assert statuses == {"perplexity": "failed", "speed": "ok"}


def test_settings_that_fit_no_run_stop_the_evaluation(model, tmp_path):
    folder = run_folder(tmp_path / "a")
    with pytest.raises(UserError, match=r"task\.perplexity\.protocols=.*Did you mean .blocks"):
        run_eval([folder], "task.perplexity.protocols=[block]")


@pytest.mark.parametrize("task", ["generate", "stream"])
def test_what_does_not_apply_to_the_only_run_is_refused_by_its_option(
    task, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(zoo.tasks.measured_run, "load", lambda *_: pytest.fail("was opened"))
    with pytest.raises(UserError, match=f"^task={task}: reads from left to right") as refused:
        run_eval(
            [run_folder(tmp_path / "a", "model=linformer", "objective=masked")], f"task={task}"
        )
    assert FORM.fullmatch(str(refused.value))


def test_an_extension_that_does_not_apply_stops_one_run_and_keeps_its_row_among_several(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(zoo.tasks.evaluate, "write_report", lambda rows, *_: json.dumps(rows))
    folders = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b")]
    with pytest.raises(UserError, match="extension=dca: acts on positions=alibi, rope"):
        run_eval(folders[:1], "extension=dca")
    _, said, _ = run_eval(folders, "extension=dca", f"report={tmp_path}/report.html")
    for row in json.loads(said.splitlines()[0]):
        assert row["status"] == "not_applicable"
        assert "extension=dca: acts on positions=alibi, rope" in row["reason"]


def test_the_report_has_the_same_questions_under_every_extension_measured_before(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(zoo.tasks.evaluate, "write_report", lambda rows, *_: json.dumps(rows))
    monkeypatch.setattr(zoo.tasks.measured_run, "extend", lambda model, *_: model)
    folder, report = run_folder(tmp_path / "a"), f"report={tmp_path}/report.html"

    def arms(*words: str) -> list[tuple[str, int]]:
        _, said, _ = run_eval([folder], report, *words)
        return sorted({(row["arm"], row["units"]) for row in json.loads(said.splitlines()[0])})

    assert arms() == [("transformer", 4)]
    both = [("transformer", 4), ("transformer + dca", 4)]
    assert arms("extension=dca") == both
    assert arms() == both
    assert arms("extension=pi", "extension.factor=2", "task.perplexity.units=2") == [
        ("transformer + pi x2", 2)
    ]


def test_the_report_has_the_latest_answers_of_tasks_that_were_not_measured_now(model, tmp_path):
    folder = run_folder(tmp_path / "a", "model=mamba")
    run_eval([folder], "task.perplexity.units=2", "task.perplexity.lengths=[32,64,128]")
    _, scores, _ = run_eval([folder])
    words = ["task=stream", "task.stream.tokens=100"]
    _, said, _ = run_eval([folder], *words)
    assert "no score measured yet" not in said
    assert "Streaming at 100 tokens" in said
    latest, shown = scores.splitlines()[3].split(), said.splitlines()
    (line,) = (one.split() for one in shown if one.split()[:3] == latest[:3])  # the same scores
    assert len(line) == len(latest) + 1  # and that of the length that only the earlier ones have
    (title,) = (i for i, one in enumerate(shown) if one.startswith("bits per byte by test length"))
    assert "128" in shown[title + 1]
    assert shown[0] == "Streaming at 100 tokens."  # what was requested comes first
    by_length = {row["length"]: row["units"] for row in all_known([folder])[0] if "units" in row}
    assert by_length == {32: 4, 64: 4, 128: 2}
    _, alone, _ = run_eval([run_folder(tmp_path / "b", "model=mamba")], *words)
    assert "bits per byte by test length" not in alone


def test_two_settings_of_one_extension_are_reported_as_two_arms(model, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo.tasks.measured_run, "extend", lambda model, *_: model)
    folder = run_folder(tmp_path / "a")
    yarn = ["extension=yarn", "extension.factor=8"]
    run_eval([folder], *yarn)
    _, said, _ = run_eval([folder], *yarn, "extension.scaling.beta_fast=16")
    assert "transformer + yarn x8 · beta_fast 16 *" in said
    assert "transformer + yarn x8 · beta_fast 32  " in said
    _, said, _ = run_eval([folder], "extension=dca", "extension.scaling=ntk", "extension.factor=4")
    assert "transformer + dca over ntk x4 *" in said


def test_a_run_trained_otherwise_is_no_seed_of_the_same_arm(model, tmp_path):
    folders = [
        run_folder(tmp_path / "a", "seed=0"),
        run_folder(tmp_path / "b", "seed=1", "optim.weight_decay=0.2"),
        run_folder(tmp_path / "c", "seed=2", "valid_every=7", "save_every=9"),
    ]
    _, said, _ = run_eval(folders)
    assert "transformer · weight_decay 0.1" in said
    assert "transformer · weight_decay 0.2" in said
    assert "valid_every" not in said


def test_runs_tuned_from_seeds_of_one_base_are_one_arm(model, tmp_path):
    tuned = []
    for seed in (0, 1):
        base = run_folder(tmp_path / f"base{seed}", f"seed={seed}")
        words = [f"seed={seed}", f"finetune={base}", "extension=pi", "extension.factor=2"]
        tuned.append(run_folder(tmp_path / f"tuned{seed}", *words))
    other = run_folder(tmp_path / "base2", "seed=2", "optim.lr=0.1")
    words = ["seed=2", f"finetune={other}", "extension=pi", "extension.factor=2"]
    tuned.append(run_folder(tmp_path / "tuned2", *words))
    _, said, _ = run_eval(tuned[:2])
    assert "transformer tuned with pi x2  " in said
    assert "·" not in said
    _, said, _ = run_eval(tuned)
    assert "transformer tuned with pi x2 · lr 0.1" in said


def test_answers_under_other_settings_of_a_task_are_kept_and_reused(model, tmp_path):
    folder = run_folder(tmp_path / "a")
    settings = [["task.passkey.candidates=3"], ["task.passkey.candidates=5"], []]
    settings += [["task.passkey.depths=2"], ["task.passkey.repeats=3"], ["task.passkey.seed=1"]]
    requested = ["task=passkey", "task.passkey.lengths=[128]", "task.passkey.repeats=2"]
    generator = torch.Generator().manual_seed(1)
    model.logits = torch.nn.Parameter(torch.randn(97, 256, generator=generator).double())

    def said() -> list[str]:
        every = [dict(w.split("=") for w in (*requested, *words)) for words in settings]
        return [run_eval([folder], *("=".join(w) for w in own.items()))[1] for own in every]

    first = said()
    read = model.read
    again = said()
    assert model.read == read
    assert again == first
    rows = [row for row in folder.rows() if row["status"] == "ok"]
    assert sorted({row["task.passkey.candidates"] for row in rows}) == [3, 5, 10]
    for row in folder.rows():
        if row["status"] == "ok":
            assert row["question"], row


def test_every_task_says_which_of_a_rows_fields_are_its_question(model, tmp_path):
    """What a row records and what older rows are read by is the same."""
    folder = run_folder(tmp_path / "a", "model=mamba")
    words = ["task=extrapolation", "task.speed.lengths=[16]"]
    words += ["task.perplexity.protocols=[half_tail,blocks,stride_tail,window_mean]"]
    words += ["task.perplexity.lengths=[16,32]", "task.perplexity.unit=64"]
    run_eval([folder], *words)
    run_eval([folder], "task=stream", "task.stream.tokens=100")
    rows = folder.rows()
    assert {row["task"] for row in rows} == {"perplexity", "speed", "stream"}
    settings = {"task.speed.decode_tokens", "task.speed.repeats", "task.perplexity.overlap"}
    for row in rows:
        before = {name: value for name, value in row.items() if name != "question"}
        earlier = {k for k, v in question(before).items() if v is not None} - {"windows"}
        assert earlier | settings == {"task", *row["question"]} | settings


@pytest.mark.parametrize("field", ["data", "seed", "fingerprint"])
def test_a_task_does_not_write_over_what_is_known_of_the_run(field, model, tmp_path, monkeypatch):
    before = Perplexity.questions
    named = lambda *words: [one | {field: "another"} for one in before(*words)]  # noqa: E731
    monkeypatch.setattr(Perplexity, "questions", named)
    folder = run_folder(tmp_path / "a")
    run_eval([folder], "task=perplexity")
    for row in folder.rows():
        assert row["status"] == "failed"
        assert row["reason"] == f"{field} of the task's rows is the run's own field"
        assert row[field] != "another"


class ReadsAhead(Remembers):
    """Knows each token that it is to predict, where the state is not empty or always."""

    def forward(self, tokens, state=None):
        found = super().forward(tokens, state)
        logits = found if state is None else found[0]
        ahead = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
        logits = logits + 9 * torch.nn.functional.one_hot(ahead, logits.shape[-1])
        return logits if state is None else (logits, found[1])


def test_a_model_that_leaks_is_never_scored_and_says_why(tmp_path, monkeypatch):
    held = {"good": Remembers(memory=5), "leaky": ReadsAhead(memory=5)}
    monkeypatch.setattr(zoo.tasks.measured_run, "load", lambda folder, *_: held[folder.name])
    monkeypatch.setattr(zoo.tasks.measured_run, "open_data", lambda data, seq_len: CORPUS)
    folders = [
        run_folder(tmp_path / "good", "model=alibi"),
        run_folder(tmp_path / "leaky", "model=mamba"),
    ]
    words = ["task=extrapolation", "task.speed.lengths=[16]"]
    code, said, rows = run_eval(folders, *words)
    assert code == 1
    good = [row for row in rows if row["run"] == "good"]
    assert {row["audit"] for row in good} == {None}
    assert all(row["audited"] == {"float64": 64} for row in good)
    leaks = [row for row in rows if row["run"] == "leaky"]
    assert {row["task"] for row in leaks} == {"perplexity", "speed"}
    for row in leaks:
        assert row["status"] == "leaks"
        assert row["reason"].startswith("it reads the future: ")
        assert row["audit"] == row["reason"]
        assert row["audited"] == {"float64": 64}
        assert "bits_per_byte" not in row
    assert "it reads the future" in said
    assert run_eval(folders, *words)[0] == 1  # the second time as well


def test_scores_from_before_the_leak_was_seen_are_not_shown(model, tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "a")
    _, _, rows = run_eval([folder])
    old = run_folder(tmp_path / "b")
    for row in rows:
        old.append_row(
            {k: v for k, v in row.items() if k not in ("audit", "audited")} | {"run": "b"}
        )
    monkeypatch.setattr(zoo.tasks.measured_run, "load", lambda folder, *_: ReadsAhead(memory=5))
    code, said, _ = run_eval([old])
    assert code == 1
    assert f"{rows[0]['bits_per_byte']:.3f}" not in said
    assert "it reads the future" in said


def test_what_was_audited_is_not_audited_again(model, tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "a")
    _, said, rows = run_eval([folder])
    monkeypatch.setattr("zoo.tasks.leaks.audit", None)
    assert run_eval([folder]) == (0, said, rows)


def test_rows_of_before_audits_were_recorded_are_audited_once_and_keep_their_scores(
    model, tmp_path, monkeypatch
):
    folder, old = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    _, said, rows = run_eval([folder])
    for row in rows:
        old.append_row({k: v for k, v in row.items() if k != "audited"} | {"run": "b"})
    shown, runs = all_known([old])
    assert {row["status"] for row in gather(shown, runs).rows} == {"not_audited"}
    code, again, renewed = run_eval([old])
    assert (code, again) == (0, said)
    assert [(row["audited"], row["time"]) for row in renewed] == [
        (row["audited"], row["time"]) for row in rows
    ]
    assert {row["status"] for row in gather(*all_known([old])).rows} == {"ok"}
    monkeypatch.setattr("zoo.tasks.leaks.audit", None)
    assert run_eval([old])[:2] == (0, said)


class ReadsFarAhead(Remembers):
    """Knows each token that it is to predict, of those after the first hundred."""

    def forward(self, tokens, state=None):
        found = super().forward(tokens, state)
        logits = found if state is None else found[0]
        ahead = torch.nn.functional.pad(tokens[:, 101:], (100, 1))[:, : tokens.shape[1]]
        hot = torch.nn.functional.one_hot(ahead, logits.shape[-1])
        far = torch.arange(tokens.shape[1])[:, None] >= 100
        logits = logits + 9 * hot * far
        return logits if state is None else (logits, found[1])


def test_a_leak_that_a_longer_audit_finds_withdraws_the_shorter_lengths(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo.tasks.measured_run, "load", lambda folder, *_: ReadsFarAhead(memory=5))
    monkeypatch.setattr(zoo.tasks.measured_run, "open_data", lambda data, seq_len: CORPUS)
    folder = run_folder(tmp_path / "a")
    assert run_eval([folder])[0] == 0
    far = ["task=perplexity", "task.perplexity.lengths=[32,256]", "task.perplexity.units=4"]
    assert run_eval([folder], *far)[0] == 1
    shown, _ = all_known([folder])
    assert [row["status"] for row in shown] == ["leaks"]  # of no later answer
    for words in ([], far):
        code, said, _ = run_eval([folder], *words)
        assert code == 1
        assert "it reads the future" in said


def test_a_longer_measurement_is_audited_further_but_no_further_than_can_be(
    model, tmp_path, monkeypatch
):
    requested, most = [], 10**6

    def audit(held, text, *, lengths, autocast):
        requested.append(lengths)
        read = tuple(min(n, most) for n in lengths)
        return Audit(ok=True, lengths=read, tokens={"float64": max(read)})

    monkeypatch.setattr("zoo.tasks.leaks.audit", audit)
    leaks = Leaks(make_context(Remembers(5), tmp_path, text_store(random_text(2000))))
    for n in (64, 64, 128, 32, 10**5):
        leaks.check([{"length": n}])
    assert requested == [(32, 64), (32, 128), (32, 4096)]
    requested.clear()
    most, leaks = 80, Leaks(leaks.context)
    for n in (64, 128, 256, 512):
        leaks.check([{"length": n}])
    assert requested == [(32, 64), (32, 128)]
    assert leaks.audited == {"float64": 80}


def test_a_model_that_cannot_be_audited_is_not_scored(model, tmp_path, monkeypatch):
    def breaks(*_, **__):
        raise MemoryError("too long")

    monkeypatch.setattr("zoo.tasks.leaks.audit", breaks)
    code, _, rows = run_eval([run_folder(tmp_path / "a")])
    assert code == 1
    reason = "it could not be audited for leaks: MemoryError: too long"
    assert {(row["status"], row["reason"]) for row in rows} == {("failed", reason)}
    assert {row["audited"] for row in rows} == {None}


def test_a_run_whose_training_leaked_is_not_scored(model, tmp_path):
    audit = {"ok": False, "reason": "it reads the future: ..."}
    folder = run_folder(tmp_path / "a", audit=audit)
    code, _, rows = run_eval([folder])
    assert code == 1
    assert {row["status"] for row in rows} == {"leaks"}
    assert rows[0]["audit"] == "trained with a leak: it reads the future: ..."
    folder.update(audit={"ok": True, "reason": None})
    assert run_eval([folder])[0] == 0


def test_the_report_takes_the_rows(model, tmp_path):
    folders = [
        run_folder(tmp_path / "a"),
        run_folder(tmp_path / "b", "model=mamba"),
        run_folder(tmp_path / "c", "model=alibi", status="failed", reason="loss is nan"),
    ]
    words = ["task=extrapolation", "task.speed.lengths=[16]", f"report={tmp_path}/out/report.html"]
    _, said, _ = run_eval(folders, *words)
    assert (tmp_path / "out/report.html").is_file()
    assert list((tmp_path / "out/report").glob("*.png"))
    other = f"report={tmp_path}/out/other.html"
    run_eval(folders, *words[:2], other)
    assert list((tmp_path / "out/other").glob("*.png"))
    for word in ("transformer", "mamba", "loss is nan"):
        assert word in said


def test_progress_says_how_fast_and_how_long():
    stream = io.StringIO()
    progress = Progress(stream)
    progress.run, progress.every = "a", 0.0
    progress.begin("perplexity at 512", 1000)
    progress.advance(250)
    assert stream.getvalue().startswith("a perplexity at 512: ")
    assert "tokens/s" in stream.getvalue()
    assert stream.getvalue().endswith("s left\n")
    progress.begin("many-shot", 8, "questions")
    progress.started -= 10
    progress.advance(2)
    assert stream.getvalue().splitlines()[-1] == "a many-shot: 0.2 questions/s, 30 s left"


def test_published_results_of_the_same_data_are_shown_beside_a_run(model, tmp_path, monkeypatch):
    theirs, mine = run_folder(tmp_path / "theirs"), run_folder(tmp_path / "mine")
    monkeypatch.setattr(published, "FOLDER", tmp_path / "published")
    with pytest.raises(UserError, match="against=published: no published table has the data"):
        run_eval([mine], "against=published")
    run_eval([theirs], f"publish={tmp_path}/published/table.json")
    code, said, _ = run_eval([mine], "against=published")
    assert code == 0
    assert "transformer (published table)" in said
    assert len(mine.rows()) == len(theirs.rows())  # theirs were not measured again, nor kept
    table = tmp_path / "published/table.json"
    run_eval([mine], f"publish={table}")
    assert {run["run"] for run in unpack(json.loads(table.read_text()))[1]} == {"theirs", "mine"}
    table.write_text('{"format":0,"runs":[]}')
    read = model.read
    with pytest.raises(UserError, match="is no published table"):
        run_eval([mine], f"publish={table}", fresh=True)
    assert model.read == read  # refused first


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("name", TASKS)
def test_a_quantity_that_is_no_finite_number_or_left_out_is_a_failure_of_any_task(
    model, tmp_path, monkeypatch, name, value
):
    words = [f"task={name}", *REQUIRED.get(name, ())]
    config = compose("eval", ["run=any", *words, "report=null", f"runs={tmp_path}"])
    part = config.task[name]
    cls = part.load().func if hasattr(part.load(), "func") else part.load()
    quantity = cls.declares.quantities[0]
    row = {each.field: 0 for each in cls.declares.quantities}
    row |= {**quantity.where, quantity.field: value}
    reason = f"no finite number: {quantity.name}"
    if value is None:
        del row[quantity.field]
        reason = f"the task left out {quantity.field}"
    monkeypatch.setattr(cls, "questions", lambda self, context: [{"length": 32}])
    monkeypatch.setattr(cls, "still_valid", lambda self, context: True)
    monkeypatch.setattr(cls, "check", lambda self: None)
    monkeypatch.setattr(cls, "check_model", lambda self, model: None)
    answer = Outcome(row, {"status": "ok", "reason": None, "seconds": 0.0})
    monkeypatch.setattr(cls, "answers", lambda self, context, wanted: [({"length": 32}, answer)])
    folder = run_folder(tmp_path / "a", *["data=parity"] * (cls.reads == "examples"))
    code = evaluate(config, [folder], say=lambda _: None, progress=Progress())
    (found,) = folder.rows()
    assert code == 1
    assert found["status"] == "failed"
    assert found["reason"] == reason


def test_a_task_that_refuses_one_run_leaves_the_others_and_stops_the_only_one(
    model, tmp_path, monkeypatch
):
    folders = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b")]
    questions = Perplexity.questions

    def refusing(self, context):
        if context.folder.name == "a":
            raise UserError("a: is of another kind. Measure another run.")
        return questions(self, context)

    monkeypatch.setattr(Perplexity, "questions", refusing)
    monkeypatch.setattr(zoo.tasks.evaluate, "write_report", lambda rows, *_: json.dumps(rows))
    code, said, rows = run_eval(folders, f"report={tmp_path}/report.html")
    assert code == 1
    assert {row["run"] for row in rows} == {"b"}
    refused = [row for row in json.loads(said.splitlines()[0]) if row["run"] == "a"]
    assert [(row["status"], row["reason"]) for row in refused] == [
        ("failed", "a: is of another kind. Measure another run.")
    ]
    with pytest.raises(UserError, match=r"^a: is of another kind"):
        run_eval(folders[:1])


@pytest.mark.parametrize(
    ("words", "info", "opens"),
    [([], {}, True), (["data=recall"], {}, False), ([], {"status": "stopped"}, False)],
)
def test_a_scorer_is_opened_for_runs_that_are_measured_alone(
    words, info, opens, tmp_path, monkeypatch
):
    opened = []
    monkeypatch.setattr(zoo.tasks.measured_run, "scorer_of", lambda *place: opened.append(place))
    folder, scorer = run_folder(tmp_path / "run", *words, **info), run_folder(tmp_path / "scorer")
    shortened = ["compress=llmlingua", "compress.rate=0.5", f"compress.by={scorer}"]
    config = compose("eval", [*SMALL, *shortened])
    MeasuredRun.open(config, folder, torch.device("cpu"), Progress(), "now")
    assert opened == [(str(scorer), "cpu")] * opens
