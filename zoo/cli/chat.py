"""Write on with a model, line by line: `zoo chat run=<run> [option=value ...]`.

What was read and written stays in the model's state, so that a line costs its own tokens alone.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from zoo.cli.guard import held_back, run_program
from zoo.config.compose import compose
from zoo.console import say
from zoo.errors import UserError, refuse, refuse_path, refuse_unknown, sentence, short_names

USAGE = """zoo chat run=<run folder> | checkpoint=<folder or file> [option=value ...]
write on with a model: each line is added to the text, and the model goes on from there

  zoo chat run=runs/my-run temperature=0.8
  zoo chat checkpoint=models/SmolLM2-135M extension=dca tokens=300

options
  prompt=           what the text begins with; without it, with your first line
  tokens=128        the most that are written after a line
  temperature=0     0 takes the likeliest token
  top_p=1           draw from the likeliest tokens that have this probability together
  seed=0            of the random numbers
  stop=null         [text, ..] before which writing ends
  device=auto       auto, cpu, mps, cuda, cuda:1 ...
  weights=null      stored, float32, bfloat16, float16, int8 or int4
  kv_cache=null     int8 or int4: of the keys and values that attention caches
  extension=none    and extension.factor=8 and the like, as for eval.py

An empty line lets the model write on. Ctrl-D ends.
"""
TASK = "task.generate."
OF_TASK = ("prompt", "tokens", "temperature", "top_p", "seed", "stop")
INTERPOLATED = re.compile(r"(?<!\\)\$\{")  # the value of another option
PLACES = ("run", "checkpoint")
OPTIONS = (*PLACES, *OF_TASK, "device", "weights", "kv_cache", "extension")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return run_program("zoo chat", USAGE, argv, chat)


def chat(words: Sequence[str]) -> int:
    """Carry the command out; see the module."""
    bare = [word for word in words if "=" not in word or Path(word).exists()]
    named = [word for word in words if word not in bare and word.partition("=")[0] in PLACES]
    places = bare + [word.partition("=")[2] for word in named]
    if len(places) != 1 or not places[0]:
        given = " ".join(bare + named) or "no place"
        refuse_path(given, "must be one run or checkpoint", "Give it as run=<folder>")
    options = [word for word in words if word not in bare + named]
    names = [word.partition("=")[0] for word in options]
    for place, (word, name) in enumerate(zip(options, names, strict=True)):
        if name in names[:place]:
            refuse_path(word, f"{name} is given twice", "Give each option once")
        if name not in OPTIONS and not name.startswith("extension."):
            refuse_unknown(word, "option", name, OPTIONS)
    extension = [word for word in options if word.startswith("extension")]
    others = [word for word in options if word not in extension]
    others = [f"{TASK}{word}" if word.split("=")[0] in OF_TASK else word for word in others]
    try:
        with short_names("run=x task=generate ", TASK):
            config = compose("eval", ["run=x", "task=generate", *others])
            how = config.task["generate"].load()()
            how.check()
            if not isinstance(how.prompt, str):
                refuse(f"{TASK}prompt", how.prompt, "must be one text")
    except UserError as error:
        raise UserError(_of_chat(str(error), others)) from None
    from zoo.model.generation import write_text  # heavy: seconds
    from zoo.model.language_model import load_language_model
    from zoo.report.words import size

    how_read = {name: getattr(config, name) for name in ("device", "weights", "kv_cache")}
    model = load_language_model(places[0], *extension, **how_read)
    writer = model.writer(how.prompt) if how.prompt else None
    for line in sys.stdin or ():
        if writer is None:
            writer = model.writer(line)
        elif line.strip("\n"):
            writer.read(model.tokenizer.further(line))
        writer.check_length(how.tokens)
        before, began = writer.written, perf_counter()
        with held_back():
            pieces = write_text(writer, model.tokenizer, how.tokens, how.sampling, how.stop or ())
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
            sys.stdout.flush()
        count, seconds = writer.written - before, perf_counter() - began
        said = f"{count} tokens, {count / seconds:,.1f} a second; text {writer.tokens:,}"
        say(f"[{said}, state {size(writer.state_bytes)}]")
    return 0


def _of_chat(said: str, words: Sequence[str]) -> str:
    """What eval.py says of these words, in the terms of this command."""
    values = [word.removeprefix(TASK) for word in words if INTERPOLATED.search(word)]
    if values and "Interpolation" in said:
        rule = "${..} has the value of an option, and there is none of that name"
        return sentence(values[0], rule, "Write \\${ for these characters")
    setting, text, _ = said.partition(": must be text")
    if setting.startswith("prompt=") and text:
        advice = "Quote what is read as something else: prompt='\"3\"'"
        return sentence(setting, "must be one text", advice)
    return said
