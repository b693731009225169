"""A run's model, exported: `transformers` and the zoo open it with the same weights and logits."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from building import ARCHITECTURES, MODEL_OF, train_config, write_text
from safetensors.torch import load_file

import zoo
from zoo.__main__ import main
from zoo.cli.train import main as train
from zoo.config.compose import compose
from zoo.config.groups import extensions
from zoo.config.introspect import constructor_parameters
from zoo.config.schema.model import Extension, Model
from zoo.config.schema.train import TrainConfig
from zoo.config.stages import stages_of, trained_length
from zoo.config.validate import plain, validate
from zoo.errors import UserError
from zoo.model import export as export_module
from zoo.model.backbone import Backbone
from zoo.model.build import build_model
from zoo.model.checkpoint import load
from zoo.model.convert import from_transformers
from zoo.model.export import export
from zoo.model.extend import extend, extend_as_trained
from zoo.model.lora import A, B
from zoo.model.pretrained import load_pretrained
from zoo.model.transformers_config import foreign
from zoo.pretrained.checkpoint import read_checkpoint
from zoo.pretrained.options import pretrained_config
from zoo.runs.claim import weights_of
from zoo.runs.folder import RunFolder
from zoo.runs.resume import finetuned
from zoo.tasks.extensions import check_extension
from zoo.tasks.identity import row_identity

transformers = pytest.importorskip("transformers")

LLAMA3 = ["extension=llama3", "extension.factor=4"]


def long_factors(pairs: int) -> str:
    """Those of longrope, one for each pair of channels."""
    factors = [1 + i / 5 for i in range(pairs)]
    return f"extension.scaling.long_factors={factors}".replace(" ", "")


PI = ["extension=pi", "extension.factor=2"]
YARN = ["extension=yarn", "extension.factor=4", "extension.original_length=16"]
LONGROPE = ["extension=longrope", "extension.factor=4", "extension.original_length=16"]
SCALED = {
    "pi": [*PI, "extension.original_length=16"],
    "yarn": YARN,
    "llama3": [*LLAMA3, "extension.original_length=16"],
    "dynamic": ["extension=dynamic_ntk", "extension.factor=2"],
}
NEOX = ["model.norm=layer_norm", "model.parallel_residual=true", "model.mixer.qkv_bias=true"]
NEOX += ["model.mixer.output_bias=true", "model.positions.partial_rotary_factor=0.25"]
NEOX += ["model.feed_forward._target_=zoo.mixers.feed_forward.MLP"]
FORMS = {  # what transformers has: its class, and the options of the run
    "llama": ("LlamaForCausalLM", ["model.mixer.kv_heads=2"]),
    "llama untied": ("LlamaForCausalLM", ["model.tied=false", "model.mixer.head_width=12"]),
    **{f"llama {kind}": ("LlamaForCausalLM", words) for kind, words in SCALED.items()},
    "llama longrope": ("LlamaForCausalLM", [*LONGROPE, long_factors(16)]),
    "mistral": ("MistralForCausalLM", ["extension=window", "extension.attention.window=9"]),
    "mistral long": (  # a window of more than the trained length
        "MistralForCausalLM",
        ["model.positions=local_rope", "model.positions.window=64"],
    ),
    "qwen2": ("Qwen2ForCausalLM", ["model.mixer.qkv_bias=true"]),
    "qwen3": ("Qwen3ForCausalLM", ["model.mixer.qk_norm=true", "model.mixer.head_width=12"]),
    "neox": ("GPTNeoXForCausalLM", NEOX),
    **{f"neox {kind}": ("GPTNeoXForCausalLM", [*NEOX, *words]) for kind, words in SCALED.items()},
    "neox longrope": ("GPTNeoXForCausalLM", [*NEOX, *LONGROPE, long_factors(4)]),
    "mamba": ("MambaForCausalLM", ["model=mamba"]),
    "falcon mamba": ("FalconMambaForCausalLM", ["model=mamba", "model.mixer.input_norm_eps=1e-6"]),
    "mamba2": ("Mamba2ForCausalLM", ["model=mamba2", "model.norm_eps=1e-5"]),
    "rwkv": (
        "RwkvForCausalLM",
        [
            *("model=rwkv4", "model.norm=layer_norm"),
            "model.embedding_norm=true",
            "model.norm_eps=1e-5",
        ],
    ),
}

OWN = {  # what the zoo alone has
    "dca": ["extension=dca"],
    "yarn": YARN,
    "gla": ["model=gla"],
}


def made(folder: Path, *words: str) -> RunFolder:
    """A run of random weights, as training leaves it."""
    scaled = [word for word in words if word.startswith("extension")]
    config = train_config(
        *("size=tiny", "match=none", "seq_len=48", f"runs={folder}"),
        "trainer.precision=bf16-mixed",
        *(word for word in words if word not in scaled),
    )
    if scaled:
        tree = {**plain(config), "finetune": str(folder)}
        tree["extension"] = plain(compose("eval", ["run=x", *scaled]).extension)
        config = validate(type(config), tree)
    torch.manual_seed(0)
    model, _ = build_model(config, 256)
    for name, one in model.named_parameters():
        if one.dim() == 1 and "dt" not in name and "A_log" not in name:
            one.data += 0.1 * torch.randn_like(one)
    return stored(folder / "run", config, model)


def stored(path: Path, config: TrainConfig, model: Backbone) -> RunFolder:
    """A run that is done, with these weights."""
    run = RunFolder.create(path, config, {"step": 1, "status": "done"})
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    file = run.path / "checkpoints" / "step=1.ckpt"
    torch.save({"state_dict": state, "global_step": 1}, file)
    return run


@pytest.mark.parametrize("form", FORMS)
def test_transformers_opens_it_and_computes_the_same(form, tmp_path):
    architecture, words = FORMS[form]
    run, to = made(tmp_path, *words), tmp_path / "out"
    assert export(run, to).architecture == architecture
    ours = load(run)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(to).eval()
    assert type(theirs).__name__ == architecture
    again = zoo.load(to, device="cpu").backbone
    # Beyond the trained length `transformers` takes one frequency for all tokens of a call.
    lengths = (1, 2, 31, 48) if "dynamic" in form else (1, 2, 15, 16)
    for length in lengths if form.endswith(("dynamic", "longrope")) else (1, 2, 31, 100):
        tokens = torch.randint(0, 256, (2, length))
        with torch.no_grad():
            expected, logits = theirs(tokens, use_cache=False).logits, ours(tokens)
        assert torch.allclose(logits, expected, atol=1e-5, rtol=1e-5), length
        assert torch.allclose(again(tokens), logits, atol=1e-6, rtol=1e-6), length
    written = from_transformers(load_file(to / "model.safetensors"), ours_heads(run))
    for name, value in ours.state_dict().items():
        assert torch.equal(written[name], value), name


def opened(checkpoint: Path) -> TrainConfig:
    """The configuration of a checkpoint, as eval.py reads it."""
    described, _ = read_checkpoint(checkpoint, checkpoint)
    data = plain(train_config().data)
    return pretrained_config(described, checkpoint, data, checkpoint.parent / "runs")


@pytest.mark.parametrize("form", [*FORMS, *OWN])
def test_how_it_was_trained_is_read_again(form, tmp_path):
    words = FORMS[form][1] if form in FORMS else OWN[form]
    run, to = made(tmp_path, *words), tmp_path / "out"
    export(run, to, "auto" if form in FORMS else "zoo")
    trained, found = run.config, opened(to)
    for config in (trained, found):
        assert config.seq_len == 48
        assert config.trainer.precision == "bf16-mixed"
    assert [scaling(found), remap(found)] == [scaling(trained), remap(trained)]
    model = zoo.load(to, device="cpu")
    assert (model.train_length, model.precision) == (48, "bf16-mixed")
    tokens = torch.randint(0, 256, (1, 100))
    same = torch.allclose(model.backbone(tokens), load(run)(tokens), atol=1e-6, rtol=1e-6)
    assert same  # beyond the trained length too


ROTARY = [name for name in extensions() if name not in ("none", *MODEL_OF)]
TUNING = [
    name for name in ROTARY if name != "clex" and not extensions()[name].get("positions")
]  # what needs no training on positions
THEN = [("pi", "replace"), ("pi", "on_top"), ("dca", "replace"), ("none", "replace")]
QUICK = ("yarn", "dca")


def tuned(base: TrainConfig, *stages: tuple[str, str, int]) -> TrainConfig:
    """The configuration of a run after these stages: an extension, its composition, its windows."""
    trees = []
    for name, composition, seq_len in stages:
        words = ["run=x", f"extension={name}", f"extension.composition={composition}"]
        words += ["extension.factor=2"] * (extensions()[name]["factor"] == "???")
        words += [long_factors(16)] * (name == "longrope")
        words += ["extension.attention.sinks=2"] * (name == "lm_infinite")
        words[:1] = ["finetune=x"] if extensions()[name].get("positions") else words[:1]
        composed = compose("train" if words[0] == "finetune=x" else "eval", words)
        trees.append(
            {"run": "a/before", "seq_len": seq_len, "extension": plain(composed.extension)}
        )
    *before, last = trees
    last.pop("run")
    return validate(TrainConfig, {**plain(base), **last, "stages": before, "finetune": "a/before"})


@pytest.mark.parametrize("name", ["pose", "randomised"])
@pytest.mark.parametrize("scaling", ["null", "pi", "yarn"])
def test_the_trained_length_of_positions_of_a_longer_text_is_exported(name, scaling, tmp_path):
    words = [
        "finetune=x",
        f"extension={name}",
        "extension.factor=4",
        f"extension.scaling={scaling}",
    ]
    tree = plain(compose("train", words).extension)
    base = plain(made(tmp_path).config)
    config = validate(TrainConfig, {**base, "extension": tree, "finetune": "x"})
    assert trained_length(config.extension, config.seq_len) == 4 * 48
    model, _ = build_model(config, 256)
    export(stored(tmp_path / "tuned", config, model), tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["max_position_embeddings"] == 4 * 48
    assert opened(tmp_path / "out").seq_len == 4 * 48


@pytest.mark.parametrize(
    "first",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ROTARY],
)
def test_every_chain_of_stages_is_exported_whole_or_refused(first, tmp_path):
    """A run tuned under any extension and then under another is the same model in both forms."""
    base, tokens = made(tmp_path), torch.randint(0, 256, (1, 100))
    weights, exported = load(base).state_dict(), 0
    for second, composition in THEN:
        config = tuned(base.config, (first, "replace", 96), (second, composition, 120))
        model, _ = build_model(config, 256)
        try:
            extend_as_trained(model, config)
        except UserError:  # as is refused when it is to be tuned
            continue
        model.load_state_dict(weights, strict=False)
        run = stored(tmp_path / f"{second} {composition}", config, model)
        for form in ("zoo", "auto"):
            to = run.path / form
            try:
                export(run, to, form)
            except UserError as error:
                message = str(error)
                assert "its frequencies are trained" in message
                assert first == "clex"
                continue
            again, exported = zoo.load(to, device="cpu"), exported + 1
            expected = load(run)(tokens)
            assert torch.allclose(again.backbone(tokens), expected, atol=1e-6, rtol=1e-6), to
            if form == "zoo":
                found = opened(to)
                assert stages_of(found) == stages_of(config)
                assert [stage.run for stage in found.stages] == ["before"]
    assert exported


def under(name: str, composition: str) -> Extension:
    words = ["run=x", f"extension={name}", f"extension.composition={composition}"]
    words += ["extension.factor=8"] * (extensions()[name]["factor"] == "???")
    words += [long_factors(16)] * (name == "longrope")
    words += ["extension.attention.sinks=2"] * (name == "lm_infinite")
    return compose("eval", words).extension


def after(model: Backbone, config: TrainConfig, extension: Extension) -> torch.Tensor | str:
    """What a model reads under a further extension; why it is not put under it, in words."""
    text = torch.randint(0, 256, (1, 240), generator=torch.Generator().manual_seed(0))
    try:
        return extend(copy.deepcopy(model), extension, config.seq_len)(text)
    except UserError as error:
        return str(error).partition("=")[0]


@pytest.mark.slow  # a minute
@pytest.mark.parametrize("first", TUNING)
@pytest.mark.parametrize("lengths", [(48, 96), (24, 192)])
def test_an_export_reads_under_every_further_extension_as_the_run_does(first, lengths, tmp_path):
    """What the next scaling counts from, too, is in the files."""
    original, seq_len = lengths
    config = tuned(made(tmp_path).config, (first, "replace", seq_len))
    tree = plain(config.extension) | {"original_length": original}
    config = validate(TrainConfig, {**plain(config), "extension": tree})
    run = stored(tmp_path / "tuned", config, extend_as_trained(build_model(config, 256)[0], config))
    model, number = load(run), 0
    for form in ("auto", "zoo"):
        export(run, tmp_path / form, form)
        found = opened(tmp_path / form)
        again = load_pretrained(found).eval()
        assert found.seq_len == seq_len
        for name, composition in itertools.product(TUNING, ("replace", "on_top")):
            extension = under(name, composition)
            expected = after(model, config, extension)
            got = after(again, found, extension)
            if isinstance(expected, str) or isinstance(got, str):
                assert got == expected, (form, name, composition)
                continue
            number += 1
            assert torch.allclose(got, expected, atol=1e-6, rtol=1e-6), (form, name, composition)
    assert number


def test_what_is_exported_of_a_chain_is_measured_as_the_run_is(tmp_path):
    """eval.py judges an extension by all the stages, and fine-tuning goes on from them all."""
    base = made(tmp_path)
    config = tuned(base.config, ("yarn", "replace", 96), ("none", "replace", 96))
    model = extend_as_trained(build_model(config, 256)[0], config)
    run = stored(tmp_path / "chain", config, model)
    check_extension(tuned(base.config, ("pi", "on_top", 96)).extension, [run])
    export(run, tmp_path / "out", "zoo")  # the form that holds the stages
    copy = RunFolder.create(tmp_path / "copy", opened(tmp_path / "out"), {"status": "done"})
    here = config.extension, torch.device("cpu")
    (label,) = {row_identity(here[0], folder, here[1])["arm"] for folder in (run, copy)}
    assert label.startswith("transformer tuned with yarn x2 ")
    words = ["extension=pi", "extension.factor=2", "extension.composition=on_top"]
    tree = plain(train_config("finetune=x", *words))
    trees = [
        finetuned({**tree, "finetune": str(folder.path)}, ["finetune", "extension"])
        for folder in (run, copy)
    ]
    assert stages_of(trees[0]) == stages_of(trees[1])
    assert [extension.name for extension, _ in stages_of(trees[1])] == ["yarn", "none", "pi"]


def scaling(config: TrainConfig) -> tuple[str, float, int]:
    found = config.extension
    return found.name, found.factor, found.original_length or config.seq_len


def remap(config: TrainConfig) -> dict[str, Any] | None:
    found = config.extension.attention
    return found and {k: v for k, v in plain(found).items() if v is not None}


def ours_heads(run: RunFolder) -> int:
    return run.config.size.heads


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("hybrid", "lstm", "star") else pytest.param(name, marks=pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_every_architecture_goes_round_in_the_zoos_own_form(name, tmp_path):
    run, to = made(tmp_path, f"model={name}"), tmp_path / "out"
    assert export(run, to, "zoo").architecture == "zoo"
    ours, again = load(run), zoo.load(to, device="cpu").backbone
    for one, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[one], value), one
    tokens = torch.randint(0, 256, (1, 20))
    torch.testing.assert_close(again(tokens), ours(tokens), rtol=1e-5, atol=1e-6)


def test_its_tokenizer_gives_the_bytes_that_the_run_was_trained_on(tmp_path):
    export(made(tmp_path), tmp_path / "out")
    text = "def f(x):\n\treturn 'é ☃' + x\0\n"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text)["input_ids"] == [*text.encode()]
    assert tokenizer.decode([*text.encode()]) == text
    assert zoo.load(tmp_path / "out", device="cpu").encode(text) == [*text.encode()]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 0


@pytest.mark.parametrize(
    ("words", "form", "said"),
    [
        (["model=gla"], "transformers", "format=transformers: has no architecture"),
        (["model.mixer.sink=true"], "transformers", "sink of attention"),
        (["extension=dca"], "transformers", "extension=dca"),
        (
            ["extension=dynamic_ntk", "extension.factor=2", "extension.step=16"],
            "transformers",
            "extension.step",
        ),
        ([], "pickle", "format=pickle: must be auto, transformers, zoo or adapter"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(words, form, said, tmp_path):
    run = made(tmp_path, *words)
    with pytest.raises(UserError) as error:
        export(run, tmp_path / "out", form)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_that_transformers_has_not_is_refused_for_what_differs(name):
    config = train_config("size=tiny", "match=none", "seq_len=48", f"model={name}")
    model, _ = build_model(config, 256)
    found, mixer = foreign(model, config), model.blocks[0].named_sublayers()["mixer"]
    others = {"sink": "sink of attention", "transformer_conv": "short_conv"}
    others |= {"hybrid": "its layers differ"}
    others |= dict.fromkeys(("learned", "sinusoidal"), "positions at the embedding")
    if name in ("transformer", "mamba"):
        assert not isinstance(found, str)
    elif name in ("mamba2", "rwkv4"):
        assert isinstance(found, str)
        assert "; trained with " in found
    elif type(mixer).__name__ == "SoftmaxAttention" and name not in others:
        scheme = "none" if name == "nope" else name
        assert found == f"positions={scheme}"
    else:
        assert found == others.get(name, type(mixer).__name__)


OTHERS = {  # an option's values beside its default, where they are no switch and no number
    "norm": ["layer_norm", "rms_norm_offset"],
    "norm_eps": [1e-5, 1e-4],
    "activation": ["gelu"],
    "input_norm_eps": [1e-5],
    "positions": [{"_target_": "zoo.positions.local_rope.LocalRope", "window": 16}],
    "score_scale": [0.5],
    "score_softcap": [5.0],
    "embedding_scale": [3.0],
    "logit_softcap": [5.0],
}
SIZES = ("width", "layer", "layers", "heads", "kv_heads", "head_width", "causal", "backend")


def computed_alike(run: RunFolder, to: Path) -> bool | None:
    """Whether `transformers` computes what a run's model does; None where it is not exported so."""
    if isinstance(foreign(load(run), run.config), str):
        return None
    export(run, to, "transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(to).eval()
    tokens = torch.randint(0, 256, (1, 40))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        return torch.allclose(load(run)(tokens), expected, atol=1e-5, rtol=1e-5)


# 4 s for the first, 1 to 3 s for each of the others
@pytest.mark.parametrize(
    "form",
    [
        "llama",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("neox", "mamba", "mamba2", "rwkv")),
    ],
)
def test_every_option_of_a_model_and_its_parts_is_exported_or_refused(form, tmp_path):
    """Whatever one sets: the model that is written computes the same, or there is none."""
    base, found = plain(made(tmp_path, *FORMS[form][1]).config), {}
    block = base["model"]["blocks"][0]
    places = [("model", name) for name in Model.unwritten]
    for slot in (slot for slot in ("mixer", "feed_forward") if block[slot]):
        names = constructor_parameters(block[slot]["_target_"]) or []
        places += [(slot, name) for name in names if name not in SIZES]
    for slot, name in places:
        for value in OTHERS.get(name, [True, False, 2, 8]):
            tree = copy.deepcopy(base)
            part = tree["model"] if slot == "model" else tree["model"]["blocks"][0][slot]
            if part.get(name, ...) == value:
                continue
            part[name] = value
            try:
                config = validate(TrainConfig, tree)
                model, _ = build_model(config, 256)
            except UserError:  # of another type, or not with the others
                continue
            place = tmp_path / f"{slot}.{name}.{len(found)}"
            run = stored(place, config, model)
            found[slot, name, str(value)] = computed_alike(run, place / "out")
            if name not in OTHERS:
                break  # one that it takes is enough
    assert {key[:2] for key in found} == {*places}
    assert False not in found.values(), found
    assert {True, None} <= {*found.values()}


