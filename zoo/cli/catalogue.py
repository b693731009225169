"""`python -m zoo.cli.catalogue README.md`: rewrites README's tables of what can be chosen.

A table is written between `<!-- catalogue: models -->` and `<!-- end -->`. Its rows come from the
headers of the YAML files: the sentence on the first line, and the entries `Source`, `Time` and
`State` where there are any; those of `families` from zoo.pretrained.families. An `arXiv <id>`
becomes the link of the authors and year before it.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zoo.cli.listing import KINDS, summary
from zoo.errors import choose
from zoo.paths import shipped
from zoo.runs.files import read_text, write_text

BLOCK = re.compile(r"(<!-- catalogue: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
ENTRY = re.compile(r"^([A-Z]\w+):? +(.*)$")
WORK = re.compile(r"(?<!\w)([A-Z][^\s,;(]*(?: (?:&|and) [^\s,;(]+)*,? (?:19|20)\d\d)\b")
ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")
COLUMNS = {
    "models": ("Source", "Time", "State"),
    "extensions": ("Source",),
    "corpora": ("Source",),
    "tasks": ("Source",),
    "compressions": ("Source",),
    "experiments": (),
    "recipes": ("Source",),
}
FAMILIES_KIND = "families"  # of pretrained checkpoints, from zoo.pretrained.families
HEADS = {"Source": "source", "Time": "time", "State": "state per layer"}


def header(file: Path) -> dict[str, str]:
    """The entries of a YAML file's leading comment, such as {"Time": "O(t)"}, on one line each."""
    entries, current = {}, ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words = line.lstrip("# ").strip()
        if found := ENTRY.match(line.removeprefix("# ")):
            current, words = found[1], found[2]
            entries[current] = ""
        if current:
            entries[current] = f"{entries[current]} {words}".strip()
    return entries


def citations(source: str) -> str:
    """The works that a `Source` names, as "Authors year", linked where an arXiv id follows.

    >>> citations('Su 2021, "RoFormer", section 3.4 (arXiv 2104.09864)')
    '[Su 2021](https://arxiv.org/abs/2104.09864)'
    """
    bare = re.sub(r'"[^"]*"', lambda title: " " * len(title[0]), source)
    works = [*WORK.finditer(bare)]
    starts = [*(work.start() for work in works), len(source)]
    cited = {}
    for work, end in zip(works, starts[1:], strict=True):
        name, link = work[1].replace(",", ""), ARXIV.search(source[work.end() : end])
        cited.setdefault(name, f"[{name}](https://arxiv.org/abs/{link[1]})" if link else name)
    return ", ".join(cited.values())


def table(kind: str) -> str:
    """The table of one kind, a row for each YAML file of its group, in Markdown."""
    if kind == FAMILIES_KIND:
        heads = ("`model_type`", "what it is")
        rows = [[f"`{name}`", str(read.__doc__).removesuffix(".")] for name, read in families()]
        return _markdown(heads, rows)
    columns = COLUMNS[choose("kind", kind, COLUMNS)]
    heads = ("name", "what it is", *(HEADS[column] for column in columns))
    rows = []
    for file in sorted((shipped("configs") / KINDS[kind]).glob("*.yaml")):
        entries = header(file)
        entries["Source"] = citations(entries.get("Source", ""))
        entries["State"] = entries.get("State", "").removesuffix(" (per layer)")
        row = (f"`{file.stem}`", summary(file), *(entries.get(column, "") for column in columns))
        rows.append([_mathematics(cell) for cell in row])
    return _markdown(heads, rows)


def families() -> list[tuple[str, Callable[..., Any]]]:
    """The families of checkpoints that can be opened, by their name in config.json."""
    from zoo.pretrained.families import FAMILIES

    return sorted(FAMILIES.items())


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _mathematics(cell: str) -> str:
    """A cell as Markdown shows it: a * b and t^2 as they are printed, no end of the column."""
    return cell.replace("|", "\\|").replace(" * ", " · ").replace("^2", "²")


def updated(text: str) -> str:
    """A document with each of its tables made anew."""
    return BLOCK.sub(lambda block: block[1] + table(block[2]) + block[3], text)


def main(argv: Sequence[str]) -> int:
    """Rewrite the tables of the documents named."""
    for name in argv:
        write_text(Path(name), updated(read_text(Path(name))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
