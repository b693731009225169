"""`zoo compress`, and compressed prompts under every task."""

import resource
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from building import train_on_text

from zoo.cli import eval as eval_program
from zoo.cli.compress import OPTIONS, OUTPUTS, main
from zoo.config.groups import CONFIGS, choices
from zoo.model.flops import reading_cost
from zoo.model.language_model import load_language_model
from zoo.runs.folder import RunFolder
from zoo.tasks.task import Task

TEXT = "The river moved in the dark. Nobody spoke, and the house was still.\n\n" * 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with two runs, runs/reader and runs/scorer."""
    place = tmp_path_factory.mktemp("work")
    steps = ["trainer.max_steps=2", "batch_tokens=256", "valid_windows=2", f"runs={place}/runs"]
    train_on_text(place, "name=reader", *steps)
    data = ["data=text", f"data.path={place}/text", f"data.cache={place / 'cache'}", "seq_len=32"]
    from zoo.cli.train import main as train

    more = ["model=mamba", "size=tiny", "size.width=16", "size.layers=1"]
    more += ["match=none", "logger=none", "name=scorer"]
    assert train([*data, *more, *steps]) == 0
    return place


@pytest.fixture
def here(trained, monkeypatch) -> Path:
    monkeypatch.chdir(trained)
    Path("text.txt").write_text(TEXT)
    return trained


def test_a_file_is_shortened_and_what_was_dropped_is_shown(here, capfd):
    words = ["file=text.txt", "by=runs/scorer", "rate=0.4", "to=short.txt", "html=shown.html"]
    assert main([*words, "marked=marked.txt", "question=Who spoke?"]) == 0
    short, shown = Path("short.txt").read_text(), Path("shown.html").read_text()
    whole = len(TEXT) + len("Who spoke?")
    assert abs(len(short) / whole - 0.4) < 0.02
    assert f"{len(short)} of {whole} tokens are left" in capfd.readouterr().err.replace(",", "")
    assert "<del>" in shown
    marked = Path("marked.txt").read_text()
    assert marked.replace("[-", "").replace("-]", "") == TEXT + "Who spoke?"
    assert main(["file=text.txt", "by=runs/scorer", "tokens=1k"]) == 0
    assert capfd.readouterr().out == TEXT  # within the budget


@pytest.mark.parametrize(
    ("content", "message"),
    {
        b"": "file=case.txt: is empty. Give a longer text.",
        b"x": "file=case.txt: has 1 token, and one must be left. Give a longer text.",
        b"\xff\xfe\x00\x01" * 9: "file=case.txt: must be text in UTF-8, and this is binary.",
        b"text\0text": "file=case.txt: must be text, and this has bytes of zero.",
    }.items(),
)
def test_what_is_no_text_or_too_short_is_refused_in_one_line(content, message, here, capfd):
    Path("case.txt").write_bytes(content)
    for method in choices("compress"):
        if method == "none":
            continue
        by = ["by=runs/scorer"] * (method in SCORES)
        words = ["file=case.txt", *by, f"method={method}", "rate=0.5", "to=never.txt"]
        ranked = method == "longllmlingua"  # a question, which takes the room of one token
        words += ["question=Why?"] * ranked
        assert main(words) == 2
        (line,) = capfd.readouterr().err.splitlines()
        alone = ranked and content == b"x"
        assert ("leaves nothing of the file itself" if alone else message) in line
        assert not Path("never.txt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "by=runs/scorer rate=0.5": "file=: must be given",
        "file=text.txt by=runs/scorer": "rate=: must be given, or tokens=, and not both.",
        "file=text.txt by=runs/scorer rate=0.5 tokens=9": "must be given, or tokens=, and not both",
        "file=text.txt by=runs/scorer rate=1.5": "rate=1.5: must be",
        "file=text.txt by=runs/scorer tokens=-1": "tokens=-1: must be a number of tokens",
        "file=text.txt rate=0.5": "by=: must be given for method=llmlingua.",
        "file=text.txt by=runs/none rate=0.5": "runs/none",
        "file=gone.txt by=runs/scorer rate=0.5": "file=gone.txt: cannot be read",
        "file=text.txt by=runs/scorer rate=0.5 method=lingua": "Did you mean 'llmlingua'?",
        "file=text.txt by=runs/scorer rate=0.5 method.segmnt=3": "segment",
        "file=text.txt by=runs/scorer tokens=1k method=longllmlingua": "question=: must be given",
        "file=text.txt by=runs/none rate=0.5 method=longllmlingua": "question=: must be given",
        "file=text.txt by=runs/scorer rate=0.5 method=selective_context method.unit=x": "unit=x",
        "file=text.txt by=runs/scorer rate=0.5 to=gone/x.txt": "to=gone/x.txt: must be in a folder",
        "file=text.txt by=runs/scorer rate=0.5 method.question_rate=1": "there is no question",
        "file=text.txt by=runs/scorer rate=0.5 method.instruction_rate=1": "there is no instr",
    }.items(),
)
def test_a_mistake_is_refused_in_one_line(words, message, here, capfd):
    assert main(words.split()) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line


GIVEN = {"rate": "0.2", "tokens": "50", "instruction": "Say it.", "question": "Who is it?"}
GIVEN |= {"file": "other.txt", "by": "runs/reader", "method": "truncation", "device": "cuda:99"}
GIVEN |= {name: f"{name}.out" for name in OUTPUTS}
METHODS = [name for name in choices("compress") if name != "none"]
OWN = {
    name: yaml.safe_load((CONFIGS / "compress" / f"{name}.yaml").read_text()) for name in METHODS
}
SCORES = {name for name in METHODS if OWN[name]["by"] == "???"}
PLAIN: dict[str, tuple[int, dict[str, str], str]] = {}  # what a method gives without an option


@pytest.mark.parametrize("question", ["", "Who is it, and why?"])
@pytest.mark.parametrize("method", METHODS)
def test_so_many_tokens_are_the_most_and_the_file_is_never_gone(method, question, here, capfd):
    by = ["by=runs/scorer"] * (method in SCORES)
    ending = [f"question={question}"] * bool(question)
    if method == "longllmlingua" and not question:
        return
    shortened = 0
    for content in ("\n" * 6, "a bc. Def ghi\n\njk lm no. P", TEXT):
        Path("case.txt").write_text(content)
        for tokens in (1, 5, 60):
            words = ["file=case.txt", f"method={method}", f"tokens={tokens}", *by, *ending]
            code, said = main(words), capfd.readouterr()
            if code == 2:
                (line,) = said.err.splitlines()
                assert line.startswith(f"zoo compress: tokens={tokens}: ")
                continue
            assert code == 0
            shortened += len(content) > tokens
            assert len(said.out) <= tokens
            assert {*said.out} - {*question} or {*content} <= {*question}
    assert shortened


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_every_option_acts_or_is_refused_by_name(method, option, here, monkeypatch, capfd):
    place = here / f"{method}-{option}"
    place.mkdir()
    monkeypatch.chdir(place)
    (place / "runs").symlink_to(here / "runs")
    (place / "text.txt").write_text(TEXT)
    (place / "other.txt").write_text(TEXT[9:])
    plain = {"file": "text.txt", "rate": "0.6", "method": method}
    plain |= {"by": "runs/scorer"} if method in SCORES else {}
    plain |= {"question": "Who spoke?"} if method == "longllmlingua" else {}

    def outcome(options: dict[str, str]) -> tuple[int, dict[str, str], str]:
        code = main(["=".join(pair) for pair in options.items()])
        files = {file.name: file.read_text() for file in place.glob("*.out")}
        said = capfd.readouterr()
        return code, files | {"terminal": said.out}, said.err

    before = PLAIN.setdefault(method, PLAIN.get(method) or outcome(plain))
    assert before[0] == 0
    value = "llmlingua" if (option, method) == ("method", "truncation") else GIVEN[option]
    code, files, said = outcome(plain | {option: value})
    if code == 2:
        assert f"{option}=" in said
        assert said.count("\n") == 1
    else:
        assert (code, files) != before[:2]


OF_METHODS = {  # each with what it needs to act
    "segment": "20", "instruction_rate": "0.1 instruction=Say,in,one,line,who,spoke.",
    "question_rate": "0.1 question=Who,spoke,in,the,dark?", "granularity": "1.0",
    "spread": "0.9", "unit": "word", "form": "mean",
}  # fmt: skip


def options_of_methods() -> list[tuple[str, str]]:
    found = []
    for name in METHODS:
        found += [(name, option) for option in OWN[name]["method"] if option != "_target_"]
    return found


@pytest.mark.parametrize(("method", "option"), options_of_methods())
def test_every_option_of_a_method_acts(method, option, here, capfd):
    sides = {"left": "middle", "middle": "left"}
    other = sides.get(OWN[method]["method"].get(option)) or OF_METHODS[option]
    value, *more = other.split()
    words = ["file=text.txt", f"method={method}", "rate=0.45", *more]
    words += ["by=runs/scorer"] * (method in SCORES)
    if method == "longllmlingua" and option != "question_rate":
        words.append("question=Who spoke?")
    assert main(words) == 0
    plain = capfd.readouterr().out
    assert main([*words, f"method.{option}={value}"]) == 0
    assert capfd.readouterr().out != plain


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_file_that_is_there_is_never_replaced(output, here, capfd):
    words = ["file=text.txt", "rate=0.5", "method=truncation"]
    Path("link.txt").unlink(missing_ok=True)
    Path("link.txt").symlink_to("text.txt")
    Path("mine.txt").write_text("mine")
    for name in ("text.txt", "link.txt", "mine.txt", "runs"):
        assert main([*words, f"{output}={name}"]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert f"{output}={name}: is there already. Name a new file, or remove it." in line
    assert (Path("text.txt").read_text(), Path("mine.txt").read_text()) == (TEXT, "mine")
    other = next(name for name in OUTPUTS if name != output)
    assert main([*words, f"{output}=one.txt", f"{other}={here}/one.txt"]) == 2
    assert "one.txt: is the file of " in capfd.readouterr().err
    assert not Path("one.txt").exists()


def measure(run: str, *words: str) -> tuple[int, list[dict]]:
    small = ["report=null", "logger=none", *words]
    code = eval_program.main([f"run=runs/{run}", *small])
    return code, RunFolder.open(f"runs/{run}").rows()


def test_prompts_are_compressed_under_tasks_and_extensions_in_rows_of_their_own(here):
    shorter = ["compress=llmlingua", "compress.by=runs/scorer", "compress.rate=0.5"]
    perplexity = ["task=perplexity", "task.perplexity.lengths=[64]", "task.perplexity.units=2"]
    perplexity.append("task.perplexity.stride=16")
    protocols = "task.perplexity.protocols=[half_tail,stride_tail]"
    assert measure("reader", *perplexity)[0] == 0
    plain = {row["extension_settings"] for row in RunFolder.open("runs/reader").rows()}
    code, rows = measure("reader", *perplexity, protocols, *shorter)
    assert code == 0
    own = [row for row in rows if row["extension_settings"] not in plain]
    assert {row["protocol"] for row in own} == {"half_tail", "stride_tail"}
    for row in own:
        assert row["status"] == "ok"
        assert row["arm"] == "transformer, prompts by llmlingua to 0.5 by scorer"
        read, given = row["prompt_tokens_read"], row["prompt_tokens_given"]
        assert abs(read / given - 0.5) < 0.1  # prompts of some thirty tokens
        assert row["compressor_flops"] > 0
        assert row["reader_flops"] > 0
    before = len(rows)
    assert measure("reader", *perplexity, protocols, *shorter)[0] == 0
    assert len(RunFolder.open("runs/reader").rows()) == before  # known

    passkey = ["task=passkey", "task.passkey.lengths=[128]", "task.passkey.repeats=1"]
    code, rows = measure("reader", *passkey, *shorter, "extension=dca")
    assert code == 0
    assert rows[-1]["arm"] == "transformer + dca, prompts by llmlingua to 0.5 by scorer"
    assert rows[-1]["status"] == "ok"
    code, rows = measure("reader", "task=generate", "task.generate.prompt='The river moved on'",
                         "task.generate.tokens=4", *shorter)  # fmt: skip
    assert code == 0
    assert rows[-1]["prompt_tokens"] == 9


def test_rows_of_whole_and_of_shortened_prompts_say_what_each_took(here):
    reading = ["task=passkey", "task.passkey.lengths=[256]", "task.passkey.repeats=1"]
    assert measure("reader", *reading)[0] == 0
    whole = RunFolder.open("runs/reader").rows()[-1]
    reader = reading_cost(load_language_model("runs/reader").backbone)
    assert whole["prompt_flops"] == pytest.approx(reader.of(256 - 4))
    words = ["compress=llmlingua", "compress.by=runs/scorer", "compress.flops=50e6"]
    row = measure("reader", *reading, *words)[1][-1]
    assert row["prompt_flops"] == pytest.approx(50e6, rel=0.05)
    assert row["prompt_flops"] * 5 == row["reader_flops"] + row["compressor_flops"]
    assert row["arm"] == "transformer, prompts by llmlingua to 50 MFLOP by scorer"
    assert row["compression_family"] == "transformer, prompts by llmlingua by scorer"


def test_the_state_of_a_compressed_prompt_is_of_the_tokens_that_were_read(here):
    """A row of every task that compresses: the keys and values of what is left of its prompt."""
    more = {
        "perplexity": ["lengths=[128]", "units=1", "stride=16"],
        "passkey": ["lengths=[128]", "repeats=1"],
        "facts": ["lengths=[128]", "repeats=1", "facts=2"],
        "generate": [f"prompt='{'The river moved on. ' * 6}'", "tokens=1"],
    }
    modules = [f"zoo.tasks.{name}" for name in choices("task")]
    classes = [vars(import_module(name)) for name in modules if find_spec(name)]
    tasks = [one for names in classes for one in names.values() if isinstance(one, type)]
    compress = {one for one in tasks if issubclass(one, Task) and one.compresses}
    assert {one.__name__.lower() for one in compress} == {*more}
    for name, options in more.items():
        words = [f"task={name}", *(f"task.{name}.{option}" for option in options)]
        if name == "perplexity":
            words.append("task.perplexity.protocols=[half_tail]")
        found = []
        for compression in ([], ["compress=truncation", "compress.rate=0.25"]):
            code, rows = measure("reader", *words, *compression, "fresh=true")
            assert code == 0, rows[-1]
            found.append(rows[-1])
        whole, short = (row["state_bytes"] for row in found)
        read = found[1]["prompt_tokens_read"] / found[1]["prompt_tokens_given"]
        assert found[1]["compressor_flops"] == 0  # a cut reads nothing
        assert found[1]["reader_flops"] > 0
        scored = 0.5 if name == "perplexity" else 0  # half of the window is not compressed
        assert short / whole == pytest.approx(scored + read * (1 - scored), abs=0.06), name


OF_LIMITS = {  # a scorer that reads at most 32 tokens, and one that reads both ways
    "short": ["model=learned", "seq_len=32"],
    "encoder": ["model=transformer", "objective=masked", "seq_len=32"],
}


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "compress=llmlingua compress.by=runs/scorer compress.rate=0.2 task.generate.prompt='🌻🌻'":
            "compress.rate=0.2: leaves nothing of a prompt of 8 tokens",
        "compress=llmlingua compress.by=runs/scorer compress.flops=1e5":
            "compress.flops=100000: is less than the ",
        "compress=truncation compress.flops=10":
            "compress.flops=10: is less than the ",
        "compress=longllmlingua compress.by=runs/scorer compress.rate=0.5":
            "compress=longllmlingua: ranks documents by a question, and the prompt has none.",
        "compress=selective_context compress.by=runs/short compress.rate=0.5":
            "compress.by=runs/short: reads at most 32 tokens, and here are",
        "compress=selective_context compress.by=runs/encoder compress.rate=0.5":
            "compress.by=runs/encoder: reads its text both ways, so",
    }.items(),
)  # fmt: skip
def test_a_compression_that_cannot_be_is_refused_before_anything_is_written(
    words, message, here, capfd
):
    from zoo.cli.train import main as train

    for name, options in OF_LIMITS.items():
        if f"runs/{name}" in words:
            data = ["data=text", f"data.path={here}/text", f"data.cache={here / 'cache'}"]
            few = ["trainer.max_steps=1", "batch_tokens=64", "valid_windows=2", "logger=none"]
            assert train([*data, *few, "size=tiny", "match=none", f"name={name}", *options]) == 0
    before = RunFolder.open("runs/reader").rows()
    prompt = "'The river moved on and on, in the dark.'"
    also = [] if "prompt=" in words else [f"task.generate.prompt={prompt}"]
    capfd.readouterr()
    code, rows = measure("reader", "task=generate", *words.split(), *also)
    assert (code, rows) == (2, before)
    (line,) = [one for one in capfd.readouterr().err.splitlines() if "compress" in one]
    assert message in line


def test_a_task_without_a_prompt_says_so_and_settings_of_nothing_are_refused(here, capfd):
    shorter = ["compress=truncation", "compress.rate=0.5"]
    assert measure("reader", "task=speed", *shorter)[0] == 2
    assert "has no prompt that compress=truncation could shorten" in capfd.readouterr().err
    for words, message in {
        "compress.rate=0.5": "compress.rate=0.5: compress=none has no settings.",
        "compress.flops=1e9": "compress.flops=1000000000: compress=none has no settings.",
        "compress=truncation": "compress.rate=: must be given, or compress.flops=.",
        "compress=truncation compress.rate=0.5 compress.flops=1e9": "compress.flops= says how much",
        "compress=truncation compress.flops=0": "compress.flops=0: must be",
        "compress=truncation_middle compress.rate=0.5 compress.by=runs/scorer": "scores nothing",
        "compress=llmlingua compress.rate=0.5": "compress.by=: must be given",
        "compress=llmlingua compress.rate=0.5 compress.by=runs/gone": "compress.by=runs/gone: must",
        "compress=truncation compress.rate=0.5 compress.by=runs/scorer": "scores nothing",
        "compress=truncation compress.rate=2": "compress.rate=2: must be",
    }.items():
        assert measure("reader", "task=passkey", *words.split())[0] == 2
        assert message in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("model", ["rwkv4", "mamba"])
def test_64k_tokens_are_compressed_under_30_seconds_in_constant_memory(model, tmp_path, capfd):
    """By a recurrent scorer of size small; time as the processor's own."""
    from building import write_text

    from zoo.cli.train import main as train

    data = ["data=text", f"data.path={write_text(tmp_path)}", f"data.cache={tmp_path / 'cache'}"]
    few = [
        "trainer.max_steps=1",
        "batch_tokens=512",
        "seq_len=64",
        "valid_windows=1",
        "logger=none",
    ]
    place = ["name=scorer", f"runs={tmp_path}/runs", f"model={model}", "size=small"]
    assert train([*data, *few, *place]) == 0
    whole = (TEXT * 200)[:65536]
    peaks = []
    for tokens in (8192, 65536):
        (tmp_path / "text.txt").write_text(whole[:tokens])
        words = [f"file={tmp_path}/text.txt", f"by={tmp_path}/runs/scorer", "rate=0.25"]
        began = time.process_time()
        assert main([*words, f"to={tmp_path}/short-{tokens}.txt"]) == 0
        spent = time.process_time() - began
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert spent < 30
    assert peaks[1] - peaks[0] < 64 * 1024  # KiB: pieces of text, no cache that grows
