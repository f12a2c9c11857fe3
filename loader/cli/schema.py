"""`loader schema`."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import click

from loader.cli import options, terminal


@click.command("schema")
@options.as_json
def command(as_json: bool) -> None:
    """Print the format of a line, for writers in other languages.

    With --json, print a JSON Schema (draft 2020-12).

    \b
    Examples:
      loader schema
      loader schema --json > line.schema.json
    """
    text = (resources.files("loader") / "files" / "line.schema.json").read_text("utf-8")
    if as_json:
        click.echo(text, nl=False)
        return
    definitions = json.loads(text)["$defs"]
    for kind in (definitions["event"], definitions["metric"]):
        terminal.say(kind["title"], "bold")
        width = max(map(len, kind["properties"]))
        for name, field in kind["properties"].items():
            optional = "" if name in kind["required"] else "Optional. "
            terminal.say(f"  {name:<{width}}  {optional}{_meaning(field, definitions)}")


def _meaning(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    shared = definitions[field["$ref"].rpartition("/")[2]] if "$ref" in field else {}
    return str(field.get("description") or shared["description"])
