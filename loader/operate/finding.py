"""Findings of `loader doctor`: a check, its verdict and a remedy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from loader.errors import LoaderError


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """The result of a check: what was found, and a remedy if there is a problem."""

    check: str
    verdict: Verdict
    finding: str
    remedy: str = ""
    exit_code: int = LoaderError.exit_code

    def facts(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("check", "verdict", "finding", "remedy")}


def ok(check: str, finding: str) -> Finding:
    return Finding(check, Verdict.OK, finding)


def warning(check: str, finding: str, remedy: str) -> Finding:
    return Finding(check, Verdict.WARNING, finding, remedy)


def failed(check: str, finding: str, remedy: str) -> Finding:
    return Finding(check, Verdict.FAILED, finding, remedy)
