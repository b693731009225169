"""Reads windows split over ranks, and compares them with the whole windows."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from building import train_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.config.schema.model import Extension
from zoo.config.schema.train import TrainConfig
from zoo.config.validate import validate
from zoo.data.synthetic import NO_LABEL
from zoo.mixers.quantized_cache import CacheBits
from zoo.model.backbone import Backbone
from zoo.model.build import build_model
from zoo.model.chunks import bytes_sent, chunk_loss, split_over
from zoo.model.extend import extend, places
from zoo.model.quantization import quantize_cache
from zoo.parallel.ranks import Ranks
from zoo.tasks.context import EvalContext, check_state, nats
from zoo.tasks.memory import peak_bytes
from zoo.tasks.readers import chunk_nats, read_prompt

ROWS, VOCABULARY, TRAINED = 2, 32, 16
CHUNK = 7  # tokens that are read at a time where a text is scored
NEXT = 3  # tokens that are read on from the state after a prompt
LONG = 1024  # tokens of the window whose memory is measured


class Case(NamedTuple):
    model: TrainConfig
    extension: Extension | None
    lengths: list[int]
    kv_cache: CacheBits | None  # of a model that is only measured


@functools.cache
def _config(*words: str) -> TrainConfig:
    return train_config("size=tiny", "seq_len=256", "match=none", *words)


def composed(
    model: list[str], extension: dict[str, Any] | None, lengths: list[int], kv_cache: Any = None
) -> Case:
    """A case of these options of train.py, this section of an extension and cache of eval.py."""
    section = extension and validate(Extension, extension)
    return Case(_config(*model), section, lengths, kv_cache)


def built(case: Case, length: int) -> tuple[Backbone, Tensor | None]:
    """The model of a case, and the positions of its tokens where the extension draws them."""
    torch.manual_seed(0)
    model, positions = build_model(case.model, VOCABULARY)[0].double(), None
    if case.extension is not None:
        extend(model, case.extension, TRAINED).double()
        if draw := places(case.extension.model_copy(update={"original_length": length}), length):
            positions = draw(ROWS, length, torch.Generator().manual_seed(0))
    if case.kv_cache is not None:
        quantize_cache(model, case.kv_cache)
    return model, positions


def differences(ranks: Ranks, case: Case, length: int) -> dict[str, float]:
    """Of the outputs, the loss, every gradient and the bytes sent; in the first rank.

    Of a model that is only measured, of its scores.
    """
    model, positions = built(case, length)
    model.checkpoint_activations = length % 2 == 1
    tokens = torch.randint(VOCABULARY, (ROWS, length + 1))
    if case.kv_cache is not None:
        alone = nats(model(tokens[:, :-1]), tokens[:, 1:])
        found = {"scores": _apart(_scores(model, ranks, tokens), alone)}
        return found | _continued(model, ranks, tokens)
    before = ranks.bytes_sent
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    labels[:, 1 : length // 2 : 2] = NO_LABEL  # a chunk's share of the labels is not of the tokens
    read: list[Tensor] = []
    watch = model.norm.register_forward_hook(lambda *call: read.append(call[2].detach()))
    part = chunk_loss(model, ranks, inputs, labels, positions)
    part.backward()
    ranks.finish()
    unexpected = torch.tensor(ranks.bytes_sent - before - bytes_sent(model, ranks, length, ROWS))
    outputs = read[0].new_zeros((ROWS, length, model.width))
    chunks = split_over(model, ranks, length).chunks().values()
    for chunk, own in zip(chunks, read, strict=True):
        outputs[:, chunk] = own
    summed, scores, more = part.detach(), None, {}
    if positions is None:
        scores, more = _scores(model, ranks, tokens), _continued(model, ranks, tokens)
    for x in (outputs, summed, unexpected.abs_()):
        dist.all_reduce(x)
    found = {}
    for name, p in model.named_parameters():
        found[name] = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(found[name])
    if ranks.index:
        return {}
    model.zero_grad()
    whole = model.labels_loss(inputs, labels, positions)
    whole.backward()
    watch.remove()
    about = {"outputs": _apart(outputs, read[-1]), "loss": _apart(summed, whole)}
    if scores is not None:
        about["scores"] = _apart(scores, nats(model.head(read[-1]), tokens[:, 1:]))
    about |= more
    about["bytes"] = unexpected.item()
    return about | {n: _apart(found[n], p.grad) for n, p in model.named_parameters()}


def share_of_memory(ranks: Ranks) -> float:
    """The most that a rank holds at a time in a step of the transformer, of what one process does.

    Beyond the weights: of tensors, which are the same in every call.
    """
    config = train_config("model=transformer", "size=small", f"seq_len={LONG}", "match=none")
    model = build_model(config, VOCABULARY)[0]
    tokens = torch.randint(VOCABULARY, (1, LONG + 1))

    def split() -> None:
        chunk_loss(model, ranks, tokens[:, :-1], tokens[:, 1:]).backward()
        ranks.finish()

    def peak(step: Callable[[], None]) -> float:
        step()  # fills the tables that are kept
        model.zero_grad(set_to_none=True)
        most = peak_bytes(torch.device("cpu"), step)
        model.zero_grad(set_to_none=True)
        assert most
        return float(most)

    most = torch.tensor(peak(split), dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item() / peak(lambda: model.loss(tokens).backward())


class _Log(TorchDispatchMode):
    """What a rank does, in order: `attends`, `sends` and `receives`."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.done: list[str] = []
        for name in ("send", "receive"):
            setattr(ranks, name, self._logged(getattr(ranks, name), f"{name}s"))

    def _logged(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def logged(*args: Any) -> Any:
            self.done.append(name)
            return call(*args)

        return logged

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in op.name():
            self.done.append("attends")
        return op(*args, **(kwargs or {}))


def waits_for_attention(ranks: Ranks) -> bool:
    """Whether any rank attends before it has sent all keys of a block of the transformer, or waits
    for their gradients before it has computed its own attention's."""
    ranks = Ranks(ranks.size, ranks.index)
    config = train_config("model=transformer", "size=tiny", "size.layers=1", "match=none")
    model, tokens = build_model(config, VOCABULARY)[0], torch.randint(VOCABULARY, (1, 65))
    with _Log(ranks) as log:
        loss = chunk_loss(model, ranks, tokens[:, :-1], tokens[:, 1:])
        forward, log.done = log.done, []
        loss.backward()
        backward = log.done
    ranks.finish()
    assert {"attends", "sends", "receives"} <= {*forward} | {*backward}
    late = "sends" in forward[forward.index("attends") :]
    early = "receives" in backward[: len(backward) - backward[::-1].index("attends")]
    found = torch.tensor(int(late or early))
    dist.all_reduce(found)
    return bool(found)


def _scores(model: Backbone, ranks: Ranks, tokens: Tensor) -> Tensor:
    """What every token costs as it is measured: in all ranks' chunks."""
    context = _context(model, ranks)
    with context.arithmetic():
        found = chunk_nats(context, tokens, CHUNK)
        ranks.finish()
        dist.all_reduce(found)
    return found.clone()


def _continued(model: Backbone, ranks: Ranks, tokens: Tensor) -> dict[str, float]:
    """Of the logits behind a prompt, and of more tokens that one rank reads from the state."""
    prompt, then = tokens[:, :-NEXT], tokens[:, -NEXT:]
    context, alone = _context(model, ranks), _context(model, Ranks(1, 0))
    found = []
    for one in (context, alone):
        with one.arithmetic():
            read = read_prompt(one, prompt, CHUNK) if prompt.shape[1] >= one.ranks.size else None
            one.ranks.finish()
            logits = torch.zeros(len(tokens), 1 + NEXT, model.vocab_size, dtype=torch.float64)
            if read is not None:
                check_state(model, read[1], len(tokens))
                logits = torch.cat([model.head(read[0]), model(then, read[1])[0]], 1)
            if one is context:
                dist.all_reduce(logits)
            found.append(logits.clone())
    if prompt.shape[1] < ranks.size:
        return {}
    return {"read on": _apart(*found)}


def _context(model: Backbone, ranks: Ranks) -> EvalContext:
    return EvalContext(
        model=model, data=cast(Any, None), folder=Path(), train_length=TRAINED, ranks=ranks
    )


def _apart(one: Tensor, other: Tensor | None) -> float:
    other = torch.zeros_like(one) if other is None else other.detach()
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-3)).item()


def read_all(cases: dict[str, Case], report: Path) -> None:
    """Write the differences of all cases to `report`."""
    torch.set_num_threads(1)
    alone: dict[str, Any] = {}
    if "RANK" not in os.environ:  # one process has no others to meet
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    ranks, found = Ranks(dist.get_world_size(), dist.get_rank()), {}
    for name, case in cases.items():
        for length in case.lengths:
            found[f"{name} {length}"] = differences(ranks, case, length)
    about = {"cases": found, "memory": share_of_memory(ranks)}
    about["waits"] = ranks.size > 1 and waits_for_attention(ranks)
    if not ranks.index:
        report.write_text(json.dumps(about))
    dist.destroy_process_group()
