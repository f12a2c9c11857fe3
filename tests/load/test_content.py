"""Files are read by their content, whatever their name: each line is loaded, and unreadable files are reported."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from loader.load.database import Connection
from tests.load.lines import event, joined, number, rejected
from tests.processes import LOADER, Cli
from tests.thinned import one_in

EVENTS = "SELECT count(*) FROM analytics_events"
Pack = Callable[[bytes], bytes]
PACKS: dict[str, Pack] = {
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}
packed = pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)


def lines(first: int, last: int) -> bytes:
    """Return events with incompressible metadata."""
    noise = random.Random(first)
    return joined(*[event(n, metadata={"noise": noise.randbytes(40).hex()}) for n in range(first, last)])


def whole_lines(compressed: bytes, pack: str) -> int:
    """Return the complete lines that a decompressor yields if it is fed byte by byte."""
    out = b""
    decompressors = {
        "gzip": lambda: __import__("zlib").decompressobj(31),
        "zstd": lambda: zstandard.ZstdDecompressor().decompressobj(),
        "bzip2": bz2.BZ2Decompressor,
        "xz": lzma.LZMADecompressor,
    }
    decompressor = decompressors[pack]()
    for at in range(len(compressed)):
        out += decompressor.decompress(compressed[at : at + 1])
    return out.count(b"\n")


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("share", one_in(3, [0.7, 0.1, 0.999]))
def test_a_truncated_file_loads_its_complete_lines_and_is_reported(
    cli: Cli, one_connection: Connection, tmp_path: Path, pack: str, share: float
) -> None:
    compressed = PACKS[pack](lines(0, 3000))
    cut = compressed[: int(len(compressed) * share)]
    (tmp_path / "export").write_bytes(cut)
    printed = cli("backfill", tmp_path / "export", code=1)
    assert "export could not be read to its end" in printed and "truncated" in printed
    assert number(one_connection, EVENTS) == whole_lines(cut, pack)
    assert not rejected(cli.spool)
    (tmp_path / "export").write_bytes(compressed)
    cli("backfill", tmp_path / "export")
    assert number(one_connection, EVENTS) == 3000


@packed
def test_every_member_of_a_file_is_read(
    cli: Cli, one_connection: Connection, tmp_path: Path, pack: Pack
) -> None:
    members = [lines(0, 10), b"", lines(10, 900), lines(900, 901)]
    (tmp_path / "members").write_bytes(b"".join(map(pack, members)))
    cli("backfill", tmp_path / "members")
    assert number(one_connection, EVENTS) == 901


@packed
def test_what_follows_the_end_of_a_stream_is_reported_unless_it_is_padding(
    cli: Cli, one_connection: Connection, tmp_path: Path, pack: Pack
) -> None:
    (tmp_path / "padded").write_bytes(pack(lines(0, 5)) + bytes(512))
    cli("backfill", tmp_path / "padded")
    (tmp_path / "garbage").write_bytes(pack(lines(5, 9)) + b"garbage")
    assert "7 bytes that are not" in cli("backfill", tmp_path / "garbage", code=1)
    (tmp_path / "another").write_bytes(pack(lines(9, 12)) + pack(lines(12, 900))[:-20])
    assert "truncated" in cli("backfill", tmp_path / "another", code=1)
    assert number(one_connection, EVENTS) >= 12


@packed
def test_a_damaged_file_loads_what_is_before_the_damage(
    cli: Cli, one_connection: Connection, tmp_path: Path, pack: Pack
) -> None:
    data = bytearray(pack(lines(0, 3000)))
    data[-9:-1] = bytes(8)  # the checksum, or the last block
    (tmp_path / "damaged").write_bytes(data)
    printed = cli("backfill", tmp_path / "damaged", code=None)
    assert number(one_connection, EVENTS) >= (0 if pack is bz2.compress else 2500), printed


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_an_empty_file_that_should_be_compressed_is_reported(cli: Cli, tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.ndjson{suffix}").write_bytes(b"")
    assert "is empty" in cli("backfill", tmp_path / f"a.ndjson{suffix}", code=1)
    (tmp_path / "a.ndjson").write_bytes(b"")
    cli("backfill", tmp_path / "a.ndjson")


@pytest.mark.parametrize(
    "name", one_in(2, ["a.jsonl", "a.json", "a", "a.log", "a.ndjson.gz.1", "a.zst", "é ü.gz"])
)
@pytest.mark.parametrize(
    "pack", [bytes, gzip.compress, zstandard.compress, lambda b: gzip.compress(zstandard.compress(b))]
)
def test_any_name_loads_whatever_it_is_packed_with(
    cli: Cli, one_connection: Connection, tmp_path: Path, name: str, pack: Pack
) -> None:
    directory = tmp_path / "archive" / "2026"
    directory.mkdir(parents=True)
    (directory / name).write_bytes(pack(lines(0, 20)))
    cli("backfill", tmp_path / "archive")
    assert number(one_connection, EVENTS) == 20
    cli("backfill", "-", stdin=pack(lines(0, 30)))
    assert number(one_connection, EVENTS) == 30


ENCODINGS: dict[str, Pack] = {
    "utf-8 with a mark": lambda text: b"\xef\xbb\xbf" + text,
    "marks between files": lambda text: b"".join(b"\xef\xbb\xbf" + line for line in text.splitlines(True)),
    "utf-16 of PowerShell": lambda text: text.decode().replace("\n", "\r\n").encode("utf-16"),
    "utf-16 big endian": lambda text: b"\xfe\xff" + text.decode().encode("utf-16-be"),
    "utf-16 without a mark": lambda text: text.decode().encode("utf-16-le"),
    "crlf": lambda text: text.replace(b"\n", b"\r\n"),
    "blank lines": lambda text: b"\n \t\r\n" + text.replace(b"\n", b"\n\n") + b"\r\n   ",
    "no newline at the end": lambda text: text.removesuffix(b"\n"),
}


@pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_load_however_they_are_written(
    cli: Cli, one_connection: Connection, tmp_path: Path, encode: Pack, pack: Pack
) -> None:
    text = joined(*[event(n, metadata={"name": "Zoë 🎈"}) for n in range(50)])
    (tmp_path / "a").write_bytes(pack(encode(text)))
    assert "lines 50, events 50" in cli("backfill", tmp_path / "a")
    assert number(one_connection, f"{EVENTS} WHERE metadata->>'name' = 'Zoë 🎈'") == 50
    assert "lines 50" in cli("backfill", "--dry-run", tmp_path / "a")


def test_a_half_of_a_utf_16_character_at_the_end_is_reported(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(lines(0, 3).decode().encode("utf-16") + b"{")
    assert "truncated" in cli("backfill", tmp_path / "a", code=1)


UNREADABLE = {
    "array.json": (b"[" + event(1) + b"]", "a JSON array"),
    "pretty.json": (b'{\n  "event_id": 1,\n  "metadata": {}\n}\n', "one object over several lines"),
    "text.txt": (b"Dear reader,\nnothing here is data.\n", "has no line that is a JSON object"),
    "image.png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "binary"),
    "archive.zip": (b"PK\x03\x04" + bytes(100), "a zip archive"),
    "archive.tar": (bytes(257) + b"ustar\x00" + bytes(249), "a tar archive"),
    "block.lz4": (b"\x04\x22\x4d\x18" + bytes(30), "lz4"),
    "table.parquet": (b"PAR1" + bytes(30), "Parquet"),
    "utf32.txt": ("{}\n".encode("utf-32"), "UTF-32"),
}


@pytest.mark.parametrize("name", one_in(2, UNREADABLE))
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_what_is_not_lines_of_objects_is_named_as_what_it_is(
    cli: Cli, one_connection: Connection, tmp_path: Path, name: str, pack: Pack, option: list[str]
) -> None:
    data, words = UNREADABLE[name]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).write_bytes(pack(data))
    (tmp_path / "d" / "good").write_bytes(lines(0, 2))
    printed = cli("backfill", *option, tmp_path / "d", code=1)
    assert name in printed and words in printed and "Traceback" not in printed
    assert number(one_connection, EVENTS) == (0 if option else 2)
    assert not rejected(cli.spool)


def test_a_directory_names_what_it_leaves_out(cli: Cli, one_connection: Connection, tmp_path: Path) -> None:
    directory = tmp_path / "d"
    (directory / "rejected").mkdir(parents=True)
    (directory / "rejected" / "a-0.ndjson").write_bytes(b"")
    (directory / "a.ndjson").write_bytes(lines(0, 2))
    (directory / "b.open").write_bytes(lines(2, 4))
    (directory / ".loader.lock").write_bytes(b"pid 1 on host")
    (directory / "loop").symlink_to(directory)
    printed = cli("backfill", directory)
    for name in ("b.open", "loop", "rejected"):
        assert f"skipped {directory / name}" in printed, printed
    assert ".loader.lock" not in printed
    assert number(one_connection, EVENTS) == 2


def test_a_first_line_that_is_broken_does_not_keep_the_others_out(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"garbage\n[1]\n" + lines(0, 2) + b"{broken\n")
    cli("backfill", tmp_path / "a", code=3)
    assert number(one_connection, EVENTS) == 2 and len(rejected(cli.spool)) == 3


def test_a_bomb_is_read_in_bounded_memory(cli: Cli, tmp_path: Path) -> None:
    """A zstd block of 4 bytes can expand to 128 KiB."""
    frame = zstandard.ZstdCompressor(level=19).compress(b"x" * (1 << 28))
    (tmp_path / "bomb").write_bytes(zstandard.compress(lines(0, 2)) + frame)
    command = ["bash", "-c", 'ulimit -v 900000; exec "$@"', "-", *LOADER, "backfill", "--dry-run"]
    ended = subprocess.run([*command, tmp_path / "bomb"], env=cli.environment, capture_output=True, text=True)
    assert ended.returncode == 3, ended.stderr
    assert "oversize" in ended.stdout
