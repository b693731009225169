"""LongRoPE's search on a trained run: which rescale of its rotary pairs reads longer texts best.

What is found stays in the run's folder, `longrope-x8.json` for a factor of 8, where extension=
longrope finds it. So does the search itself, after every generation: the same command goes on with
it, and with more `generations` beyond its end. Of a run that was fine-tuned under LongRoPE the
factors of texts up to its original length are searched for (Ding 2024, section 3.4), beside those
it was tuned with. With composition=on_top the search is the second one of section 3.3: of a run
tuned under any scaling, for texts of `factor` times the length that it was tuned at, on top of its
frequencies.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from zoo.attention.pattern import AttentionPattern
from zoo.config.domains import Count, Range, Seed
from zoo.config.longrope_factors import factors_file
from zoo.config.stages import scalings, stages_of, trained_length
from zoo.data.loader import evaluation_bytes, evaluation_text
from zoo.errors import below, refuse, refuse_path
from zoo.measurement import Declaration, Quantity
from zoo.model.backbone import Backbone
from zoo.model.extend import Frequencies, frequencies, rotary_positions
from zoo.positions.longrope import N_HATS, Rescale, Search
from zoo.positions.rope import Rope
from zoo.positions.scaling import KeepFirst, linear, longrope, ntk_aware, on_top, yarn
from zoo.runs.files import write_text
from zoo.runs.folder import RunFolder
from zoo.tasks.context import (
    EvalContext,
    NotApplicableError,
    Row,
    bits_per_byte,
    chunk_tokens,
    score,
)
from zoo.tasks.task import Task

log = logging.getLogger("zoo")


@dataclass(frozen=True, kw_only=True)
class LongRope(Task):
    """One row: bits per byte under the best rescale, and the best of each generation.

    Searched on `texts` texts of the validation split, of `factor` times the trained length; short
    factors at the original length. `most` is the largest factor, by default 1.25 times as much, or
    as much for short texts.
    """

    declares = Declaration(
        title="LongRoPE's search",
        about="The best rescale of the rotary frequencies that the search found, scored on texts "
        "of the validation split.",
        quantities=(
            Quantity(field="bits_per_byte", name="bits per byte", better="lower", form="score"),
        ),
    )
    rescales = True
    # A question has the number of texts that there are, and the composition where it is on_top.
    unidentifying = ("texts", "chunk", "composition")
    factor: Annotated[float, Range(above=1, most=2**20)]
    texts: Count = 5
    population: Count = 64
    generations: Annotated[int, Range(0, 2**20)] = 40
    mutations: Count = 16
    crossovers: Count = 16
    parents: Count = 32
    most: Annotated[float, Range(above=1, most=2**21)] | None = None
    magnitude: Literal["su", "yarn", "none"] = "su"
    composition: Literal["replace", "on_top"] = "replace"
    seed: Seed = 0
    chunk: Count = 4096

    def check_model(self, model: Backbone) -> None:
        ropes = rotary_positions(model)
        if not ropes or len({(rope.rotary_width, rope.rope_base) for rope in ropes}) > 1:
            raise NotApplicableError("longrope needs rotary layers, all of one head width and base")

    def questions(self, context: EvalContext) -> list[Row]:
        """The one question.

        Raises NotApplicableError where the model has no rotary positions, and UserError where the
        run's folder holds a search with other settings.
        """
        if context.model.quantized or context.model.quantized_cache:
            why = "factors are searched with numbers as they are, without weights= and kv_cache="
            raise NotApplicableError(why)
        self.check_model(context.model)
        prepared = self._prepare(context)
        question = {"length": prepared.problem.length, "units": len(prepared.text)}
        return [{"split": "valid", **question, **self._composed()}]

    def still_valid(self, context: EvalContext) -> bool:
        return "search" in json.loads(self._file(context).read_text(encoding="utf-8"))

    def measure(self, context: EvalContext, question: Row) -> Row:
        return _search(context, self._prepare(context), self.generations, self.chunk)

    def _file(self, context: EvalContext) -> Path:
        return context.folder / factors_file(self.factor, self.composition)

    def _composed(self) -> Row:
        return {} if self.composition == "replace" else {"composition": self.composition}

    def _prepare(self, context: EvalContext) -> "Prepared":
        """The search as the run's folder holds it, or its beginning, and the texts."""
        problem = _problem(context, self.factor, self.magnitude, self.composition)
        most = self.most or (self.factor if problem.tuned else 1.25 * self.factor)
        sizes = {name: getattr(self, name) for name in ("population", "mutations", "crossovers")}
        sizes |= {"parents": self.parents, "seed": self.seed}
        try:
            search = Search(problem.starts, most, problem.n_hats, **sizes)
        except ValueError as error:
            raise below("task.longrope", error) from error
        corpus = context.corpus
        which = corpus.valid, problem.length, self.texts, corpus.eval_documents
        text, text_bytes = evaluation_text(*which), int(evaluation_bytes(*which)[:, 1:].sum())
        settings = {"texts": len(text), "factor": self.factor, "magnitude": problem.magnitude}
        settings |= {**sizes, "most": most, "weights": _fingerprint(context), **self._composed()}
        _resume(search, self._file(context), settings)
        words = self._read_by(problem.magnitude)
        return Prepared(search, problem, text, text_bytes, self._file(context), words)

    def _read_by(self, magnitude: str) -> str:
        """The options under which eval.py, train.py and zoo.load read what was found."""
        words = f"extension=longrope extension.factor={self.factor:g}"
        if self.composition == "on_top":
            words += " extension.composition=on_top"
        return words if magnitude == "su" else f"{words} extension.scaling.magnitude={magnitude}"


