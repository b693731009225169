"""A GGUF file gives the weights, the options and the tokens of the model it was made of."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
from zoo.data.tokenizers import bos_of, open_tokenizer
from zoo.errors import UserError
from zoo.pretrained.checkpoint import read_checkpoint
from zoo.pretrained.families import describe
from zoo.pretrained.gguf import GGUFFile

gguf = pytest.importorskip("gguf")

WIDTH, HEADS, GROUPS, HIDDEN, VOCAB = 32, 4, 2, 64, 260
TOKENS = ["<|end|>", "ab", "abc", "Ġ1"]
MERGES = ["a b", "ab c", "Ġ 1"]


def letters() -> list[str]:
    """The 256 letters by which a byte-level tokeniser writes bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp lays them out: the two of a rotary pair beside each other."""
    rows, columns = weight.shape
    width = rows // heads
    order = [
        head * width + half * width // 2 + i
        for head in range(heads)
        for i in range(width // 2)
        for half in (0, 1)
    ]
    return weight[order].reshape(rows, columns)


def write(
    path: Path,
    quantised: str = "F32",
    without: str = "",
    groups: int = GROUPS,
    head: int = WIDTH // HEADS,
    **fields,
) -> dict[str, np.ndarray]:
    """A Llama of one layer and random weights; returns these under transformers' names.

    Its metadata have no key `without`, and those of `fields` beside theirs, or instead of them.
    """
    draw = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens": (VOCAB, WIDTH),
        "model.norm": (WIDTH,),
        "model.layers.0.input_layernorm": (WIDTH,),
        "model.layers.0.self_attn.q_proj": (HEADS * head, WIDTH),
        "model.layers.0.self_attn.k_proj": (groups * head, WIDTH),
        "model.layers.0.self_attn.v_proj": (groups * head, WIDTH),
        "model.layers.0.self_attn.o_proj": (WIDTH, HEADS * head),
        "model.layers.0.post_attention_layernorm": (WIDTH,),
        "model.layers.0.mlp.gate_proj": (HIDDEN, WIDTH),
        "model.layers.0.mlp.up_proj": (HIDDEN, WIDTH),
        "model.layers.0.mlp.down_proj": (WIDTH, HIDDEN),
    }
    weights = {
        f"{name}.weight": draw.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(groups)
    writer.add_rope_freq_base(20000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_rope_dimension_count(head)
    writer.add_tokenizer_model(fields.pop("tokenizer", "gpt2"))
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*letters(), *TOKENS])
    writer.add_token_types([1] * 256 + [3, 1, 1, 1])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(256)
    written = writer.kv_data[0]
    for key, value in fields.items():
        name = key.replace("__", ".")
        if name in written:
            written[name].value = value
        else:
            writer.add_uint32(name, value)
    written.pop(without, None)
    kind = gguf.GGMLQuantizationType[quantised]
    for name, weight in weights.items():
        inside = name.removesuffix(".weight")
        last = inside if inside in names else inside.rpartition(".")[2]
        block = "blk.0." if "layers.0" in name else ""
        stored = weight
        if last in ("q_proj", "k_proj"):
            stored = permuted(weight, HEADS if last == "q_proj" else groups)
        if stored.ndim == 2:
            stored = gguf.quants.quantize(stored, kind)
            writer.add_tensor(f"{block}{names[last]}.weight", stored, raw_dtype=kind)
        else:
            writer.add_tensor(f"{block}{names[last]}.weight", stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize(("quantised", "off"), [("F32", 0), ("Q8_0", 0.02), ("Q4_1", 0.3)])
def test_weights_come_back_in_the_order_of_transformers(quantised, off, tmp_path):
    weights = write(tmp_path / "a.gguf", quantised)
    read = GGUFFile(tmp_path / "a.gguf").weights()
    assert read.keys() == weights.keys()
    for name, weight in weights.items():
        assert (read[name] - torch.from_numpy(weight)).abs().max() <= off, name


def test_the_options_are_those_of_the_file(tmp_path):
    write(tmp_path / "a.gguf")
    described = describe(GGUFFile(tmp_path / "a.gguf").config())
    assert described.end_token == 256
    assert described.vocab_size == VOCAB
    for word in ("size.width=32", "model.mixer.kv_heads=2", "model.tied=true", "seq_len=128"):
        assert word in described.words
    assert "model.norm_eps=1e-05" in described.words
    assert "model.positions.rope_base=20000.0" in described.words


def test_its_tokenizer_merges_gives_text_back_and_keeps_digits_apart(tmp_path):
    from tokenizers import Tokenizer

    write(tmp_path / "a.gguf")
    tokenizer = Tokenizer.from_str(GGUFFile(tmp_path / "a.gguf").tokenizer())
    assert tokenizer.encode("abcab", add_special_tokens=False).ids == [258, 257]
    assert tokenizer.encode(" 1", add_special_tokens=False).tokens == ["Ġ", "1"]  # a digit alone
    assert tokenizer.encode("<|end|>").ids == [256]
    text = "Jürgen, 日本 and\n\n  12 more\t"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"architecture": "gemma"}, "general.architecture=gemma"),
        ({"llama__expert_count": 4}, "llama.expert_count"),
        ({"tokenizer": "llama"}, "tokenizer.ggml.model=llama"),
    ],
)
def test_what_is_not_read_is_refused_by_name(fields, said, tmp_path):
    write(tmp_path / "a.gguf", **fields)

    def read():
        file = GGUFFile(tmp_path / "a.gguf")
        return file.config(), file.tokenizer()

    with pytest.raises(UserError, match=re.escape(said)):
        read()


@pytest.mark.parametrize("length", [0, 3, 40, 2000])
def test_a_truncated_file_is_refused_in_one_line(length, tmp_path):
    path = tmp_path / "a.gguf"
    write(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError) as error:
        GGUFFile(path)
    assert "\n" not in str(error.value)


def test_a_file_that_ends_within_its_header_says_where(tmp_path):
    path, cut = tmp_path / "a.gguf", tmp_path / "cut.gguf"
    write(path)
    whole, end = path.read_bytes(), gguf.GGUFReader(path).data_offset
    for length in [*range(1, 200, 7), *range(200, end, 331), end - 1]:
        cut.write_bytes(whole[:length])
        line = rf"^checkpoint={cut}: must be a whole GGUF file \(it ends at byte {length}\)\.$"
        with pytest.raises(UserError, match=line):
            GGUFFile(cut)


def test_the_width_of_heads_is_the_one_of_keys_and_values(tmp_path):
    path, own = tmp_path / "a.gguf", WIDTH // HEADS
    write(path)
    plain = describe(GGUFFile(path).config())
    both = ("llama__attention__key_length", "llama__attention__value_length")
    for names in (both, both[:1], both[1:]):
        write(path, **dict.fromkeys(names, own))
        assert describe(GGUFFile(path).config()) == plain
        write(path, without="llama.rope.dimension_count", **dict.fromkeys(names, own))
        assert describe(GGUFFile(path).config()) == plain
    write(path, head=6, **dict.fromkeys(both, 6))
    assert "model.mixer.head_width=6" in describe(GGUFFile(path).config()).words
    assert logits_of(path).isfinite().all()
    for lengths in ((6, own), (own, 6), (6, 6)):  # the last: a part of each head is rotated
        write(path, **dict(zip(both, lengths, strict=True)))
        with pytest.raises(
            UserError, match=rf"^checkpoint={path}: .* not read\. Use the model's s"
        ):
            GGUFFile(path).config()


def test_the_json_is_what_tokenizers_writes(tmp_path):
    write(tmp_path / "a.gguf")
    tree = json.loads(GGUFFile(tmp_path / "a.gguf").tokenizer())
    assert tree["model"]["merges"] == [["a", "b"], ["ab", "c"], ["Ġ", "1"]]


KEYS = {  # of what `write` writes, with what a file without them means; None: it is refused
    **{f"llama.{key}": None for key in ("block_count", "context_length", "embedding_length")},
    **{f"llama.{key}": None for key in ("feed_forward_length", "attention.head_count")},
    "llama.attention.layer_norm_rms_epsilon": None,
    "llama.attention.head_count_kv": HEADS,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": WIDTH // HEADS,
    "llama.vocab_size": VOCAB,
    "general.architecture": None,
    "tokenizer.ggml.model": None,
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": None,
    "tokenizer.ggml.token_type": [1] * VOCAB,
    "tokenizer.ggml.merges": None,
}


def test_a_key_that_is_absent_has_the_default_of_the_format_or_is_named(tmp_path):
    path = tmp_path / "a.gguf"
    write(path)
    keys = [name for name in gguf.GGUFReader(path).fields if not name.startswith("GGUF.")]
    assert {*keys} == {*KEYS, "tokenizer.ggml.eos_token_id"}

    def read() -> tuple:
        file = GGUFFile(path)
        return file.config(), json.loads(file.tokenizer()), describe(file.config())

    for key, default in KEYS.items():
        write(path, without=key, groups=HEADS)
        if default is None:
            with pytest.raises(UserError, match=rf"^checkpoint={path}: has no {key}\. Give"):
                read()
        else:
            config, tokenizer, described = read()
            write(path, groups=HEADS, **{key.replace(".", "__"): default})
            written, *others = read()
            # config.json's reader takes as many keys and values as queries, and whole heads
            assert config == {key: config[key] and value for key, value in written.items()}
            assert [tokenizer, described] == others, key
    write(path, without="tokenizer.ggml.eos_token_id")
    assert describe(GGUFFile(path).config()).end_token is None


def test_a_file_is_opened_once_until_it_changes(tmp_path, monkeypatch):
    write(path := tmp_path / "a.gguf")
    opened = []
    real = GGUFFile.__init__
    monkeypatch.setattr(
        GGUFFile, "__init__", lambda self, path: opened.append(path) or real(self, path)
    )
    described, _ = read_checkpoint(path, None)
    assert read_checkpoint(path, tmp_path)[0] == described
    assert len(opened) == 1
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="whole GGUF file"):
        read_checkpoint(path, None)


def parts_of(path: Path) -> tuple:
    """What makes the model: the options, its tokenizer's name and a digest of its weights."""
    described, file = read_checkpoint(path, path.parent)
    name = open_tokenizer(str(file), described.end_token, bos_of(str(file))).name
    weights = GGUFFile(path).weights()
    return described, name, {key: one.numpy().tobytes() for key, one in weights.items()}


def logits_of(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return zoo.load(path).backbone(torch.arange(40)[None])


@pytest.mark.parametrize("seed", range(25))
def test_changed_bytes_are_refused_in_one_line_or_give_a_model(seed, tmp_path):
    """Of everything but the weights, whose numbers may be any."""
    draw, path = random.Random(seed), tmp_path / "a.gguf"
    write(path)
    changed, end = bytearray(path.read_bytes()), gguf.GGUFReader(path).data_offset
    before = parts_of(path)
    for _ in range(draw.choice((1, 1, 3))):
        changed[draw.randrange(end)] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
    path.write_bytes(changed)
    said = ""
    try:
        described, _, weights = parts_of(path)
        if (described, weights) != (before[0], before[2]):  # or it is another tokenizer at most
            assert logits_of(path).isfinite().all()
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert "config.json" not in said


def test_a_number_that_is_not_finite_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    write(path)
    path.write_bytes(path.read_bytes()[:-4] + np.float32("nan").tobytes())
    with pytest.raises(UserError, match=r"blocks\.0\.\S+\.weight has a number that is not finite"):
        zoo.load(path)
