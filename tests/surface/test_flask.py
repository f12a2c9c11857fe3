"""`spool.flask.Analytics`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from spool import Emitter, context
from spool.testing import Recorder
from tests.surface.test_requests import USER, labels

flask = pytest.importorskip("flask")


def application(emitter: Emitter) -> Any:
    app = flask.Flask(__name__)

    def view_item(item: int) -> str:
        emitter.emit_event(event_type="item_viewed")
        return str(item)

    def fails() -> str:
        raise LookupError("the application's own")

    def stream() -> Any:
        def pieces() -> Iterator[bytes]:
            for _ in range(3):
                emitter.emit_event(event_type="piece_sent")
                yield b"piece"

        return app.response_class(pieces())

    shop = flask.Blueprint("shop", __name__, url_prefix="/shop/<int:shop>")
    shop.add_url_rule("/items/<int:item>", view_func=lambda shop, item: view_item(item), endpoint="item")
    app.register_blueprint(shop)
    for path, view in {"/items/<int:item>": view_item, "/fails": fails, "/stream": stream}.items():
        app.add_url_rule(path, view_func=view)

    def guard() -> Any:
        return ("locked", 401) if "locked" in flask.request.args else None

    app.before_request(guard)
    return app


def user() -> Any:
    return {"user_id": USER, "family_unit_id": USER} if "known" in flask.g else None


def know() -> None:
    flask.g.known = True


@pytest.mark.parametrize("testing", [False, True])
def test_requests_are_counted_with_their_templates(
    emitter: Emitter, recorded: Recorder, testing: bool
) -> None:
    from spool.flask import Analytics

    app = application(emitter)
    app.testing = testing  # which lets exceptions through
    Analytics(app, emitter=emitter, exclude=["/health"], user=user)
    app.before_request(know)
    client = app.test_client()
    kinds = {
        "/items/007": ("/items/<int:item>", "200"),
        "/shop/08/items/09": ("/shop/<int:shop>/items/<int:item>", "200"),
        "/items/7?locked": ("/items/<int:item>", "401"),
        "/anything-unmatched": ("unmatched", "404"),
        "/stream": ("/stream", "200"),
        "/fails": ("/fails", "500"),
    }
    for path, (_, status) in kinds.items():
        if testing and status == "500":
            with pytest.raises(LookupError, match="the application's own"):
                client.get(path)
        else:
            answer = client.get(path, headers={"X-Request-ID": "r1"})
            assert answer.headers.getlist("X-Request-ID") == ["r1"]
            assert str(answer.status_code) == status
            answer.get_data()
    client.get("/health")
    assert labels(recorded) == [(label, "GET", status) for label, status in kinds.values()]
    assert {each["user_id"] for each in recorded.events} == {str(USER)}
    assert len(recorded.of("piece_sent")) == 3
    assert context.in_force() is None


def test_an_application_factory_may_install_it_twice(emitter: Emitter, recorded: Recorder) -> None:
    from spool.flask import Analytics

    analytics = Analytics(emitter=emitter)
    app = application(emitter)
    analytics.init_app(app)
    analytics.init_app(app)
    app.before_request(know)
    app.test_client().get("/anything-unmatched").get_data()
    assert labels(recorded) == [("unmatched", "GET", "404")]


def test_a_function_of_the_user_that_fails_fails_no_request(
    emitter: Emitter, caplog: pytest.LogCaptureFixture
) -> None:
    from spool.flask import Analytics

    app = application(emitter)
    wrong: Any = {"user": USER}
    Analytics(app, emitter=emitter, user=lambda: wrong)
    assert app.test_client().get("/items/7").status_code == 200


def test_what_cannot_be_is_refused_at_once(emitter: Emitter) -> None:
    from spool.flask import Analytics

    for options in ({"exclude": "/health"}, {"user": USER}, {"endpoint": "/x"}):
        with pytest.raises(TypeError):
            Analytics(flask.Flask(__name__), emitter=emitter, **options)
