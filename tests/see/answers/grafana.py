"""Grafana's macros and variables, expanded as Grafana does, so that a panel's SQL runs without it.

The front end replaces variables and $__interval; the back end expands macros:
pkg/tsdb/grafana-postgresql-datasource/macros.go and pkg/tsdb/sqleng. Unknown or remaining ones raise an
error, as on the dashboard.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

_UNITS: Final = {
    "ms": 0.001,
    "s": 1,
    "m": 60,
    "h": 3600,
    "d": 86400,
    "w": 604800,
    "M": 2592000,
    "y": 31536000,
}
# The argument list ends at the first parenthesis and is split at every comma, also within quotes.
_MACRO: Final = re.compile(r"\$(__\w+)\(([^)]*)\)")


def seconds(text: str) -> float:
    """Return the length of an interval such as 5m or '1h'."""
    parts = re.fullmatch(r"'?(\d+(?:\.\d+)?)(ms|[smhdwMy])'?", text.strip())
    if parts is None:
        raise ValueError(f"not an interval: {text}")
    return float(parts[1]) * _UNITS[parts[2]]


def expand(
    statement: str,
    since: datetime,
    until: datetime,
    interval: str,
    variables: Mapping[str, str | Sequence[str]],
) -> str:
    """Return the SQL that Postgres gets. Raises ValueError for an unknown macro or variable."""
    statement = re.sub(r"\$__interval_ms\b", str(int(seconds(interval) * 1000)), statement)
    statement = re.sub(r"\$__interval\b|\$\{__interval\}", interval, statement)
    for name, value in variables.items():
        statement = _replace(statement, name, value)
    first, last = (moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ") for moment in (since, until))

    def macro(found: re.Match[str]) -> str:
        name, arguments = found[1], [each.strip() for each in found[2].split(",")]
        if name in ("__timeGroup", "__timeGroupAlias"):
            width = f"{seconds(arguments[1]):g}"
            group = f"floor(extract(epoch from {arguments[0]})/{width})*{width}"
            return f'{group} AS "time"' if name == "__timeGroupAlias" else group
        simple = {
            "__time": f'{arguments[0]} AS "time"',
            "__timeEpoch": f'extract(epoch from {arguments[0]}) as "time"',
            "__timeFilter": f"{arguments[0]} BETWEEN '{first}' AND '{last}'",
            "__timeFrom": f"'{first}'",
            "__timeTo": f"'{last}'",
            "__unixEpochFilter": f"{arguments[0]} >= {int(since.timestamp())} "
            f"AND {arguments[0]} <= {int(until.timestamp())}",
        }
        if name not in simple:
            raise ValueError(f"unknown macro ${name}")
        return simple[name]

    expanded = _MACRO.sub(macro, statement)
    if left := re.findall(r"\$\{?[A-Za-z_]\w*", expanded):
        raise ValueError(f"left over: {left}")
    return expanded


def _replace(statement: str, name: str, value: str | Sequence[str]) -> str:
    values = [value] if isinstance(value, str) else list(value)
    quoted = ",".join("'" + each.replace("'", "''") + "'" for each in values)
    statement = statement.replace(f"${{{name}:sqlstring}}", quoted)
    plain = values[0] if len(values) == 1 else "{" + ",".join(values) + "}"
    return re.sub(rf"\$\{{{name}\}}|\${name}\b|\[\[{name}\]\]", lambda _: plain, statement)