@dataclass
class Problem:
    """What is searched: the texts' length, where to start, and how a genome rotates the keys."""

    ropes: list[Rope]
    length: int
    starts: list[Rescale]
    n_hats: Sequence[int]
    factor: float
    original_length: int
    magnitude: str
    tuned: dict[str, Any]  # LongRoPE's that the run was tuned under, if it was with this factor
    under: Sequence[Frequencies]  # that the genome rescales, of each layer

    def use(self, genome: Rescale) -> None:
        """Let the model read under the genome."""
        search = partial(
            longrope,
            width=self.ropes[0].rotary_width,
            base=self.ropes[0].rope_base,
            factor=self.factor,
            original_length=self.original_length,
            long_factors=genome.factors,
            n_hat=genome.n_hat,
            magnitude=self.magnitude,
        )
        for rope, under in zip(self.ropes, self.under, strict=True):
            scaled = on_top(search, under.scaling(self.length))
            rope.pattern = AttentionPattern(lambda _, scaled=scaled: scaled)

    def found(self, best: Rescale) -> dict[str, Any]:
        """The options of `longrope` that the search has settled."""
        factors = list(best.factors)
        if self.tuned:
            return {**self.tuned, "short_factors": factors, "magnitude": self.magnitude}
        return {"long_factors": factors, "n_hat": best.n_hat, "magnitude": self.magnitude}


def _problem(context: EvalContext, factor: float, magnitude: str, composition: str) -> Problem:
    ropes = rotary_positions(context.model)
    if context.extension != "none":
        rule = "must be none with task=longrope, which searches for the model as it was trained"
        refuse("extension", context.extension, rule)
    config = RunFolder.open(context.folder).config
    stages = context.model.stages[: len(stages_of(config))]
    if remaps := [extension.name for extension, _ in stages if extension.attention]:
        rule = f"the run was tuned under the attention of extension={remaps[-1]}"
        refuse("task", "longrope", rule, "Search for the run that it was tuned from")
    own, in_force = stages[-1][0], scalings(stages)
    short = composition == own.composition == "replace"
    short = short and own.name == "longrope" and own.factor == factor
    if composition == "on_top" and not in_force:
        rule = "is of two scalings, and the run was trained under none"
        refuse("task.longrope.composition", composition, rule, "Leave it out")
    beneath = stages if composition == "on_top" else ()
    if beneath and context.model.frequencies is not None:
        rule = "the run has trained frequencies (extension=clex), which no factors rescale"
        refuse("task.longrope.composition", composition, rule, "Use replace")
    window = trained_length(*stages[-1])
    if short or (composition == "replace" and in_force):
        first = own if short else next(one for one, _ in stages if one.scaling)
        window = first.original_length
    length = window if short else int(factor * window)
    under = [frequencies(rope, context.model, beneath) for rope in ropes]
    if short:
        known = own.scaling.options
        ratios, n_hats = [[1.0] * len(ropes[0].inv_freq), known["long_factors"]], [0]
        tuned = {name: known[name] for name in ("long_factors", "n_hat")}
        magnitude = known["magnitude"]
    else:
        scaled = under[0].scaling(length)[0] if beneath else None
        if isinstance(scaled, Sequence) and not any(scaled):
            rule = "the run's frequencies were dropped (extension=drope), which no factors rescale"
            refuse("task.longrope.composition", composition, rule, "Use replace")
        ratios, tuned = _ratios(ropes[0], factor, window, scaled), {}
        n_hats = [n for n in N_HATS if n < window]
    starts = [Rescale(tuple(ratio)) for ratio in ratios]
    return Problem(ropes, length, starts, n_hats, factor, window, magnitude, tuned, under)


