"""Where and how an emitter writes: arguments and `SPOOL_*` variables as one frozen value."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from spool.redaction import SENSITIVE_KEYS
from spool.segment import DEFAULT_DIRECTORY

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off", ""})


@dataclass(frozen=True)
class Settings:
    """Settings of an emitter, in bytes and seconds. Raises ValueError where one is impossible."""

    directory: Path = DEFAULT_DIRECTORY
    max_age: float = 1.0
    """A segment with lines is sealed this long after its first line: the bound on freshness."""
    segment_bytes: int = 4 << 20
    """Capacity that is reserved for a segment; sealing cuts it to what was written. Below 4 MiB a busy
    process rotates before the next segment is ready, which makes the median emit 10 % slower."""
    max_line_bytes: int = 1 << 20
    """A longer line is dropped and counted."""
    max_spool_bytes: int = 10 << 30
    """No segment is made that would bring the spool's segments above this: newer lines are dropped and
    counted. 0 is no limit."""
    fsync: bool = False
    """Sync each segment before it is sealed: power loss then costs at most the last `max_age` seconds."""
    mapped: bool = True
    """Map segments where that is safe. Without, each line is one write: slower, beside busy threads by tens
    of milliseconds, but nobody who truncates an open segment ends the process."""
    redact: frozenset[str] = SENSITIVE_KEYS
    """Words; a value under a key that contains one is not written (see spool/redaction.py). In the
    environment, `nickname,school` replaces the list and `+nickname,school` adds to it."""
    strict: bool = False
    """Raise ValueError for what can't be written, for development and tests."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_age) and self.max_age > 0):
            raise ValueError(f"max_age must be above 0 seconds: {self.max_age}")
        for name in ("segment_bytes", "max_line_bytes"):
            if getattr(self, name) < 4096:
                raise ValueError(f"{name} must be at least 4096: {getattr(self, name)}")
        if self.max_spool_bytes < 0:
            raise ValueError(f"max_spool_bytes must not be below 0: {self.max_spool_bytes}")

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ, **given: Any) -> Settings:
        """Return what was given, else what the environment says (`SPOOL_DIR`, `SPOOL_MAX_AGE`, ...).

        Raises ValueError that names the variable where its value can't be read.
        """
        values = {name: value for name, value in given.items() if value is not None}
        for field in fields(cls):
            variable = "SPOOL_DIR" if field.name == "directory" else f"SPOOL_{field.name.upper()}"
            if field.name not in values and variable in environment:
                values[field.name] = _parse(variable, environment[variable], type(field.default))
        values["directory"] = Path(values.get("directory", cls.directory)).absolute()
        values["redact"] = frozenset(values.get("redact", cls.redact))
        return cls(**values)


def _parse(variable: str, text: str, kind: type) -> Any:
    if kind is frozenset:
        words = frozenset(text.removeprefix("+").replace(" ", "").split(","))
        return words | SENSITIVE_KEYS if text.startswith("+") else words
    if kind is bool:
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        raise ValueError(f"{variable} must be 0 or 1, not {text!r}")
    if kind is int or kind is float:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"{variable} must be a number, not {text!r}") from None
    return Path(text)
