"""Only segments are touched, whatever else the spool contains; a changed file is never removed."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from loader.files.retire import FileIdentity, retire
from loader.files.scan import scan
from spool import Emitter

STEM = "20261123T120000.{:06d}Z-host-0a1b2c3d-7-0a1b2c3d-000001"


def test_sealed_segments_come_oldest_first_and_a_dead_writers_is_adopted(tmp_path: Path) -> None:
    for n in (3, 1):
        (tmp_path / f"{STEM.format(n)}.ndjson").write_bytes(b"{}\n")
    (tmp_path / f"{STEM.format(2)}.open").write_bytes(b"{}\n{cut")
    found = scan(tmp_path)
    assert [path.stem for path in found.sealed] == [STEM.format(n) for n in (1, 2, 3)]
    assert (len(found.adopted), found.torn_bytes) == (1, 4)
    assert found.adopted[0].read_bytes() == b"{}\n"


def test_a_running_writers_segment_is_not_touched(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, max_age=60)
    emitter.emit_event(event_type="kept", user_id=uuid.uuid4(), family_unit_id=uuid.uuid4())
    assert not scan(tmp_path).sealed
    emitter.close()
    assert len(scan(tmp_path).sealed) == 1


def test_links_pipes_directories_and_strange_names_are_reported_and_not_touched(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"private\n")
    spool = tmp_path / "spool"
    spool.mkdir()
    (spool / f"{STEM.format(1)}.ndjson").symlink_to(outside)
    (spool / f"{STEM.format(2)}.open").symlink_to(outside)
    (spool / f"{STEM.format(3)}.ndjson").mkdir()
    os.mkfifo(spool / f"{STEM.format(4)}.open")
    (spool / "odd\x1b[31m\n.ndjson").write_bytes(b"{}\n")
    before = sorted(os.listdir(spool))
    found = scan(spool)
    assert not found.sealed
    assert len(found.skipped) == 5
    assert sorted(os.listdir(spool)) == before
    assert outside.read_bytes() == b"private\n"


def test_a_file_that_changed_after_it_was_read_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "s.ndjson"
    file.write_bytes(b"{}\n")
    version = FileIdentity.of(os.lstat(file))
    file.write_bytes(b"{}\n{}\n")
    assert not retire(file, version)
    assert file.exists()
    assert retire(file, FileIdentity.of(os.lstat(file)))
    assert not file.exists()
    assert retire(file, version)