def _ratios(rope: Rope, factor: float, window: int, scaled: Any) -> list[list[float]]:
    """By how much PI, NTK and YaRN divide each frequency: the model's own, or `scaled` ones."""
    given = {"width": rope.rotary_width, "base": rope.rope_base, "factor": factor}
    theta = rope.inv_freq
    if scaled is not None:
        while isinstance(scaled, KeepFirst):
            scaled = scaled.inv_freq
        theta, given["theta"] = scaled, scaled
    starts = [linear(**given)[0], ntk_aware(**given)[0]]
    starts.append(yarn(**given, original_length=window)[0])
    return [[t / f for t, f in zip(theta, start, strict=True)] for start in starts]


class Prepared(NamedTuple):
    """A search, and what it searches on."""

    search: Search
    problem: Problem
    text: Int[np.ndarray, "n t1"]
    text_bytes: int
    file: Path
    read_by: str  # options of the extension


def _search(context: EvalContext, prepared: Prepared, generations: int, chunk: int) -> Row:
    """Search to the end, saving as it goes; the row's figures."""
    search, problem, text, text_bytes, file, read_by = prepared
    tokens = len(text) * problem.length

    def loss(genome: Rescale) -> float:
        problem.use(genome)
        sums = (
            score(context, piece[None], chunk=chunk_tokens(context, chunk))[0] for piece in text
        )
        return bits_per_byte(sum(float(nll.sum()) for nll in sums), text_bytes)

    def begin() -> None:
        what = f"longrope generation {search.generation} of {generations}"
        best = f", best {search.scored[0][0]:.4f}" if search.scored else ""
        many = search.mutations + search.crossovers if search.generation else search.population
        context.progress.begin(f"{what}{best}", many * tokens)

    state = json.loads(file.read_text(encoding="utf-8"))
    before = [rope.pattern for rope in problem.ropes]
    begin()
    try:
        with context.arithmetic():
            for _ in search.run(loss, generations):
                state |= {"search": search.state(), "found": problem.found(search.scored[0][1])}
                state["best"] = [*state["best"], search.scored[0][0]]
                write_text(file, json.dumps(state))
                begin()
    finally:
        for rope, pattern in zip(problem.ropes, before, strict=True):
            rope.pattern = pattern
    best, genome = search.scored[0]
    log.info(
        "longrope: %.4f bits per byte at %d tokens under n_hat=%d and factors %s; "
        "%s reads under them",
        *(best, problem.length, genome.n_hat),
        *(" ".join(f"{factor:.2f}" for factor in genome.factors), read_by),
    )
    return {"bits_per_byte": best, "best": state["best"], "n_hat": genome.n_hat} | {
        "factors": list(genome.factors),
        "found_file": file.name,
    }


def _resume(search: Search, file: Path, settings: Row) -> None:
    """Go on with the search that the file holds, or begin one there."""
    if not file.is_file():
        write_text(file, json.dumps({"settings": settings, "best": []}))
        return
    state = json.loads(file.read_text(encoding="utf-8"))
    theirs = {"factor" if key == "times" else key: v for key, v in state["settings"].items()}
    if differ := [key for key in {**theirs, **settings} if theirs.get(key) != settings.get(key)]:
        rule = f"holds another search, which differs in {', '.join(differ)}"
        refuse_path(file, rule, "Move it away, or use its settings")
    if "search" in state:
        search.restore(state["search"])


def _fingerprint(context: EvalContext) -> str:
    digest = hashlib.sha256()
    for parameter in context.model.parameters():
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
