"""Where and how an emitter writes: arguments and `SPOOL_*` variables as one frozen value.

An empty variable counts as unset. A value that cannot be read, or with which no line could be kept, raises
ValueError here, before anything is written; `get_emitter` then logs it
once and drops.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

from spool.record import MAX_LINE_BYTES
from spool.redaction import DEFAULTS
from spool.segment import DEFAULT_DIRECTORY
from spool.sensitive import SENSITIVE_SETS

_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})

_MIN_BYTES: Final = 4096
_MAX_SEGMENT_BYTES: Final = 1 << 30
"""A process keeps two segments mapped; address space and `posix_fallocate` bear this on every platform."""
_MAX_TEXT: Final = 200
_MAX_AGE: Final = 7 * 86_400.0
"""A week. Some multiples of it are waited for, and a wait is limited (`threading.TIMEOUT_MAX`)."""


Event = dict[str, Any]
BeforeEmit = Callable[[Event], Event | None]
"""What may change or drop an event: see spool/hook.py."""


class Options(TypedDict, total=False):
    """The arguments of `Emitter` beside the directory: see `Settings`. None is as if it was not given."""

    max_age: float | None
    segment_bytes: int | None
    max_line_bytes: int | None
    max_spool_bytes: int | None
    fsync: bool | None
    mapped: bool | None
    redact: list[str] | tuple[str, ...] | set[str] | frozenset[str] | None
    identity: Literal["required", "optional"] | None
    service: str | None
    release: str | None
    environment: str | None
    request_timer_rate: float | None
    strict: bool | None
    disabled: bool | None
    console: bool | None


class SettingError(ValueError):
    """A setting that cannot be: `name` is the field of `Settings`."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem}")
        self.name = name
        self.problem = problem


@dataclass(frozen=True)
class Settings:
    """Settings of an emitter, in bytes and seconds. Raises ValueError if one is impossible."""

    directory: Path = DEFAULT_DIRECTORY
    max_age: float = 1.0
    """A segment with lines is sealed so long after its first line: the bound on freshness. At most a week."""
    segment_bytes: int = 4 << 20
    """Capacity that is reserved for a segment, at most 1 GiB; sealing cuts it to what was written. Below
    4 MiB a busy process rotates before the next segment is ready, which makes the median emit 10 % slower."""
    max_line_bytes: int = 1 << 20
    """A longer line is dropped and counted. At most 4 MiB, the longest line that the loader reads."""
    max_spool_bytes: int = 10 << 30
    """No segment is made that would bring the spool's segments above this: newer lines are dropped and
    counted. At least two segments, because one is prepared while another is written; 0 is no limit."""
    fsync: bool = False
    """Sync each segment before it is sealed: power loss then costs at most the last `max_age` seconds."""
    mapped: bool = True
    """Map segments where that is safe. Without, each line is one write: slower, beside busy threads by tens
    of milliseconds, but nobody who truncates an open segment ends the process."""
    redact: frozenset[str] = frozenset()
    """Words that are added to the sets `secrets` and `personal_data` of spool/sensitive.py: a value under a
    key that contains one is not written. `-secrets` and `-personal_data` switch a set off. In the
    environment with commas between them: `nickname,school,-personal_data`."""
    identity: str = "required"
    """`optional` writes events without a user or a family, which the tables accept after
    `loader init --optional-identity`; `required` drops and counts them, as new tables refuse them."""
    service: str = ""
    """With `release` and `environment`: what all events have in their metadata and all metrics in their
    labels, as `service`, `release` and `environment`. Empty is left out. At most 200 characters."""
    release: str = ""
    environment: str = ""
    request_timer_rate: float = 1.0
    """Part of the requests that the middlewares time, above 0 and at most 1; all are counted. Below 1 the timer's
    lines have it as the label `sample_rate`."""
    strict: bool = False
    """Raise ValueError for what cannot be written, for development and tests."""
    disabled: bool = False
    """Keep, count, log and create nothing; see spool/disabled.py."""
    console: bool = False
    """Also print each line to standard error, for development; see spool/console.py."""

    def __post_init__(self) -> None:
        _check_type("max_age", self.max_age, int, float)
        if not 0 < self.max_age <= _MAX_AGE:  # nan is neither
            raise SettingError(
                "max_age", f"must be above 0 and at most {_MAX_AGE:.0f} seconds: {self.max_age}"
            )
        _check_bytes("segment_bytes", self.segment_bytes, _MIN_BYTES, _MAX_SEGMENT_BYTES)
        _check_bytes("max_line_bytes", self.max_line_bytes, _MIN_BYTES, MAX_LINE_BYTES)
        if self.max_spool_bytes != 0:
            _check_bytes("max_spool_bytes", self.max_spool_bytes, 2 * self.segment_bytes, None)
        if self.identity not in ("required", "optional"):
            raise SettingError("identity", f"must be required or optional, not {self.identity!r}")
        for name in DEFAULTS:
            _check_text(name, getattr(self, name))
        _check_type("request_timer_rate", self.request_timer_rate, int, float)
        if not 0 < self.request_timer_rate <= 1:  # nan is neither
            raise SettingError(
                "request_timer_rate", f"must be above 0 and at most 1: {self.request_timer_rate}"
            )
        if "\0" in str(self.directory):
            raise SettingError(
                "directory", f"must be a path, which has no NUL character: {str(self.directory)!r}"
            )

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ, /, **given: Any) -> Settings:
        """Return what was given, else what the environment says (`SPOOL_DIR`, `SPOOL_MAX_AGE`, ...).

        Raises ValueError that names the variable or the argument that cannot be read or cannot work, and
        TypeError for an argument that is not a setting.
        """
        values = {name: value for name, value in given.items() if value is not None}
        variables: dict[str, str] = {}
        for field in fields(cls):
            variable = _variable(field.name)
            if field.name not in values and environment.get(variable, "").strip():
                variables[field.name] = variable
                values[field.name] = _parse(variable, environment[variable].strip(), type(field.default))
        try:
            values["directory"] = _absolute(values.get("directory", cls.directory))
            values["redact"] = _words(values.get("redact", cls.redact))
            settings = cls(**values)
            if "max_line_bytes" in values:
                _check_line_fits(settings)
        except SettingError as error:
            raise SettingError(variables.get(error.name, error.name), error.problem) from None
        return settings


