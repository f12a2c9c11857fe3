"""`loader erase`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import click

from loader import settings
from loader.cli import options, terminal
from loader.cli.options import Person
from loader.errors import LoaderError, UsageError
from loader.operate.places import Places

if TYPE_CHECKING:
    from loader.operate.erase import Erased, Kind, Proof


@click.command("erase")
@click.option("--user", "users", type=Person(), multiple=True, metavar="UUID", help="A person; repeat it.")
@click.option(
    "--family", "families", type=Person(), multiple=True, metavar="UUID", help="A family; repeat it."
)
@click.option(
    "--users-from", metavar="FILE", type=click.Path(allow_dash=True, path_type=Path),
    help="A file with the UUID of a person per line, or - for standard input. Unlike arguments, it is not visible "
    "to other users of the machine.",
)  # fmt: skip
@click.option(
    "--again", is_flag=True, help="Erase everybody again who was erased before, for example after a restore."
)
@click.option("--dry-run", is_flag=True, help="Count what would be erased; change nothing.")
@click.option(
    "--verify", is_flag=True, help="Afterwards search all tables and files, and store the result as a proof."
)
@click.option(
    "--exports", metavar="DIR", multiple=True, type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="A directory with files of `loader export`; repeat it.",
)  # fmt: skip
@options.dsn
@options.spool_dir
@options.archive
@options.as_json
def command(
    users: tuple[UUID, ...], families: tuple[UUID, ...], users_from: Path | None, again: bool, dry_run: bool,
    verify: bool, exports: tuple[Path, ...], dsn: str | None, spool_dir: Path | None, archive: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Permanently erase all data about a person or a family.

    Erases their rows, their id in the rows of others, daily activity, rejects, archived and exported files, and
    segments in the spool. A tombstone remains, so that later loads discard their lines. Run it as the owner of the tables, on each host
    that has a spool.

    \b
    Examples:
      loader erase --user 0190163d-8694-739b-aea5-966c26f8ad91 --dry-run
      loader erase --family 0190163d-8694-739b-aea5-966c26f8ad92 --archive archive --verify
      loader erase --again --verify
    """
    people = _people(users, families, users_from)
    if again == bool(people):
        raise UsageError("use either --user, --family or --users-from, or --again for everyone erased before")
    if dry_run and (verify or again):
        raise UsageError("--dry-run cannot be combined with --verify or --again")
    directories = [each.absolute() for each in exports]
    places = Places(settings.spool_directory(spool_dir), archive and archive.absolute(), directories)
    erased, proof = _erase(settings.database_dsn(dsn), places, people, dry_run=dry_run, verify=verify)
    if as_json:
        facts = {**erased.counts(), "failures": erased.failures}
        terminal.print_json({"dry_run": dry_run, **facts, "proof": proof and proof.facts()})
    else:
        _show(erased, proof, dry_run=dry_run)
    if erased.failures:
        raise LoaderError(
            f"{len(erased.failures)} files could not be searched: repair or remove them, then run the command again"
        )
    if proof is not None and not proof.holds:
        raise LoaderError(
            "something was found, or could not be searched: segments in the spool are erased when they are loaded; "
            "run the command again after that"
        )


def _erase(
    dsn: str, places: Places, people: Sequence[tuple[Kind, UUID]], *, dry_run: bool, verify: bool
) -> tuple[Erased, Proof | None]:
    """Erase or count people; without any, erase everybody again. Return the proof too if `verify` is set."""
    from loader.cli.loading import only_for
    from loader.load import database
    from loader.operate import erase

    proof = None
    with only_for("the owner of the tables"), database.connect(dsn) as connection:
        erasure = erase.Erasure(connection, places, people) if people else erase.Again(connection, places)
        if dry_run:
            return erasure.count(), None
        erased = erasure.run()
        erase.vacuum(connection)
        if verify:
            proof = erase.prove(connection, places, erasure.mentions)
        if not erased.failures:
            erase.note(connection, erasure.subjects(), proof)
    return erased, proof


def _people(
    users: tuple[UUID, ...], families: tuple[UUID, ...], users_from: Path | None
) -> list[tuple[Kind, UUID]]:
    given = list(users)
    if users_from is not None:
        with click.open_file(str(users_from), encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if text := line.strip():
                    given.append(_listed(text, f"{users_from}, line {number}"))
    people: list[tuple[Kind, UUID]] = [("user", each) for each in dict.fromkeys(given)]
    return people + [("family", each) for each in dict.fromkeys(families)]


def _listed(text: str, place: str) -> UUID:
    try:
        return Person().convert(text, None, None)
    except click.BadParameter as error:
        raise UsageError(f"{place}: {error.message}") from None


def _show(erased: Erased, proof: Proof | None, *, dry_run: bool) -> None:
    from loader.operate.erase import UNREACHED

    terminal.say(f"{'would be erased' if dry_run else 'erased'}: {terminal.counts(erased.counts())}")
    if proof is not None:
        for place in proof.places:
            terminal.say(f"searched: {place.place}, {place.bytes} bytes, {place.hits} hits")
        for name in proof.waiting:
            terminal.warn(f"{name} is still in the spool")
    if not dry_run:
        for unreached in UNREACHED:
            terminal.say(f"not reached: {unreached}")
    for name, reason in (erased.failures | (proof.failures if proof else {})).items():
        terminal.warn(f"{name} {reason}")
