"""Checkpoints saved by `transformers`, opened here: logits are theirs, what differs is refused."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    CASES,
    LLAMA,
    LLAMA3,
    NEOX,
    PAIRS,
    SU,
    VOCAB,
    opened,
    save,
    scaled,
    transformers,
)

from zoo.config.compose import compose
from zoo.errors import UserError
from zoo.model.pretrained import check_unchanged, identify
from zoo.pretrained.config_reader import SILENT
from zoo.pretrained.families import describe
from zoo.pretrained.rope_scaling import SCALINGS
from zoo.pretrained.weights import open_weights, read_json
from zoo.tasks.identity import compressed_identity


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    theirs, ours = save(tmp_path, case), opened(tmp_path)
    for length in (1, 2, 15, 33, 200):
        tokens = torch.randint(0, VOCAB, (2, length))
        with torch.no_grad():
            expected = theirs(tokens, use_cache=False).logits
        assert torch.allclose(ours(tokens), expected, atol=1e-5, rtol=1e-5), length


@pytest.mark.parametrize("case", ["qwen3", "gpt_neox", "rwkv"])
def test_in_float64_little_is_left_of_the_difference(case, tmp_path):
    """What `transformers` keeps in float32: norms, rotary tables, averages."""
    theirs, ours = save(tmp_path, case).double(), opened(tmp_path).double()
    tokens = torch.randint(0, VOCAB, (1, 60))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
    assert torch.allclose(ours(tokens), expected, atol=1e-6, rtol=0)


DYNAMIC = {
    "dynamic": scaled("dynamic", factor=3.0),
    "dynamic, with a length": scaled("dynamic", factor=3.0, original_max_position_embeddings=16),
    "longrope": scaled(
        "longrope",
        factor=4.0,
        original_max_position_embeddings=16,
        short_factor=PAIRS,
        long_factor=[2 * one for one in PAIRS],
    ),
}


@pytest.mark.parametrize("kind", DYNAMIC)
def test_frequencies_that_follow_the_length_are_those_of_transformers(kind, tmp_path):
    """At every length within the trained one; beyond, for the queries of the last step, which take
    the length of the whole text (of one layer: what earlier queries read does not enter)."""
    CASES[kind] = ("Llama", LLAMA | DYNAMIC[kind] | {"num_hidden_layers": 1})
    theirs, ours = save(tmp_path, kind), opened(tmp_path)
    del CASES[kind]
    step = 16 if kind == "longrope" else 64
    for length in (1, 15, step, 2 * step, 3 * step, 5 * step):
        tokens = torch.randint(0, VOCAB, (2, length))
        with torch.no_grad():
            expected = theirs(tokens, use_cache=False).logits[:, -step:]
        found = ours(tokens)[:, -step:]
        assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5), length
        state, parts = ours.empty_state(2), []
        for part in tokens.split(11, 1):
            logits, state = ours(part, state)
            parts.append(logits)
        assert torch.allclose(torch.cat(parts, 1)[:, -step:], expected, atol=1e-5, rtol=1e-5)


ROPE_TYPES = {  # with settings of heads whose rotated part has eight channels
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"factor": 4.0, **SU},
    "llama3": {key: value for key, value in LLAMA3.items() if not key.startswith("rope")},
    "proportional": {"factor": 2.0},
    "axial": {},
}
ROTATED = {  # the family, its options and the share of each head that is rotated
    "llama": ("Llama", LLAMA, 1.0),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 8}, 1.0),
    "gpt_neox": ("GPTNeoX", NEOX, 0.5),
}


@pytest.mark.parametrize("family", ROTATED)
@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_every_rope_type_of_transformers_is_read_or_refused_by_its_name(
    kind, family, tmp_path, monkeypatch
):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert {*ROPE_INIT_FUNCTIONS} <= {*ROPE_TYPES}
    name, options, share = ROTATED[family]
    supported = kind == "default" or kind in SCALINGS
    if supported and (kind != "proportional" or share == 1):
        more = {"partial_rotary_factor": share} if share < 1 else {}
        case = name, options | scaled(kind, **ROPE_TYPES[kind], **more)
        monkeypatch.setitem(CASES, "scaled", case)
        theirs, ours = save(tmp_path, "scaled"), opened(tmp_path)
        tokens = torch.randint(0, VOCAB, (2, 15))
        with torch.no_grad():
            expected = theirs(tokens, use_cache=False).logits
        assert torch.allclose(ours(tokens), expected, atol=1e-5, rtol=1e-5)
    if not supported or kind == "proportional":
        save(tmp_path, family)
        altered(tmp_path, **scaled(kind, **ROPE_TYPES[kind], partial_rotary_factor=0.5))
        with pytest.raises(UserError, match=rf"^config.json: rope_scaling.rope_type='{kind}': "):
            opened(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_prefill_and_decoding_give_the_tokens_of_transformers(case, tmp_path):
    theirs, ours = save(tmp_path, case), opened(tmp_path)
    prompt = torch.randint(0, VOCAB, (1, 21))
    expected = theirs.generate(
        prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    logits, state = ours(prompt, ours.empty_state(1))
    written = prompt
    for _ in range(64):
        token = logits[:, -1:].argmax(-1)
        written = torch.cat([written, token], 1)
        logits, state = ours(token, state)
    assert torch.equal(written, expected)


def test_shards_are_one_checkpoint(tmp_path):
    theirs = save(tmp_path, "llama", max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens = torch.randint(0, VOCAB, (1, 9))
    assert torch.allclose(opened(tmp_path)(tokens), theirs(tokens).logits, atol=1e-5)


def test_weights_in_bfloat16_are_read_in_float32(tmp_path):
    theirs = save(tmp_path, "llama")
    theirs.bfloat16().save_pretrained(tmp_path)
    assert open_weights(tmp_path)["model.norm.weight"].dtype == torch.bfloat16
    tokens = torch.randint(0, VOCAB, (1, 9))
    assert torch.allclose(opened(tmp_path)(tokens), theirs.float()(tokens).logits, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's list of mapped files")
def test_opening_copies_no_float32_weight(tmp_path):
    save(tmp_path, "llama")
    model = opened(tmp_path)
    mapped = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(tmp_path / "model.safetensors"))
    ]
    for name, weight in model.named_parameters():
        assert any(start <= weight.data_ptr() < end for start, end in mapped), name


def altered(folder: Path, **changes) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: v for key, v in config.items() if v != "absent"}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "lama"}, "llama"),
        ({"model_type": "absent"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types=["),
        ({"layer_types": []}, "layer_types=[]"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"logit_softcapping": 30.0}, "logit_softcapping=30.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "rope_type='su'"),
        (scaled("longrope", factor=4.0, attention_factor=1.7, **SU), "attention_factor=1.7"),
        (
            {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}},
            "rope_scaling.high_freq_factor=1.0: must be more than low_freq_factor=1.0",
        ),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"rms_norm_eps": None}, "must give rms_norm_eps, a number. Put back the file"),
    ],
)
def test_what_the_zoo_does_not_compute_is_refused_by_name(changes, said, tmp_path):
    save(tmp_path, "llama")
    altered(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        opened(tmp_path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scalar", [1e30, 1e-30, 0.5])
@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_scale_of_scores_that_no_heads_have_is_refused(family, scalar, tmp_path):
    save(tmp_path, family)
    altered(tmp_path, query_pre_attn_scalar=scalar)
    with pytest.raises(UserError, match=r"query_pre_attn_scalar=\S+: must be a number from 1 to"):
        opened(tmp_path)


def test_every_key_of_every_family_is_read_or_known_to_be_silent(tmp_path):
    """A key that no table knows is refused: none of a family's own may be."""
    for case in CASES:
        save(tmp_path / case, case)
        config = read_json(tmp_path / case / "config.json")
        describe(config)
        with pytest.raises(UserError, match="new_key"):
            describe(config | {"new_key": 1})


