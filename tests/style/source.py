"""The project's Python files, parsed, and the questions that the style tests ask about them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Source:
    """A Python file.

    Args:
        path: from the project's folder, such as ``megavlm/data/store/format.py``.
        text: what is in it.
    """

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The file, parsed."""
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        """Dotted name, such as ``megavlm.data.store.pack_format``."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def folder(self) -> str:
        """Folder inside the package, such as ``data/store``; empty for the package's own files."""
        parts = self.path.split("/")
        return "/".join(parts[1:-1]) if parts[0] == "megavlm" else ""

    def imports(self) -> list[tuple[int, str]]:
        """Line and dotted name of every import, those inside functions included; ``from a import
        b`` counts as ``a.b``.
        """
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = self.module.split(".")[: -node.level] if node.level else []
                base = ".".join([*start, *([node.module] if node.module else [])])
                found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        return found

    def texts(self) -> Iterator[tuple[int, str]]:
        """Line and value of every text in the code, docstrings and comments not."""
        said = {id(node.value) for node in ast.walk(self.tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(self.tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in said
            ):
                yield node.lineno, node.value

    def functions(self) -> Iterator[tuple[str, int]]:
        """Name and number of lines of every function, from ``def`` to its last line."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name, node.end_lineno - node.lineno + 1

    def calls(self) -> Iterator[tuple[int, str]]:
        """Line and last name of every call: ``item`` for ``loss.item()``, ``getattr`` for
        ``getattr(a, "b")``.
        """
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                yield (
                    node.lineno,
                    node.func.id if isinstance(node.func, ast.Name) else node.func.attr,
                )


@cache
def _read(path: Path) -> Source:
    """Read a file once for all rules, which share its syntax tree."""
    return Source(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))


def sources(*folders: str) -> tuple[Source, ...]:
    """Every Python file in ``folders`` of the project."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return tuple(map(_read, paths))


def reaches(name: str, dependency: str) -> bool:
    """Whether the dotted ``name`` is ``dependency`` or something in it."""
    return name == dependency or name.startswith(dependency + ".")


def folder_of(name: str, modules: Iterable[str]) -> str | None:
    """Return the package's folder that the dotted ``name``, a module or something in one,
    lies in.
    """
    parts = name.split(".")
    if parts[0] != "megavlm":
        return None
    known = set(modules)
    folders = {
        "/".join(module.split(".")[1:end])
        for module in known
        for end in range(1, module.count(".") + 1)
    }
    for end in range(len(parts), 0, -1):
        if (path := "/".join(parts[1:end])) in folders:
            return path
    return ""
