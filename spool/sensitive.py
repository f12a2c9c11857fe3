"""The two named sets of words that mark a key as sensitive, and the words that mark it as harmless.

An entry is a run of words. A leading `^` anchors it to the beginning of a key, a trailing `$` to the end, so
`^pin$` matches only the whole key. An entry of several words also matches them written as one (`api key`:
`api_key`, `apiKey`, `X-Api-Key` and `apikey`). spool/words.py splits keys; spool/redaction.py redacts values.

The lists contain the denylists of sentry-sdk 2 (`sentry_sdk/scrubber.py`) and of Rails'
`filter_parameter_logging`, and synonyms of their entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple


def _entries(text: str) -> tuple[str, ...]:
    return tuple(entry for line in text.strip().splitlines() for entry in line.strip().split(", "))


class SensitiveSet(NamedTuple):
    """The entries of a named set."""

    text: tuple[str, ...]
    """Keys whose values are sensitive if they are or contain text."""
    numbers: tuple[str, ...]
    """Keys whose values are also sensitive if they are or contain a number."""


_SECRETS: Final = _entries("""
    password, passwords, pass word, passwd, pwd, pswd, pass phrase, pass phrases, pass code, ^pass$, ^pw$
    user pass$, db pass$, secret, secrets, token, ^tokens$, access tokens, refresh tokens, auth tokens, api tokens
    session tokens, bearer tokens, device tokens, push tokens, csrf, xsrf, csrf token, xsrf token
    csrf middleware token, access token, refresh token, auth token, client secret, user password, db password
    database password, new password, old password, jwt, bearer, otp, totp, hotp, 2fa code, mfa code, one time code
    verification code, security code, sms code, login code, reset code, backup code, backup codes, recovery code
    recovery codes, two factor code, ^pin$, pin code, pin number, user pin, card pin
    auth$, auth code, auth header, auth data, auth string, auth key, authorization, authorisation
    authorization code, credential, credentials, creds, cookie, cookies, set cookie, sessionid, phpsessid, jsessionid
    api key, api keys, access key, access keys, secret key, secret keys, private key, private keys, ssh key
    ssh keys, encryption key, decryption key, signing key, master key, shared key, session key, service key
    account key, application key, app key, deploy key, host key, server key, webhook key, license key, gpg key
    stripe key, openai key, pgp key, rsa key, aes key, hmac key, tls key, ssl key, seed phrase, recovery phrase
    dsn, connection string, connection url, connection uri, database url, database uri, db url, db uri, redis url
    redis uri, mongo url, mongo uri, mongodb url, mongodb uri, postgres url, postgres uri, postgresql url
    mysql url, broker url, amqp url
    ssn, social security, social security number, credit card, debit card, card number, credit card number, cvv
    cvc, iban, account number, bank account, routing number, sort code, passport, passport number, tax id
    tax number, national id, national insurance number, driver license, drivers license, driving licence
""")

_PERSONAL_TEXT: Final = _entries("""
    email, emails, e mail, e mails, email address, email addresses, user email, mail address
    address, addresses, street address, home address, postal address, billing address, shipping address
    mac address, address line, ^street$, street name, street number, house number, postal code, post code
    zip code, ^zip$
    first name, last name, full name, middle name, given name, family name, maiden name, surname, forename
    legal name, real name, user name, nick name, person name, customer name, contact name, member name
    parent name, child name, guest name, author name, sender name, recipient name, patient name, employee name
    student name, teacher name, holder name, card holder, account holder, fname, lname
    ip, ips, ipv4, ipv6, ip address, ip addresses, ip addr, client ip, remote ip, user ip, real ip, remote addr
    remote address, forwarded for
""")

_PERSONAL_NUMBERS: Final = _entries("""
    phone, phones, phone number, phone numbers, phone no, mobile phone, mobile number, mobile no, cell phone
    cell number, contact number, telephone, telephone number, ^tel$, msisdn, ^fax$, fax number
    birth date, birth day, birthdays, birth year, birth place, date of birth, year of birth, place of birth, dob
    ^born$, born on
    latitude, longitude, lat, lng, lon, lat lng, lat lon, lat long, coordinate, coordinates, coords, gps
    ^geo$, geo location, geo point, geo hash, geo coordinates
""")

SENSITIVE_SETS: Final[Mapping[str, SensitiveSet]] = MappingProxyType({
    "secrets": SensitiveSet(_SECRETS, ()),
    "personal_data": SensitiveSet(_PERSONAL_TEXT, _PERSONAL_NUMBERS),
})  # fmt: skip

PREDICATES: Final = frozenset({"has", "is", "needs", "requires"})
"""A key that starts with one of these is a question, such as `has_password`; its value is harmless."""

ABOUT: Final = frozenset(_entries("""
    accepted, attempts, banner, changed, confirmed, consent, count, disabled, enabled, expired, expires, expiry
    format, last, length, method, model, policy, provider, required, status, strength, template, type, verified
    version
"""))  # fmt: skip
"""Words directly after a sensitive run, or at the end of the key, after which the value only describes the
secret: `password_strength`, `card_number_last4`, `phones_supported_count`."""

HARMLESS_RUNS: Final = ("i phone", "i phones")
"""Runs that contain a sensitive word and are not sensitive themselves."""


def _spellings(text: str) -> frozenset[str]:
    return frozenset(each for word in text.split(", ") for each in (word, word.title(), word.upper()))


NAME_KEYS: Final = _spellings("name, key, header, field, k")
VALUE_KEYS: Final = _spellings("value, values, val, v")
"""`{"name": "authorization", "value": ...}`: in an object with both, the first names what the second holds."""