def _variable(name: str) -> str:
    return "SPOOL_DIR" if name == "directory" else f"SPOOL_{name.upper()}"


def _check_type(name: str, value: object, *kinds: type) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise SettingError(name, f"must be a number, not {value!r}")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise SettingError(name, f"must be text, not {value!r}")
    if len(value) > _MAX_TEXT or "\0" in value or not _is_unicode(value):
        raise SettingError(
            name, f"must be at most {_MAX_TEXT} characters of Unicode without NUL: {value[:_MAX_TEXT]!r}"
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, or a byte of the environment that is not UTF-8
        return False
    return True


def _check_bytes(name: str, value: int, least: int, most: int | None) -> None:
    _check_type(name, value, int)
    if value < least:
        raise SettingError(name, f"must be at least {least} bytes: {value}")
    if most is not None and value > most:
        raise SettingError(name, f"must be at most {most} bytes: {value}")


def _check_line_fits(settings: Settings) -> None:
    """A line that was asked for must fit into the spool beside the segment that is being written."""
    room = settings.max_spool_bytes - settings.segment_bytes
    if settings.max_spool_bytes and settings.max_line_bytes > room:
        raise SettingError("max_line_bytes", f"must be at most max_spool_bytes less one segment: {room}")


def _absolute(directory: str | os.PathLike[str]) -> Path:
    try:
        return Path(directory).absolute()
    except OSError as error:  # the working directory was removed
        raise SettingError("directory", f"must be an absolute path here: {directory!s} ({error})") from None


def _words(words: object) -> frozenset[str]:
    if isinstance(words, str) or not isinstance(words, list | tuple | set | frozenset):
        raise SettingError("redact", f"must be a list of words, not {type(words).__name__}")
    for word in words:
        _check_word(word)
    return frozenset(words)


def _check_word(word: object) -> None:
    if not isinstance(word, str):
        raise SettingError("redact", f"must be a list of words, and {word!r} is not one")
    if word.startswith("-") and word[1:] not in SENSITIVE_SETS:
        known = " or ".join(f'"-{name}"' for name in SENSITIVE_SETS)
        raise SettingError("redact", f'must switch off a set by its name, {known}, not "{word}"')


def _parse(variable: str, text: str, kind: type) -> Any:
    if kind is frozenset:
        return _parse_words(variable, text)
    if kind is bool:
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        raise ValueError(f"{variable} must be 0 or 1, not {text!r}")
    if kind is str:
        return text.lower() if variable == _variable("identity") else text
    if kind is int or kind is float:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"{variable} must be a number, not {text!r}") from None
    return Path(text)


def _parse_words(variable: str, text: str) -> frozenset[str]:
    words = frozenset(filter(None, (word.strip().removeprefix("+") for word in text.split(","))))
    if not words:
        raise ValueError(f"{variable} must be words with commas between them, not {text!r}")
    return words
