"""The run folder survives kills, full disks and what was altered in it."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from building import files_below, write_checkpoint

import zoo
import zoo.runs.files
import zoo.runs.folder
from zoo.__main__ import main
from zoo.config.compose import compose
from zoo.errors import UserError
from zoo.runs import checkpoints
from zoo.runs.claim import claim
from zoo.runs.files import CHECKED, one_line, replacing
from zoo.runs.find import find_runs
from zoo.runs.folder import RunFolder


@pytest.fixture(scope="module")
def config():
    return compose("train", ["size=tiny", "logger=none"])


@pytest.fixture
def folder(tmp_path, config) -> RunFolder:
    return RunFolder.create(tmp_path / "run", config, {"commit": "abc"})


class Killed(BaseException):
    """What kill -9 looks like from inside: nothing after it happens."""


def kill(*_: object) -> None:
    raise Killed


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_holds_its_configuration_and_status(folder, config):
    assert folder.config == config
    assert folder.info == {
        **{"status": "running", "reason": None, "step": 0, "tokens_seen": 0},
        "commit": "abc",
    }
    folder.update(step=5)
    assert RunFolder.open(folder.path).info["step"] == 5


def test_a_folder_appears_whole_or_not_at_all(tmp_path, config, monkeypatch):
    monkeypatch.setattr(zoo.runs.folder.os, "rename", kill)
    with pytest.raises(Killed):
        RunFolder.create(tmp_path / "run", config, {})
    assert not (tmp_path / "run").exists()


def test_who_comes_second_gets_the_first_ones_folder(folder, config):
    again = RunFolder.create(folder.path, config, {"commit": "other"})
    assert again.info["commit"] == "abc"
    assert not again.created
    assert os.listdir(folder.path.parent) == ["run"]


def test_a_kill_while_writing_leaves_the_last_state(folder, monkeypatch):
    folder.update(step=1)
    with monkeypatch.context() as patch:
        patch.setattr(zoo.runs.files.os, "replace", kill)
        with pytest.raises(Killed):
            folder.update(step=2)
    assert folder.info["step"] == 1
    (folder.path / ".run.json.1.tmp").touch()
    with folder.lock():  # the next process cleans up
        assert not list(folder.path.rglob("*.tmp"))


def test_a_real_kill_at_any_moment_leaves_a_readable_folder(folder):
    loop = (
        "import sys; from pathlib import Path; from zoo.runs.folder import RunFolder\n"
        "folder, step = RunFolder(Path(sys.argv[1])), 0\n"
        "metrics = folder.metrics(['loss'])\n"
        "while step := step + 1:\n"
        "    folder.update(step=step, filling='x' * 20000)\n"
        "    metrics.write({'step': step, 'loss': 0.5})\n"
        "    folder.append_row({'length': step})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", loop, str(folder.path)])
    deadline = time.monotonic() + 20
    while not folder.info["step"] and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = RunFolder.open(folder.path).info["step"]
    assert step > 0
    assert step - 1 <= len(folder.rows()) <= step
    folder.metrics(["loss"], step=step)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_is_reported_and_leaves_what_was_there(folder, monkeypatch, failing):
    before = files_below(folder.path), folder.info
    monkeypatch.setattr(zoo.runs.files.os, failing, full_disk)
    with pytest.raises(UserError, match=r"run\.json: cannot be written \(No space"):
        folder.update(step=9)
    assert (files_below(folder.path), folder.info) == before
    with pytest.raises(UserError, match="No space left"):  # however a library wraps it
        save_through_a_library(folder.path / "checkpoints" / "last.ckpt")
    assert files_below(folder.path) == before[0]


def save_through_a_library(path: Path) -> None:
    with replacing(path):
        try:
            full_disk()
        except OSError:
            raise RuntimeError("unexpected position in file") from None


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_that_is_not_the_disks_passes_and_leaves_no_draft(folder, error):
    with pytest.raises(error), replacing(folder.path / "run.json"):
        raise error
    assert folder.info["commit"] == "abc"
    assert not list(folder.path.rglob("*.tmp"))


def test_only_one_process_trains_in_a_folder(folder):
    with folder.lock():
        message = f"already being trained by process {os.getpid()}"
        with pytest.raises(UserError, match=message), folder.lock():
            pass
    with folder.lock():
        pass


@pytest.mark.parametrize("failing", ["write", "mkdir"])
def test_a_folder_that_cannot_be_held_is_reported(folder, monkeypatch, failing):
    (folder.path / "checkpoints").rmdir()
    monkeypatch.setattr(os, failing, full_disk)
    said = r"run: cannot be written \(No space left on device\)\. Free some space"
    with pytest.raises(UserError, match=said), folder.lock():
        pass


def test_who_comes_second_with_other_options_is_refused(tmp_path, config, monkeypatch):
    """Both have seen no folder of that name."""
    own, create = config.model_copy(update={"name": "x", "runs": str(tmp_path)}), RunFolder.create
    other = own.model_copy(update={"seed": 1})

    def second(path, config, info):
        create(path, other, info)
        return create(path, config, info)

    monkeypatch.setattr(RunFolder, "create", second)
    with pytest.raises(UserError, match="holds another run, which differs in seed"):
        claim(own)


def flip(path: Path) -> None:
    """One wrong bit in the middle, as a bad disk leaves it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, cut, empty])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(folder, damage, caplog):
    assert folder.checkpoint() is None
    older, newer = (
        write_checkpoint(folder, "step=00000900.ckpt"),
        write_checkpoint(folder, "step=00001000.ckpt"),
    )
    assert folder.checkpoint() == newer
    last = write_checkpoint(folder, "last.ckpt")
    assert folder.checkpoint() == last
    damage(last)
    damage(newer)
    assert folder.checkpoint() == older
    assert "last.ckpt, step=00001000.ckpt damaged" in caplog.text
    damage(older)
    with pytest.raises(UserError, match=r"no whole checkpoint \(last\.ckpt, "):
        folder.checkpoint()


