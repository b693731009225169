"""Shorten a text for another model, and show what was dropped: `zoo compress file=<text> ...`.

The text goes to `to=` or to the terminal. `html=` gets all of it with what was dropped struck
through, `marked=` the same as plain text, what was dropped in [- -].
"""

import html
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from zoo.cli.guard import read_options, run_program
from zoo.config.compose import compose
from zoo.config.groups import CONFIGS, choices
from zoo.config.measurable import RANKING
from zoo.config.sizes import read_sizes
from zoo.console import say
from zoo.errors import choose, refuse, short_names
from zoo.runs.files import check_place, write_text

USAGE = """zoo compress file=<text> by=<run or checkpoint> rate=<share> [option=value ...]
shorten a text to the tokens that a model finds hard to guess

  zoo compress file=book.txt by=runs/my-run rate=0.25 to=short.txt html=dropped.html
  zoo compress file=book.txt by=runs/my-run tokens=2k method=selective_context method.unit=word

options
  rate=              tokens kept over tokens there are
  tokens=            or the most tokens that are kept
  method=llmlingua   selective_context, llmlingua, longllmlingua; without by=:
                     truncation, truncation_middle
  method.<option>=   of the method, as configs/compress/<method>.yaml has them
  instruction=       text before the file's, and question= after it: counted, and kept whole but
                     by llmlingua and longllmlingua, which have budgets for them
  to=                new file for the text that is left; without it, the terminal
  html=, marked=     new files that show what was dropped
  device=auto        auto, cpu, mps, cuda, cuda:1 ...
"""
OUTPUTS = ("to", "html", "marked")
OPTIONS = ("file", "by", "rate", "tokens", "method", "instruction", "question", "device", *OUTPUTS)
PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ max-width: 46rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.6 system-ui, sans-serif;
  color-scheme: light dark }}
