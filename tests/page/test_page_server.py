"""Who may read the page, and what else the server refuses."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest
from braid_orchestrator.page import Page, Place
from braid_orchestrator.page.broadcast import MOST_LISTENERS
from braid_orchestrator.page.server import FILES, allowed_host, url
from braid_wire.errors import RequestInvalid
from page_harness import Watched, eventually


@pytest.mark.parametrize("path", FILES)
def test_files_come_with_their_type_and_a_strict_policy(watched: Watched, path: str) -> None:
    status, headers, body = watched.request("GET", path)
    assert status == 200 and body
    assert headers["Content-Type"] == FILES[path][1]
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    status, headers, nothing = watched.request("HEAD", path)
    assert (status, headers["Content-Length"], nothing) == (200, str(len(body)), b"")


def test_the_files_keep_to_the_policy(watched: Watched) -> None:
    for path in FILES:
        text = watched.request("GET", path)[2].decode()
        for foreign in ("https://", "http://", "innerHTML", "style=", "onclick=", "eval("):
            assert foreign not in text.replace("http://www.w3.org/2000/svg", ""), path


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE", "FOO"])
def test_nothing_but_reading(watched: Watched, method: str) -> None:
    status, headers, _ = watched.request(method, "/")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "path",
    ["/page.py", "/../server.py", "/static/page.css", "/%2e%2e/server.py", "/events/", "/metrics"],
)
def test_other_paths_do_not_exist(watched: Watched, path: str) -> None:
    assert watched.request("GET", path)[0] == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1234", 200),
        ("127.0.0.1:80", 200),
        ("[::1]:80", 200),
        ("cell.example", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("cell.example:x", 421),
        ("", 421),
    ],
)
def test_names_that_others_can_point_here_are_refused(watched: Watched, host: str, status: int) -> None:
    for path in ("/", "/page.js"):
        assert watched.request("GET", path, Host=host)[0] == status
    if status != 200:
        assert watched.request("GET", "/events", Host=host)[0] == status


def test_one_host_header_exactly() -> None:
    names = frozenset({"localhost"})
    assert allowed_host(["localhost"], names)
    assert not allowed_host([], names)
    assert not allowed_host(["localhost", "localhost"], names)


@pytest.mark.parametrize(("site", "status"), [("cross-site", 403), ("same-site", 403)])
def test_other_sites_cannot_take_places(watched: Watched, site: str, status: int) -> None:
    assert watched.request("GET", "/events", Sec_Fetch_Site=site)[0] == status


def test_pages_are_bounded_and_given_back(watched: Watched) -> None:
    with ExitStack() as opened:
        for _ in range(MOST_LISTENERS):
            assert next(opened.enter_context(watched.events()))[0] == "cell"
        status, headers, why = watched.request("GET", "/events")
        assert (status, headers["Retry-After"]) == (503, "5")
        assert b"open already" in why
        assert watched.request("GET", "/")[0] == 200
    assert eventually(lambda: watched.page.listeners == 0)
    assert watched.frame()


def test_nonsense_on_the_socket_harms_nobody(watched: Watched) -> None:
    for data in (b"", b"\0" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000):
        with socket.create_connection(("127.0.0.1", watched.page.port), timeout=10) as peer:
            peer.sendall(data)
    assert watched.request("GET", "/")[0] == 200


def test_a_taken_port_is_named(watched: Watched) -> None:
    with pytest.raises(RequestInvalid, match=str(watched.page.port)) as caught:
        Page(watched.cell, Place(watched.page.port))
    assert caught.value.metadata["field"] == "page_port"


def test_addresses_for_browsers() -> None:
    assert url("127.0.0.1", 9404) == "http://127.0.0.1:9404/"
    assert url("0.0.0.0", 9404) == "http://127.0.0.1:9404/"
    assert url("::1", 9404) == "http://[::1]:9404/"
