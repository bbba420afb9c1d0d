"""The links and paths in the documentation exist, and it lists all commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavlm import __version__
from tests.style.source import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# Files that users have and we do not, and a library's.
FOREIGN = ("megatron/core/",)


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def wrong_links(path: Path, text: str) -> Iterator[str]:
    """Report relative links to files or headings that do not exist."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            there = (path.parent / name) if name else path
            if not there.exists():
                yield f"{path.name}: links to {target}, which does not exist"
            elif anchor and anchor not in anchors(there.read_text(encoding="utf-8")):
                yield f"{path.name}: links to {target}, which has no such heading"


def wrong_paths(path: Path, text: str) -> Iterator[str]:
    """Report Python files and folders of the project that are named and do not exist."""
    files = re.findall(r"(?<![\w./-])((?:[a-z_0-9]+/)+[a-z_0-9]+\.py)\b", text)
    folders = re.findall(r"`((?:megavlm|tests|tools)/[a-z_0-9/]*)`", text)
    for name in [*files, *folders]:
        if not name.startswith(FOREIGN) and not (ROOT / name).exists():
            yield f"{path.name}: names {name}, which does not exist"


@pytest.mark.parametrize(
    "text",
    [
        "[a](docs/nothing.md)",
        "[a](README.md#nothing)",
        "see `megavlm/nothing.py`",
        "see `data/store/reader.py`",
        "in `megavlm/nothing/`",
    ],
)
def test_a_bad_document_is_reported(text: str):
    path = ROOT / "README.md"
    assert [*wrong_links(path, text), *wrong_paths(path, text)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_exist(path: Path):
    text = path.read_text(encoding="utf-8")
    complaints = [*wrong_links(path, text), *wrong_paths(path, text)]
    assert not complaints, "\n".join(complaints)


def test_the_changelog_has_the_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {__version__} - " in text


def test_every_command_is_in_the_table_of_commands():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(tools/\w+\.py)` \|", text, re.M)
    assert sorted(listed) == sorted(f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py"))