pre {{ white-space: pre-wrap; font: inherit }}
del {{ opacity: .45; text-decoration-color: #c33 }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<pre>{text}</pre>
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run_program("zoo compress", USAGE, argv, compress)


def compress(words: Sequence[str]) -> int:
    """Carry the command out; see the module."""
    given, settings = _read(words)
    text = _text(given["file"])
    method, rate, tokens = _method(given, settings)
    _check_outputs(given)
    from zoo.compression.prompt import compressed, prompt_of  # heavy: seconds
    from zoo.compression.scorer import Scorer
    from zoo.data.tokenizers import open_tokenizer
    from zoo.model.language_model import load_language_model

    scorer, tokenizer = None, open_tokenizer("bytes")
    if "by" in given:
        model = load_language_model(given["by"], device=given.get("device", "auto"))
        scorer = Scorer(model, given["by"])
        tokenizer = scorer.tokenizer
    prompt = prompt_of(text, tokenizer, given.get("instruction", ""), given.get("question", ""))
    size = prompt.size()
    if size < 2:
        rule = f"has {size} token, and one must be left" if size else "is empty"
        refuse("file", given["file"], rule, "Give a longer text")
    with short_names("text="):
        kept = compressed(method, scorer, prompt, rate=rate, tokens=tokens)
    if not {*kept} & {number for part in prompt.demonstrations for number in part}:
        option = "tokens" if "tokens" in given else "rate"
        refuse(option, given[option], "leaves nothing of the file itself", "Keep more of it")
    left, shown = prompt.text(kept), marks(prompt.pieces, kept)
    summary = f"{prompt.size(kept):,} of {size:,} tokens are left ({prompt.size(kept) / size:.1%})"
    if "html" in given:
        title = html.escape(Path(given["file"]).name)
        body = "".join(_html(part, is_kept) for part, is_kept in shown)
        write_text(Path(given["html"]), PAGE.format(title=title, summary=summary, text=body))
    if "marked" in given:
        lines = "".join(part if is_kept else f"[-{part}-]" for part, is_kept in shown)
        write_text(Path(given["marked"]), lines)
    if "to" in given:
        write_text(Path(given["to"]), left)
    else:
        sys.stdout.write(left)
    say(summary)
    return 0


def marks(pieces: Sequence[Any], kept: Sequence[int]) -> list[tuple[str, bool]]:
    """A text in runs of what was kept and what was dropped: (text, whether it was kept)."""
    chosen = {*kept}
    runs = groupby(enumerate(pieces), key=lambda pair: pair[0] in chosen)
    return [("".join(piece.text for _, piece in run), is_kept) for is_kept, run in runs]


def _html(text: str, kept: bool) -> str:
    escaped = html.escape(text)
    return escaped if kept else f"<del>{escaped}</del>"


def _read(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options that are given, and those of the method as compress.method.<option>=<value>."""
    of_method = [word for word in words if word.startswith("method.")]
    given = read_options([word for word in words if word not in of_method], OPTIONS)
    if "file" not in given:
        refuse("file", "", "must be given", "See zoo compress --help")
    for part in ("instruction", "question"):
        for word in of_method:
            name, _, value = word.partition("=")
            if name == f"method.{part}_rate" and part not in given:
                refuse(name, value, f"there is no {part}", f"Give {part}=, or leave it out")
    return given, [f"compress.{word}" for word in of_method]


def _check_outputs(given: dict[str, str]) -> None:
    """Refuse an output that cannot be written, or would replace the input or any other file."""
    written: dict[Path, str] = {}
    for name in OUTPUTS:
        if name not in given:
            continue
        file = Path(given[name]).absolute()
        if not file.parent.is_dir():
            refuse(name, given[name], "must be in a folder that is there", "Make that folder first")
        check_place(name, given[name])
        if os.path.lexists(file):
            refuse(name, given[name], "is there already", "Name a new file, or remove it")
        file = file.parent.resolve() / file.name
        if file in written:
            refuse(name, given[name], f"is the file of {written[file]}= as well", "Name another")
        written[file] = name


def _method(given: dict[str, str], settings: list[str]) -> tuple[Any, float | None, int | None]:
    """The method with its options, the rate and the number of tokens; one of the two is None."""
    names = [name for name in choices("compress") if name != "none"]
    name = choose("method", given.get("method", "llmlingua"), names)
    if ("rate" in given) == ("tokens" in given):
        refuse("rate", given.get("rate", ""), "must be given, or tokens=, and not both")
    file = CONFIGS / "compress" / f"{name}.yaml"
    needs = yaml.safe_load(file.read_text(encoding="utf-8"))["by"] == "???"
    if needs != ("by" in given):
        rule = f"must be given for method={name}" if needs else f"method={name} scores nothing"
        refuse("by", given.get("by", ""), rule, "See zoo compress --help")
    if "device" in given and not needs:
        refuse("device", given["device"], f"method={name} runs no model", "Leave it out")
    by = [f"compress.by={given['by']}"] if needs else []
    words = ["run=x", f"compress={name}", f"compress.rate={given.get('rate', 0.5)}", *by, *settings]
    with short_names("compress."):
        found = compose("eval", words).compress
    assert found.method is not None
    if found.method.target == RANKING and "question" not in given:  # also where nothing is dropped
        rule = f"must be given for method={name}, which ranks paragraphs by it"
        refuse("question", "", rule, "Use method=llmlingua without one")
    if "tokens" not in given:
        return found.method.load(), found.rate, None
    tokens = read_sizes(given["tokens"])
    tokens = int(tokens) if isinstance(tokens, str) and tokens.isdecimal() else tokens
    if not isinstance(tokens, int) or tokens < 1:
        refuse("tokens", given["tokens"], "must be a number of tokens, at least 1")
    return found.method.load(), None, tokens


def _text(name: str) -> str:
    """The text of a file. UserError where it cannot be read, is empty, or is no text."""
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        refuse("file", name, f"cannot be read ({error.strerror})", "Name a text file")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        refuse("file", name, "must be text in UTF-8, and this is binary", "Name a text file")
    if "\0" in text:
        refuse("file", name, "must be text, and this has bytes of zero", "Name a text file")
    if not text:
        refuse("file", name, "is empty", "Give a longer text")
    return text
