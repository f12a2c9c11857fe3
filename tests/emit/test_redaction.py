"""Secrets and personal data stay in the process, and harmless data does not: 150 keys, half on each side."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spool import Emitter
from spool.context import bind
from spool.testing import Recorder, record
from spool.words import words
from tests.emit.lines import FAMILY, USER, emit

SECRETS = [
    "password",
    "Password",
    "passwords",
    "user_password",
    "passwordHash",
    "password2",
    "new-password",
    "db.password",
    "DB_PASSWORD",
    "passwd",
    "pwd",
    "mysql_pwd",
    "passphrase",
    "passcode",
    "secret",
    "client_secret",
    "clientSecret",
    "secretKey",
    "token",
    "access_token",
    "accessToken",
    "refresh-token",
    "id_token",
    "authToken",
    "access_tokens",
    "otp",
    "otp_code",
    "totp",
    "auth",
    "basic_auth",
    "Authorization",
    "Proxy-Authorization",
    "bearer",
    "jwt",
    "csrf_token",
    "csrfmiddlewaretoken",
    "X-CSRFToken",
    "api_key",
    "apikey",
    "apiKey",
    "X-Api-Key",
    "APIKey",
    "private_key",
    "ssh_key",
    "SSHKey",
    "sshKey",
    "encryption_key",
    "aws_secret_access_key",
    "aws_access_key_id",
    "database_url",
    "DATABASE_URL",
    "redis_url",
    "dsn",
    "sentry_dsn",
    "connection_string",
    "cookie",
    "Set-Cookie",
    "cookies",
    "sessionid",
    "credentials",
    "ssn",
    "userSSN",
    "social_security_number",
    "credit_card_number",
    "cardNumber",
    "cvv",
    "iban",
    "pin_code",
    "two_factor_code",
    "stripe_key",
]
PERSONAL = [
    "email",
    "e-mail",
    "user_email",
    "emailAddress",
    "phone",
    "phoneNumber",
    "address",
    "ip_address",
    "birth_date",
    "dateOfBirth",
    "firstName",
    "last_name",
    "latitude",
    "lng",
    "clientIP",
    "geo",
]
HARMLESS = [
    "class_name",
    "business_name",
    "process_name",
    "file_name",
    "host_name",
    "event_name",
    "product_name",
    "company_name",
    "name",
    "album_name",
    "prompt_tokens",
    "completion_tokens",
    "max_tokens",
    "tokenizer",
    "tokenized",
    "has_password",
    "is_email",
    "cookies_accepted",
    "cookie_banner",
    "cookie_consent",
    "password_strength",
    "password_length",
    "token_count",
    "token_type",
    "phones_supported_count",
    "birthday_reminder_enabled",
    "email_verified",
    "email_template",
    "phone_model",
    "address_type",
    "credit_card_type",
    "ip_version",
    "iPhone",
    "iPhoneModel",
    "assignment",
    "passenger",
    "passage",
    "compass",
    "bypass",
    "author",
    "authority",
    "authored_by",
    "oauth_provider",
    "auth_method",
    "secretary",
    "discretion",
    "keyboard",
    "monkey",
    "key",
    "keys",
    "public_key",
    "cache_key",
    "primary_key",
    "storage_key",
    "tip",
    "zip_file",
    "shipping",
    "ship",
    "recipe",
    "equipment",
    "description",
    "script",
    "session",
    "session_number",
    "birthright",
    "latency",
    "language",
    "platform",
    "plate",
    "longest",
    "translation",
    "relation",
    "balloon",
    "colony",
    "mailing_list",
    "emailing",
    "telemetry",
    "stele",
    "street_view",
    "lined_up",
    "ipsum",
    "ssnake",
]


def test_the_table_has_half_of_its_keys_on_each_side() -> None:
    assert len({*SECRETS, *PERSONAL, *HARMLESS}) == len(SECRETS + PERSONAL + HARMLESS) >= 150
    assert len(SECRETS + PERSONAL) >= 75 and len(HARMLESS) >= 75


@pytest.fixture
def emitter(tmp_path: Path) -> Iterator[Emitter]:
    emitter = Emitter(tmp_path)
    yield emitter
    emitter.close()


@pytest.fixture
def recorder(emitter: Emitter) -> Iterator[Recorder]:
    with record(emitter) as recorder:
        yield recorder


def written(emitter: Emitter, metadata: Any) -> Any:
    """Return the metadata as written to the spool; check that labels and nested values are written the same."""
    with record(emitter) as recorder:
        for wrapped in (metadata, {"deep": [metadata]}):
            assert emitter.emit_event(event_type="odd", user_id=USER, family_unit_id=FAMILY, metadata=wrapped)
        assert emitter.increment_counter(metric_name="odd", labels=metadata)
    flat, deep = (event["metadata"] for event in recorder.events)
    assert recorder.metrics[0]["labels"] == flat
    assert deep == {"deep": [flat]}
    return flat


@pytest.mark.parametrize("key", SECRETS + PERSONAL)
def test_text_under_a_sensitive_key_is_redacted_and_counted(emitter: Emitter, key: str) -> None:
    assert written(emitter, {"a": 1, key: "hunter2"}) == {"a": 1, key: "[redacted]"}
    assert written(emitter, {key: ["hunter2", 3]}) == {key: "[redacted]"}
    assert written(emitter, {key: {"a": {"b": "hunter2"}}}) == {key: "[redacted]"}
    assert emitter.stats().redacted == {key: 9}


@pytest.mark.parametrize("key", HARMLESS)
def test_text_under_a_harmless_key_is_written(emitter: Emitter, key: str) -> None:
    assert written(emitter, {"a": 1, key: "text"}) == {"a": 1, key: "text"}
    assert emitter.stats().redacted == {}


@pytest.mark.parametrize("key", SECRETS)
@pytest.mark.parametrize("value", [12, 1.5, True, False, None, [1, 2], {"a": 3}, [], {}])
def test_numbers_and_booleans_are_not_secrets(emitter: Emitter, key: str, value: Any) -> None:
    assert written(emitter, {key: value}) == {key: value}


@pytest.mark.parametrize(
    ("metadata", "kept"),
    [
        ({"latitude": 52.5, "longitude": 13.4}, {"latitude": "[redacted]", "longitude": "[redacted]"}),
        ({"phone": 4930123, "birth_year": 1990}, {"phone": "[redacted]", "birth_year": "[redacted]"}),
        ({"coordinates": [52.5, 13.4]}, {"coordinates": "[redacted]"}),
        ({"email": True, "phone": False, "ip": 3}, {"email": True, "phone": False, "ip": 3}),
    ],
)
def test_numbers_are_personal_data_if_the_key_is_of_numbers(
    emitter: Emitter, metadata: dict[str, Any], kept: dict[str, Any]
) -> None:
    assert written(emitter, metadata) == kept


@pytest.mark.parametrize(
    "key",
    [
        "pass\u200bword", "\ufeffpassword", "pass\u00adword", "p\u2060assword", "password\ufe0f",
        "\uff50\uff41\uff53\uff53\uff57\uff4f\uff52\uff44", "PA\u017f\u017fWORD", "pass\x00word", "pass\x1bword",
        "\U0001d429\U0001d41a\U0001d42c\U0001d42c\U0001d430\U0001d428\U0001d42b\U0001d41d", "user\u00a0password",
        "user\u2010password", "user password", "user/password", "user:password", "user[password]", "passWord", "PaSsWoRd",
        "USERPassword", "userPASSWORD", "__password__", "password\n",
    ],
)  # fmt: skip
def test_a_key_is_sensitive_however_it_is_spelt(emitter: Emitter, key: str) -> None:
    assert "hunter2" not in str(written(emitter, {key: "hunter2"}))


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ({"name": "authorization", "value": "x"}, {"name": "authorization", "value": "[redacted]"}),
        ({"value": "x", "name": "Authorization"}, {"value": "[redacted]", "name": "Authorization"}),
        ({"Key": "password", "Value": {"a": "x"}}, {"Key": "password", "Value": "[redacted]"}),
        ({"header": "X-Api-Key", "values": ["x"]}, {"header": "X-Api-Key", "values": "[redacted]"}),
        ({"name": "colour", "value": "red"}, {"name": "colour", "value": "red"}),
        ({"name": "prompt_tokens", "value": "12"}, {"name": "prompt_tokens", "value": "12"}),
        ({"name": "token", "value": 12}, {"name": "token", "value": 12}),
        ({"name": 3, "value": "x"}, {"name": 3, "value": "x"}),
        ({"a": [["authorization", "x"]]}, {"a": [["authorization", "[redacted]"]]}),
        ({"a": [("cookie", "x"), ("host", "y")]}, {"a": [["cookie", "[redacted]"], ["host", "y"]]}),
        ({"a": [(b"cookie", b"x")]}, {"a": [["cookie", "[redacted]"]]}),
        ({"a": [["token", 12]]}, {"a": [["token", 12]]}),
        ({"a": [["b", {"password": "x"}]]}, {"a": [["b", {"password": "[redacted]"}]]}),
        ({"columns": ["email", "phone"]}, {"columns": ["email", "phone"]}),
    ],
)
def test_what_is_named_beside_its_value_is_redacted(emitter: Emitter, value: Any, kept: Any) -> None:
    emit(emitter, **dict.fromkeys(value, "seen"))  # each of the keys is harmless
    assert written(emitter, value) == kept


def test_words_of_the_application_are_added_and_match_whole_words(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, redact=["school class", "hobby"])
    metadata = {"schoolClass": "x", "school_class": "x", "hobby": "x", "hobbyist": "y", "class": "y"}
    assert written(emitter, metadata) == {
        "schoolClass": "[redacted]", "school_class": "[redacted]", "hobby": "[redacted]", "hobbyist": "y",
        "class": "y",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("redact", "kept"),
    [
        ([], {"password": "[redacted]", "email": "[redacted]"}),
        (["-secrets"], {"password": "x", "email": "[redacted]"}),
        (["-personal_data"], {"password": "[redacted]", "email": "x"}),
        (["-secrets", "-personal_data", "password"], {"password": "[redacted]", "email": "x"}),
    ],
)
def test_a_set_is_switched_off_by_its_name_alone(
    tmp_path: Path, redact: list[str], kept: dict[str, str]
) -> None:
    assert written(Emitter(tmp_path, redact=redact), {"password": "x", "email": "x"}) == kept


def test_a_set_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='"-secrets" or "-personal_data", not "-personal"'):
        Emitter(tmp_path, redact=["-personal"])


def test_what_is_bound_is_redacted_beside_what_is_given(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, redact=["role"])
    with record(emitter) as recorder, bind(user_id=USER, family_unit_id=FAMILY, role="parent"):
        emitter.emit_event(event_type="odd", metadata={"token": "x"})
    assert recorder.events[0]["metadata"] == {"role": "[redacted]", "token": "[redacted]"}


def test_redactions_are_counted_by_a_limited_number_of_keys(emitter: Emitter) -> None:
    for number in range(300):
        emit(emitter, **{f"token_of_{number}": "x", "password": "y"})
    redacted = emitter.stats().redacted
    assert len(redacted) == 101
    assert redacted["password"] == 300
    assert redacted["other"] == 300 - 99


@pytest.mark.parametrize(
    ("key", "split"),
    [
        ("user_apiKey", ["user", "api", "key"]), ("HTTPServer2Go", ["http", "server", "2", "go"]),
        ("größteLänge", ["grösste", "länge"]), ("X-Forwarded-For", ["x", "forwarded", "for"]), ("___", []),
        ("пароль_пользователя", ["пароль", "пользователя"]), ("", []),
    ],
)  # fmt: skip
def test_a_key_is_split_into_words(key: str, split: list[str]) -> None:
    assert list(words(key)) == split


def test_a_key_of_a_megabyte_is_split_in_no_time(emitter: Emitter) -> None:
    code = "from spool.words import words; [words('aB_' * 400_000) for _ in range(3)]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