LONG = torch.arange(150)[None] % VOCAB  # beyond the trained length and the widest window


def others(value: Any) -> list[Any]:
    """Values that a field might have instead, and that say something else."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [2 * value + 1]
    if isinstance(value, str):
        return ["another"]
    if isinstance(value, list):
        return [[*value[:-1], *others(value[-1])]] if value else [[1]]
    if isinstance(value, dict):
        changed = [value | {key: new} for key, one in value.items() for new in others(one)]
        return [*changed, value | {"new_key": 1}]
    return [3, True, "another"]  # of a field that is not set


@pytest.mark.parametrize("case", CASES)
def test_every_field_of_a_config_is_honoured_or_refused_by_name(case, tmp_path):
    """Whatever a field is changed to, another model is built or one line names the field; one that
    changes nothing changes nothing in `transformers` either."""
    theirs = save(tmp_path, case)
    config = read_json(tmp_path / "config.json")
    before = describe(config)
    changes = [(key, new) for key in {*config} - SILENT for new in others(config[key])]
    for key, value in changes:
        try:
            same = describe(config | {key: value}) == before
        except UserError:
            same = False
        if same and (again := reopened(theirs, config | {key: value}, tmp_path)) is not None:
            assert torch.equal(again, logits_of(theirs)), (key, value)


FIRST = {family: case for case, (family, _) in reversed(CASES.items())}


@pytest.mark.parametrize("family", FIRST)
def test_a_config_with_another_value_in_a_field_is_read_as_transformers_reads_it(family, tmp_path):
    """Within the trained length and beyond: whatever is not refused has the same logits there."""
    from huggingface_hub.errors import StrictDataclassError

    theirs = save(tmp_path, FIRST[family])
    config, weights, read = read_json(tmp_path / "config.json"), theirs.state_dict(), 0
    for key in sorted({*config} - SILENT):
        for value in others(config[key]):
            changed = config | {key: value}
            (tmp_path / "config.json").write_text(json.dumps(changed))
            try:
                ours = opened(tmp_path)
            except UserError:
                continue
            try:
                again = type(theirs)(type(theirs.config).from_dict(changed)).eval()
            except StrictDataclassError:  # as a whole number where it has 3.0
                continue
            again.load_state_dict(weights)
            expected = logits_of(again)
            assert torch.allclose(ours(LONG), expected, atol=1e-4), (key, value)
            read += 1
    assert read > 1 or "max_position_embeddings" not in config  # others have widths alone


def every_value() -> dict[str, list[Any]]:
    """Of every key that a family's config.json has, the values that it has in some case."""
    found: dict[str, list[Any]] = {}
    for family, options in CASES.values():
        config = json.loads(getattr(transformers, f"{family}Config")(**options).to_json_string())
        for key in {*config} - SILENT:
            if config[key] is not None and config[key] not in found.setdefault(key, []):
                found[key].append(config[key])
    return found


