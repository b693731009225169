"""Every published recipe of several stages is carried out at tiny scale, by one command."""

import dataclasses
import importlib
import json
import shlex
import shutil
from pathlib import Path

import pytest
from building import write_checkpoint, write_text
from hydra.conf import HydraConf

from zoo.cli import train
from zoo.cli.recipe import OF_RECIPE, main, steps
from zoo.config.compose import compose_tree, composing, parse
from zoo.config.groups import choices, groups
from zoo.config.schema.eval import EvalConfig
from zoo.config.schema.train import TrainConfig
from zoo.errors import refuse
from zoo.runs.folder import RunFolder

SMALL = ["size=tiny", "match=none", "seq_len=32", "valid_windows=2", "logger=none"]
SMALL += ["batch_tokens=1k", "trainer.max_steps=2"]
SEARCH = ["population=3", "generations=0", "mutations=1", "crossovers=1", "parents=2", "texts=1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", choices("recipe"))
def test_a_recipe_is_carried_out_by_one_command_and_a_second_trains_nothing(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = small(name, tmp_path, 800)
    for _ in range(2):
        assert main([name, *words]) == 0
        folders = [
            RunFolder.open(path) for path in sorted(Path(f"runs/{name}").iterdir()) if path.is_dir()
        ]
        assert {folder.info["step"] for folder in folders} == {2}
        tuned = [folder for folder in folders if folder.config.finetune]
        assert tuned
        for folder in tuned:
            assert any(" tuned" in row["arm"] for row in folder.rows())
            assert {row["status"] for row in folder.rows()} == {"ok"}


def tasks(name: str) -> set[str]:
    return {word[5:] for _, step in steps(name) for word in step if word.startswith("task=")}


def small(name: str, folder: Path, sentences: int = 300) -> list[str]:
    """A few steps of a tiny model, on a text where the recipe has no data of its own."""
    words = [f"task.{task}.lengths=[32,64]" for task in tasks(name) & {"perplexity", "accuracy"}]
    words += [f"task.longrope.{word}" for word in SEARCH] if "longrope" in tasks(name) else []
    if not any(word.startswith("data=") for word in steps(name)[0][1]):
        words += ["data=text", f"data.path={write_text(folder, sentences)}"]
        words.append(f"data.cache={folder / 'cache'}")
    return [*SMALL, *words]


@pytest.mark.parametrize("name", choices("recipe"))
def test_the_runs_of_a_recipe_are_named_in_its_folder(name):
    for number, (program, words) in enumerate(steps(name, ["size=tiny", "optim.lr=1"])):
        assert ("size=tiny" in words) == (number == 0)
        assert ("optim.lr=1" in words) == (program == "train")
        assert sum(word.startswith("optim.lr=") for word in words) <= 1
        for key in ("finetune=", "run=", "runs="):
            placed = [word for word in words if word.startswith(key)]
            assert all(word.startswith(f"{key}runs/{name}") for word in placed)


@pytest.mark.parametrize(
    ("given", "own"), [("batch_size=4", "batch_tokens"), ("batch_tokens=4k", "x")]
)
@pytest.mark.parametrize("name", choices("recipe"))
def test_windows_of_a_step_are_given_in_one_unit_to_every_stage(name, given, own):
    for program, words in steps(name, [given]):
        assert (given in words) == (program == "train")
        assert not any(word.startswith(f"{own}=") for word in words)


@pytest.mark.parametrize("name", choices("recipe"))
def test_the_folder_of_a_recipe_may_end_in_a_slash(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for program in ("train", "eval"):
        monkeypatch.setattr(f"zoo.cli.{program}.main", lambda *_: 3)
    begun = []
    for runs in ("out", "out/"):
        assert main([name, f"runs={runs}"]) == 3
        begun.append(
            capfd.readouterr().err.replace(f"runs={runs} ", "").replace(f"runs={runs}\n", "")
        )
    assert begun[0] == begun[1]


@pytest.mark.parametrize("place", ["a,b", "a b", "a=b", "it's", "null", "\u00e9", "a\\", "[a]"])
def test_the_folder_of_a_recipe_may_have_any_name_in_quotes(place, tmp_path, monkeypatch, capfd):
    """Every stage gets it, and what was printed is the stage in a shell."""
    monkeypatch.chdir(tmp_path)
    got = []
    for program in ("train", "eval"):
        monkeypatch.setattr(f"zoo.cli.{program}.main", lambda words, *_: got.append(words) or 0)
    quoted = place.replace("\\", "\\\\").replace("'", "\\'")
    assert main(["yarn_twice", f"runs='{quoted}'"]) == 0
    begun = [line for line in capfd.readouterr().err.splitlines() if "stage " in line]
    assert [shlex.split(line.partition(": zoo ")[2])[1:] for line in begun] == got
    for words in got:
        with composing("train"):
            given = {one.key_or_group: one.value() for one in parse(words)}
        assert given["runs"] == place
        assert all(given.get(key, place).startswith(place) for key in ("finetune", "run", "report"))


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "yarn_twice model=mamba": "extension=yarn: acts on positions=",
        "dca_over_pi model=alibi": "extension=pi: acts on positions=",
        "dca_over_pi seq_len=32 batch_tokens=64": "batch_tokens=64: must be at least seq_len=128",
        "yarn_twice optim.warmup_steps=300": "optim.warmup_steps=300: must be at most trainer.max",
        "yarn_twice trainer.accumulate_grad_batches=8": "accumulate_grad_batches=8: must divide",
        "longformer_staged extension=none": "extension=none: longformer_staged sets it",
        "dca_over_pi device=cuda:99": "device=cuda:99: is not available here",
        "longrope_progressive device=cuda:99": "device=cuda:99: is not available here",
        "longrope_progressive model=alibi": "task=longrope: rescales rotary frequencies",
        "yarn_twice data=text data.path=gone": "gone: does not exist.",
        "yarn_twice report=/proc/x.html": "report=/proc/x.html: cannot be written",
        "longrope_progressive report=.": "report=.: cannot be written, it is a folder",
        "yarn_twice extension.factor=8": "extension.factor=8: yarn_twice sets it in each of its",
        "yarn_twice seed=0,1": "seed=0,1: names several values",
        "longformer_staged size=tiny,small": "size=tiny,small: names several values",
        "yarn_twice experiment=text": "experiment=text: is of a sweep, and a stage is one run.",
        "yarn_twice +launcher=local": "launcher=local: is of a sweep, and a stage is one run.",
        "yarn_twice hydra/launcher=basic": "hydra/launcher=basic: is of a sweep",
        "yarn_twice fresh=true": "fresh=true: begins runs that no later stage reads. Use another",
        "yarn_twice runs=": "zoo recipe: runs=: must have at least 1 character.",
        "yarn_twice runs=a,b": "runs=a,b: names several values, and a recipe takes one. Give one;",
        "yarn_twice runs=a=b": "runs=a=b: cannot be read. Write lists as [a,b] and quote special",
        "yarn_twice runs=${nope}": "zoo recipe: runs=${nope}: Interpolation key 'nope' not found.",
        "yarn_twice seed=${nope}": "zoo recipe: seed=${nope}: Interpolation key 'nope' not found.",
        "yarn_twice runs=/proc/zoo": "zoo recipe: runs=/proc/zoo: cannot be written",
        f"yarn_twice runs={__file__}": f"zoo recipe: runs={__file__}: is a file. Name a folder",
    }.items(),
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(
    words, message, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert not [*tmp_path.iterdir()]


def trained_stages(name: str, words: list[str]) -> None:
    """Leave the folders of a recipe's runs, as if they were trained, and what a search found."""
    for program, step in steps(name, words):
        if program == "train":
            with composing("train"):
                tree = compose_tree("train", parse(step))
                config = train.check(tree, [word.partition("=")[0] for word in step])
            folder = RunFolder.create(Path(config.runs) / str(config.name), config, {"step": 2})
            write_checkpoint(folder, "step=2.ckpt")
        elif "task=longrope" in step and "run=runs/longrope_progressive/base" in step:
            found = {"long_factors": [1.0, 2.0], "short_factors": None, "n_hat": 1}
            content = json.dumps({"found": found | {"magnitude": "su"}})
            Path("runs/longrope_progressive/base/longrope-x4.json").write_text(content)


@pytest.mark.parametrize("name", choices("recipe"))
def test_a_later_stage_of_another_run_is_refused_before_the_first(
    name, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    words = small(name, tmp_path)
    trained_stages(name, words)
    first = next(word[5:] for word in steps(name)[0][1] if word.startswith("name="))
    shutil.rmtree(f"runs/{name}/{first}")
    for program in ("train", "eval"):
        monkeypatch.setattr(f"zoo.cli.{program}.main", lambda *_: 3)
    assert main([name, *words]) == 3  # the runs are those: it begins
    capfd.readouterr()
    assert main([name, *words, "optim.lr=0.5"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "holds another run, which differs in optim.lr" in line
    assert line.endswith(f"of {name}).")
    assert not Path(f"runs/{name}/{first}").exists()


def test_what_a_stage_refuses_when_it_runs_is_said_by_the_recipe(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def refuses(*_, **__):
        refuse("seq_len", 1, "must be 2")

    monkeypatch.setattr("zoo.cli.train.rehearse", refuses)
    assert main(["yarn_twice", *small("yarn_twice", tmp_path)]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line == "zoo recipe yarn_twice, stage 1: seq_len=1: must be 2."


def test_a_recipe_that_is_none_is_refused_in_one_line(capfd):
    assert main(["yarn_twise"]) == 2
    assert "Did you mean 'yarn_twice'?" in capfd.readouterr().err
    assert main([]) == 2
    assert (
        capfd.readouterr().err
        == "zoo recipe: no name: must be one recipe. See zoo recipe --help.\n"
    )


@pytest.mark.parametrize("name", choices("recipe"))
def test_a_recipe_says_first_how_many_stages_it_has_and_what_each_runs(
    name, monkeypatch, capfd, tmp_path
):
    words = small(name, tmp_path)
    began: list[list[str]] = []
    checked = []
    for program in ("train", "eval"):
        check = importlib.import_module(f"zoo.cli.{program}").check

        def noted(tree, given, check=check, program=program):
            checked.append((program, given))
            return check(tree, given)

        monkeypatch.setattr(f"zoo.cli.{program}.check", noted)
        monkeypatch.setattr(f"zoo.cli.{program}.main", lambda words, _: began.append(words) or 3)
    assert main([name, *words]) == 3
    found = steps(name, words)
    assert began == [found[0][1]]
    assert checked == [(one, [word.partition("=")[0] for word in words]) for one, words in found]
    lines = [f"zoo {program} {' '.join(words)}" for program, words in found]
    listed = [f"  {number}. {line}" for number, line in enumerate(lines, 1)]
    first = f"stage 1 of {len(found)}: {lines[0]}"
    assert capfd.readouterr().err.splitlines() == [
        f"{name} has {len(found)} stages:", *listed, first
    ]  # fmt: skip


@pytest.mark.parametrize("name", choices("recipe"))
def test_an_option_that_no_stage_takes_is_refused_before_the_first(name, monkeypatch, capfd):
    for program in ("train", "eval"):
        monkeypatch.setattr(f"zoo.cli.{program}.main", lambda *_: pytest.fail("a stage began"))
    own = (*OF_RECIPE, "extension.factor", "extension.scaling.beta_fast")
    owned = {f"{key}=x": "sets it in each of its stages. Leave it out." for key in own}
    unused = {"task.speed.lengths=[8]": f"no stage of {name} takes it. Leave it out."}
    task = min(tasks(name))
    wrong = {f"task.{task}.lenths=[8]": "unknown option.", "siez=tiny": "unknown option."}
    wrong |= {"seq_len=-1": "must be", "optim.lr=abc": "must be", "device": "must be one recipe"}
    for word, said in (owned | unused | wrong).items():
        assert main([name, word]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("zoo recipe: ")
        assert word.partition("=")[0] in line
        assert said in line


OPTIONS = {"train": {*TrainConfig.model_fields}, "eval": {*EvalConfig.model_fields}}
KEYS = sorted({key for program, own in OPTIONS.items() for key in (*own, *groups(program))})
HYDRAS = [f"hydra.{field.name}" for field in dataclasses.fields(HydraConf)]


@pytest.mark.parametrize("key", [*KEYS, "hydra", *HYDRAS, "hydra/launcher", "hydra.sweep.dir"])
def test_every_option_goes_to_a_stage_or_is_refused_by_its_name_before_the_first(
    key, monkeypatch, capfd
):
    for program in ("train", "eval"):
        monkeypatch.setattr(f"zoo.cli.{program}.main", lambda *_: pytest.fail("a stage began"))
    assert main(["yarn_twice", f"{key}=[[a]]"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"zoo recipe: {key}"), line
    said = ("sets it", "is of a sweep", "unknown option", "begins runs")
    owned = any(part in line for part in said)
    takers = {
        program for program, words in steps("yarn_twice", [f"{key}=x"]) if f"{key}=x" in words
    }
    assert owned or takers
    assert all(key in {*OPTIONS[program], *groups(program)} for program in takers if not owned)
    for one in ("finetune", "resume", "extension", "run", "launcher", "fresh"):
        assert f" {one}," not in line  # among what can be given
