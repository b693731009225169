"""A run whose text, base, weights or code is no longer what it was: followed, or reported."""

import contextlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_altered_files import MEASURE, RUN, carry_out, original, same, truth  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import zoo.runs.claim
import zoo.tasks.measured_run
from zoo.cli import eval as eval_program
from zoo.cli import train as train_program
from zoo.config.compose import compose_tree, composing, parse
from zoo.errors import UserError
from zoo.model import checkpoint, shards
from zoo.runs import checkpoints
from zoo.runs.files import replacing
from zoo.runs.folder import RunFolder

EVAL = [f"run={RUN}", "report=null", "logger=none", *MEASURE]
TUNE = ["extension=pi", "extension.factor=2", "name=tuned", "logger=none", "trainer.max_steps=2",
        "optim.warmup_steps=1"]  # fmt: skip


@pytest.fixture
def place(original, tmp_path):  # noqa: F811
    """A copy of the runs, their text and cache; the test is in it."""
    shutil.copytree(original, tmp_path / "copy")
    with contextlib.chdir(tmp_path / "copy"):
        yield tmp_path / "copy"


def run(name: str, *words: str) -> int:
    """train or eval under these options, in this process. UserError as they raise it."""
    program = {"train": train_program, "eval": eval_program}[name]
    with composing(name):
        composed = compose_tree(name, parse(words))
    return program.job(program.check(composed, [w.partition("=")[0] for w in words]), None)


def move_text(place: Path) -> None:
    shutil.rmtree(place / "cache")
    (place / "text").rename(place / "elsewhere")


def test_a_moved_text_is_followed_by_resume_eval_and_finetune(place):
    move_text(place)
    for program, words in (
        ("train", [f"finetune={RUN}", *TUNE]),
        ("eval", EVAL),
        ("train", [f"resume={RUN}", "trainer.max_steps=6"]),
    ):
        if program == "train":
            with pytest.raises(UserError, match=r"/text: does not exist\. Give data\.path="):
                run(program, *words)
        assert run(program, *words, "data.path=elsewhere") == 0
    assert RunFolder.open(RUN).config.data.options["path"] == "elsewhere"
    assert RunFolder.open(RUN).info["step"] == 6


def test_why_nothing_was_measured_is_said(place, caplog):
    move_text(place)
    assert run("eval", *EVAL, "fresh=true") == 1
    assert "elsewhere" not in caplog.text
    assert "mine: failed: /" in caplog.text
    assert "/text: does not exist. Give data.path=" in caplog.text


def test_another_text_is_refused_by_resume_and_eval_and_nothing_changes(place, caplog):
    shutil.copytree("text", "other")
    Path("other/train/a.txt").write_text("another text " * 200)
    before = {name: (RUN / name).read_bytes() for name in ("config.yaml", "run.json")}
    for words in (["data.path=other"], []):
        if not words:
            Path("text/train/a.txt").write_text("another text " * 200)
        finished = [] if words else [[]]  # without steps to train, as well
        for more in (["trainer.max_steps=6"], *finished):
            with pytest.raises(UserError, match=r"is not the text that .*mine was trained on so"):
                run("train", f"resume={RUN}", *more, *words)
        assert (RUN / "config.yaml").read_bytes() == before["config.yaml"]
        now, then = RunFolder.open(RUN).info, json.loads(before["run.json"])
        kept = ("status", "reason", "step", "fingerprint", "sources", "data")
        assert {name: now[name] for name in kept} == {name: then[name] for name in kept}
        assert run("eval", *EVAL, "fresh=true", *words) == 1
        assert "is not the text that the run was trained on" in caplog.text
        caplog.clear()


def test_a_place_for_a_text_that_has_none_is_refused(place):
    with pytest.raises(UserError, match=r"has no such option|unknown option"):
        run("train", f"resume={RUN}", "data.documents=3")


def test_a_run_tuned_from_a_base_that_was_replaced_is_not_already_trained(place):
    assert run("train", f"finetune={RUN}", *TUNE) == 0
    tuned = RunFolder.open("runs/tuned")
    assert tuned.info["base"]["sources"] == RunFolder.open(RUN).info["sources"]
    assert run("train", f"finetune={RUN}", *TUNE) == 0  # already trained
    shutil.rmtree(RUN)
    shutil.copytree("runs/other", RUN)
    with pytest.raises(UserError, match=r"tuned: was fine-tuned from other weights than .*mine"):
        run("train", f"finetune={RUN}", "seed=0", *TUNE)