def each_left_out(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key, also of the rotary settings, and the config without it."""
    for key, value in config.items():
        yield key, {other: one for other, one in config.items() if other != key}
        for inner, without in each_left_out(value) if type(value) is dict else ():
            yield f"{key}.{inner}", config | {key: without}


OLDER = {f"{case}, before layer_types": case for case in ("qwen2, sliding", "gemma2")}


@pytest.mark.parametrize("case", [*OLDER, *(case for case in FIRST.values() if case != "gemma2")])
def test_a_key_left_out_or_of_another_family_means_what_it_means_to_transformers(case, tmp_path):
    """It is refused, or the logits are the same: beyond the windows and the trained length, of
    weights so large that what is attended to counts."""
    theirs = save(tmp_path, OLDER.get(case, case))
    for name, weight in theirs.named_parameters():
        if weight.dim() > 1 and "A_log" not in name and "conv" not in name:
            weight.data *= 6
    theirs.save_pretrained(tmp_path)
    config, kind = read_json(tmp_path / "config.json"), type(theirs.config)
    if case in OLDER:
        del config["layer_types"]
    changes = [(key, without) for key, without in each_left_out(config) if key != "model_type"]
    foreign = {key: values for key, values in every_value().items() if key not in config}
    changes += [(key, config | {key: one}) for key, values in foreign.items() for one in values]
    silent, refused = dict.fromkeys(SILENT), []
    settings = {**kind.from_pretrained(tmp_path).to_dict(), **silent}
    described, found = describe(config), {}
    for key, changed in changes:
        try:
            again = describe(changed)
            (tmp_path / "config.json").write_text(json.dumps(changed))
            read = kind.from_pretrained(tmp_path)
            if again == described and {**read.to_dict(), **silent} == settings:
                continue
            if repr(again) not in found:
                found[repr(again)] = opened(tmp_path)(LONG)
        except UserError as error:
            refused.append((key, str(error)))
            continue
        other = type(theirs)(read).eval()
        other.load_state_dict(theirs.state_dict())
        assert torch.allclose(found[repr(again)], logits_of(other), atol=1e-3), key
    assert {"hidden_size", "num_hidden_layers"} <= {key for key, _ in refused}
    assert not any("\n" in said for _, said in refused)


ODD = ([], {}, None, -1, 0, "x", 1e30, True)
ABSENT = ("rope_scaling", "rope_theta", "head_dim", "partial_rotary_factor", "sliding_window")
ABSENT += ("layer_types", "original_max_position_embeddings")


@pytest.mark.parametrize("case", ["llama", "qwen2", "mamba"])
def test_an_odd_value_of_a_key_is_refused_or_means_what_it_means_to_transformers(case, tmp_path):
    theirs = save(tmp_path, case)
    config = read_json(tmp_path / "config.json")
    before, logits, refused = describe(config), logits_of(theirs), 0
    inside = config.get("rope_parameters", {})
    changes = [{key: value} for key in ({**config} | dict.fromkeys(ABSENT)) for value in ODD]
    changes += [{"rope_parameters": inside | {key: value}} for key in inside for value in ODD]
    for change in changes:
        said, found = "", logits
        try:
            if describe(config | change) != before:
                (tmp_path / "config.json").write_text(json.dumps(config | change))
                with torch.no_grad():
                    found = opened(tmp_path)(LONG)
        except UserError as error:
            said = str(error)
        refused += bool(said)
        assert "\n" not in said, change
        if not torch.allclose(found, logits, atol=1e-5):
            expected = reopened(theirs, config | change, tmp_path)
            assert expected is not None, change
            assert torch.allclose(found, expected, atol=1e-5), change
    assert refused > len(changes) / 3


@pytest.mark.parametrize(
    "old", [{"rope_type": "nope"}, {"type": "linear", "factor": 2.0}, {"rope_theta": 5.0}]
)
def test_rope_scaling_that_contradicts_rope_parameters_is_refused(old, tmp_path):
    save(tmp_path, "llama")
    config = read_json(tmp_path / "config.json")
    describe(config | {"rope_scaling": config["rope_parameters"]})
    with pytest.raises(UserError, match=r"rope_scaling=.*: says otherwise than rope_parameters"):
        describe(config | {"rope_scaling": old})


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
@pytest.mark.parametrize("window", [9, 17, 64, 100])
def test_a_window_beside_a_scaling_is_read_or_refused(window, kind, tmp_path, monkeypatch, capsys):
    """It is refused where it is longer than the texts before the scaling, whose positions were
    trained, or where the scaling depends on the length of the text."""
    original = {"original_max_position_embeddings": 16} if kind == "yarn" else {}
    settings = LLAMA | {"sliding_window": window} | scaled(kind, factor=4.0, **original)
    monkeypatch.setitem(CASES, "windowed", ("Mistral", settings))
    theirs = save(tmp_path, "windowed")
    config = read_json(tmp_path / "config.json")
    if window < 64 and (kind == "dynamic" or (kind == "yarn" and window > 16)):
        with pytest.raises(UserError, match=f"sliding_window={window}: is not supported"):
            describe(config)
    elif window < 64:
        assert not describe(config).notes
        for length in (window, 40, 100):
            tokens = torch.randint(0, VOCAB, (1, length))
            with torch.no_grad():
                expected = theirs(tokens, use_cache=False).logits
            assert torch.allclose(opened(tmp_path)(tokens), expected, atol=1e-5, rtol=1e-5)
    else:
        (note,) = describe(config).notes
        assert note.startswith(f"sliding_window={window}: does not act beside rope_scaling")
        opened(tmp_path)
        assert f"{tmp_path}: {note}\n" in capsys.readouterr().err
        assert not describe(config | {"sliding_window": None}).notes


def test_a_window_that_no_trained_text_fills_is_said():
    config = {**LLAMA, "model_type": "mistral", "hidden_act": "silu", "sliding_window": 100}
    (note,) = describe(config).notes
    length = config["max_position_embeddings"]
    assert note.startswith(f"sliding_window=100: acts on texts of more than the {length} tokens")
    assert not describe(config | {"sliding_window": length}).notes


def logits_of(theirs: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return theirs(LONG, use_cache=False).logits


def reopened(theirs: Any, config: dict[str, Any], folder: Path) -> torch.Tensor | None:
    """The logits of the weights under another config.json; None where `transformers` refuses it."""
    (folder / "config.json").write_text(json.dumps(config))
    try:
        again = type(theirs).from_pretrained(folder).eval()
        return logits_of(again)
    except (ValueError, TypeError, ArithmeticError):
        return None


def damage_missing_shard(folder: Path) -> None:
    save(folder, "llama", max_shard_size="20KB")
    next(folder.glob("*.safetensors")).unlink()


def damage_truncated(folder: Path) -> None:
    save(folder, "llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_header(folder: Path) -> None:
    save(folder, "llama")
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def damage_pickle(folder: Path) -> None:
    save(folder, "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damage_config(folder: Path) -> None:
    save(folder, "llama")
    (folder / "config.json").write_text("{")


def damage_no_tokenizer(folder: Path) -> None:
    save(folder, "llama")
    (folder / "tokenizer.json").unlink()


def damage_another_size(folder: Path) -> None:
    save(folder, "llama")
    altered(folder, intermediate_size=48)


def damage_fewer_tokens(folder: Path) -> None:
    save(folder, "llama")
    altered(folder, vocab_size=VOCAB - 1)


def damage_countless_layers(folder: Path) -> None:
    save(folder, "llama")
    altered(folder, num_hidden_layers=10**7)


def damage_no_head(folder: Path) -> None:
    save(folder, "llama, tied")
    altered(folder, tie_word_embeddings=False)


def damage_no_embedding(folder: Path) -> None:
    save_with(folder, "model.embed_tokens.weight", lambda _: None)


def damage_a_tensor_less(folder: Path) -> None:
    save_with(folder, "model.layers.1.mlp.up_proj.weight", lambda _: None)


def damage_not_a_number(folder: Path) -> None:
    save_with(folder, "model.norm.weight", lambda weight: weight.index_fill(0, LAST, math.nan))


def damage_infinite(folder: Path) -> None:
    save_with(folder, "model.norm.weight", lambda weight: weight.index_fill(0, LAST, -math.inf))


def damage_integers(folder: Path) -> None:
    save_with(folder, "model.layers.1.mlp.up_proj.weight", lambda weight: weight.to(torch.int8))


def damage_an_embedding_of_no_rows(folder: Path) -> None:
    save_with(folder, "model.embed_tokens.weight", lambda _: torch.tensor(1.0))


LAST = torch.tensor([31])


def save_with(folder: Path, name: str, change: Callable[[torch.Tensor], Any]) -> None:
    """A Llama one of whose weights was changed; None leaves it out."""
    from safetensors.torch import load_file, save_file

    save(folder, "llama")
    weights = load_file(folder / "model.safetensors")
    weights[name] = change(weights[name])
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "damage", [value for name, value in sorted(globals().items()) if name.startswith("damage_")]
)
def test_a_damaged_checkpoint_is_refused_in_one_line(damage, tmp_path):
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


def test_files_outside_the_folder_are_not_read(tmp_path):
    save(tmp_path / "one", "llama", max_shard_size="20KB")
    file = tmp_path / "one" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = index["weight_map"]["lm_head.weight"]
    (tmp_path / "one" / shard).rename(tmp_path / shard)
    placed = {name: f"../{at}" if at == shard else at for name, at in index["weight_map"].items()}
    file.write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(UserError, match="outside the folder"):
        opened(tmp_path / "one")


@pytest.mark.parametrize(("case", "tied"), [("llama", False), ("mamba", True)])
def test_a_head_is_tied_where_its_family_ties_it_unless_its_config_says_otherwise(
    case, tied, tmp_path
):
    save(tmp_path, case)
    altered(tmp_path, tie_word_embeddings="absent")
    words = describe(read_json(tmp_path / "config.json")).words
    assert f"model.tied={str(tied).lower()}" in words


def test_weights_that_changed_are_reported(tmp_path):
    save(tmp_path, "llama")
    recorded = identify(tmp_path)
    (tmp_path / "model.safetensors").touch()
    check_unchanged(tmp_path, recorded)  # the same contents at another time
    save(tmp_path, "llama, tied")
    with pytest.raises(UserError, match="changed"):
        check_unchanged(tmp_path, recorded)


def test_a_scorer_of_prompts_is_known_by_its_weights(tmp_path):
    """Not by their files' names and sizes: rows that another has scored are another's."""

    def settings() -> str:
        words = ["run=x", "compress=llmlingua", "compress.rate=0.5", f"compress.by={tmp_path}"]
        about = {"arm": "x", "extension_settings": "none", "extension_options": {}}
        return compressed_identity(about, compose("eval", words).compress)["extension_settings"]

    theirs = save(tmp_path, "llama")
    before = settings()
    (tmp_path / "model.safetensors").touch()
    assert settings() == before
    with torch.no_grad():
        next(theirs.parameters()).add_(1)
    theirs.save_pretrained(tmp_path)
    assert settings() != before


def test_what_is_refused_is_refused_without_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from zoo.pretrained.checkpoint import "
        "check_checkpoint\n"
        f"try: check_checkpoint(Path({str(tmp_path / 'nowhere')!r}))\n"
        "except ValueError: sys.exit('torch' in sys.modules)\n"
        "sys.exit(2)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
