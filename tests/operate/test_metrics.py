"""The metrics as read by Prometheus."""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loader.demo import embedded
from loader.load.database import Connection
from spool import Emitter
from tests.load.lines import event, metric, rows, segment
from tests.processes import Cli, eventually, free_port

LISTEN = "0A"
EVERYWHERE = "0.0.0.0"  # noqa: S104  # needed for a probe from outside the container


def scrape(port: int) -> dict[str, float]:
    """Return every sample by its name and labels."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


@contextmanager
def serving(cli: Cli) -> Iterator[int]:
    port = free_port()
    with cli.daemon("--metrics-port", str(port)):
        eventually(lambda: scrape(port).get("analytics_loader_up") == 1)
        yield port


def test_what_was_loaded_and_what_waits_are_counted(cli: Cli, one_connection: Connection) -> None:
    segment(cli.spool, 1, event(1), event(2), event(2), metric(1), b"{broken")
    with serving(cli) as port:
        eventually(lambda: scrape(port)["analytics_loader_files_total"] == 1)
        samples = scrape(port)
        with one_connection.transaction():
            one_connection.execute("LOCK TABLE analytics_events IN ACCESS EXCLUSIVE MODE")
            path = segment(cli.spool, 2, event(3))
            eventually(lambda: scrape(port)["analytics_spool_backlog_files"] == 1)
            assert scrape(port)["analytics_spool_backlog_bytes"] == path.stat().st_size
            eventually(lambda: scrape(port)["analytics_spool_oldest_sealed_seconds"] > 0)
        eventually(lambda: scrape(port)["analytics_spool_backlog_files"] == 0)
    assert samples["analytics_loader_rows_total{table=analytics_events}"] == 2
    assert samples["analytics_loader_rows_total{table=analytics_metrics}"] == 1
    assert samples["analytics_loader_duplicates_total"] == 1
    assert samples["analytics_loader_rejects_total"] == 1
    assert samples["analytics_loader_batch_seconds_count"] == 1
    assert samples["analytics_loader_batch_seconds_bucket{le=+Inf}"] == 1
    assert samples["analytics_loader_batch_seconds_sum"] > 0


def test_a_loader_that_waits_is_not_up(cli: Cli, one_connection: Connection) -> None:
    with serving(cli) as port:
        one_connection.execute("ALTER TABLE analytics_loads RENAME TO away")
        one_connection.commit()
        segment(cli.spool, 1, event(1))
        eventually(lambda: scrape(port)["analytics_loader_up"] == 0)
        assert scrape(port)["analytics_loader_retries_total"] >= 1
        one_connection.execute("ALTER TABLE away RENAME TO analytics_loads")
        one_connection.commit()
        eventually(lambda: scrape(port)["analytics_loader_up"] == 1)


def test_the_port_is_reached_from_this_machine_alone(cli: Cli) -> None:
    with serving(cli) as port:
        sockets = [
            line.split()
            for name in ("tcp", "tcp6")
            for line in Path(f"/proc/net/{name}").read_text().splitlines()
        ]
        bound = [local for _, local, _, state, *_ in sockets if state == LISTEN]
        listening = [local for local in bound if f":{port:04X}" in local]
        assert listening == [f"0100007F:{port:04X}"]


def test_dropped_lines_are_counted_by_cause_and_name(cli: Cli, one_connection: Connection) -> None:
    def drops(number: int, cause: object, name: object, value: object = 1) -> bytes:
        labels = {"cause": cause, "name": name}
        return metric(number, metric_name="spool_dropped_count", labels=labels, value=value)

    segment(
        cli.spool, 1, drops(1, "disk", "hits", 3), drops(2, "disk", "hits", 2), drops(2, "disk", "hits", 2),
        drops(3, "missing", "seen"), drops(4, 'a"\\\n', None, 1.5),
        metric(5, metric_name="spool_dropped_count", labels={}), metric(6),
    )  # fmt: skip
    with serving(cli) as port:
        eventually(lambda: scrape(port)["analytics_loader_files_total"] == 1)
        samples = scrape(port)
    assert samples["analytics_spool_dropped_total{cause=disk,name=hits}"] == 5
    assert samples["analytics_spool_dropped_total{cause=missing,name=seen}"] == 1
    assert json.loads(cli("status", "--json"))["database"]["dropped"]["disk hits"] == 5


def test_what_an_emitter_drops_reaches_every_place(cli: Cli, one_connection: Connection) -> None:
    emitter = Emitter(cli.spool, max_age=0.1)
    with serving(cli) as port:
        for _ in range(3):
            emitter.emit_event(event_type="seen", user_id="nobody")
        name = "analytics_spool_dropped_total{cause=invalid_uuid,name=seen}"
        eventually(lambda: scrape(port).get(name) == 3)
        status = json.loads(cli("status", "--json"))
        assert status["database"]["dropped"] == {"invalid_uuid seen": 3}
        assert "invalid_uuid seen 3" in cli("doctor")
    emitter.close()
    ((labels, value),) = rows(one_connection, "SELECT labels, value FROM analytics_metrics")
    assert (labels, value) == ({"cause": "invalid_uuid", "name": "seen"}, 3)


def probe(port: int, host: str = "127.0.0.1") -> tuple[int, str]:
    """Return the status and the text of /healthz; status 0 if nothing is listening."""
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/healthz") as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def test_healthz_is_503_while_the_database_is_away_also_if_nothing_is_to_load(cli: Cli) -> None:
    port = free_port()
    with embedded.cluster() as cluster:
        Cli(cli.spool, cluster.dsn)("init")
        cli = Cli(cli.spool, cluster.dsn)
        cli.environment["WATCHDOG_USEC"] = "1000000"  # scans every quarter of it
        with cli.daemon("--metrics-port", str(port)):
            eventually(lambda: probe(port) == (200, "ok\n"))
            cluster.stop(signal.SIGKILL)
            eventually(lambda: probe(port)[0] == 503)
            why = probe(port)[1]
            assert "out of reach" in why and why.count("\n") == 1, why
            assert scrape(port)["analytics_loader_up"] == 0
            cluster.start()
            eventually(lambda: probe(port)[0] == 200)


def test_healthz_names_missing_tables_and_a_refusal(cli: Cli, one_connection: Connection) -> None:
    with serving(cli) as port:
        one_connection.execute("REVOKE INSERT ON analytics_events FROM analytics_loader")
        one_connection.commit()
        segment(cli.spool, 1, event(1))
        eventually(lambda: probe(port)[0] == 503)
        assert "permission denied" in probe(port)[1]
    one_connection.execute("DROP TABLE analytics_settings CASCADE")
    one_connection.commit()
    port = free_port()
    with cli.daemon("--metrics-port", str(port)):
        eventually(lambda: "loader init" in probe(port)[1])
        assert probe(port)[0] == 503


def test_healthz_is_503_while_the_spool_cannot_be_scanned(cli: Cli) -> None:
    cli.environment["WATCHDOG_USEC"] = "1000000"  # scans every quarter of it
    with serving(cli) as port:
        away = cli.spool.rename(cli.spool.with_name("away"))
        eventually(lambda: "could not scan" in probe(port)[1])
        away.rename(cli.spool)
        eventually(lambda: probe(port)[0] == 200)


@pytest.mark.parametrize(
    ("address", "host"), [(EVERYWHERE, "127.0.0.2"), ("::1", "[::1]"), ("localhost", "localhost")]
)
def test_the_metrics_listen_on_the_given_address(cli: Cli, address: str, host: str) -> None:
    cli.environment["LOADER_METRICS_ADDRESS"] = address
    port = free_port()
    with cli.daemon("--metrics-port", str(port)):
        eventually(lambda: probe(port, host)[0] == 200)


def test_an_address_that_cannot_be_had_is_refused_in_one_line(cli: Cli) -> None:
    for address in ("192.0.2.1", "no such host"):
        printed = cli("run", "--metrics-port", str(free_port()), "--metrics-address", address, code=2)
        assert f'"{address}"' in printed and printed.count("\n") == 1
    assert "--metrics-port" in cli("run", "--metrics-address", EVERYWHERE, code=2)
