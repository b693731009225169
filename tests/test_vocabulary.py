"""Names and prose use the field's words: those that were replaced do not come back.

`RETIRED` holds a word, where it may not be a name, and what is used instead. A name is an
identifier of Python, whole or between underscores; the folders are those in which the word had a
meaning of its own. Elsewhere it is ordinary English, such as `seen = set()` in a loop.
"""

import ast
import io
import re
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPUTES = ("ops", "positions", "attention", "mixers", "model")  # folders of zoo/ and of tests/
ALL = ("",)

RETIRED: dict[str, tuple[tuple[str, ...], str]] = {
    "reach": (ALL, "attention (a pattern), length_extension (an experiment)"),
    "places": (("attention", "mixers"), "a PositionMap, or positions"),
    "plain": (("positions", "attention"), "identity"),
    "near": (("mixers", "ops"), "nearest, inside"),
    "few": (("attention", "mixers"), "attend_per_key, small_kv_attention"),
    "earlier": (("attention", "ops"), "shifted_views, preceding"),
    "turned": (ALL, "rotated"),
    "turn_table": (ALL, "rotary_tables"),
    "fade": (ALL, "apply_xpos_decay, decay"),
    "bucketed": (ALL, "t5_attention"),
    "triangle": (ALL, "causal_sums"),
    "pick": (("ops",), "select_backend"),
    "forget": (("ops",), "reset"),
    "unwatched": (ALL, "can_bypass_dispatcher"),
    "halves": (COMPUTES, "sublayers"),
    "shares": (COMPUTES, "cross_layer"),
    "shared": (("positions", "mixers", "model"), "cross_layer"),
    "seen": (("positions", "attention", "mixers", "ops"), "tokens_seen, visible"),
    "kept": (COMPUTES, "cached, saved"),
    "keep": (("positions", "attention", "mixers"), "evict"),
    "carry": (COMPUTES, "truncate_state"),
    "subject": (ALL, "EvalContext"),
    "attempt": (ALL, "run_guarded"),
    "told": (ALL, "failure_row, message"),
    "asked": (ALL, "requested"),
    "arm": ((*COMPUTES, "data", "tasks", "training"), "model; an arm is of an experiment"),
    "PIECE": (ALL, "CHUNK_TOKENS"),
    "SMALLEST": (ALL, "MIN_..."),
    "FEW": (ALL, "what there is little of"),
    "MOST": (ALL, "MAX_..."),
}
EXCEPTIONS = {
    ("zoo/ops/runtime/build.py", "arm"): "the processor",
    ("zoo/mixers/star.py", "places"): "a parameter of stored checkpoints",
    ("tests/mixers/test_star.py", "places"): "a parameter of stored checkpoints",
    ("zoo/mixers/linformer.py", "few"): "beside `many`: the two sides of a projection",
}

# Verbs that say of code what people do. `stand for` and a `stand-in` are ordinary English;
# `study.ask` and `study.tell` are Optuna's, `tell` of a file Python's.
VERBS = re.compile(
    r"(?<![A-Za-z])(tells?|told|asks?|asked|wants?|stands?|stood|unturned|turned)(?![a-z])", re.I
)
ALLOWED = re.compile(
    r"stands? for\b|stand-in|stand_in|STAND_IN|study\.(ask|tell)|file\.tell|stream\.tell|def tell"
)
TEXT = (".py", ".md", ".yaml", ".txt", ".toml", ".c", ".cu", ".h", ".cuh", ".j2", "Makefile")


def tracked() -> list[str]:
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git checkout")
    files = [name for name in found.stdout.splitlines() if (ROOT / name).is_file()]
    return [name for name in files if name.endswith(TEXT) and name != "tests/test_vocabulary.py"]


def names(source: str) -> Iterator[tuple[int, str]]:
    """The identifiers of a Python source that it defines or uses, with their lines."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string


def applies(file: str, folders: tuple[str, ...]) -> bool:
    parts = file.split("/")
    return folders == ALL or (parts[0] in ("zoo", "tests") and parts[1] in folders)


def retired_names(file: str, source: str) -> list[tuple[str, str]]:
    """The retired words among a source's names, each with a line that says where it is."""
    words = [word for word, (folders, _) in RETIRED.items() if applies(file, folders)]
    return [
        (word, f"{file}:{line}: {name} (use {RETIRED[word][1]})")
        for line, name in names(source)
        for word in words
        if name.strip("_") == word
    ]


def private_verbs(file: str, text: str) -> list[str]:
    return [
        f"{file}:{number}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), 1)
        if VERBS.search(ALLOWED.sub("", line))
    ]


def test_retired_names_are_gone_but_for_the_exceptions():
    wrong, excused = [], set()
    for file in tracked():
        if file.endswith(".py"):
            for word, line in retired_names(file, (ROOT / file).read_text(encoding="utf-8")):
                if (file, word) in EXCEPTIONS:
                    excused.add((file, word))
                else:
                    wrong.append(line)
    assert wrong == []
    assert excused == set(EXCEPTIONS)


def test_no_text_uses_a_private_verb():
    wrong = []
    for file in tracked():
        wrong += private_verbs(file, (ROOT / file).read_text(encoding="utf-8"))
    assert wrong == []


def test_a_retired_name_and_a_private_verb_are_found():
    assert retired_names("zoo/mixers/a.py", "kept = 1  # told") == [
        ("kept", "zoo/mixers/a.py:1: kept (use cached, saved)")
    ]
    assert retired_names("zoo/report/a.py", "kept = 1") == []
    assert private_verbs("a.md", "A row stands for one.\nIt stands alone.\ndef is_told(): ...") == [
        "a.md:2: It stands alone.",
        "a.md:3: def is_told(): ...",
    ]


def test_one_class_has_one_name():
    classes = Counter(
        node.name
        for file in sorted((ROOT / "zoo").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in classes.items() if count > 1] == []
