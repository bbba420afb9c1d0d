"""Rules about single statements; each is shown bad lines first, and good ones that look alike."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator

import pytest

from tests.style.source import Source, sources


def one_value_an_assignment(files: Iterable[Source]) -> Iterator[str]:
    """Report assignments of several unrelated values; swaps and unpacking are allowed."""
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
                targets = [target for target in node.targets if isinstance(target, ast.Tuple)]
                values = sorted(map(ast.unparse, node.value.elts))
                if any(sorted(map(ast.unparse, target.elts)) != values for target in targets):
                    yield f"{file.path}:{node.lineno}: {ast.unparse(node)}"


def no_product_with_a_truth(files: Iterable[Source]) -> Iterator[str]:
    """Report products of a text, a list or a number with something true or false."""
    for file in files:
        for node in ast.walk(file.tree):
            is_product = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)
            if is_product and (_is_truth(node.left) or _is_truth(node.right)):
                yield f"{file.path}:{node.lineno}: {ast.unparse(node)}"


def repository_first(files: Iterable[Source]) -> Iterator[str]:
    """Report scripts in tools/ and examples/ that may import another copy of the code: an installed
    one that is not editable is as old as its installation, and training runs the repository's.
    """
    wanted = {
        "tools": "sys.path.insert(0, str(Path(__file__).parents[1]))",
        "examples": "sys.path.insert(0, str(Path(__file__).resolve().parents[2]))",
    }
    for file in files:
        found = re.fullmatch(r"(?:(tools)|(examples)/[^/]+)/[^/]+\.py", file.path)
        ours = [line for line, name in file.imports() if name.startswith(("megavlm.", "tools."))]
        if found and ours:
            statement = wanted[found[1] or found[2]]
            inserts = [node.lineno for node in file.tree.body if ast.unparse(node) == statement]
            if not inserts or min(inserts) > min(ours):
                yield f"{file.path}: imports before {statement}"


def _is_truth(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Compare)
        or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))
        or (isinstance(node, ast.BoolOp) and any(map(_is_truth, node.values)))
        or (isinstance(node, ast.Call) and ast.unparse(node.func) == "bool")
    )


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        (repository_first, "from megavlm.config.cli import parse"),
        (
            repository_first,
            "import tools.x\nsys.path.insert(0, str(Path(__file__).parents[1]))",
        ),
        (one_value_an_assignment, "x, y = [], None"),
        (one_value_an_assignment, "a = b, c = d, e"),
        (one_value_an_assignment, "self.a, b[0] = b[0], c"),
        (no_product_with_a_truth, "x = 's' * (n > 1)"),
        (no_product_with_a_truth, "x = [y] * bool(z)"),
        (no_product_with_a_truth, "x = 3 * (y and not z)"),
    ],
)
def test_a_bad_line_is_reported(rule: Callable, line: str):
    assert list(rule([Source("tools/bad.py", line)]))


def test_an_example_that_imports_another_copy_is_reported():
    line = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))\nimport megavlm.train"
    assert list(repository_first([Source("examples/fuyu/bad.py", line)]))


@pytest.mark.parametrize(
    "line", ["x, y = y, x", "x, y = f()", "a[i], a[j] = a[j], a[i]", "x = n * (given or 1)"]
)
def test_a_good_line_is_not(line: str):
    source = [Source("megavlm/good.py", line)]
    assert not [*one_value_an_assignment(source), *no_product_with_a_truth(source)]


@pytest.mark.parametrize(
    "rule", [one_value_an_assignment, no_product_with_a_truth, repository_first]
)
def test_the_project_keeps_the_rule(rule: Callable):
    complaints = list(rule(sources("megavlm", "tools", "tests", "examples")))
    assert not complaints, "\n".join(complaints)
