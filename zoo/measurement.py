"""What identifies a measurement, and how its numbers are shown: one place for all that need it.

A row of `results.jsonl` answers a question about the weights in its folder. Two rows are the same
measurement where the text, how it was read and the question agree; what came out does not count.
A row also carries its task's `Declaration`, so that whoever reads rows can draw any task.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

BITS = ("int8", "int4")  # of quantized weights, keys and values
# What identifies a measurement beside its question: the text, how it was read, by what machine.
READ_BY = ("fingerprint", "extension_settings", "device", "dtype", "threads", "ranks")
# The fields of a question, for rows written before each row listed its own in `question`.
EARLIER_QUESTIONS = {
    "perplexity": (
        *("split", "documents", "unit", "units", "stride", "protocol", "length", "windows"),
    ),
    "passkey": (
        *("split", "documents", "unit", "count", "depths", "candidates", "digits", "key_seed"),
        "length",
    ),
    "stream": ("split", "length", "chunk"),
    "speed": ("phase", "repeats", "decode_tokens", "length"),
    "longrope": (
        *("split", "length", "units", "searched", "texts", "times", "magnitude", "population"),
        *("mutations", "crossovers", "parents", "search_seed", "most"),
    ),
}

Form = Literal["score", "share", "count", "bytes"]
LARGEST = 10**18  # of an integer in a row or record: beyond, neighbours are one float


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A number that a task measures, and how reports show it.

    Attributes:
        field: the row's field that holds it.
        name: what it is, in lower case: "accuracy". Quantities of one name are drawn once.
        better: which direction is better; None where neither is.
        form: how it is printed: `score` 1.234, `share` 12%, `count` three digits, `bytes` 3 MiB.
        unit: follows the name in captions: "bits per byte".
        interval: the row's field with its 95% interval, [low, high].
        chance: the row's field with what guessing would give.
        guess: that with what rules give that read the prompt and associate nothing.
        where: fields that a row of it has, {"phase": "decode"}.
        cost: whether it is drawn under "Speed and memory", not with its task.
    """

    field: str
    name: str
    better: Literal["lower", "higher"] | None
    form: Form = "count"
    unit: str = ""
    interval: str | None = None
    chance: str | None = None
    guess: str | None = None
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cost: bool = False

    def unlearned(self, row: Mapping[str, Any]) -> float | None:
        """The most that a row's value may be without any learning: chance, or a better guess.

        None where the row has neither, as where lower is better.
        """
        fields = (self.chance, self.guess)
        found = [row[name] for name in fields if name and _is_number(row.get(name))]
        return max(found) if found and self.better == "higher" else None

    @property
    def timed(self) -> bool:
        """Whether it is a time or a rate, which depends on the machine and on its load."""
        said = f"{self.name}, {self.unit}"
        return "per second" in said or "seconds" in said

    def of(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is one of this quantity's."""
        return all(row.get(name) == value for name, value in self.where.items())


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What a task says of itself: a title, one or two sentences, and its quantities.

    `text` is the row's field with a text that reports show as it is, `prompt` that with what it was
    written after; "" where there is none.
    """

    title: str
    about: str
    quantities: tuple[Quantity, ...]
    text: str = ""
    prompt: str = ""

    def plain(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The declaration as a row carries it: the quantities that the row has, no defaults."""
        mine = [dataclasses.asdict(quantity) for quantity in self.quantities if quantity.of(row)]
        short = [{k: v for k, v in each.items() if v or k == "better"} for each in mine]
        said = {"title": self.title, "about": self.about, "quantities": short}
        fields = {"text": self.text, "prompt": self.prompt}
        return said | {name: value for name, value in fields.items() if value}


def declared(row: Mapping[str, Any]) -> Declaration | None:
    """The declaration that a row carries; None where it has none that can be read."""
    found: Any = row.get("declares")
    try:
        known = {each.name for each in dataclasses.fields(Quantity)}
        quantities = [
            Quantity(**{k: v for k, v in one.items() if k in known}) for one in found["quantities"]
        ]
        if not all(map(_is_quantity, quantities)):
            return None
        return Declaration(
            title=str(found["title"]),
            about=str(found["about"]),
            quantities=tuple(quantities),
            text=str(found.get("text") or ""),
            prompt=str(found.get("prompt") or ""),
        )
    except (TypeError, KeyError, AttributeError):
        return None


def _is_quantity(one: Quantity) -> bool:
    """Whether a quantity that was read from a file has values of its fields' kinds."""
    texts = (one.field, one.name, one.unit, one.interval or "", one.chance or "", one.guess or "")
    known = one.better in ("lower", "higher", None) and one.form in get_args(Form)
    return known and all(type(text) is str for text in texts) and type(one.where) is dict


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < LARGEST)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def _is_numbers(value: Any) -> bool:
    return type(value) is list and all(one is None or _is_number(one) for one in value)


