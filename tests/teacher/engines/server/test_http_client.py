"""Messages about a server that makes requests wait, or refuses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from pipeline.errors import ModelError
from pipeline.teacher.engines.server.http_client import SHOWN, HttpClient, Query

KEY = "sk-secret-1234567890"


@contextmanager
def served(status: int, body: Callable[[str], str], **headers: str) -> Iterator[str]:
    """The URL of a server that answers everything in the same way. Args: body: of the key that it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            data = body(self.headers.get("Authorization", "")).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def said(url: str) -> str:
    with closing(HttpClient(url, api_key=KEY)) as client, pytest.raises(ModelError) as error:
        client.post(Query("/x", {}, lambda answer: answer)).result()
    return str(error.value)


def test_a_pause_that_is_longer_than_the_patience_is_named() -> None:
    with served(429, lambda _: "daily quota used up", **{"Retry-After": "86400"}) as url:
        found = said(url)
    assert "status 429: daily quota used up. The server asks to wait for 86,400 seconds, longer than" in found
    assert "`server_patience` 600. " in found and "for 0 seconds" not in found


@pytest.mark.parametrize("before", range(SHOWN - len(KEY) - 8, SHOWN + 1, 3))
def test_no_part_of_the_key_is_shown(before: int) -> None:
    with served(400, lambda key: "x" * before + key) as url:
        assert "sk-" not in said(url)