def test_of_the_same_measurement_the_last_row_counts(folder):
    rows = [
        {"task": "perplexity", "protocol": "blocks", "length": 512, "status": "failed"},
        {"task": "perplexity", "protocol": "blocks", "length": 1024, "status": "ok"},
        {"task": "perplexity", "protocol": "stride_tail", "length": 512, "status": "ok"},
        {"task": "perplexity", "protocol": "blocks", "length": 512, "status": "ok"},
    ]
    assert folder.rows() == []
    for row in rows:
        folder.append_row(row)
    assert sorted(map(str, folder.rows())) == sorted(map(str, rows[1:]))


def test_a_row_cut_by_a_kill_does_not_spoil_the_next(folder, caplog):
    folder.append_row({"length": 1})
    with open(folder.path / "results.jsonl", "a") as file:
        file.write('{"length": 2, "sta')
    folder.append_row({"length": 3})
    assert [row["length"] for row in folder.rows()] == [1, 3]
    assert "line 2 was not written whole" in caplog.text


def test_metrics_after_the_checkpoint_are_forgotten(folder):
    metrics = folder.metrics(["loss", "valid"])
    for step in (1, 2, 3, 4):
        metrics.write({"step": step, "loss": step / 2})
    with open(folder.path / "metrics.csv", "a") as file:
        file.write("5,0.")  # a kill
    folder.metrics(["loss", "valid", "more"], step=2).write({"step": 3, "valid": 7, "more": 1})
    text = (folder.path / "metrics.csv").read_text()
    assert text == "step,loss,valid,more\n1,0.5,,\n2,1.0,,\n3,,7,1\n"
    with pytest.raises(ValueError, match="lost"):
        metrics.write({"step": 9, "lost": 1})


