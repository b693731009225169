"""Smaller models: nearest products and zeros in the smallest numbers, which training keeps."""

import json

import numpy as np
import pytest
import torch
from building import train_config, train_on_text

import zoo
import zoo.runs.files
import zoo.runs.folder
from zoo.cli.eval import main as eval_main
from zoo.cli.export import main as export_main
from zoo.cli.shrink import main
from zoo.cli.train import main as train_main
from zoo.config.groups import choices
from zoo.config.schema.model import Shrunk
from zoo.config.schema.train import TrainConfig
from zoo.config.validate import plain, validate
from zoo.errors import UserError
from zoo.mixers.low_rank import LowRank
from zoo.model.backbone import Backbone
from zoo.model.build import build_model
from zoo.model.checkpoint import load
from zoo.model.lora import A, B
from zoo.model.shrink import multiplied_out, shrink
from zoo.ops.linear import Linear
from zoo.runs.claim import weights_of
from zoo.runs.folder import RunFolder

TINY = ["batch_tokens=256", "trainer.max_steps=3", "save_every=1"]


def model_of(name: str) -> Backbone:
    torch.manual_seed(0)
    config = train_config(f"model={name}", "size=tiny", "seq_len=64", "match=none")
    return build_model(config, vocab_size=64)[0].double().eval()


def matrices(model: Backbone) -> dict[str, torch.Tensor]:
    layers = model.blocks.named_modules()
    return {name: one.weight.detach().clone() for name, one in layers if type(one) is Linear}


@pytest.mark.parametrize("name", [name for name in choices("model") if name != "low_rank"])
def test_every_matrix_is_as_near_as_its_rank_allows_and_the_model_reads_on(name):
    model, rank = model_of(name).requires_grad_(False), 7
    before, tokens = matrices(model), torch.randint(64, (2, 64))
    rest = {key: value.clone() for key, value in model.state_dict().items()}
    shrink(model, Shrunk(run="x", rank=rank))
    units = {key: one for key, one in model.blocks.named_modules() if type(one) is LowRank}
    assert units
    for key, weight in before.items():
        saves = rank * sum(weight.shape) < weight.numel()
        assert (key in units) == saves, key
        if saves:
            beyond = np.linalg.svd(weight.numpy(), compute_uv=False)[rank:]
            found = torch.linalg.matrix_norm(weight - units[key].weight)
            assert float(found) == pytest.approx(float(np.sqrt((beyond**2).sum())), rel=1e-9)
            spectral = torch.linalg.matrix_norm(weight - units[key].weight, 2)
            assert float(spectral) == pytest.approx(float(beyond[0]), rel=1e-9)
    for key, value in model.state_dict().items():
        if key in rest:
            assert torch.equal(value, rest[key])
    read, (_, state) = model(tokens), model(tokens[:, :30], model.empty_state(2))
    pieces, _ = model(tokens[:, 30:], state)
    torch.testing.assert_close(pieces, read[:, 30:], rtol=1e-9, atol=1e-9)
    names = {*model.state_dict()}
    torch.testing.assert_close(multiplied_out(model)(tokens), read, rtol=1e-9, atol=1e-9)
    assert {*model.state_dict()} == {*rest} != names


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_the_smallest_share_of_each_matrix_is_zero_and_the_rest_stays(share):
    model = model_of("mamba")
    before = matrices(model)
    shrink(model, Shrunk(run="x", sparsity=share))
    for key, weight in matrices(model).items():
        nonzero = weight != 0
        assert int((~nonzero).sum()) == round(share * weight.numel())
        assert torch.equal(weight[nonzero], before[key][nonzero])
        assert before[key][~nonzero].abs().max() <= before[key][nonzero].abs().min()


