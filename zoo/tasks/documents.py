"""Answers that lie in long texts: generated retrieval and reasoning, and benchmarks of documents.

    variable_tracking, common_words, babilong    generated to any length (zoo.data.long_contexts)
    gov_report, qmsum                            summaries (Huang 2021, arXiv 2104.02112; Zhong
                                                 2021, arXiv 2104.05938): ROUGE
    narrative_qa, qasper                         answers in a few words (Kocisky 2017, arXiv
                                                 1712.07040; Dasigi 2021, arXiv 2105.03011): F1
    quality                                      one of several answers (Pang 2021, arXiv
                                                 2112.08608): exact match

The model reads an instruction, the text and the question, and writes on greedily. Scores are those
of torchmetrics, the best over the right answers: ROUGE without stemming (it knows words of ASCII
letters and digits alone), F1 and exact match after SQuAD's normalisation; of generated texts the
share of the answers that was written (RULER's). The prompts are this package's own, so scores
compare models here, not with published figures.

A document whose prompt is longer than the length is cut as `truncate` says, on tokens of the text
alone: `left` drops its beginning, `middle` as many around its middle (as LongBench does, Bai 2023,
arXiv 2308.14508); how many were cut, and by how much, is in the row. So is how many of the `shots`
demonstrations a prompt has room for (zoo.data.long_prompts). Xiong 2023 (arXiv 2309.16039, table 3)
gives none for NarrativeQA, one for QMSum, two for Qasper and QuALITY.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from zoo.config.domains import Count, Lengths, Range, Seed
from zoo.data.long_contexts import GENERATED, Example, kind_of, read_examples, sentences
from zoo.data.long_prompts import LongPrompt, cut_to, fitting, least, solved, with_shots
from zoo.data.records import require_package
from zoo.data.tokenizers import Tokenizer
from zoo.errors import refuse
from zoo.measurement import Declaration, Quantity
from zoo.model.generation import Sampling
from zoo.model.scoring import write_many
from zoo.report.statistics import interval, wilson
from zoo.runs.files import file_hash
from zoo.tasks.answers import METRICS
from zoo.tasks.context import EvalContext, Row, check_length
from zoo.tasks.task import STATE, Task, lengths_of

FIELDS = ("context", "input", "answers")
ROUNDING = 1e-6  # of a score, which torchmetrics has in float32
BACKGROUND = 2**20  # tokens of the corpus that generated examples take sentences from


class Benchmark(NamedTuple):
    """How a data set is read, and how answers to it are scored."""

    title: str
    metric: str  # a key of METRICS
    tokens: int  # of an answer, at most
    instruction: str = ""
    cue: str = ""  # behind the question
    one_line: bool = True  # the answer ends with its line


SUMMARY = Benchmark("", "rouge", 512, "Read the text.", "Summary:", one_line=False)
ANSWER = Benchmark("", "f1", 32, "Read the text and answer the question briefly.", "Answer:")
BENCHMARKS = {
    "variable_tracking": Benchmark("variable tracking", "found", 64),
    "common_words": Benchmark("common words", "found", 96),
    "babilong": Benchmark("facts in a text", "found", 16),
    "gov_report": SUMMARY._replace(title="GovReport"),
    "qmsum": SUMMARY._replace(title="QMSum"),
    "narrative_qa": ANSWER._replace(title="NarrativeQA"),
    "qasper": ANSWER._replace(title="Qasper"),
    "quality": ANSWER._replace(title="QuALITY", metric="exact", tokens=64),
}
UNITS = {"rouge": "ROUGE-L", "f1": "F1", "exact": "exact match", "found": "answers found"}


def _interval(scores: Sequence[float]) -> tuple[float, float] | None:
    """Student's over the examples; of scores that are alike but for rounding, Wilson's.

    Wilson's holds for their mean too: scores from 0 to 1 with the mean p vary by p (1 - p) at most,
    as answers do of which the share p is right.
    """
    alike = max(scores) - min(scores) <= ROUNDING
    return wilson(sum(scores), len(scores)) if alike else interval(scores)


def _quantities() -> Iterator[Quantity]:
    for name, one in BENCHMARKS.items():
        options = {"better": "higher", "form": "share", "where": {"dataset": name}}
        label = f"{one.title}, {UNITS[one.metric]}"
        yield Quantity(field="score", name=label, interval="interval", **options)
        if one.metric == "rouge":
            for n in (1, 2):
                yield Quantity(field=f"rouge{n}", name=f"{one.title}, ROUGE-{n}", **options)
        where, words = {"dataset": name}, f"{one.title}, texts cut to the length"
        yield Quantity(field="cut", name=words, better=None, form="share", where=where)
        words = f"{one.title}, demonstrations read"
        yield Quantity(field="shots_read", name=words, better=None, where=where)


@dataclass(frozen=True, kw_only=True)
class Documents(Task):
    """One row per length: the score of `examples` examples whose prompt and answer fit it.

    Args:
        dataset: one of those above.
        path: its file of records; None for generated ones.
        fields: the names of the text, the question ("" where the text holds it) and the answers;
            None: those of FIELDS, which LongBench's files have.
        truncate: how a longer text is cut; None: it is refused. Generated ones fit their length.
        tokens: of an answer, at most; None: the data set's own.
        seed: of generated examples.
        shots: demonstrations before each prompt, as many of them as fit: the first of `shots_path`,
            or generated ones of the shortest kind. One of the tested text is left out.
        shots_path: the file of records with the training examples, with the same `fields`.
    """

    declares = Declaration(
        title="Answers in long texts",
        about="The answer lies in a text of this length: retrieval, tracking and counting in "
        "generated texts, questions on documents and their summaries.",
        quantities=(*_quantities(), STATE),
    )
    unidentifying = (
        "lengths",
        "batch",
        "dataset",
        "path",
        "shots_path",
    )  # a question has the data itself
    dataset: Literal[
        "variable_tracking",
        "common_words",
        "babilong",
        "gov_report",
        "qmsum",
        "narrative_qa",
        "qasper",
        "quality",
    ] = "variable_tracking"
    path: str | None = None
    fields: Sequence[str] | None = None
    lengths: Lengths | None = None
    examples: Count = 20
    truncate: Literal["left", "middle"] | None = None
    tokens: Count | None = None
    seed: Seed = 0
    batch: Count = 4
    shots: Annotated[int, Range(0, 1000)] = 0
    shots_path: str | None = None

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[self.dataset]

    def check(self) -> None:
        if self.dataset in GENERATED:
            for option in ("path", "fields", "truncate", "shots_path"):
                if (value := getattr(self, option)) is not None:
                    rule = f"dataset={self.dataset} is generated to its length"
                    refuse(f"task.documents.{option}", value, rule, "Leave it out")
            return
        self._check_file("path", self.path)
        if self.shots:
            self._check_file("shots_path", self.shots_path)
        elif self.shots_path is not None:
            rule = "no demonstration is read with shots=0"
            refuse("task.documents.shots_path", self.shots_path, rule, "Set shots, or leave it out")
        names = FIELDS if self.fields is None else self.fields
        if len(names) != 3 or not (names[0] and names[2]):
            rule = "must be the names of text, question and answers; of the question also empty"
            refuse("task.documents.fields", names, rule)

    def _check_file(self, option: str, path: str | None) -> None:
        """Refuse what is no file of records."""
        if path is None or not Path(path).is_file():
            part = "the training examples" if option == "shots_path" else "the file"
            rule = f"must be {part} of dataset={self.dataset}, .jsonl or .parquet"
            refuse(f"task.documents.{option}", path, rule)
        if kind_of(Path(path)) == "parquet":
            require_package("pyarrow", f"task.documents.{option}={path}")

    def questions(self, context: EvalContext) -> list[Row]:
        _ = context.corpus
        data: Row = {"dataset": self.dataset}
        if self.path is not None:
            data["examples"] = file_hash(Path(self.path))
        if self.shots_path is not None:
            data["demonstrations"] = file_hash(Path(self.shots_path))
            if data["demonstrations"] == data["examples"]:
                rule = "holds the very examples that are measured"
                advice = "Give the file of the training examples"
                refuse("task.documents.shots_path", self.shots_path, rule, advice)
        lengths = lengths_of(self.lengths, context, (1, 2, 4))
        if context.model.causal:
            self._check_prompts(context, lengths)
        return [{**data, "length": length} for length in lengths]

    def measure(self, context: EvalContext, question: Row) -> Row:
        length, tokenizer = question["length"], context.corpus.tokenizer
        check_length(context.model, length)
        prompts = self._prompts(context, length)
        context.progress.begin(f"{self.dataset} at {length}", len(prompts) * length)
        written = write_many(
            context.model,
            [prompt.tokens for prompt in prompts],
            tokens=self._answer_tokens,
            sampling=Sampling(),
            stops=lambda _, tokens: tokens[-1] in tokenizer.ends,
            rows=self.batch,
            precision=context.precision,
        )
        answers = [self._answer(tokenizer, one) for one in written]
        metric = METRICS[self.benchmark.metric]
        found = [
            metric(text, prompt.answers) for text, prompt in zip(answers, prompts, strict=True)
        ]
        scores = [one["score"] for one in found]
        cut = [prompt.cut for prompt in prompts if prompt.cut]
        return {
            **{name: sum(one[name] for one in found) / len(found) for name in found[0]},
            "interval": _interval(scores),
            "count": len(prompts),
            "cut": len(cut) / len(prompts),
            "tokens_cut": sum(cut) / len(cut) if cut else 0,  # of those that were
            "shots_read": sum(prompt.shots for prompt in prompts) / len(prompts),
            "shots_tokens_cut": sum(prompt.shots_cut for prompt in prompts) / len(prompts),
            "prompt_tokens": sum(len(prompt.tokens) for prompt in prompts) / len(prompts),
            "first_answer": answers[0],
            "state_bytes": context.model.state_bytes(length),
        }

    def _answer(self, tokenizer: Tokenizer, tokens: list[int]) -> str:
        own = takewhile(lambda token: token not in tokenizer.ends, tokens)
        text = "".join(tokenizer.decode(own)).strip()
        if self.shots and self.benchmark.instruction:  # it went on with an example of its own
            text = text.partition(f"\n\n{self.benchmark.instruction}")[0].rstrip()
        return text.partition("\n")[0].strip() if self.benchmark.one_line else text

    @property
    def _answer_tokens(self) -> int:
        return self.tokens or self.benchmark.tokens

    def _check_prompts(self, context: EvalContext, lengths: Sequence[int]) -> None:
        """Refuse lengths in which no prompt fits, and answers without room, before anything is
        measured."""
        tokenizer, answer, found = context.corpus.tokenizer, self._answer_tokens, []
        if self.dataset not in GENERATED:
            for length in lengths:
                found = self._prompts(context, length)
        else:
            text, most = self._background(context), min(lengths) - answer
            for number in range(self.examples):
                seed = [self.seed, number]
                found.append(least(tokenizer, self.dataset, seed, text, most, answer))
        needed = max(self._least_answer(tokenizer, prompt.answers) for prompt in found)
        if needed > answer:
            rule = f"an answer that scores has {needed} tokens of this tokenizer"
            refuse("task.documents.tokens", answer, rule, f"Use at least {needed}")

    def _least_answer(self, tokenizer: Tokenizer, answers: Sequence[str]) -> int:
        """The tokens of the shortest right answer where one of fewer words is no answer."""
        every = {"found": [", ".join(answers)], "exact": answers}.get(self.benchmark.metric, [])
        before = len(tokenizer.tokens("a"))  # a text of its own may begin with a space more
        return min((len(tokenizer.tokens(f"a {one}")) - before for one in every), default=0)

    def _background(self, context: EvalContext) -> list[str]:
        """The sentences among which generated examples are hidden."""
        if self.dataset != "babilong":
            return []
        tokens = context.store.tokens[:BACKGROUND].tolist()
        return sentences("".join(context.corpus.tokenizer.decode(tokens)))

    def _prompts(self, context: EvalContext, length: int) -> "list[LongPrompt]":
        """The prompts, each of which leaves room for an answer within so many tokens."""
        found = [*self._each_prompt(context, length - self._answer_tokens)]
        if not found:
            refuse("task.documents.path", self.path, "has no record", "Give a file of examples")
        return found

    def _each_prompt(self, context: EvalContext, most: int) -> Iterator[LongPrompt]:
        tokenizer, answer = context.corpus.tokenizer, self._answer_tokens
        if self.dataset in GENERATED:
            text = self._background(context)
            for number in range(self.examples):
                seed = [self.seed, number]
                shown = (self.dataset, self.seed, self.shots)
                yield fitting(tokenizer, self.dataset, seed, text, most, answer, shown)
            return
        shown = [solved(one) for one in self._from_file(self.shots_path, self.shots)]
        if len(shown) < self.shots:
            rule = f"{self.shots_path} has {len(shown)} examples"
            refuse("task.documents.shots", self.shots, rule, "Use fewer")
        for example in self._from_file(self.path, self.examples):
            if shown:
                yield with_shots(tokenizer, example, shown, most, self.truncate, answer)
            else:
                yield cut_to(tokenizer, example, most, self.truncate, answer)

    def _from_file(self, path: str | None, count: int) -> Iterator[Example]:
        """The first examples of a file, each question with its cue."""
        if not count:
            return
        every = read_examples(Path(str(path)), self.fields or FIELDS, self.benchmark.instruction)
        for example in islice(every, count):
            cue = "\n".join(part for part in (example.question, self.benchmark.cue) if part)
            yield example._replace(question=cue)
