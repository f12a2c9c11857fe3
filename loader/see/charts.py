"""Charts as inline SVG, drawn by Vega-Lite (vl-convert) without a browser or network requests.

Each colour is a placeholder that is replaced by a CSS variable, so that one drawing works on a light page, a
dark page and paper. Each chart is drawn in a wide and a narrow version, and CSS shows the one that fits, so
that text keeps its size on a phone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any, Final

import vl_convert
from markupsafe import Markup, escape

_INK, _MUTED, _GRID, _CARD = "#010203", "#040506", "#070809", "#0c0d0e"
_SERIES: Final = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
_VARIABLES: Final = {
    _INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)", _CARD: "var(--card)",
    **{placeholder: f"var(--c{number})" for number, placeholder in enumerate(_SERIES, 1)},
}  # fmt: skip
_SIZES: Final = {"wide": (900, 220), "narrow": (300, 190)}
"""Width and height in CSS pixels, without the axis."""
_LABELS: Final = {"wide": 10, "narrow": 4}
"""Maximum number of dates below the axis."""
_DASHES: Final = ([1, 0], [7, 4], [2, 3])
_DATE: Final = "utcFormat(toDate(datum.value), '%-d %b')"
_NUMBER: Final = "datum.value === 0 ? '0' : replace(datum.label, '\u2212', '')"
"""Bars below zero count people, so their labels have no minus sign."""
_CONFIG: Final = {
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": _MUTED, "gridColor": _GRID, "domainColor": _GRID, "tickColor": _GRID,
        "labelFontSize": 12,
        "title": None, "labelPadding": 6, "ticks": False, "domain": False,
    },
    "legend": {"disable": True},
}  # fmt: skip


def bars(label: str, rows: Sequence[Mapping[str, Any]], series: Sequence[str]) -> Markup:
    """Draw stacked bars. A row has `day`, `name`, `value` (negative values hang below zero) and `complete`."""
    return _both(label, rows, series, {
        "mark": {"type": "bar", "stroke": _CARD, "strokeWidth": 1},
        "encoding": {
            "y": _amount(),
            "color": _colour(series),
            "order": {"field": "order", "type": "quantitative"},
            "fillOpacity": {"condition": {"test": "datum.complete", "value": 1}, "value": 0.4},
        },
    })  # fmt: skip


def lines(label: str, rows: Sequence[Mapping[str, Any]], series: Sequence[str]) -> Markup:
    """Draw lines that also differ by their dashes. A row has `day`, `name` and `value`."""
    dashes = {"domain": [*map(_name, range(len(series)))], "range": [*_DASHES[: len(series)]]}
    return _both(label, rows, series, {
        "mark": {"type": "line", "strokeWidth": 2.5, "strokeCap": "round"},
        "encoding": {
            "y": _amount(), "color": _colour(series),
            "strokeDash": {"field": "name", "type": "nominal", "scale": dashes},
        },
    })  # fmt: skip


def spark(values: Sequence[float]) -> Markup:
    """Draw a line without axes for a tile, as decoration that screen readers skip."""
    if len(values) < 2:
        return Markup("")
    low, high = min(values), max(values)
    span = (high - low) or 1
    points = [
        f"{at * 100 / (len(values) - 1):.1f},{28 - (value - low) * 26 / span:.1f}"
        for at, value in enumerate(values)
    ]
    return Markup(
        '<svg class="spark" viewBox="0 0 100 30" preserveAspectRatio="none" aria-hidden="true">'
        '<path class="area" d="M0,30 L{0} L100,30 Z"/><path class="line" d="M{0}"/></svg>'
    ).format(" L".join(points))


def _amount() -> dict[str, Any]:
    return {
        "field": "value",
        "type": "quantitative",
        "axis": {"tickCount": 4, "format": "~s", "labelExpr": _NUMBER},
    }


def _colour(series: Sequence[str]) -> dict[str, Any]:
    scale = {"domain": [*map(_name, range(len(series)))], "range": [*_SERIES[: len(series)]]}
    return {"field": "name", "type": "nominal", "scale": scale}


def _both(
    label: str, rows: Sequence[Mapping[str, Any]], series: Sequence[str], spec: dict[str, Any]
) -> Markup:
    days = sorted({row["day"] for row in rows})
    # Series are identified by number, so that no text from an event gets into a drawing.
    values = [
        {
            **row,
            "day": _iso(row["day"]),
            "name": _name(series.index(row["name"])),
            "order": series.index(row["name"]),
        }
        for row in rows
    ]
    drawn = Markup("")
    for size, (width, height) in _SIZES.items():
        axis = {"values": _labelled(days, _LABELS[size]), "labelExpr": _DATE, "labelAngle": 0, "grid": False}
        x = {"field": "day", "type": "ordinal", "axis": axis, "scale": {"paddingInner": 0.25}}
        whole = {
            "$schema": "https://vega.github.io/schema/vega-lite/v5.json", "data": {"values": values},
            "width": width, "height": height, "background": None, "padding": 4, "config": _CONFIG, **spec,
            "encoding": {"x": x, **spec["encoding"]},
        }  # fmt: skip
        drawn += _inline(vl_convert.vegalite_to_svg(whole), size, label)
    return drawn


def _name(number: int) -> str:
    return f"s{number}"


def _labelled(days: Sequence[date], most: int) -> Sequence[str]:
    """Return the labelled days, in even steps backwards from the last one."""
    step = max(1, -(-len(days) // most))
    return [_iso(day) for day in reversed(days[::-1][::step])]


def _iso(day: date) -> str:
    return day.isoformat()


def _inline(drawing: str, size: str, label: str) -> Markup:
    """Return the drawing for embedding: with our colours, one label, and no labels of its parts."""
    for placeholder, variable in _VARIABLES.items():
        drawing = re.sub(re.escape(placeholder), variable, drawing, flags=re.IGNORECASE)
    drawing = re.sub(r' (aria-[a-z]+|role)="[^"]*"', "", drawing)
    box = re.search(r'viewBox="([-0-9. ]+)"', drawing)
    assert box is not None  # every SVG from Vega has one
    head = Markup('<svg class="{}" viewBox="{}" role="img" aria-label="{}">').format(size, box[1], label)
    # Trusted: its only text is the dates and numbers of the axes.
    return head + Markup(re.sub(r"^.*?<svg [^>]*>", "", drawing, count=1, flags=re.DOTALL))


def legend(series: Iterable[str]) -> Markup:
    """Return the legend in HTML, because the reader's browser measures its own fonts."""
    entry = Markup('<span><i class="k{}"></i>{}</span>')
    parts = Markup("").join(entry.format(number, escape(name)) for number, name in enumerate(series, 1))
    return Markup('<p class="key">') + parts + Markup("</p>")