def _is_interval(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and all(map(_is_number, value))


def _is_texts(value: Any) -> bool:
    return type(value) is list and all(type(one) is str for one in value)


def _is_counts(value: Any) -> bool:
    return type(value) is dict and all(map(_is_count, value.values()))


def _is_curve(value: Any) -> bool:
    """Whether it has the edges of buckets of positions, and lists of a number of each bucket."""
    edges = value.get("edges") if type(value) is dict and "bits_per_byte" in value else None
    if not (type(edges) is list and all(map(_is_count, edges)) and edges == sorted({*edges})):
        return False
    parts = [part for name, part in value.items() if name != "edges"]
    return all(_is_numbers(part) and len(part) == len(edges) - 1 for part in parts)


# What fields of a row, and of a run's record, must be where they are there and not null. Fields of
# other names may be anything: reports read them where a declaration names them.
KINDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "a text",
        lambda value: type(value) is str,
        """
        run arm model size match data device dtype documents extension extension_settings commit
        compression compression_family fingerprint measured_by phase protocol reason session sources
        ignores split state_passing status task time tokenizer positions_file found_file""",
    ),
    ("an integer >= 1", lambda value: _is_count(value) and value > 0, "length train_length"),
    (
        "an integer >= 0",
        _is_count,
        """
        train_tokens train_steps lost_steps parameters count correct seed step tokens_seen
        threads windows window unit units most shown bytes state_bytes stride valid_windows""",
    ),
    (
        "a number",
        _is_number,
        """
        lr extension_factor flops_per_token valid_loss seconds accuracy bits_per_byte perplexity
        nll_sum chance guess bigram_bits unigram_bits uniform_bits value score""",
    ),
    ("two numbers", _is_interval, "interval"),
    (
        "numbers, or null where there is none",
        _is_numbers,
        "accuracy_by_quarter correct_by_depth unit_bits",
    ),
    (
        "a list of integers >= 0",
        lambda value: type(value) is list and all(map(_is_count, value)),
        "unit_bytes",
    ),
    ("a list of texts", _is_texts, "question"),
    ("true or false", lambda value: type(value) is bool, "requested pruned dirty"),
    ("settings by name", lambda value: type(value) is dict, "settings extension_options versions"),
    ("integers by name", _is_counts, "audited"),
    ("edges and lists of a number for each bucket", _is_curve, "curve"),
    ("a text, or settings by name", lambda value: type(value) in (str, dict), "audit"),
)
FIELDS = {name: (words, fits) for words, fits, names in KINDS for name in names.split()}


def wrong_field(row: Mapping[str, Any]) -> str | None:
    """What is wrong with the first field of a row or a record that is of another kind than it must
    be, in words: "length must be an integer >= 0"; None where all are as they must be."""
    for name, value in row.items():
        words, fits = FIELDS.get(name, ("", None))
        if fits is not None and value is not None and not fits(value):
            return f"{name} must be {words}"
    found = declared(row)
    if found is None and row.get("declares") is not None:
        return "declares must be what a task declares"
    for one in found.quantities if found else ():
        for name, words, fits in (
            (one.field, "a number", _is_number),
            (one.chance, "a number", _is_number),
            (one.guess, "a number", _is_number),
            (one.interval, "two numbers", _is_interval),
        ):
            if name and row.get(name) is not None and not fits(row[name]):
                return f"{name} must be {words}"
    return None


def numbers(dtype: str, kv_cache: str | None) -> str:
    """What a row says of the numbers that it was measured in: its field `dtype`."""
    return dtype if kv_cache is None else f"{dtype}, {kv_cache} KV cache"


def is_quantized(dtype: str | None) -> bool:
    """Whether a row's field `dtype` names weights, or cached keys and values, in 8 or 4 bits."""
    return any(bits in (dtype or "") for bits in BITS)


def plain_numbers(dtype: str) -> str:
    """The numbers that a quantized row's were before: quantized weights come from float32."""
    weights = dtype.partition(",")[0]
    return "float32" if weights in BITS else weights


def not_finite(declaration: Declaration, row: Mapping[str, Any]) -> list[str]:
    """The names of the declared quantities whose value in the row is NaN or infinite."""
    values = [(one.name, row.get(one.field)) for one in declaration.quantities if one.of(row)]
    return [name for name, x in values if isinstance(x, float) and not math.isfinite(x)]


def lacking(declaration: Declaration, row: Mapping[str, Any]) -> list[str]:
    """The declared fields that a row does not have at all; one that is None was not measured."""
    return [one.field for one in declaration.quantities if one.of(row) and one.field not in row]


def panel(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that distinguish the rows of a task at one length: its quantities' `where`, and
    the prompt of a text."""
    found = declared(row)
    wheres = [name for one in found.quantities for name in one.where] if found else []
    prompt = found.prompt if found else ""
    names = sorted({"protocol", "phase", *wheres, prompt})  # these two of rows that declare nothing
    return {name: row[name] for name in names if row.get(name) is not None}


def question(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row that identify its question: the task, its settings and the key fields."""
    names = row.get("question") or EARLIER_QUESTIONS.get(str(row.get("task")), ("length",))
    return {name: row.get(name) for name in ("task", *names)}


def replaces(later: Mapping[str, Any], earlier: Mapping[str, Any]) -> bool:
    """Whether a row measured again what an earlier one had measured; a field that the earlier one
    lacks, being of an older kind, distinguishes nothing."""
    same = {name: later.get(name) for name in READ_BY} | question(later)
    return all(earlier.get(name, value) == value for name, value in same.items())


def agrees(row: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """Whether the row has these fields, as JSON would have written them."""
    return all(row.get(name) == json.loads(json.dumps(value)) for name, value in part.items())