def test_rows_say_what_code_trained_and_measured_and_other_code_measures_anew(
    place, monkeypatch, caplog
):
    def answers() -> list[tuple]:
        return [(r["sources"], r["measured_by"], r["time"]) for r in RunFolder(RUN).rows()]

    (first, *_) = before = answers()
    assert first[0] == RunFolder.open(RUN).info["sources"]
    assert run("eval", *EVAL) == 0
    assert answers() == before
    assert "changed since it was trained" not in caplog.text
    monkeypatch.setattr(zoo.tasks.measured_run, "measured_by", lambda *_: "other")
    real, more = zoo.runs.claim.sources, {"zoo/x.py": "1"}
    monkeypatch.setattr(zoo.runs.claim, "sources", lambda *a, **k: real(*a, **k) | more)
    assert run("eval", *EVAL) == 0
    assert {measured for _, measured, _ in answers()} == {"other"}
    assert "mine: zoo/x.py changed since it was trained" in caplog.text


def test_after_a_damaged_checkpoint_rows_are_of_the_weights_that_were_measured(place, truth):  # noqa: F811
    last = RUN / "checkpoints" / "step=00000004.ckpt"
    last.write_bytes(last.read_bytes()[:9000])
    assert run("eval", *EVAL) == 0
    rows = RunFolder(RUN).rows()
    assert {(row["train_steps"], row["train_tokens"]) for row in rows} == {(2, 64)}
    found = {(row["protocol"], row["length"]): row["bits_per_byte"] for row in rows}
    assert found == truth[1][2]


def whole(path: Path) -> checkpoints.Checkpoint:
    found = checkpoints.read(path)
    assert found is not None
    return found


