"""A model of the zoo as one of lm-evaluation-harness (Gao 2024, github.com/EleutherAI/
lm-evaluation-harness), which scores continuations, whole texts and what is written.

What is scored follows the harness's own model of `transformers` (`hf`): how a context and its
continuation are cut into tokens, which token precedes an empty context, windows of
`max_length` tokens over longer texts, contexts that are cut on the left. Here what requests begin
with alike is read once (zoo.model.shared_prefixes).
"""

import importlib
from collections.abc import Sequence
from typing import Any

from zoo.errors import refuse, refuse_path
from zoo.model.generation import Sampling
from zoo.model.language_model import LanguageModel
from zoo.model.scoring import likelihoods, write_texts

WRITTEN = 256  # tokens, unless the harness's task says how many
ALIASES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def imported(module: str = "") -> Any:
    """A module of lm_eval. UserError where the package is not installed."""
    try:
        return importlib.import_module(f"lm_eval{module}")
    except ImportError as error:
        rule = f"needs the package lm-eval ({error})"
        refuse("task", "harness", rule, "Run pip install 'zoo[eval]'")


def harness_model(model: LanguageModel, *, rows: int = 8, max_length: int | None = None) -> Any:
    """An `LM` of lm_eval, for `lm_eval.simple_evaluate(model=...)`.

    Args:
        model: a run's or a checkpoint's, under its extension.
        rows: sequences that are read at a time.
        max_length: tokens of a context with its continuation, and of a window over a text; None:
            those of the windows that the model was trained on.

    Raises:
        UserError: where lm_eval is not installed, or the model cannot be scored left to right.
    """
    if not model.backbone.causal:
        rule = "reads its text both ways, so it scores no continuation"
        refuse("model", type(model.backbone.sublayers()[0]).__name__, rule, "Use a causal model")
    template = imported(".api.model").TemplateLM

    class ZooLM(_Answers, template):
        """A model of the zoo."""

        def __init__(self) -> None:
            template.__init__(self)
            self.model, self.rows = model, rows
            self.max_length = model.train_length if max_length is None else max_length

    return ZooLM()


class _Answers:
    """What lm_eval calls of a model, but for what its own base does."""

    model: LanguageModel
    rows: int
    max_length: int
    cache_hook: Any

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.end

    @property
    def prefix_token_id(self) -> int:
        """The token before an empty context."""
        bos = self.model.tokenizer.bos
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any
    ) -> list[int]:
        """The tokens of a text, behind the one that begins a text unless it is there already."""
        tokenizer = self.model.tokenizer
        tokens = tokenizer.tokens(string)
        begun = add_special_tokens is None and tokens[:1] == [tokenizer.bos]
        if add_special_tokens is False or begun or tokenizer.bos is None:
            return tokens
        return [tokenizer.bos, *tokens]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        cut = [self._cut(context, rest) for _, context, rest in requests]
        found = likelihoods(
            self.model.backbone, cut, rows=self.rows, precision=self.model.precision
        )
        answers = [(one.nats, one.greedy) for one in found]
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def _cut(self, context: list[int], rest: list[int]) -> tuple[list[int], list[int]]:
        """Both without what is too much on the left, so that max_length tokens are read."""
        if len(rest) > self.max_length:
            rule = f"must be at least {len(rest)}, the tokens of a continuation"
            refuse("task.harness.max_length", self.max_length, rule)
        return context[max(0, len(context) + len(rest) - self.max_length - 1) :], rest

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of whole texts, read in windows without overlap."""
        del disable_tqdm
        utils, windows, counts = imported(".utils"), [], []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            cut = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            mine = [(None, *utils.make_disjoint_window(one)) for one in cut]
            windows += mine
            counts.append(len(mine))
        answers, found = iter(self._loglikelihood_tokens(windows)), []
        for request, count in zip(requests, counts, strict=True):
            found.append(sum(next(answers)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each prompt, up to the first of its stop texts."""
        del disable_tqdm
        written: dict[int, str] = {}
        kinds: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(index)
        for members in kinds.values():
            prompts = [requests[i].args[0] for i in members]
            written |= dict(
                zip(members, self._written(prompts, requests[members[0]].args[1]), strict=True)
            )
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, written[index])
        return [written[index] for index in range(len(requests))]

    def _written(self, prompts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """The texts after prompts that are all written on under the same settings."""
        stop, tokens, sampling = _settings(settings)
        most, tokenizer = self.max_length - tokens, self.model.tokenizer
        if most < 1:
            rule = f"must be more than the {tokens} tokens that are written"
            refuse("task.harness.max_length", self.max_length, rule)
        texts = [self.tok_encode(prompt)[-most:] or [self.prefix_token_id] for prompt in prompts]
        how = {"tokens": tokens, "sampling": sampling, "stop": stop, "rows": self.rows}
        found = write_texts(
            self.model.backbone, tokenizer, texts, precision=self.model.precision, **how
        )
        return [one.text for one in found]


def _settings(given: dict[str, Any]) -> tuple[list[str], int, Sampling]:
    """Stop texts, tokens to write and how they are drawn, of the harness's generation_kwargs.

    Raises UserError for one that is not known here.
    """
    left = dict(given)
    stop = left.pop("until", None) or []
    counts = [left.pop(name, None) for name in ALIASES]
    tokens = next((int(count) for count in counts if count is not None), WRITTEN)
    temperature, sample = left.pop("temperature", None), left.pop("do_sample", None)
    if sample is None:
        sample = bool(temperature)
    warm = (1.0 if temperature is None else float(temperature)) if sample else 0.0
    top_p = float(left.pop("top_p", 1.0) or 1.0)
    if left:
        name, value = next(iter(left.items()))
        refuse_path(f"generation_kwargs: {name}={value}", "is not supported", "Leave it out")
    sampling = Sampling(temperature=warm, top_p=top_p if warm else 1.0)
    return [stop] if isinstance(stop, str) else [*stop], tokens, sampling
