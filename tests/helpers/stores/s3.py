"""A real S3 server (moto) on the loopback, behind a proxy of ours that can spoil what passes through.

with s3_server() as server:
    server.url("cache")                     # s3://bucket/cache
    server.spoil({"drop": 0.05})            # share of requests that each fault befalls
    server.counts()                         # requests by method, and faults injected

The faults are those of a network: they happen on the wire, below botocore, aiohttp and s3fs. The server is a process of
its own: its threads must not be there when a test forks.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import Request, urlopen

FAULTS = ("drop", "drop_answer", "error_500", "slow_down", "truncate", "slow")
SLOW_S = 0.3
CONTROL = "/-control"


@dataclass(frozen=True)
class Server:
    endpoint: str
    bucket: str

    def url(self, name: str) -> str:
        return f"s3://{self.bucket}/{name}"

    def spoil(self, faults: dict[str, float], *, down: bool = False) -> None:
        """From now on. down: every connection is dropped. Counts begin anew."""
        body = json.dumps({"faults": faults, "down": down}).encode()
        urlopen(Request(self.endpoint + CONTROL, data=body, method="PUT")).read()

    def counts(self) -> dict[str, dict[str, int]]:
        """{"requests": by method, "injected": by fault}"""
        return json.loads(urlopen(self.endpoint + CONTROL).read())


@contextlib.contextmanager
def s3_server() -> Iterator[Server]:
    """Credentials and endpoint are in the environment for as long as it runs, as users have them."""
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    process = subprocess.Popen([sys.executable, __file__, bucket], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    server = Server(process.stdout.readline().strip(), bucket)
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
        yield server
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        process.kill()
        process.wait()


# -- in the server's process ------------------------------------------------------------------------------------------


class _State:
    faults: dict[str, float] = {}
    down = False
    random = random.Random(0)
    requests: Counter[str] = Counter()
    injected: Counter[str] = Counter()

    @classmethod
    def choose(cls) -> str | None:
        if cls.down:
            return "drop"
        draw = cls.random.random()
        for fault, share in cls.faults.items():
            if draw < share:
                return fault
            draw -= share
        return None


class _Proxy(BaseHTTPRequestHandler):
    # Without the second, the body of an answer waits 40 ms for the client to acknowledge the headers.
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    upstream: tuple[str, int]

    def log_message(self, *_: Any) -> None:
        pass

    def _pass_on(self) -> None:
        body = self._body()
        if self.path == CONTROL:
            return self._control(body)
        fault = _State.choose()
        _State.requests[self.command] += 1
        if fault is not None:
            _State.injected[fault] += 1
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

    def _control(self, body: bytes) -> None:
        if self.command == "PUT":
            given = json.loads(body)
            _State.faults, _State.down = given["faults"], given["down"]
            _State.requests, _State.injected = Counter(), Counter()
        text = json.dumps({"requests": _State.requests, "injected": _State.injected}).encode()
        self._answer(200, [("Content-Type", "application/json")], text, len(text))

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


def serve(bucket: str) -> None:
    """Says its endpoint on stdout, then serves until it is killed, or its parent is gone."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    _Proxy.upstream = moto.get_host_and_port()
    connection = http.client.HTTPConnection(*_Proxy.upstream)
    connection.request("PUT", f"/{bucket}", headers={"Host": "127.0.0.1"})
    assert connection.getresponse().status == 200
    connection.close()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    print(f"http://127.0.0.1:{proxy.server_address[1]}", flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)


if __name__ == "__main__":
    import logging

    logging.getLogger("werkzeug").disabled = True
    serve(sys.argv[1])
