"""Every public function and method of the package says what it takes and what it returns."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("zoo/**/*.py"), ROOT / "train.py", ROOT / "eval.py"])


def unannotated(body: list[ast.stmt], place: str, method: bool = False) -> Iterator[str]:
    """The public functions of a module or class that leave a parameter or the result open."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from unannotated(node.body, f"{place}.{node.name}", method=True)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            starred = [found for found in (node.args.vararg, node.args.kwarg) if found]
            if method and named and named[0].arg in ("self", "cls"):
                named = named[1:]
            open_ones = [found.arg for found in (*named, *starred) if found.annotation is None]
            open_ones += ["return"] if node.returns is None else []
            if open_ones:
                yield f"{place}.{node.name}: {', '.join(open_ones)}"


def test_public_functions_are_annotated():
    found = [
        line
        for path in SOURCES
        for line in unannotated(
            ast.parse(path.read_text("utf-8")).body, str(path.relative_to(ROOT))
        )
    ]
    assert found == []


def test_an_open_parameter_and_an_open_result_are_found():
    source = "class A:\n    def f(self, x, *y: int): ...\ndef g(*, z) -> int: ...\ndef _h(x): ..."
    assert [*unannotated(ast.parse(source).body, "m")] == ["m.A.f: x, return", "m.g: z"]
