"""Serves the live page: a few files and one stream of events, to browsers on this machine.

Reading is all that can be done here. A name that a stranger's site lets point at this machine is
refused (DNS rebinding), nothing is loaded from elsewhere, and no other site may frame or read it.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from braid_wire.errors import QueueFull, RequestInvalid

from braid_orchestrator.cell import Cell
from braid_orchestrator.page.broadcast import PERIOD_S, Broadcast
from braid_orchestrator.page.snapshots import Snapshots

log = logging.getLogger(__name__)

EVENTS = "/events"
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/strip.js": ("strip.js", "text/javascript; charset=utf-8"),
    "/tables.js": ("tables.js", "text/javascript; charset=utf-8"),
    "/format.js": ("format.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
MOST_CONNECTIONS = 64
_METHODS = ("GET", "HEAD")
_IDLE_S = 15.0
"""A peer that takes nothing, or says nothing, for so long is let go."""


@dataclass(frozen=True)
class Place:
    """Where a page is served.

    Args:
        port: 0 picks a free one.
        host: an address; beyond loopback everybody who can reach it can read the page.
        names: by which browsers may call it, beside `localhost` and addresses.
    """

    port: int = 0
    host: str = "127.0.0.1"
    names: tuple[str, ...] = ()


class Page:
    """The page of a cell, being served.

    Args:
        cell: that is shown.
        place: where.
        period_s: from frame to frame.

    Raises:
        RequestInvalid: the port is taken.
    """

    def __init__(self, cell: Cell, place: Place, period_s: float = PERIOD_S) -> None:
        self._broadcast = Broadcast(Snapshots(cell), period_s)
        try:
            self._server = _Server(place, self._broadcast)
        except OSError as error:
            raise RequestInvalid(
                f"page port {place.host}:{place.port} cannot be used: {error}",
                field="page_port",
                value=place.port,
            ) from error
        self.port = int(self._server.server_address[1])
        self.url = url(place.host, self.port)
        if not _is_loopback(place.host):
            log.warning("the page at %s has no authentication: whoever reaches it can read it", self.url)
        self._thread = threading.Thread(target=self._server.serve_forever, name="page-http", daemon=True)
        self._thread.start()

    @property
    def listeners(self) -> int:
        """Browsers that follow it."""
        return self._broadcast.listeners

    def close(self) -> None:
        """Stop serving."""
        self._broadcast.close()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def url(host: str, port: int) -> str:
    """Of a page, for a browser on this machine."""
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


class _Server(ThreadingHTTPServer):
    """A thread for each connection, and a bound on them."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 32

    def __init__(self, place: Place, broadcast: Broadcast) -> None:
        self.broadcast = broadcast
        self.names = frozenset(name.lower() for name in (*place.names, "localhost"))
        self._room = threading.BoundedSemaphore(MOST_CONNECTIONS)
        if ":" in place.host:
            self.address_family = socket.AF_INET6
        super().__init__((place.host, place.port), _Handler)

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any
    ) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: object, client_address: object) -> None:
        # A browser that leaves is no error; anything else is ours.
        log.debug("a connection to the page ended early", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "braid"
    sys_version = ""
    timeout = _IDLE_S
    server: _Server

    def parse_request(self) -> bool:
        """As the base class, and the rules that hold for every request."""
        if not super().parse_request():
            return False
        if self.command not in _METHODS:
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "the page can only be read", ("Allow", "GET, HEAD"))
            return False
        if not allowed_host(self.headers.get_all("Host") or (), self.server.names):
            self._refuse(
                HTTPStatus.MISDIRECTED_REQUEST,
                "this name is not one of the page's; use its address, localhost, or add --page-name",
            )
            return False
        return True

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == EVENTS:
            self._events()
        elif path in FILES:
            self._file(*FILES[path])
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        log.debug(format, *arguments)

    def _file(self, name: str, content_type: str) -> None:
        self._answer(HTTPStatus.OK, _read(name), content_type)

    def _events(self) -> None:
        # Other sites cannot read the stream, and shall not take up its places either.
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            self._refuse(HTTPStatus.FORBIDDEN, "only the page itself follows its events")
            return
        try:
            with self.server.broadcast.listen() as events:
                self.close_connection = True
                self._head(HTTPStatus.OK, "text/event-stream; charset=utf-8", ("Connection", "close"))
                if self.command == "GET":
                    for event in events:
                        self.wfile.write(event)
        except QueueFull as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, error.message, ("Retry-After", "5"))

    def _refuse(self, status: HTTPStatus, why: str, *more: tuple[str, str]) -> None:
        self.close_connection = True
        self._answer(status, f"{why}\n".encode(), "text/plain; charset=utf-8", ("Connection", "close"), *more)

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str, *more: tuple[str, str]) -> None:
        self._head(status, content_type, ("Content-Length", str(len(body))), *more)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: HTTPStatus, content_type: str, *more: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", content_type), *HEADERS.items(), *more):
            self.send_header(name, value)
        self.end_headers()


def allowed_host(hosts: Iterable[str], names: frozenset[str]) -> bool:
    """Whether a request's Host headers name this page: exactly one, an address or a known name.

    An address cannot be made to point elsewhere, so a page that was loaded by address came from here.
    """
    given = list(hosts)
    if len(given) != 1:
        return False
    host = given[0].strip().lower()
    if host.startswith("["):
        name, _, port = host[1:].partition("]")
        port = port.removeprefix(":")
    else:
        name, _, port = host.partition(":")
    if port and not port.isdecimal():
        return False
    return name in names or _is_address(name)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


@cache
def _read(name: str) -> bytes:
    return resources.files(__package__).joinpath("static", name).read_bytes()
