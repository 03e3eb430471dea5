"""The review page: one local server, the manifest's own images, every act in the journal before it is acknowledged.

The page itself is `review.html` (markup, style and script in one file, nothing from elsewhere). Whoever has the link
can review; the link has a random token, and the server listens on this machine only unless told otherwise.
"""

import hmac
import logging
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from flask import Flask, Response, abort, jsonify, request
from werkzeug.exceptions import HTTPException
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from octofold.clean.desk import MOST_ACTS, SIDES, Desk
from octofold.errors import UserError

log = logging.getLogger("octofold")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def make_app(desk: Desk, token: str, finish: Callable[[], None] = lambda: None, loopback: bool = True) -> Flask:
    """Return the web application; every address starts with ``/<token>/``."""
    app = Flask("octofold.review", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = 1 << 20
    _guard(app, token, loopback)
    _show(app, desk, f"/{token}")
    _listen(app, desk, f"/{token}", finish)
    for error in (HTTPException, UserError, ValueError):
        app.register_error_handler(error, _say)
    return app


def _guard(app: Flask, token: str, loopback: bool) -> None:
    """Nobody without the token, no other site, nothing kept in caches."""

    @app.before_request
    def guard() -> None:
        given = request.path.split("/")[1]
        if not hmac.compare_digest(given.encode(), token.encode()):
            abort(404, "No such page. Open the link that clean printed; each start of clean makes a new one.")
        if loopback and urlsplit(request.host_url).hostname not in LOOPBACK:  # a foreign name that points at 127.0.0.1
            abort(403, "This page answers to 127.0.0.1 and localhost only.")

    @app.after_request
    def harden(response: Response) -> Response:
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers.setdefault("Content-Security-Policy", "default-src 'none'")
        return response


def _show(app: Flask, desk: Desk, root: str) -> None:
    """The page, and the manifest's own images."""
    page = Path(__file__).with_name("review.html").read_text(encoding="utf-8")

    @app.get(f"{root}/")
    def show() -> Response:
        nonce = secrets.token_urlsafe(16)
        response = Response(page.replace("{{nonce}}", nonce), mimetype="text/html")
        response.headers["Content-Security-Policy"] = (
            f"default-src 'none'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            f"frame-ancestors 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
        )
        return response

    @app.get(f"{root}/<any({','.join(SIDES)}):size>/<sample_id>")
    def image(size: str, sample_id: str) -> Response:
        data = desk.image(sample_id, size)
        kind = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
        return Response(data, mimetype=kind, headers={"Cache-Control": "private, max-age=86400, immutable"})


def _listen(app: Flask, desk: Desk, root: str, finish: Callable[[], None]) -> None:
    """What the page asks for, and what the reviewer decides."""

    @app.get(f"{root}/state")
    def state() -> Response:
        return jsonify(desk.state())

    @app.get(f"{root}/queue")
    def queue() -> Response:
        return jsonify(desk.chosen(request.args.get("label", ""), request.args.get("kind", "")))

    @app.get(f"{root}/items")
    def items() -> Response:
        desk.journal.refresh()
        ranks = [int(text) for text in request.args.get("ranks", "").split(",") if text.isdecimal()][:MOST_ACTS]
        return jsonify([desk.describe(number) for number in ranks if number < len(desk.queue.items)])

    @app.get(f"{root}/news")
    def news() -> Response:
        desk.journal.refresh()
        return jsonify(desk.news(max(0, request.args.get("since", 0, type=int))))

    @app.get(f"{root}/mine")
    def mine() -> Response:
        return jsonify(desk.mine(request.args.get("reviewer", "") or desk.reviewer))

    @app.post(f"{root}/acts")
    def acts() -> Response:
        return jsonify(desk.act(request.get_json()))

    @app.post(f"{root}/finish")
    def end() -> Response:
        finish()
        return jsonify({"finished": True})


def _say(error: Exception) -> tuple[Response, int]:
    """Errors are JSON with one text, never a page with a traceback."""
    if isinstance(error, HTTPException):
        return jsonify({"error": error.description}), error.code or 500
    if isinstance(error, UserError):
        is_image = request.method == "GET"
        return jsonify({"error": str(error)}), 410 if is_image else 507
    return jsonify({"error": str(error)}), 400


class _Quiet(WSGIRequestHandler):
    """Keep connections open (a picture a keystroke) and do not log each of them."""

    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        logging.getLogger("octofold.clean.review").debug("%s %s", self.command, code)


class Server:
    """The running page.

    Attributes:
        url: the link to open, token included.
    """

    def __init__(self, desk: Desk, host: str = "127.0.0.1", port: int = 0) -> None:
        token = secrets.token_urlsafe(16)
        loopback = host in LOOPBACK
        app = make_app(desk, token, self.stop, loopback)
        try:
            self._server: BaseWSGIServer = make_server(host, port, app, threaded=True, request_handler=_Quiet)
        except (OSError, SystemExit) as error:  # werkzeug exits where a port is taken
            got = getattr(error, "strerror", "") or "it is taken"
            raise UserError(f"port {port} on {host}", expected="a free port", got=got, fix="--port 0") from error
        name = host if loopback else socket.gethostname() if host in ("0.0.0.0", "::") else host
        self.url = f"http://{name}:{self._server.server_port}/{token}/"

    def serve(self) -> None:
        """Answer until `stop`, or until Ctrl-C: nothing is lost by either, every act is on the disk already."""
        log.info("review page: %s   (Ctrl-C ends it; every decision is kept)", self.url)
        try:
            self._server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            self._server.server_close()

    def stop(self) -> None:
        """End `serve` after the request at hand."""
        threading.Thread(target=self._server.shutdown, daemon=True).start()