@pytest.mark.parametrize("name", ["pi", "yarn", "ntk"])
def test_a_scaling_over_the_window_of_an_earlier_stage_is_exported_or_its_line_says_why_not(
    name, tmp_path, capfd
):
    """Within the window of 9 tokens, beyond it, and where the scaling acts."""
    base = made(tmp_path, "extension=window", "extension.attention.window=9").config
    tree = plain(base)
    stage = {"run": "a/before", "seq_len": 48, "extension": tree["extension"]}
    words = ["run=x", f"extension={name}", "extension.factor=2", "extension.original_length=48"]
    tree |= {"extension": plain(compose("eval", words).extension), "stages": [stage]}
    config = validate(TrainConfig, {**tree, "seq_len": 96, "finetune": "a/before"})
    model = extend_as_trained(build_model(config, 256)[0], config)
    run, to = stored(tmp_path / "tuned", config, model), tmp_path / "out"
    assert main(["export", f"run={run.path}", f"to={to}"]) == 0
    said = capfd.readouterr().err
    if name == "ntk":
        assert (
            "transformers has no architecture for this model: extension.scaling=ntk_aware)" in said
        )
        return
    assert "MistralForCausalLM" in said
    written = json.loads((to / "config.json").read_text())
    assert written["sliding_window"] == 9
    assert written["rope_parameters"]["factor"] == 2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(to).eval()
    again = zoo.load(to, device="cpu").backbone
    for length in (5, 9, 40, 96, 150):
        tokens = torch.randint(0, 256, (2, length))
        with torch.no_grad():
            expected, logits = theirs(tokens, use_cache=False).logits, load(run)(tokens)
        assert torch.allclose(logits, expected, atol=1e-5, rtol=1e-5), length
        assert torch.allclose(again(tokens), logits, atol=1e-6, rtol=1e-6), length


