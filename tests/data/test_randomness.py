"""What a draw must differ between (rows, steps, seeds, prompts) and between what it must not.

Places are those of every extension in configs/extension that has any.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from building import ARCHITECTURES, ROOT, train_config

from zoo.config.compose import compose
from zoo.data.corpora import Corpus, open_corpus
from zoo.data.loader import train_loader, valid_batch
from zoo.data.masking import mask_windows
from zoo.data.passkey import DIGITS, END, STATEMENT, Passkeys
from zoo.data.store import TokenStore
from zoo.data.tokenizers import encode_bytes
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model.extend import extend, places
from zoo.positions.rope import inverse_frequencies
from zoo.runs.claim import claim
from zoo.tasks.passkey import _distinct_keys
from zoo.training import fit as fitting
from zoo.training.windows import Windows

ROWS, TOKENS = 6, 64


def with_places() -> list[str]:
    names = [path.stem for path in sorted((ROOT / "configs/extension").glob("*.yaml"))]
    text = {name: (ROOT / f"configs/extension/{name}.yaml").read_text() for name in names}
    return [name for name in names if "\npositions:" in text[name]]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    return corpus_of(tmp_path_factory.mktemp("corpus")).train


def corpus_of(folder: Path) -> Corpus:
    for split, start in (("train", 0), ("valid", 5000), ("test", 7000)):
        (folder / split).mkdir()
        words = " ".join(str(i * i) for i in range(start, start + 600))
        (folder / split / "a.txt").write_text(words)
    config = train_config("data=text", f"data.path={folder}", f"data.cache={folder}-cache")
    return open_corpus(config.data.model_dump(), f"{folder}-cache")


def batches(store: TokenStore, seed: int = 0, steps: int = 4, **options) -> list[dict]:
    given = {"seq_len": TOKENS, "batch_size": ROWS, "start_step": 0, "contiguous": False}
    return list(train_loader(store, seed=seed, steps=steps, **{**given, **options}))


def all_differ(draws: list) -> bool:
    """No two of the tensors are equal."""
    return len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


@pytest.mark.parametrize("name", with_places())
def test_places_differ_between_rows_steps_and_seeds(name, store):
    words = [f"extension={name}", "extension.factor=8", f"seq_len={TOKENS}", "finetune=runs/x"]
    config = compose("train", words)
    drawn = [
        batch["positions"]
        for seed in (0, 1)
        for batch in batches(store, seed, draw_positions=places(config.extension, TOKENS))
    ]
    distinct = {tuple(row.tolist()) for rows in drawn for row in rows}
    assert len(distinct) >= 8 * ROWS - 3  # two may fall alike where there are few to choose from
    assert all(len(rows.unique(dim=0)) >= ROWS - 1 for rows in drawn)
    again = batches(store, 0, draw_positions=places(config.extension, TOKENS))
    assert torch.equal(again[2]["positions"], drawn[2])
    for rows in drawn:
        assert (rows.diff() > 0).all()
        assert rows.max() < 8 * TOKENS
    assert max(int(rows.max()) for rows in drawn) > 6 * TOKENS  # they fill what they are to fill
    if name == "pose":  # where the second half is, row by row and nothing else
        assert ((rows.diff(dim=1) != 1).sum(1) <= 1).all()
        assert len({int(row[-1]) for rows in drawn for row in rows}) > ROWS


def test_masked_tokens_differ_between_rows_steps_and_seeds(store):
    drawn = [b["chosen"] for seed in (0, 1) for b in batches(store, seed, masked=256)]
    assert all_differ([row for step in drawn for row in step])
    shares = torch.stack(drawn).double().mean((0, 2))  # of every row over steps and tokens
    assert ((shares > 0.08) & (shares < 0.25)).all()


def test_what_replaces_a_masked_token_is_drawn_for_each():
    windows = np.zeros((1, 5000), np.int64)
    shown, chosen = mask_windows(windows, 256, [(0,)])
    strange = shown[chosen & (shown != 256) & (shown != 0)]
    assert len(strange) > 40
    assert len(set(strange.tolist())) > 30


def test_planted_keys_and_their_places_differ_between_rows_steps_and_seeds(store):
    passkeys = Passkeys(1.0, encode_bytes)
    keys, starts = [], []
    for seed in (0, 1):
        for batch in batches(store, seed, passkeys=passkeys, seq_len=150):
            for row in batch["tokens"]:
                text = bytes(row.tolist()).decode("latin1")
                at = text.index(STATEMENT)
                keys.append(text[at + len(STATEMENT) :][:DIGITS])
                starts.append(at)
    assert len(set(keys)) > 0.9 * len(keys)
    assert len(set(starts)) > 0.3 * len(starts)
    assert abs(np.corrcoef([int(key) for key in keys], starts)[0, 1]) < 0.5
    assert {len(key) for key in keys} == {DIGITS}
    assert all(key.isdigit() for key in keys)


def test_which_windows_hold_a_key_differs_between_rows_and_steps(store):
    plain = batches(store, seq_len=150, steps=20)
    some = batches(store, seq_len=150, steps=20, passkeys=Passkeys(0.5, encode_bytes))
    holds = torch.stack(
        [(a["tokens"] != b["tokens"]).any(1) for a, b in zip(plain, some, strict=True)]
    )
    assert 0.3 < holds.double().mean() < 0.7
    assert all_differ([*holds.T])
    assert (holds.sum(1) > 0).sum() > 15  # not a step as a whole, or none of it
    assert (holds.sum(1) < ROWS).sum() > 15


def test_prompts_query_keys_of_their_own_and_a_seed_for_others():
    queried = [_distinct_keys(0, index, 5) for index in range(40)]
    assert len({keys[0] for keys in queried}) > 36
    assert all(len(set(keys)) == 5 for keys in queried)
    assert queried == [_distinct_keys(0, index, 5) for index in range(40)]
    assert not {tuple(keys) for keys in queried} & {
        tuple(_distinct_keys(1, i, 5)) for i in range(40)
    }
    assert END not in "".join(queried[0])


def windows_of(corpus: Corpus, *words: str) -> list[torch.Tensor]:
    """What a run's data module reads in its first three steps, as in training."""
    config = train_config(f"seq_len={TOKENS}", f"batch_size={ROWS}", "match=none", *words)
    module = Windows(corpus, config)
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=1, global_step=0, max_steps=3, global_rank=0, world_size=1
    )
    return [batch["tokens"] for batch in iter(module)]


