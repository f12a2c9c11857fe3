"""Request metrics, request ids, the user and the context for Django, under WSGI and ASGI.

    MIDDLEWARE = ["spool.django.AnalyticsMiddleware", ...]           # first, so that it sees all responses
    SPOOL = {"EXCLUDE": ["/health"], "USER": "family.analytics.user", "LOGIN_EVENTS": True}

All settings are optional:

    EXCLUDE         a list of paths without metrics, including what is below them; "/" is only the root
    ENDPOINT        a function of the request that returns its label, or None to use the template of its route
    USER            a function of the request, sync or async, that returns the values to bind before the view, as a
                    dictionary of `spool.context.update`'s arguments, or None. True is `authenticated_user`
    LOGIN_EVENTS    emit `user_logged_in` and `user_logged_out` when Django's signals are sent

Functions may be given as dotted paths. The metrics and labels are those of spool/asgi.py, but a response that
is not streamed ends when the middleware returns it. Inside spool.asgi or spool.wsgi, the outer middleware
measures and this one only binds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from asgiref.sync import async_to_sync, iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest
from django.utils.module_loading import import_string

from spool.context import Scope, Values, begin_empty, bind, end, in_force, resume, update
from spool.emitter import get_emitter
from spool.events import log_user_logged_in, log_user_logged_out
from spool.identity import analytics_uuid
from spool.interruption import is_foreign
from spool.request import (
    DISCONNECTED,
    FAILED,
    MARK,
    PREFLIGHT,
    UNMATCHED,
    Exclusions,
    RequestTimer,
    calling_user_function,
    given_endpoint,
    request_id,
    served_request,
    trace_id,
)
from spool.routes import Routed, django_template
from spool.wsgi_input import watched

_HEADER: Final = "X-Request-ID"


def authenticated_user(request: Any) -> Values | None:
    """Return the ids of `request.user`, or None if nobody is logged in.

    A key that is not a UUID is mapped by `analytics_uuid("user", key)`. The family is the user's attribute
    `family_unit_id`, if there is one, mapped as `analytics_uuid("family", key)`.
    """
    if not request.user.is_authenticated:
        return None
    values = Values(user_id=_uuid("user", request.user.pk))
    family = getattr(request.user, "family_unit_id", None)
    return values if family is None else Values(**values, family_unit_id=_uuid("family", family))


def _uuid(kind: str, key: Any) -> UUID:
    return key if isinstance(key, UUID) else analytics_uuid(kind, key)


@dataclass(frozen=True)
class _Options:
    exclude: Exclusions
    endpoint: Callable[[Any], str | None] | None
    user: Callable[[Any], Any] | None
    login_events: bool

    @classmethod
    def of_settings(cls) -> _Options:
        """Read `SPOOL` from the settings. Raises ImproperlyConfigured for an invalid setting."""
        given = dict(getattr(settings, "SPOOL", {}))
        user = given.pop("USER", None)
        try:
            options = cls(
                Exclusions(given.pop("EXCLUDE", ())), _function("ENDPOINT", given.pop("ENDPOINT", None)),
                authenticated_user if user is True else _function("USER", user), given.pop("LOGIN_EVENTS", False),
            )  # fmt: skip
        except (TypeError, ImportError) as error:
            raise ImproperlyConfigured(f"SPOOL: {error}") from error
        if given:
            known = "EXCLUDE, ENDPOINT, USER and LOGIN_EVENTS"
            raise ImproperlyConfigured(f'SPOOL has no setting "{min(given)}"; its settings: {known}')
        return options


def _function(name: str, given: Any) -> Any:
    function = import_string(given) if isinstance(given, str) else given
    if function is not None and not callable(function):
        raise TypeError(f"{name} must be a function of the request, not {type(function).__name__}")
    return function


class AnalyticsMiddleware:
    """The class for `MIDDLEWARE`; see above. Raises ImproperlyConfigured for an invalid setting."""

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self._get_response = get_response
        self._emitter = get_emitter()
        self._emitter.prepare()
        self._options = options = _Options.of_settings()
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
            markcoroutinefunction(self)
        if options.user is not None:
            # Not a method: Django calls it in a thread if the server is asynchronous and the middleware is
            # not.
            bind_async = iscoroutinefunction(options.user)
            self.process_view = self._bind_user_async if bind_async else self._bind_user
        if options.login_events:
            _connect()

    def __call__(self, request: Any) -> Any:
        carrier = _carrier(request)
        if MARK in carrier:
            if isinstance(mark := carrier[MARK], Routed):
                mark.request = request
            return self._get_response(request)
        if served_request() == (request.method, request.path):
            return self._get_response(request)
        carrier[MARK] = None
        exchange = _Exchange(request, self._timer(request), self._options.endpoint)
        return self._serve_async(request, exchange) if self._is_async else self._serve(request, exchange)

    def _timer(self, request: Any) -> RequestTimer:
        timer = RequestTimer(self._emitter, request.method)
        timer.ended = request.path in self._options.exclude or request.path_info in self._options.exclude
        return timer

    # The scope that is current after the response was made is not always the one that was started: Django
    # runs async code in a task of its own and takes over the final context of that task.

    def _serve(self, request: Any, exchange: _Exchange) -> Any:
        begun = exchange.begin()
        try:
            return exchange.answer(self._get_response(request), in_force() or begun.scope)
        except BaseException:
            exchange.end(FAILED)
            raise
        finally:
            end(begun)

    async def _serve_async(self, request: Any, exchange: _Exchange) -> Any:
        begun = exchange.begin()
        try:
            return exchange.answer(await self._get_response(request), in_force() or begun.scope)
        except asyncio.CancelledError:  # by Django, when the client has disconnected
            exchange.end(DISCONNECTED)
            raise
        except BaseException:
            exchange.end(FAILED)
            raise
        finally:
            end(begun)

    def _bind_user(self, request: Any, *_: Any) -> None:
        with calling_user_function(self._emitter):
            if self._options.user is not None and (values := self._options.user(request)):
                update(**values)

    async def _bind_user_async(self, request: Any, *_: Any) -> None:
        with calling_user_function(self._emitter):
            if self._options.user is not None and (values := await self._options.user(request)):
                update(**values)


def _carrier(request: Any) -> Any:
    """Return the request's scope or environment, which a middleware outside Django has marked."""
    return getattr(request, "scope", None) or getattr(request, "environ", None) or request.META


