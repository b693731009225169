"""Weights in 8 and 4 bits: products are those of the restored weights, in every architecture."""

import copy
import io
import json
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from building import ARCHITECTURES, train_config, train_on_text
from torch import nn
from torch.utils._pytree import tree_leaves

import zoo
from zoo.cli.eval import main as eval_main
from zoo.config.groups import choices
from zoo.config.resolve import reads_both_ways
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model.audit import audit
from zoo.model.backbone import Backbone
from zoo.model.build import build_model
from zoo.model.quantization import (
    GROUP,
    NO_MEMORY,
    READ_ONLY,
    QuantizedWeight,
    quantize,
    quantize_cache,
    weight_bytes,
)

BITS = ["int8", "int4"]


def model_of(name: str) -> Backbone:
    torch.manual_seed(0)
    config = train_config(f"model={name}", "size=tiny", "seq_len=64", "match=none")
    return build_model(config, vocab_size=128)[0].eval().requires_grad_(False)


def restored(model: Backbone) -> Backbone:
    """The same model with the plain weights that its quantized ones stand for."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, QuantizedWeight):
            module.weight = nn.Parameter(weight.restored(), False)
    return plain


@pytest.mark.parametrize("bits", BITS)
def test_each_weight_is_the_nearest_that_its_scale_allows(bits):
    weight = torch.randn(128, 96) * torch.rand(128, 1).exp()
    found = QuantizedWeight.of(weight, bits).restored().double()
    wide = weight.double()
    if bits == "int8":
        step = wide.abs().amax(1, keepdim=True) / 127
        steps = (wide / step).round() * step
    else:
        groups = wide.unflatten(1, (-1, GROUP))
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        step = (high - low) / 15
        steps = (((groups - low) / step).round() * step + low).flatten(1)
        step = step.expand_as(groups).flatten(1)
    assert ((found - wide).abs() <= 0.5 * step + 0.08 * step + 0.004 * wide.abs().max()).all()
    assert (found - steps).abs().mean() < 0.25 * step.mean()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_restored_weight(bits, dtype):
    weight, bias = QuantizedWeight.of(torch.randn(192, 64), bits), torch.randn(192)
    x = torch.randn(2, 3, 64).to(dtype)
    found = nn.functional.linear(x, weight, bias)
    expected = nn.functional.linear(x.double(), weight.restored().double(), bias.double())
    assert found.dtype == dtype
    assert (found - expected).norm() <= torch.finfo(dtype).eps * 8 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        found = nn.functional.linear(x, weight, bias)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() <= 2**-6 * expected.norm()


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_given_by_name_is_multiplied_and_none_is_written_to(bits):
    weight, x = QuantizedWeight.of(torch.randn(32, 64), bits), torch.randn(3, 64)
    assert torch.equal(
        nn.functional.linear(input=x, weight=weight), nn.functional.linear(x, weight)
    )
    layer = nn.Linear(64, 32, bias=False)
    plain = {"weight": layer.weight.detach().clone()}
    layer.weight = nn.Parameter(weight, requires_grad=False)
    for write in (weight.fill_, weight.copy_):
        with pytest.raises(RuntimeError, match="is not written to"):
            write(plain["weight"] if write == weight.copy_ else 0)
    with pytest.raises(RuntimeError, match="is not written to"):
        layer.load_state_dict(plain)


def result(weight, name):
    """What an attribute is, called where it is a method that takes nothing else."""
    torch.manual_seed(0)
    found = getattr(weight, name)
    found = found() if callable(found) else found
    return found.restored() if isinstance(found, QuantizedWeight) else found


def leaves(found):
    """What is compared: numbers, and the bytes of tensors."""
    return [
        (x.dtype, x.detach().to_dense().resolve_conj().resolve_neg().contiguous().numpy().tobytes())
        if isinstance(x, torch.Tensor)
        else repr(x)
        for x in tree_leaves(found)
    ]


@pytest.mark.parametrize("bits", BITS)
def test_every_method_is_that_of_the_restored_weight_or_refused_in_plain_words(bits):
    """A square one, with an inverse: methods that need no argument, but for their own addresses."""
    start = torch.rand(GROUP, GROUP) + 3 * torch.eye(GROUP)
    refused, equal = set(), 0
    for name in sorted(x for x in dir(torch.Tensor) if not x.startswith("_")):
        weight = QuantizedWeight.of(start, bits)
        plain = weight.restored()
        before = plain.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = leaves(result(weight.restored(), name))
            except Exception:
                continue  # not for a matrix alone
            try:
                found = leaves(result(weight, name))
            except RuntimeError as error:
                found = str(error)
        if found in (READ_ONLY, NO_MEMORY):
            refused.add(name)
        else:
            assert found == expected, name
            equal += 1
        assert torch.equal(weight.restored(), before), name
    assert {"data_ptr", "untyped_storage", "zero_", "requires_grad_"} <= refused
    assert all(name.endswith("_") or "ptr" in name or "storage" in name for name in refused)
    assert equal > 200


WRITES = {
    "item": lambda weight, x: weight.__setitem__(0, x[0]),
    "out": lambda weight, x: torch.add(x, x, out=weight),
    "list": lambda weight, x: torch._foreach_add_([weight], [x]),
    "data": lambda weight, x: setattr(weight, "data", x),
    "apply_": lambda weight, x: weight.apply_(abs),
    "map_": lambda weight, x: weight.map_(x, max),
    "flag": lambda weight, x: setattr(weight, "requires_grad", True),
    "parameter": lambda weight, x: nn.Parameter(weight),
    "max_norm": lambda weight, x: nn.functional.embedding(x[0].long(), weight, max_norm=1.0),
    "vector": lambda weight, x: nn.utils.vector_to_parameters(x.flatten(), [weight]),
}


@pytest.mark.parametrize("name", WRITES)
def test_no_way_to_write_to_it_is_silently_without_effect(name):
    weight = QuantizedWeight.of(torch.randn(GROUP, GROUP), "int4")
    with pytest.raises(RuntimeError, match="is not written to"):
        WRITES[name](weight, torch.ones(GROUP, GROUP))


def saved(layer, **kwargs):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    made = nn.Linear(GROUP, GROUP, bias=False).requires_grad_(False)
    made.load_state_dict(torch.load(file, **kwargs), assign=True)
    return made


def sent(layer):
    queue = torch.multiprocessing.get_context("fork").SimpleQueue()
    queue.put(layer)
    return queue.get()


MOVES = {
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "state_dict": lambda layer: saved(layer, weights_only=True),
    "share_memory": lambda layer: layer.share_memory(),
    "queue": sent,
    "to cpu": lambda layer: layer.to("cpu", torch.float32),
    "half": lambda layer: layer.half().float(),
    "inference": torch.inference_mode()(lambda layer: layer.double().float()),
    "double": lambda layer: layer.double().float(),
    "meta": lambda layer: layer.to("meta"),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", MOVES)
def test_a_module_stays_quantized_wherever_it_goes(bits, name):
    layer = nn.Linear(GROUP, GROUP, bias=False)
    layer.weight = nn.Parameter(QuantizedWeight.of(layer.weight, bits), False)
    expected = layer.weight.restored()
    found = MOVES[name](layer).weight
    assert isinstance(found, QuantizedWeight)
    assert isinstance(found, nn.Parameter)
    assert not found.requires_grad
    assert found.is_shared() == (name in ("share_memory", "queue"))
    assert found.parts[0].is_meta or torch.equal(found.restored(), expected)


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("bits", BITS)
def test_what_is_written_in_c_gets_no_address(bits, name):
    """`to_dlpack` calls no method of the tensor; whoever reads from a null pointer crashes."""
    layer = nn.Linear(GROUP, GROUP, bias=False)
    layer.weight = nn.Parameter(QuantizedWeight.of(layer.weight, bits), False)
    weight = MOVES[name](layer).weight
    row = QuantizedWeight.of(torch.randn(1, GROUP), bits)  # one of a size has any stride
    for one in (weight, weight.detach(), weight.data, weight.clone(), row):
        with pytest.raises(RuntimeError, match="Cannot access data pointer"):
            torch.utils.dlpack.to_dlpack(one)


def test_arrays_are_of_the_restored_weight():
    weight = QuantizedWeight.of(torch.randn(GROUP, GROUP), "int4")
    for read in (torch.from_dlpack, np.from_dlpack, np.asarray, torch.Tensor.numpy):
        assert np.array_equal(read(weight), weight.restored())
    index = torch.tensor([-1])
    with pytest.raises(IndexError):
        nn.functional.embedding(index, weight)


def test_a_gradient_goes_through_it():
    weight, x = QuantizedWeight.of(torch.randn(64, 32), "int8"), torch.randn(2, 32)
    x.requires_grad_(True)
    nn.functional.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.restored().sum(0).expand(2, -1))


@pytest.mark.parametrize("bits", BITS)
def test_rows_and_parts_of_it_are_those_of_the_restored_weight(bits):
    weight = QuantizedWeight.of(torch.randn(128, 32), bits)
    for part, expected in zip(weight.chunk(2), weight.restored().chunk(2), strict=True):
        assert isinstance(part, QuantizedWeight)
        assert torch.equal(part.restored(), expected)
    index = torch.tensor([[3, 3], [0, 127]])
    rows = nn.functional.embedding(index, weight)
    assert torch.equal(rows, weight.restored()[index])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", sorted(choices("model")))
def test_a_model_predicts_as_with_the_restored_weights(name, bits):
    model = model_of(name)
    before = weight_bytes(model)
    quantize(model, bits)
    assert weight_bytes(model) < 0.75 * before  # lstm's recurrent matrices are no linear layers
    tokens = torch.randint(128, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, found = restored(model).double()(tokens), model(tokens)
        exact = copy.deepcopy(model).double()(tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(exact, expected)
    spread = float(expected.std())
    assert float((found - expected).abs().mean()) < 1e-4 * spread


@pytest.mark.parametrize("name", ["transformer", "mamba", "rwkv7", "hybrid"])
def test_an_audit_finds_no_leak_in_what_rounding_does(name):
    model = quantize(model_of(name), "int8")
    found = audit(model, torch.randint(128, (96,)))
    assert found.ok, found.reason
    assert found.tokens == {"float64": 96, "float32": 96}


def test_what_does_not_cut_into_groups_is_kept_in_8_bits_and_a_tied_head_once():
    model = quantize(model_of("mamba"), "int4")
    mixer = model.blocks[0].mixer
    assert repr(mixer.dt_proj.weight) == "QuantizedWeight(int8, (128, 4))"
    assert repr(mixer.in_proj.weight) == "QuantizedWeight(int4, (256, 64))"
    assert repr(model.embedding.weight) == "QuantizedWeight(int8, (128, 64))"
    assert repr(model.head.weight) == "QuantizedWeight(int4, (128, 64))"
    model = quantize(model_of("mamba"), "int8")
    assert model.head.weight is model.embedding.weight


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    model = ["model=transformer", "batch_tokens=256", "trainer.max_steps=40", "optim.lr=0.005"]
    train_on_text(folder, *model, f"runs={folder}", "name=x")
    return folder / "x"


def test_rows_of_quantized_weights_are_rows_of_their_own(run, tmp_path, capsys):
    task = ["task=perplexity", "task.perplexity.lengths=[32]", "task.perplexity.units=4"]
    words = [f"run={run}", *task, "report=null", "logger=none"]
    for weights in ("null", "int8", "int4", "int8"):
        assert eval_main([*words, f"weights={weights}"]) == 0
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["length"] == 32]  # not those of the other tests
    bits = {r["dtype"]: r["bits_per_byte"] for r in rows if r["protocol"] == "half_tail"}
    assert [*bits] == ["float32", "int8", "int4"]
    assert len(rows) == 3 * len({row["protocol"] for row in rows})  # int8 was known
    assert bits["int8"] == pytest.approx(bits["float32"], abs=0.01)
    assert bits["int8"] != bits["float32"]
    assert len({row["measured_by"] for row in rows}) == 2  # by the code that quantizes, too
    capsys.readouterr()
    table = zoo.write_report(str(run), tmp_path / "all.html")
    assert all(f"transformer \u00b7 in {dtype}" in table for dtype in bits)


def test_what_fewer_bits_cost_is_beside_the_plain_rows_of_the_run(run, tmp_path, capsys):
    task = ["task=perplexity", "task.perplexity.lengths=[64]", "task.perplexity.units=3"]
    words = [f"run={run}", *task, "report=null", "logger=none"]
    assert eval_main(words) == 0
    assert "cost of fewer bits" not in capsys.readouterr().out
    for fewer in ("weights=int4", "kv_cache=int4"):
        assert eval_main([*words, fewer]) == 0
        said = capsys.readouterr().out
        assert "cost of fewer bits, against the same runs in plain numbers" in said
        assert "transformer \u00b7 in float32" in said


def test_text_is_written_with_quantized_weights(run):
    model = zoo.load(run, device="cpu", weights="int8")
    assert isinstance(model.backbone.head.weight, QuantizedWeight)
    assert len(model.generate("ab", tokens=5)) > 0
    with pytest.raises(ValueError, match=r"weights=int3: must be stored, .* int8 or int4"):
        zoo.load(run, device="cpu", weights="int3")


def test_rows_of_a_quantized_cache_say_so_and_have_its_bytes(run, tmp_path):
    words = ["task.perplexity.lengths=[300]", "task.perplexity.units=2"]
    speed = ["task=speed", "task.speed.lengths=[300]", "task.speed.decode_tokens=2"]
    to = [f"run={run}", "report=null", "logger=none"]
    for more in ([], ["kv_cache=int8"], ["kv_cache=int4", "weights=int8"]):
        assert eval_main([*to, "task=perplexity", *words, *more]) == 0
    assert eval_main([*to, *speed, "kv_cache=int8"]) == 0
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["length"] == 300]
    found = {row["dtype"]: row for row in rows if row.get("protocol") == "half_tail"}
    names = ["float32", "float32, int8 KV cache", "int8, int4 KV cache"]
    assert [*found] == names
    assert found[names[0]]["bits_per_byte"] != found[names[1]]["bits_per_byte"]
    assert names[1] in {row["dtype"] for row in rows if row["task"] == "speed"}
    config = train_config("model=transformer", "size=tiny", "seq_len=32", "match=none")
    model = build_model(config, vocab_size=257)[0]
    for dtype, bits in zip(names, (None, "int8", "int4"), strict=True):
        expected = (quantize_cache(model, bits) if bits else model).state_bytes(300)
        held = {row["state_bytes"] for row in rows if row["dtype"] == dtype}
        assert held == {expected}, dtype
    table = zoo.write_report(str(run), tmp_path / "all.html")
    assert all(f"transformer \u00b7 in {dtype}" in table for dtype in names)


def test_a_model_without_a_cache_of_keys_and_values_is_refused_in_one_line(tmp_path, capsys):
    tiny = ["model=mamba", "batch_tokens=256", "trainer.max_steps=2", f"runs={tmp_path}"]
    train_on_text(tmp_path, *tiny, "name=m")
    capsys.readouterr()
    words = [f"run={tmp_path / 'm'}", "logger=none", "task=speed", "kv_cache=int4"]
    assert eval_main(words) == 2
    error = "kv_cache=int4: acts on the cache of layers of SoftmaxAttention, and .* are of Mamba"
    assert re.search(error, capsys.readouterr().err)
    assert not (tmp_path / "m" / "results.jsonl").exists()
    with pytest.raises(ValueError, match=error):
        zoo.load(tmp_path / "m", device="cpu", kv_cache="int4")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_a_refused_cache_says_of_a_model_is_true_of_it(name):
    for words in ([], ["objective=masked"] * reads_both_ways(name)):
        config = train_config(f"model={name}", "size=tiny", "match=none", *words)
        model, _ = build_model(config, vocab_size=8)
        softmax = [x for x in model.sublayers() if isinstance(x, SoftmaxAttention)]
        line, whole = "", model.state_bytes(2**12)
        try:
            quantize_cache(model, "int8")
        except ValueError as error:
            line = str(error)
        if named := re.search(r"of SoftmaxAttention, and this model's are of (.*)\. Leave", line):
            assert {*named[1].split(", ")} == {type(one.mixer).__name__ for one in model.layers}
            assert not softmax
        elif line:
            assert "reads both ways" in line
            assert words
        else:
            assert softmax
            assert model.state_bytes(2**12) < whole


def test_text_is_written_with_a_quantized_cache(run):
    model = zoo.load(run, device="cpu", kv_cache="int4")
    assert len(model.generate("ab" * 200, tokens=5)) > 0
    assert model.backbone.blocks[0].mixer.kv_cache is not None
    with pytest.raises(ValueError, match=r"kv_cache=int3: must be int8 or int4"):
        zoo.load(run, device="cpu", kv_cache="int3")