def divide(path: Path) -> None:
    """Writes a checkpoint's weights in parts."""
    before, state = whole(path), torch.load(path, weights_only=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weights = state["state_dict"].items()
        parts = {name: distribute_tensor(x, mesh, [Shard(0)]) for name, x in weights}
        state = shards.write(state | {"state_dict": parts}, checkpoints.shards_of(path))
    finally:
        dist.destroy_process_group()
    with replacing(path) as file:
        torch.save(state, file)
        checkpoints.seal(file, before.run, before.step or 0, state[shards.HASHES])
    assert whole(path) != before


def spoil(path: Path, damage: str) -> Callable[[], None]:
    """Damages a checkpoint; returns what puts it back."""
    part = checkpoints.shards_of(path) / (".metadata" if "index" in damage else "__0_0.distcp")
    file = part if "part" in damage else path
    content, more = file.read_bytes(), part.with_name("__1_0.distcp")
    if "gone" in damage:
        file.unlink()
    elif damage == "unreadable":
        before = whole(path)
        with replacing(path) as archive:
            torch.save({"state_dict": Harmful(), "global_step": 4}, archive)
            checkpoints.seal(archive, before.run, 4)
    elif damage == "one part more":
        more.write_bytes(content)
    else:
        middle = len(content) // 2
        changed = bytes([content[middle] ^ 1])
        file.write_bytes(content[:middle] + changed + content[middle + 1 :])

    def put_back() -> None:
        file.write_bytes(content)
        more.unlink(missing_ok=True)

    return put_back


DAMAGES = ["changed", "unreadable", "part gone", "one part more", "index of parts changed"]
MORE = ["gone", "part changed", "index of parts gone"]  # 2 s each


@pytest.mark.parametrize(
    "damage", [*DAMAGES, *(pytest.param(one, marks=pytest.mark.slow) for one in MORE)]
)
def test_nothing_takes_the_place_of_a_lost_checkpoint_unsaid(damage, place, truth):  # noqa: F811
    """The run trains its lost steps again; a run tuned from it names the weights that it began
    with; adapters are not merged with others than they were trained beside."""
    last = RUN / "checkpoints" / "step=00000004.ckpt"
    unbroken = last.read_bytes()
    if "part" in damage:
        divide(last)
    assert (
        run("train", f"finetune={RUN}", *TUNE[:2], *TUNE[3:], "name=adapters", "lora.rank=2") == 0
    )
    adapters = RunFolder.open("runs/adapters")
    merged = checkpoint.trained_weights(adapters)
    put_back = spoil(last, damage)
    with pytest.raises(UserError, match=r"adapters: .* the run .*mine, whose "):
        checkpoint.trained_weights(adapters)
    if damage == "unreadable":  # which is known once it is read
        checkpoints._rejected.clear()  # as in another process
        recorded = adapters.info["base"]
        adapters.update(base=recorded | {"weights": whole(last).content})
        with pytest.raises(UserError, match="whose last checkpoint cannot be read"):
            checkpoint.trained_weights(adapters)
        adapters.update(base=recorded)
    assert run("train", f"finetune={RUN}", *TUNE) == 0
    older = whole(last.with_name("step=00000002.ckpt"))
    assert RunFolder.open("runs/tuned").info["base"]["weights"] == older.content
    assert run("eval", *EVAL) == 0
    assert {row["lost_steps"] for row in RunFolder.open(RUN).rows()} == {2}
    put_back()
    assert same(checkpoint.trained_weights(adapters), merged)
    if damage == "unreadable":
        return  # a seal that holds is believed until the file is read
    spoil(last, damage)
    assert run("train", f"resume={RUN}") == 0
    assert same(checkpoint.trained_weights(RunFolder.open(RUN)), truth[0][4])
    if "part" not in damage:  # the same bytes: what was tuned from them finds its base again
        assert last.read_bytes() == unbroken
        assert same(checkpoint.trained_weights(adapters), merged)


def unseal(path: Path, spoil: bool) -> None:
    """As checkpoints were before the seal; spoilt, in the archive's directory alone."""
    state = torch.load(path, weights_only=True)
    torch.save(state, path)
    if spoil:
        content = bytearray(path.read_bytes())
        name = content.rindex(b"data.pkl")  # in the directory, at the end
        content[name] ^= 1
        path.write_bytes(content)
        with zipfile.ZipFile(path) as archive:
            assert len(archive.infolist()) > 1


def test_a_checkpoint_of_before_the_seal_that_cannot_be_read_is_passed_over(place, truth):  # noqa: F811
    for step in (2, 4):
        unseal(RUN / "checkpoints" / f"step={step:08d}.ckpt", spoil=False)
    assert carry_out("eval", stub=True).code == 0
    unseal(RUN / "checkpoints" / "step=00000004.ckpt", spoil=True)
    outcome = carry_out("resume", stub=True)
    assert same(outcome.weights, truth[0][2])
    assert any("step=00000004.ckpt" in line for line in outcome.said)


class Harmful:
    def __reduce__(self):
        return (print, ("harm",))


def test_a_pickle_that_is_refused_is_one_line(place, capsys):
    for file in (RUN / "checkpoints").iterdir():
        torch.save({"state_dict": Harmful(), "global_step": 4}, file)
    outcome = carry_out("resume", stub=True)
    assert outcome.code == 2
    assert "has no checkpoint that can be read (step=00000002.ckpt cannot be read" in outcome.error
    assert "\n" not in outcome.error
    outcome = carry_out("eval", stub=True)
    assert outcome.code in (1, 2)
    assert "no whole checkpoint" in str(outcome.said) + outcome.error
    assert "harm" not in capsys.readouterr().out


def test_a_configuration_that_does_not_fit_its_checkpoint_is_one_line(place):
    text = (RUN / "config.yaml").read_text().partition("\n")[2]
    (RUN / "config.yaml").write_text(text.replace("width: 16", "width: 32"))
    outcome = carry_out("resume", stub=True)
    assert outcome.code == 2
    assert "mine: config.yaml's model does not fit the checkpoint" in outcome.error
    assert carry_out("eval", stub=True).code in (1, 2)
    with pytest.raises(UserError, match="weights differ, such as embedding"):
        checkpoint.load(RunFolder.open(RUN))


def test_one_damaged_run_of_several_keeps_its_place_and_the_others_are_measured(place, caplog):
    (RUN / "run.json").write_text("[" * 100_000)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        words = [word for word in EVAL if not word.startswith("run=")]
        assert run("eval", "run=runs/*", *words) == 1
    assert "mine" in said.getvalue()
    assert "run.json: is damaged (it is nested too deeply" in caplog.text
    assert {row["status"] for row in RunFolder(Path("runs/other")).rows()} == {"ok"}


def test_which_file_went_into_which_split_is_recorded(place):
    recorded = (RUN / "documents.json").read_text()
    assert '"train/a.txt"' in recorded
    info = RunFolder.open(RUN).info
    assert info["data"]["test"]["documents"] == 1
    assert info["data"]["test"]["bytes"] == len(Path("text/test/a.txt").read_bytes()) + 1
