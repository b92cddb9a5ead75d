"""A real S3 server (moto) on the loopback, behind a proxy of ours that can spoil what passes through.

with s3_server() as server:
    server.url("cache")                     # s3://bucket/cache
    server.faults = {"drop": 0.05, ...}     # share of requests that each fault befalls

The faults are those of a network: they happen on the wire, below botocore, aiohttp and s3fs.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("drop", "drop_answer", "error_500", "slow_down", "truncate", "slow")
SLOW_S = 0.3


@dataclass
class Server:
    endpoint: str
    bucket: str
    faults: dict[str, float] = field(default_factory=dict)
    random: random.Random = field(default_factory=lambda: random.Random(0))
    requests: Counter[str] = field(default_factory=Counter)  # by method
    injected: Counter[str] = field(default_factory=Counter)
    down: bool = False  # every connection is dropped

    def url(self, name: str) -> str:
        return f"s3://{self.bucket}/{name}"

    def choose(self) -> str | None:
        if self.down:
            return "drop"
        draw = self.random.random()
        for fault, share in self.faults.items():
            if draw < share:
                return fault
            draw -= share
        return None


@contextlib.contextmanager
def s3_server() -> Iterator[Server]:
    """Credentials and endpoint are in the environment for as long as it runs, as users have them."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    behind = moto.get_host_and_port()
    server = Server("", f"bucket-{uuid.uuid4().hex[:8]}")

    class Proxy(_Proxy):
        upstream, state = behind, server

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    server.endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_MAX_ATTEMPTS": "2",  # botocore's own, within each of s3fs's, within each of ours
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        connection = http.client.HTTPConnection(*behind)
        connection.request("PUT", f"/{server.bucket}", headers={"Host": "127.0.0.1"})
        assert connection.getresponse().status == 200
        connection.close()
        yield server
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        proxy.shutdown()
        moto.stop()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: tuple[str, int]
    state: Server

    def log_message(self, *_: Any) -> None:
        pass

    def _pass_on(self) -> None:
        body = self._body()
        fault = self.state.choose()
        self.state.requests[self.command] += 1
        if fault is not None:
            self.state.injected[fault] += 1
        if fault == "drop":
            return self._hang_up()
        if fault == "slow":
            time.sleep(SLOW_S)
        if fault in ("error_500", "slow_down"):
            code, name = (500, "InternalError") if fault == "error_500" else (503, "SlowDown")
            text = f"<?xml version='1.0'?><Error><Code>{name}</Code><Message>injected</Message></Error>".encode()
            return self._answer(code, [("Content-Type", "application/xml")], text, len(text))
        connection = http.client.HTTPConnection(*self.upstream)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        connection.request(self.command, self.path, body=body, headers={**headers, "Content-Length": str(len(body))})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fault == "drop_answer":
            return self._hang_up()
        hidden = {"connection", "transfer-encoding", "content-length", "server", "date"}
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in hidden]
        length = int(answer.getheader("Content-Length") or len(data)) if self.command == "HEAD" else len(data)
        if fault == "truncate" and data:
            self._answer(answer.status, kept, data[: len(data) // 2], length)
            return self._hang_up()
        self._answer(answer.status, kept, data, length)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, code: int, headers: list[tuple[str, str]], data: bytes, length: int) -> None:
        self.send_response_only(code)
        for name, value in [*headers, ("Content-Length", str(length))]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                self.wfile.write(data)

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
