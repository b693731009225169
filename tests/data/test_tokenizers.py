"""What a checkpoint's tokenizer puts before a text is read as `transformers` reads it."""

import json
from pathlib import Path

import pytest
from tokenizing import KINDS, byte_level

from zoo.config.groups import corpora
from zoo.config.schema.train import TrainConfig
from zoo.config.validate import check_option
from zoo.data.tokenizers import BYTES, bos_of, open_tokenizer
from zoo.errors import UserError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXTS = ["the cat", "", " and then the", "the\n  the", "<s>the", "caf\u00e9 \U0001f600 the"]


def template(made: "tokenizers.Tokenizer", single: str) -> "tokenizers.processors.PostProcessor":
    special = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
    pair = f"{single} $B"
    processors = tokenizers.processors
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)


AFTER = {"none": None, "begins": "<s> $A", "ends": "$A </s>", "both": "<s> $A </s>"}


def saved(folder: Path, kind: str, after: str, nested: bool = False, **settings) -> Path:
    """A tokenizer.json and the tokenizer_config.json beside it."""
    made = KINDS[kind]()
    if (single := AFTER[after]) is not None:
        made.post_processor = template(made, single)
        if nested:  # as in Llama 3
            parts = [tokenizers.processors.ByteLevel(trim_offsets=False), made.post_processor]
            made.post_processor = tokenizers.processors.Sequence(parts)
    made.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | settings))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("add", [None, False, True])
def test_ids_are_those_of_transformers(kind, after, nested, add, tmp_path):
    """But for what it puts behind a text, since here a text is written on."""
    settings = {} if add is None else {"add_bos_token": add}
    file = saved(tmp_path, kind, after, nested, **settings)
    theirs, bos = transformers.AutoTokenizer.from_pretrained(tmp_path), bos_of(str(file))
    ours = open_tokenizer(str(file), bos_token=bos)
    for text in TEXTS:
        expected = theirs.encode(text)
        if after in ("ends", "both"):
            assert expected.pop() == theirs.eos_token_id
        assert ours.start(text) == expected, text
    assert (bos is not None) == (after in ("begins", "both"))


SAMPLING = {
    "BPE dropout": lambda m: m.models.BPE(
        vocab={"t": 0, "h": 1, "e": 2, "th": 3, "the": 4},
        merges=[("t", "h"), ("th", "e")],
        dropout=0.5,
    ),
    "unigram": lambda m: m.models.Unigram(
        [("<unk>", 0.0), *((x, -2.0) for x in ("t", "h", "e", "th", "the"))], unk_id=0
    ),
}


@pytest.mark.parametrize("kind", SAMPLING)
def test_what_a_tokenizer_draws_while_its_model_is_trained_is_off(kind, tmp_path):
    made = tokenizers.Tokenizer(SAMPLING[kind](tokenizers))
    file = tmp_path / "tokenizer.json"
    made.save(str(file))
    about = json.loads(file.read_text())
    if kind == "unigram":
        about["model"] |= {"alpha": 0.1, "nbest_size": 8}
        file.write_text(json.dumps(about))
    opened = open_tokenizer(str(file))
    assert len({tuple(opened.encode(b"the" * 20)) for _ in range(8)}) == 1


def test_a_text_read_from_its_beginning_has_one_token_at_least(tmp_path):
    file = str(saved(tmp_path, "byte level", "begins"))
    assert open_tokenizer(file, bos_token=258).prompt("") == [258]
    assert open_tokenizer(file, end_token=259).prompt("") == [259]
    assert open_tokenizer(BYTES).prompt("") == [0]


def test_several_tokens_before_a_text_are_refused(tmp_path):
    made = byte_level()
    made.post_processor = template(made, "<s> </s> $A")
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="2 tokens before a text"):
        bos_of(str(tmp_path / "tokenizer.json"))


def test_every_corpus_says_which_tokens_end_and_begin_its_texts():
    """So that a student has the tokens of any teacher, whatever it reads."""
    assert corpora()
    for name, options in corpora().items():
        assert {"tokenizer", "end_token", "bos_token"} <= {*options}, name


@pytest.mark.parametrize("option", ["end_token", "bos_token"])
def test_a_token_that_the_tokenizer_has_not_is_refused(option, tmp_path):
    file = str(saved(tmp_path, "byte level", "none"))
    with pytest.raises(UserError, match=f"data.{option}=260"):
        open_tokenizer(file, **{option: 260})
    with pytest.raises(UserError, match=f"data.{option}=1"):
        open_tokenizer(BYTES, **{option: 1})


@pytest.mark.parametrize("value", ["abc", 1.5, True, -1, [1]])
@pytest.mark.parametrize("option", ["end_token", "bos_token"])
def test_a_token_that_is_no_number_is_refused(option, value):
    with pytest.raises(UserError, match=f"{option}=.*must be the number of a token, 0 or more"):
        check_option(TrainConfig, "data", corpora()["text"] | {"path": "x", option: value})


def test_where_texts_begin_is_part_of_the_tokenizers_name(tmp_path):
    file = str(saved(tmp_path, "byte level", "begins"))
    names = {open_tokenizer(file, end, bos).name for end in (None, 259) for bos in (None, 258)}
    assert len(names) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", [" the", " the caf\u00e9", "\U0001f600"])
def test_what_is_written_on_keeps_its_first_space(kind, end, tmp_path):
    ours = open_tokenizer(str(saved(tmp_path, kind, "begins")), bos_token=1)
    for text in ("the", "the cat", "caf\u00e9", "the " * 30):
        before = ours.start(text)
        whole = ours.start(text + end)
        assert whole[: len(before)] == before
        assert "".join(ours.decode(whole[len(before) :], before)) == end


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_behind_another_has_the_tokens_that_it_has_in_both(kind, tmp_path):
    ours = open_tokenizer(str(saved(tmp_path, kind, "none")))
    for before in ("cat.", "caf\u00e9\n", "\n\n", "a:"):
        for text in [*TEXTS, "\nthe", " ", "dad\n"]:
            assert ours.tokens(before) + ours.further(text) == ours.tokens(before + text)
