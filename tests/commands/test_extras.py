"""The install command that is printed for a missing extra works for every source of the package."""

from __future__ import annotations

import json
from email.message import Message
from importlib.metadata import Distribution
from typing import Any

import pytest

from loader import extras


class Installed(Distribution):
    def __init__(self, direct_url: object) -> None:
        self.direct_url = direct_url

    def read_text(self, filename: str) -> str | None:
        assert filename == "direct_url.json"
        return json.dumps(self.direct_url) if self.direct_url else None

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError

    @property
    def metadata(self) -> Any:
        return Message()


GIT = "https://git.example.org/tools/analytics-spool.git"


@pytest.mark.parametrize(
    ("direct_url", "source"),
    [
        ({"url": "file:///srv/the%20spool", "dir_info": {}}, "'/srv/the spool[demo]'"),
        ({"url": "file:///srv/spool", "dir_info": {"editable": True}}, "-e '/srv/spool[demo]'"),
        (
            {"url": "file:///tmp/dist/analytics_spool-0.1.0-py3-none-any.whl", "archive_info": {}},
            "'analytics-spool[demo] @ file:///tmp/dist/analytics_spool-0.1.0-py3-none-any.whl'",
        ),
        (
            {"url": GIT, "vcs_info": {"vcs": "git", "requested_revision": "v1", "commit_id": "a1"}},
            f"'analytics-spool[demo] @ git+{GIT}@v1'",
        ),
        (
            {"url": GIT, "vcs_info": {"vcs": "git", "commit_id": "a1"}},
            f"'analytics-spool[demo] @ git+{GIT}@a1'",
        ),
        (None, "'analytics-spool[demo]'"),
    ],
)
def test_a_missing_extra_is_installed_from_the_source_of_the_package(
    monkeypatch: pytest.MonkeyPatch, direct_url: object, source: str
) -> None:
    monkeypatch.setattr(extras, "distribution", lambda _: Installed(direct_url))
    assert extras.missing("httpx", "demo") == f"httpx is not installed: pip install {source}"