class _Exchange:
    """One request and its response."""

    def __init__(
        self, request: Any, timer: RequestTimer, endpoint: Callable[[Any], str | None] | None
    ) -> None:
        self._request = request
        self._timer = timer
        self._endpoint = endpoint
        self._id = request_id(request.headers.get(_HEADER))
        self._complete = False
        self._failed = False
        self._input = None
        if hasattr(request, "environ"):  # under WSGI: the request class has already taken the server's input
            self._input = watched(getattr(request, "_stream", None), request.environ)
            if self._input is not None:
                request._stream = self._input

    def begin(self) -> Any:
        return begin_empty(request_id=self._id, trace_id=trace_id(self._request.headers.get("traceparent")))

    def answer(self, response: Any, scope: Scope) -> Any:
        """Return the response with the request id. A streamed response is counted when the server closes it."""
        response[_HEADER] = self._id
        if not response.streaming:
            self.end(str(response.status_code))
            return response
        if getattr(response, "file_to_stream", None) is not None or self._request.method == "HEAD":
            self._complete = True  # as far as is known here: the server may send the file itself
        elif getattr(response, "is_async", False):
            response.streaming_content = self._pieces_async(response.streaming_content, scope)
        else:
            response.streaming_content = self._pieces(response.streaming_content, scope)
        close = response.close

        def closed() -> None:
            try:
                close()
            finally:
                sent = self._complete or self._failed
                self.end(str(response.status_code) if sent else DISCONNECTED)

        response.close = closed
        return response

    def _pieces(self, content: Iterator[bytes], scope: Scope) -> Iterator[bytes]:
        pieces = iter(content)
        while True:
            begun = resume(scope)
            try:
                piece = next(pieces)
            except StopIteration:
                self._complete = True
                return
            except Exception:
                self._failed = True
                raise
            finally:
                end(begun)
            yield piece

    async def _pieces_async(self, content: AsyncIterator[bytes], scope: Scope) -> AsyncIterator[bytes]:
        pieces = aiter(content)
        while True:
            begun = resume(scope)
            try:
                piece = await anext(pieces)
            except StopAsyncIteration:
                self._complete = True
                return
            except Exception:
                self._failed = True
                raise
            finally:
                end(begun)
            yield piece

    def end(self, status: str) -> None:
        if self._input is not None and self._input.is_cut_off():
            status = DISCONNECTED
        if not self._timer.ended:
            self._timer.end(self._label(), status, failed=self._failed)

    def _label(self) -> str:
        request = self._request
        if self._endpoint is not None and (label := given_endpoint(self._endpoint, request)) is not None:
            return label
        headers = request.headers
        if request.method == "OPTIONS" and "Origin" in headers and "Access-Control-Request-Method" in headers:
            return PREFLIGHT
        try:
            return django_template(request)
        except Exception as error:  # a converter of the application may raise anything
            if is_foreign(error):
                raise
            return UNMATCHED


# ---- Django's signals -----------------------------------------------------------------------------------


def _connect() -> None:
    from django.contrib.auth.signals import user_logged_in, user_logged_out

    user_logged_in.connect(_logged_in, dispatch_uid="analytics_spool_logged_in", weak=False)
    user_logged_out.connect(_logged_out, dispatch_uid="analytics_spool_logged_out", weak=False)


def _logged_in(request: Any, user: Any, **_: object) -> None:
    with calling_user_function(get_emitter()):
        if values := _values_of(request, user):
            with bind(**values):
                log_user_logged_in.emit()
            if in_force() is not None:
                update(**values)


def _logged_out(request: Any, user: Any, **_: object) -> None:
    """Emit the event. Django sends this signal before it logs out; without a logged-in user there is no event."""
    with calling_user_function(get_emitter()):
        if user is not None and user.is_authenticated and (values := _values_of(request, user)):
            with bind(**values):
                log_user_logged_out.emit()
    if in_force() is not None:
        update(user_id=None, family_unit_id=None, session_id=None, role=None)


def _values_of(request: Any, user: Any) -> Values | None:
    request = HttpRequest() if request is None else request
    request.user = user  # not set yet in the test client's `force_login`

    async def auser() -> Any:  # Django's own lazy user may have been evaluated before the login
        return user

    request.auser = auser
    function = _Options.of_settings().user or authenticated_user
    if iscoroutinefunction(function):
        function = async_to_sync(function)
    return function(request)