def test_runs_are_found_by_path_by_name_and_by_pattern(tmp_path, config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a"):
        RunFolder.create(Path("runs") / name, config, {})
    Path("runs/notes").mkdir()

    def names(*patterns: str) -> list[str]:
        return [folder.name for folder in find_runs(patterns, "runs")]

    assert names("runs/*") == ["a", "b"]
    assert names("b") == names("runs/b") == names(str(tmp_path / "runs/b")) == ["b"]
    assert names("b", "*") == ["b", "a"]
    with pytest.raises(UserError, match="notes: is not a run folder"):
        names("notes")
    with pytest.raises(UserError, match=r"run=c\*: no run folder matches"):
        names("c*")


@pytest.mark.parametrize("reads", ["eval", "report", "rankings", "zoo.write_report"])
def test_two_runs_of_one_name_pass_for_no_two_seeds(reads, tmp_path, config, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for place in ("runs/one/a", "runs/two/a", "runs/two/b"):
        RunFolder.create(Path(place), config, {})
    if reads == "zoo.write_report":
        with pytest.raises(UserError) as caught:
            zoo.write_report(["runs/one/a", "runs/two/*"])
        said = f"{caught.value}\n"
    else:
        assert main([reads, "run=runs/*/a"]) == 2
        said = capfd.readouterr().err
    assert "finds two runs named a: runs/one/a and runs/two/a. Name one of them." in said
    assert said.count("\n") == 1


def test_errors_are_one_line():
    assert one_line(UserError("a\n  b")) == "a b"
    assert one_line(ValueError("bad width")) == "bad width"
    assert one_line(RuntimeError("lost")) == "RuntimeError: lost"
    assert one_line(OSError(errno.EROFS, "Read-only file system", "/x")) == (
        "/x: Read-only file system"
    )


def test_what_a_killed_creation_left_goes_with_the_next(tmp_path, config, monkeypatch):
    def die(path, _):
        os.rename(path, str(path).replace(f".{os.getpid()}.tmp", ".999999999.tmp"))
        raise Killed

    real = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(zoo.runs.folder.os, "rename", lambda *given: (patch.undo(), die(*given)))
        with pytest.raises(Killed):
            RunFolder.create(tmp_path / "run", config, {})
    assert zoo.runs.folder.os.rename is real
    (tmp_path / f".alive.{os.getpid()}.tmp").mkdir()
    (tmp_path / ".elsewhere.another-host.999999999.tmp").mkdir()
    RunFolder.create(tmp_path / "next", config, {})
    left = {".elsewhere.another-host.999999999.tmp", f".alive.{os.getpid()}.tmp", "next"}
    assert set(os.listdir(tmp_path)) == left


BAD_INFO = {
    "no step": {"step": ...},
    "text for a step": {"step": "seven"},
    "a step below 0": {"step": -1},
    "a step that is no whole number": {"step": 1.5},
    "truth for a step": {"step": True},
    "no status": {"status": ...},
    "another status": {"status": "finished"},
    "a list for a status": {"status": []},
    "text for tokens": {"tokens_seen": "many"},
    "a number for a fingerprint": {"fingerprint": 7},
}


@pytest.mark.parametrize("case", BAD_INFO)
def test_a_record_with_a_field_of_another_kind_is_damaged(folder, case):
    file = folder.path / "run.json"
    changed = {**json.loads(file.read_text()), **BAD_INFO[case]}
    file.write_text(json.dumps({k: v for k, v in changed.items() if v is not ...}))
    with pytest.raises(UserError, match=r"run\.json: is damaged \(\w+='?.* must be") as caught:
        RunFolder.open(folder.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\xff\xfe", b"7", b"[]", b"[" * 100_000, b"{a: " * 3000, b"a: &b *b"]
)
def test_a_record_that_is_none_is_one_line(folder, name, content):
    (folder.path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: is damaged") as caught:
        RunFolder.open(folder.path)
    assert len(str(caught.value)) < 600


def test_another_value_in_the_configuration_is_reported(folder, config):
    file = folder.path / "config.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(UserError, match=r"config\.yaml: was altered since the run began") as caught:
        RunFolder.open(folder.path)
    assert "delete its first line" in str(caught.value)
    file.write_text(file.read_text().partition("\n")[2])
    assert RunFolder.open(folder.path).config.seed == 1


def test_another_value_in_the_record_is_reported(folder, caplog):
    folder.update(step=100)
    RunFolder.open(folder.path)
    assert not caplog.text
    file = folder.path / "run.json"
    file.write_text(file.read_text().replace('"step": 100', '"step": 190'))
    assert RunFolder.open(folder.path).info["step"] == 190
    assert "run.json was altered since it was written" in caplog.text


def test_another_runs_files_are_reported(tmp_path, config):
    one, other = (
        RunFolder.create(tmp_path / name, config, {"id": name * 12}) for name in ("a", "b")
    )
    for folder, step in ((one, 5), (other, 9)):
        path = write_checkpoint(folder, f"step={step:08d}.ckpt")
        with path.open("r+b") as file:
            checkpoints.seal(file, folder.info["id"], step)
        folder.update(step=step)
    stray = one.path / "checkpoints" / "step=00000009.ckpt"
    shutil.copy(other.path / "checkpoints" / "step=00000009.ckpt", stray)
    assert [whole.step for whole in one.whole_checkpoints()] == [5]
    shutil.copy(other.path / "run.json", one.path / "run.json")
    with pytest.raises(UserError, match=r"config\.yaml: was altered .* or is another run's"):
        RunFolder.open(one.path)


@pytest.mark.parametrize("text", [checkpoints.PART + "0", "no such mark"])
def test_parts_that_are_gone_are_missed_though_the_seal_is_older_than_that_over_parts(
    tmp_path, text
):
    path = tmp_path / "step=00000003.ckpt"
    torch.save({"state_dict": {"model.x": text}, "global_step": 3}, path)
    with path.open("r+b") as file:
        checkpoints.seal(file, "a" * 12, 3)
    assert (checkpoints.read(path) is None) == text.startswith(checkpoints.PART)
    shards = checkpoints.shards_of(path)
    shards.mkdir()
    (shards / "__0_0.distcp").touch()
    assert checkpoints.read(path) is not None


def test_a_flipped_bit_in_every_byte_of_a_sealed_checkpoint_is_reported(tmp_path):
    path = tmp_path / "step=00000003.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(40))
        archive.writestr("archive/data/0", bytes(range(64)))
    with path.open("r+b") as file:
        checkpoints.seal(file, "a" * 12, 3)
    good = checkpoints.read(path)
    assert good is not None
    assert (good.run, good.step) == ("a" * 12, 3)
    content, passed = path.read_bytes(), []
    seal_at = len(content) - checkpoints.SEAL_BYTES
    for at in range(len(content)):
        altered = bytearray(content)
        altered[at] ^= 1 << at % 8
        path.write_bytes(altered)
        os.utime(path, ns=(at, at))  # as another file, whatever the clock's resolution
        if checkpoints.read(path) is not None:
            passed.append(at)
    assert all(at >= seal_at for at in passed)  # a spoilt seal: what it closes is whole


def test_rows_that_are_none_are_left_out_and_said(folder, caplog):
    folder.append_row({"task": "speed", "length": 1, "tokens_per_second": 5.0})
    with open(folder.path / "results.jsonl", "ab") as file:
        file.write(
            b'7\n[]\n{}\n"a"\nnull\n\xff\xfe\n{"task": 3}\n{"question": 7}\n\0\n' + b"[" * 9999
        )
    folder.append_row({"task": "speed", "length": 2, "tokens_per_second": 6.0})
    assert [row["length"] for row in folder.rows()] == [1, 2]
    assert len(caplog.records) == 10
    file = folder.path / "results.jsonl"
    file.write_bytes(file.read_bytes().replace(b"6.0", b"9.0"))
    assert [row["length"] for row in folder.rows()] == [1]
    assert "line 12 was altered since it was written and is left out" in caplog.text


def without_hash(file: Path, **changes) -> dict:
    """Rewrite the one record in a file without its hash; return it."""
    record = json.loads(file.read_text()) | changes
    del record["check"]
    file.write_text(f"{json.dumps(record)}\n")
    return record


@pytest.mark.parametrize("mark", CHECKED)
def test_a_hash_that_is_absent_is_missed_where_every_row_and_record_has_one(folder, mark, caplog):
    row = {"task": "speed", "length": 1, "tokens_per_second": 5.0}
    for known in (row, row | {mark: "155f139780d6"}):
        caplog.clear()
        (folder.path / "results.jsonl").unlink(missing_ok=True)
        folder.append_row(known)
        changed = without_hash(folder.path / "results.jsonl", tokens_per_second=9.0)
        assert folder.rows() == ([] if mark in known else [changed])
        said = "line 1 was altered since it was written and is left out"
        assert (said in caplog.text) == (mark in known)
        folder.update(**{mark: "155f139780d6"} if mark in known else {"note": "of before"})
        without_hash(folder.path / "run.json", step=190)
        assert RunFolder.open(folder.path).info["step"] == 190
        assert ("run.json was altered since it was written" in caplog.text) == (mark in known)


def test_metrics_that_are_none_are_left_out_and_said(folder, caplog):
    metrics = folder.metrics(["loss"])
    for step in (1, 2):
        metrics.write({"step": step, "loss": step / 2})
    with open(folder.path / "metrics.csv", "ab") as file:
        file.write(b"\0\0\nwords\n3,x\n3,1,1\n\xff,1\n-1,2\n99999999999999999999,1\n4,2.0\n")
    folder.metrics(["loss"], step=9)
    assert (folder.path / "metrics.csv").read_text() == "step,loss\n1,0.5\n2,1.0\n4,2.0\n"
    assert "7 lines hold no figures and are left out (line 4)" in caplog.text
    for content in (b"\xff\n1,2\n", b"\0" * 99, b"words\n1,2\n", b"step,step\n1,2\n"):
        (folder.path / "metrics.csv").write_bytes(content)
        folder.metrics(["loss"], step=9)
        assert (folder.path / "metrics.csv").read_text() == "step,loss\n"


def test_one_damaged_run_of_a_pattern_leaves_the_others(tmp_path, config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        RunFolder.create(Path("runs") / name, config, {})
    Path("runs/a/run.json").write_text("{")
    assert [folder.name for folder in find_runs("runs/*", "runs")] == ["a", "b"]
    with pytest.raises(UserError, match=r"run\.json: is damaged"):
        find_runs("runs/a", "runs")
