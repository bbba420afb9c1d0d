"""What tests alone use is no part of the product."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from tests.style.source import ROOT, Source, sources

# Called by torch, megatron-core, logging and io, which know them by these names.
CALLED_BY_LIBRARIES = {
    "compute_language_model_loss",
    "emit",
    "readable",
    "readall",
    "readinto",
    "record_event",
    "seekable",
    "setup_embeddings_and_output_layer",
    "writable",
    "write_data",
}
# Called by who extends the package: docs/extending.md.
CALLED_BY_EXTENSIONS = {"register"}


def unused(files: Iterable[Source]) -> Iterator[str]:
    """Report functions, classes and constants that no line of the files uses."""
    files = list(files)
    used = {name for file in files for name in _used(file.tree)}
    used |= CALLED_BY_LIBRARIES | CALLED_BY_EXTENSIONS
    for file in files:
        for line, name in _defined(file.tree):
            if name not in used and not name.startswith("__"):
                yield f"{file.path}:{line}: {name}"


def _used(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from node.value.replace(":", ".").split(".")  # "package.module:function"


def _defined(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        yield from ((node.lineno, each.id) for each in targets if isinstance(each, ast.Name))


def test_what_nothing_uses_is_reported():
    text = "import x\n\nA = 1\nB: int = A\n\n\nclass C:\n    def f(self):\n        return x.f\n"
    assert list(unused([Source("megavlm/bad.py", text)])) == [
        "megavlm/bad.py:7: C",
        "megavlm/bad.py:4: B",
    ]


def test_the_product_uses_all_of_itself():
    scripts = (Source(name, (ROOT / name).read_text()) for name in ("pretrain_vlm.py", "setup.py"))
    complaints = list(unused([*sources("megavlm", "tools", "examples"), *scripts]))
    assert not complaints, "\n".join(complaints)
