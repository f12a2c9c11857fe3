"""The documents of the project: their snippets, commands, headings and links.

Documents of a package are read from the installed package, because the tests may run without its source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Final

from tests.release import ROOT

PACKAGES: Final = ("spool", "loader")


def located(name: str) -> Path:
    """Return where a path of the repository, such as `spool/record.py`, is found."""
    first, *rest = PurePosixPath(name).parts
    return Path(str(files(first))).joinpath(*rest) if first in PACKAGES else ROOT / name


@dataclass(frozen=True)
class Document:
    """A Markdown file; `name` is its path in the repository."""

    name: str

    @cached_property
    def text(self) -> str:
        return located(self.name).read_text("utf-8")

    @cached_property
    def prose(self) -> str:
        """The text without fenced blocks."""
        return re.sub(r"^( *)```.*?^\1```$", "", self.text, flags=re.DOTALL | re.MULTILINE)

    def languages(self) -> list[str]:
        """Return the language of each fenced block."""
        return re.findall(r"^ *```(\w*)\n.*?^ *```$", self.text, re.DOTALL | re.MULTILINE)

    def snippets(self, language: str) -> list[str]:
        return re.findall(rf"^ *```{language}\n(.*?)^ *```$", self.text, re.DOTALL | re.MULTILINE)

    def section(self, heading: str) -> str:
        """Return the text below a heading of the second level, up to the next heading."""
        return re.split(r"^##? ", self.text.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]

    def spans(self) -> list[str]:
        """Return the inline code of the prose."""
        return re.findall(r"`([^`\n]+)`", self.prose)

    def anchors(self) -> set[str]:
        """Return the anchors of the headings, as GitHub forms them."""
        headings = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def links(self) -> list[str]:
        """Return the targets of all links."""
        return re.findall(r"\]\(([^)\s]+)\)", self.prose)

    def resolved(self, link: str) -> str:
        """Return the path in the repository that a relative link names."""
        parts: list[str] = []
        for part in (PurePosixPath(self.name).parent / link).parts:
            if part == "..":
                parts.pop()
            else:
                parts.append(part)
        return "/".join(parts)


README: Final = Document("README.md")
SPOOL: Final = Document("spool/README.md")
LOADER: Final = Document("loader/README.md")
SEE: Final = Document("loader/see/README.md")
TESTS: Final = Document("tests/README.md")
CHANGELOG: Final = Document("CHANGELOG.md")
DOCUMENTS: Final = (README, SPOOL, LOADER, SEE, TESTS, CHANGELOG)
