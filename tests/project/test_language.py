"""Words that make a reader stop are in no docstring, comment, message or document.

Only habits that can be found without judgement: words, phrases, and clauses as summaries. The tests read text only:
names in code are not checked. A sentence that needs one of the words is listed in EXCEPTIONS, with the reason.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.documents import located

ROOT: Final = Path(__file__).parents[2]
HABITS: Final = {
    r"tells?|told|untold": "report, log, notify; reported, unreported",
    r"says?|said": "report, state, name: a program does not speak",
    r"anew": "again",
    r"lately": "recently",
    r"meanwhile": "in the meantime",
    r"a passing": "temporary",
    r"mends?|mended": "repair",
    r"goes": "is sent, is written, is deleted, continues",
    r"gives": "returns, yields, passes",
    r"(?:is|are|was|were) there already": "already exists",
    r"(?:is|are|was|were) (?:looked at|looked for|waited for)": "scans, searches, waits for",
    r"first look": "first scan",
    r"how (?:it|they|things) stands?": "status",
    r"(?<![Tt]here )(?:is|are|was|were) no (?!longer|more|less|other)[a-z]+": "is not a segment",
    r"under other bytes": "from a different file",
    r"mistakes? of (?:the|a) caller": "an invalid call",
    r"(?:None|True|False|empty|nothing|0),? where": "if",
    r"where (?:there|nothing|nobody|somebody|no one)": "if",
}
"""What to write instead, by pattern."""
EXCEPTIONS: Final[dict[str, str]] = {}
"""The reason for keeping a text, by a part of that text."""
_WORDS: Final = re.compile("|".join(rf"\b(?:{pattern})\b" for pattern in HABITS))
_SUMMARY: Final = re.compile(r'"""(?:What|Who|Whom|Whose|Where|Which|How) .*')
"""A summary is a noun phrase or an imperative. "Whether" is the form of summaries of predicates."""
_COMMENT: Final = re.compile(r"(?:^|\s)(?:#|--) (.+)$", re.MULTILINE)
_SQL: Final = re.compile(r"\b(?:SELECT|INSERT|UPDATE|CREATE|ALTER|WITH|DELETE)\b")
_CODE: Final = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_SUFFIXES: Final = {".py", ".md", ".sql", ".toml", ".service", ".example", ".yaml", ".html"}


def texts(source: str, suffix: str) -> Iterator[str]:
    """Yield the texts for people in a file."""
    if suffix in {".md", ".yaml", ".html"}:
        yield _CODE.sub("", source)
        return
    yield from _COMMENT.findall(source)
    if suffix == ".py":
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                yield node.value


def habits(source: str, suffix: str) -> Iterator[str]:
    """Yield each bad habit in a file, with the surrounding words."""
    if suffix == ".py":
        yield from _SUMMARY.findall(source)
    if not _WORDS.search(source):  # parsing every file takes ten times as long
        return
    for text in texts(source, suffix):
        if _SQL.search(text) or any(part in text for part in EXCEPTIONS):
            continue
        plain = _CODE.sub("", text)
        for found in _WORDS.finditer(plain):
            yield " ".join(plain[max(0, found.start() - 40) : found.end() + 40].split())


def test_no_text_has_a_word_that_makes_a_reader_stop() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = {name: located(name) for name in listed.stdout.split("\0") if name}  # of the installed packages
    found = [
        f"{name}: {each}"
        for name, path in paths.items()
        if path.suffix in _SUFFIXES and path != Path(__file__) and path.is_file() and not path.is_symlink()
        for each in habits(path.read_text(), path.suffix)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        '"""What is loaded at once."""',
        "x = 1  # None where it was dropped",
        'raise ValueError("the file is no segment")',
        '"""Return it.\n\n    It goes to the spool.\n    """',
    ],
)
def test_a_bad_habit_is_found(source: str) -> None:
    assert list(habits(source, ".py"))


@pytest.mark.parametrize(
    "source",
    [
        '"""Whether the lock is held."""',
        "x = goes  # there is no lock",
        'QUERY = "SELECT 1 FROM t WHERE a IS NULL OR goes"',
        '"""Return `goes`."""',
    ],
)
def test_plain_text_and_code_are_accepted(source: str) -> None:
    assert not list(habits(source, ".py"))
