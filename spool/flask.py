"""Request metrics, request ids, the user and the context for Flask.

Analytics(app, exclude=["/health"], user=lambda: {"user_id": g.user.id} if "user" in g else None)

analytics = Analytics()            # or, for an application factory
analytics.init_app(app)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flask import Flask

from spool.context import Values, update
from spool.emitter import Emitter, get_emitter
from spool.request import Exclusions, calling_user_function
from spool.wsgi import AnalyticsMiddleware


class Analytics:
    """Installs `spool.wsgi.AnalyticsMiddleware`, which describes `emitter`, `exclude` and `endpoint`.

    `user`, called before each request's view, returns the values to bind as a dictionary of
    `spool.context.update`'s arguments, or None if there is no user.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        emitter: Emitter | None = None,
        exclude: Iterable[str] = (),
        endpoint: Callable[[Any], str | None] | None = None,
        user: Callable[[], Values | None] | None = None,
    ) -> None:
        if user is not None and not callable(user):
            raise TypeError(f"user must be a function without arguments, not {type(user).__name__}")
        Exclusions(exclude)
        self._emitter = emitter
        self._exclude = exclude
        self._endpoint = endpoint
        self._user = user
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Install it in an application. Repeating it does not count requests twice."""
        app.wsgi_app = AnalyticsMiddleware(  # type: ignore[method-assign]  # Flask's own way to add a middleware
            app.wsgi_app, emitter=self._emitter, exclude=self._exclude, endpoint=self._endpoint
        )
        if self._user is not None:
            _after_preprocessing(app, self._bind_user)

    def _bind_user(self) -> None:
        emitter = self._emitter or get_emitter()
        with calling_user_function(emitter):
            if self._user is not None and (values := self._user()):
                update(**values)


def _after_preprocessing(app: Flask, call: Callable[[], None]) -> None:
    """Call the function after all that Flask runs before a request, however late registered, unless one responds."""
    preprocess = app.preprocess_request

    def preprocess_request(*args: Any, **kwargs: Any) -> Any:
        answer = preprocess(*args, **kwargs)
        if answer is None:
            call()
        return answer

    app.preprocess_request = preprocess_request  # type: ignore[method-assign]  # Flask documents it to be replaced