@pytest.mark.parametrize(
    ("model", "form"), [("transformer", "auto"), ("gla", "auto"), ("gla", "zoo")]
)
def test_a_run_of_a_task_is_exported_where_something_opens_it(model, form, tmp_path):
    config = train_config(f"model={model}", "data=recall", "size=tiny", "match=none", "seq_len=48")
    run, to = stored(tmp_path / "run", config, build_model(config, 33)[0]), tmp_path / "out"
    if model == "gla":
        with pytest.raises(UserError, match=r"^data=recall: is a task without a tokenizer"):
            export(run, to, form)
        assert [one.name for one in tmp_path.iterdir()] == ["run"]
        return
    assert "no tokenizer" in export(run, to, form).tokenizer
    tokens = torch.randint(0, 33, (1, 40))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(to).eval()
    with torch.no_grad():
        found = theirs(tokens, use_cache=False).logits
    assert torch.allclose(load(run)(tokens), found, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"has no tokenizer\.json") as refused:
        zoo.load(to, device="cpu")
    assert "data." not in str(refused.value)


def test_a_window_of_the_trained_length_is_exported(tmp_path):
    words = ["extension=window", "extension.attention.window=null", "extension.original_length=24"]
    assert computed_alike(made(tmp_path, *words), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["sliding_window"] == 24


@pytest.mark.parametrize("match", ["params", "none"])
@pytest.mark.parametrize("name", ["transformer", "mamba", "mamba2", "rwkv4"])
def test_what_a_run_needs_for_an_architecture_there_is_named_and_is_all_it_needs(name, match):
    words = [f"model={name}", "size=tiny", "seq_len=48", f"match={match}"]
    config = train_config(*words)
    found = foreign(build_model(config, 256)[0], config)
    if isinstance(found, str):
        more = found.partition("; trained with ")[2].removesuffix(" it is exported so").split()
        named = {word.partition("=")[0] for word in more}
        own = [word for word in words if word.partition("=")[0] not in named]
        config = train_config(*own, *more)
        assert not isinstance(foreign(build_model(config, 256)[0], config), str)


def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "_write_weights", full)
    run = made(tmp_path)
    with pytest.raises(UserError, match="out"):
        export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("to", ["new/..", "new/deep/out", "run", "new/../run"])