def test_two_of_every_four_inputs_are_zero_the_smallest():
    model = model_of("transformer")
    before = matrices(model)
    shrink(model, Shrunk(run="x", sparsity="2:4"))
    for key, weight in matrices(model).items():
        for fours, own in zip(before[key].view(-1, 4), weight.view(-1, 4), strict=True):
            larger = fours.abs().argsort()[2:]
            expected = torch.zeros_like(fours)
            expected[larger] = fours[larger]
            assert torch.equal(own, expected)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A trained run, and smaller ones of it."""
    folder = tmp_path_factory.mktemp("shrunk")
    train_on_text(folder, "model=transformer", *TINY, f"runs={folder}", "name=x")
    for setting in ("rank=8", "sparsity=0.5", "sparsity=2:4"):
        assert main([f"run={folder / 'x'}", setting]) == 0
    return folder


SMALLER = ["x-rank8", "x-sparsity0.5", "x-sparsity2of4"]


@pytest.mark.parametrize("name", SMALLER)
def test_a_smaller_run_is_measured_under_its_own_name(runs, name, tmp_path, capsys):
    folder = RunFolder.open(runs / name)
    base = RunFolder.open(runs / "x")
    model, full = load(folder), load(base)
    assert folder.info["parameters"] == sum(p.numel() for p in model.parameters())
    zeros = sum(int((weight == 0).sum()) for weight in matrices(model).values())
    assert folder.info["shrunk"]["zeros"] == zeros
    assert (name == "x-rank8") == (zeros == 0)
    again = shrink(full, folder.config.shrunk)  # the weights of the run, and no others
    for key, weight in again.state_dict().items():
        assert torch.equal(weight, model.state_dict()[key])
    words = ["task=perplexity", "task.perplexity.lengths=[32]", "task.perplexity.units=2"]
    to = [f"report={tmp_path / 'r.html'}", "logger=none"]
    assert eval_main([f"run={[str(runs / 'x'), str(folder)]}".replace("'", ""), *words, *to]) == 0
    row = json.loads((folder.path / "results.jsonl").read_text().splitlines()[0])
    assert row["arm"] in (
        "transformer, rank 8",
        "transformer, 0.5 sparse",
        "transformer, 2:4 sparse",
    )
    assert row["train_tokens"] == base.info["tokens_seen"]
    assert row["arm"] in capsys.readouterr().out


@pytest.mark.parametrize("how", [{"rank": 4}, {"sparsity": 0.5}])
def test_a_smaller_run_of_adapters_has_weights_of_its_own(runs, how, tmp_path):
    base = RunFolder.open(runs / "x")
    tree = plain(base.config) | {"finetune": str(base.path), "lora": {"rank": 2}}
    facts = {"step": 1, "status": "done", "base": {"weights": weights_of(base)}}
    adapted = RunFolder.create(tmp_path / "lora", validate(TrainConfig, tree), facts)
    weight = load(base).get_parameter(f"{(layer := 'blocks.0.mixer.q_proj')}.weight")
    pair = {f"model.{layer}{A}": torch.ones(2, weight.shape[1])}
    pair |= {f"model.{layer}{B}": torch.ones(weight.shape[0], 2)}
    file = adapted.path / "checkpoints/step=1.ckpt"
    torch.save({"state_dict": pair, "global_step": 1}, file)
    ((option, value),) = how.items()
    assert main([f"run={adapted}", f"{option}={value}", f"to={tmp_path / 'out'}"]) == 0
    smaller, expected = (
        RunFolder.open(tmp_path / "out"),
        shrink(load(adapted), Shrunk(run="x", **how)),
    )
    for name, one in load(smaller).state_dict().items():
        assert torch.equal(one, expected.state_dict()[name]), name


@pytest.mark.parametrize(
    ("name", "optimiser"),
    [(SMALLER[0], "adamw"), (SMALLER[1], "muon"), (SMALLER[2], "adamw")],
)
def test_training_it_further_keeps_its_zeros_and_its_ranks(runs, name, optimiser, tmp_path):
    words = [f"finetune={runs / name}", f"runs={tmp_path}", "name=t", *TINY, "logger=none"]
    words += [f"optim={optimiser}", "optim.warmup_steps=1", "optim.lr=0.01"]
    assert train_main(words) == 0
    longer = [f"resume={tmp_path / 't'}", "trainer.max_steps=5", "optim.continuation=constant"]
    assert train_main(longer) == 0
    before, after = load(RunFolder.open(runs / name)), load(RunFolder.open(tmp_path / "t"))
    assert {*before.state_dict()} == {*after.state_dict()}
    moved = matrices(after)
    for key, weight in matrices(before).items():
        assert torch.equal(weight == 0, moved[key] == 0), key
        assert not torch.equal(weight, moved[key])


def test_what_is_exported_is_the_product(runs, tmp_path):
    assert export_main([f"run={runs / 'x-rank8'}", f"to={tmp_path / 'out'}"]) == 0
    theirs, own = (zoo.load(one, device="cpu") for one in (tmp_path / "out", runs / "x-rank8"))
    torch.testing.assert_close(theirs.logits("1 and then"), own.logits("1 and then"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "run=: must be given"),
        ("run=x", "needs one of rank= and sparsity="),
        ("run=x rank=4 sparsity=0.5", "needs one of rank= and sparsity="),
        ("run=x rank=0", "rank=0: must be a whole number from 1 to 131072."),
        ("run=x rank=four", "rank=four: must be a whole number from 1 to 131072."),
        ("run=x sparsity=1", "sparsity=1: must be above 0 and below 1, or 2:4."),
        ("run=x sparsity=nan", "sparsity=nan: must be above 0 and below 1, or 2:4."),
        ("run=x sparsity=1:4", "sparsity=1:4: must be above 0 and below 1, or 2:4."),
        ("run=x rank=1000000", "rank=1000000: must be a whole number from 1 to 131072."),
        ("run=x sparsity=1e-9", "sparsity=1e-9: rounds to none of"),
        ("run=x sparsity=0.9999999", "sparsity=0.9999999: leaves nothing of a matrix of"),
        ("run=x rank=100000", "rank=100000: products of that rank have no fewer numbers"),
        ("run=x sparsity=0.5", "x-sparsity0.5: exists already. Name another folder"),
        ("run=x-rank8 sparsity=0.5", "is a smaller model already, of"),
        ("run=nothing rank=4", "nothing: there is no such run folder."),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_leaves_nothing(runs, words, line, capsys):
    there = sorted(runs.rglob("*"))
    places = [word.replace("run=", f"run={runs}/") for word in words.split()]
    assert main(places) == 2
    said = capsys.readouterr().err
    assert line in said
    assert len(said.splitlines()) == 1
    assert sorted(runs.rglob("*")) == there


@pytest.mark.parametrize(
    ("sparsity", "said"),
    [
        (0.5, "sparsity=0.5: acts on linear layers, and the model has none. Choose another run."),
        ("2:4", "whose inputs cut into fours, and the model has none. Use a share"),
    ],
)
def test_a_model_without_a_matrix_is_refused_in_the_words_of_what_was_given(sparsity, said):
    model = model_of("mamba")
    model.blocks = torch.nn.ModuleList()
    with pytest.raises(UserError, match=said):
        shrink(model, Shrunk(run="x", sparsity=sparsity))


@pytest.mark.parametrize(
    ("place", "name"),
    [(zoo.runs.folder, "write_info"), (torch, "save"), (zoo.runs.files.os, "fsync")],
)
def test_a_smaller_run_that_cannot_be_written_leaves_no_folder(
    place, name, runs, monkeypatch, tmp_path
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, name, full)
    assert main([f"run={runs / 'x'}", "rank=4", f"to={tmp_path / 'new/deep/out'}"]) == 2
    assert not [*tmp_path.iterdir()]


def test_of_two_processes_at_once_the_second_writes_no_smaller_run(runs, monkeypatch, tmp_path):
    create = RunFolder.create

    def second(path, config, *words):
        create(path, config, {"status": "done"})
        return create(path, config, *words)

    monkeypatch.setattr(RunFolder, "create", second)
    assert main([f"run={runs / 'x'}", "rank=4", f"to={tmp_path / 'out'}"]) == 2
    assert RunFolder.open(tmp_path / "out").checkpoint() is None


def test_a_model_of_such_units_is_refused():
    with pytest.raises(UserError, match="rank=2: the model is made of units of low rank already"):
        shrink(model_of("low_rank"), Shrunk(run="x", rank=2))


def test_a_smaller_run_has_no_training_to_continue(runs, capsys):
    assert train_main([f"resume={runs / 'x-rank8'}", "trainer.max_steps=9"]) == 2
    assert "was made by zoo shrink and has no training to continue" in capsys.readouterr().err