def test_data_order_depends_on_the_seed_and_on_no_architecture_or_worker(tmp_path):
    corpus = corpus_of(tmp_path)
    first = windows_of(corpus, "model=transformer", "seed=0")
    assert len(first) == 3
    for words in (["model=mamba"], ["model=rwkv7", "workers=1"], ["size=tiny"]):
        again = windows_of(corpus, "seed=0", *words)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), words
    other = windows_of(corpus, "model=transformer", "seed=1")
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all_differ([row for step in first for row in step])


def test_weights_differ_between_seeds_and_are_those_of_the_seed(tmp_path, monkeypatch):
    """And validation reads the same windows, masked alike, at every seed and step."""
    for split in ("train", "valid", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.txt").write_text(" ".join(map(str, range(400))) + split)
    seen = {}

    def fit(self, module, datamodule, **_):
        weights = module.model.embedding.weight.detach().clone()
        seen[len(seen)] = weights, self.callbacks[0].valid

    monkeypatch.setattr(fitting.lightning.Trainer, "fit", fit)
    for number, seed in enumerate((0, 1, 0)):
        config = train_config(
            "size=tiny", "match=none", "logger=none", "data=text", f"data.path={tmp_path}",
            f"data.cache={tmp_path}-cache", f"runs={tmp_path}-runs", f"seed={seed}",
            "seq_len=32", "batch_size=2", "objective=masked", f"name=run{number}",
        )  # fmt: skip
        torch.manual_seed(1000 + number)  # whatever came before does not count
        fitting.train(config, claim(config))
    (one, valid), (other, elsewhere), (again, _) = seen.values()
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert valid.keys() == elsewhere.keys() == {"tokens", "shown", "chosen"}
    assert all(torch.equal(valid[name], elsewhere[name]) for name in valid)


def test_validation_masks_differ_between_rows(store):
    rows = valid_batch(store, 64, 12, 256)["chosen"]
    assert all_differ([*rows])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_of_an_architecture_get_their_place(name):
    """Initialisations depend on the depth: a model of four layers is not one layer four times."""
    from zoo.model.build import build_model

    config = train_config(f"model={name}", "size=tiny", "match=none", "size.layers=4")
    places = []
    for block in config.model.blocks:
        load = type(block.mixer).load

        def spied(self, load=load):
            made = load(self)

            def build(**given):
                places.append((given["layer"], given["layers"], given["width"]))
                return made(**given)

            return build

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(config.model.blocks[0].mixer), "load", spied)
        build_model(config, 32)
    assert {place[1:] for place in places} == {(4, 64)}
    assert {place[0] for place in places} == {0, 1, 2, 3}


@pytest.mark.parametrize("n_hat", [0, 5])
def test_longrope_in_a_model_keeps_its_first_positions_as_they_were(n_hat, tiny):
    """The option reaches the layers: keys before n_hat rotate as trained, the others rescaled."""
    factors = [1.0 + 0.25 * i for i in range(16)]
    words = ["finetune=runs/x", "extension=longrope", "extension.factor=4"]
    words += [f"extension.scaling.long_factors={factors}".replace(" ", "")]
    words += [f"extension.scaling.n_hat={n_hat}", "extension.original_length=8"]
    extension = compose("train", words).extension
    model = extend(tiny("transformer"), extension, 8)
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, SoftmaxAttention)
    assert mixer.positions.pattern is not None
    found, _ = mixer.positions.pattern.scaling(32)
    theta = torch.tensor(inverse_frequencies(32), dtype=torch.float64)
    scaled = theta / torch.tensor(factors, dtype=torch.float64)
    rows = found(torch.arange(12)) if callable(found) else torch.tensor([found] * 12).double()
    torch.testing.assert_close(rows[:n_hat], theta.expand(n_hat, -1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rows[n_hat:], scaled.expand(12 - n_hat, -1), rtol=1e-6, atol=0)