def test_a_refused_export_leaves_no_folder(to, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "_write_weights", full)
    run = made(tmp_path)
    with pytest.raises(UserError):
        export(run, tmp_path / to)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_program_exports_a_trained_run(tmp_path, capsys):
    data = ["data=text", f"data.path={write_text(tmp_path)}", f"data.cache={tmp_path / 'cache'}"]
    size = ["size=tiny", "seq_len=32", "batch_tokens=64", "trainer.max_steps=1"]
    assert train([*data, *size, f"runs={tmp_path}", "name=run", "logger=none"]) == 0
    words = ["export", f"run={tmp_path / 'run'}", f"to={tmp_path / 'out'}"]
    assert main(words) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().err
    model, again = (zoo.load(tmp_path / name, device="cpu") for name in ("run", "out"))
    assert torch.equal(model.logits("one and then"), again.logits("one and then"))
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(words[:2]) == 2
    assert main([*words, "form=zoo"]) == 2


def test_adapters_say_what_their_base_is_opened_with(tmp_path):
    """Their files alone are of another model than the run: its scaling is the base's."""
    base = made(tmp_path)
    config = tuned(base.config, ("yarn", "replace", 96))
    tree = plain(config) | {"finetune": str(base), "lora": {"rank": 2}}
    facts = {"step": 1, "status": "done", "base": {"weights": weights_of(base)}}
    run = RunFolder.create(tmp_path / "lora", validate(TrainConfig, tree), facts)
    layer, width = "model.blocks.0.mixer.q_proj", load(base).width
    pair = {f"{layer}{A}": torch.ones(2, width), f"{layer}{B}": torch.ones(width, 2)}
    torch.save({"state_dict": pair, "global_step": 1}, run.path / "checkpoints/step=1.ckpt")
    said = export(run, tmp_path / "adapter", "adapter").base
    options = json.loads((tmp_path / "adapter/base_options.json").read_text())
    assert {*options} == {"max_position_embeddings", "rope_parameters"}
    assert options["rope_parameters"]["rope_type"] == "yarn"
    place = f"they go over an export of their base: zoo export run={base} to=<folder>, opened with"
    assert said.startswith(
        f"{place} the max_position_embeddings and rope_parameters of base_options"
    )
