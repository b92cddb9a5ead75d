"""Caches on a plain web server, which lists names without sizes, and may not support range requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import cache_format as cf
from cache_samples import write_sample

pytest.importorskip("aiohttp")


class WholeFiles(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Ranges(WholeFiles):
    def do_GET(self) -> None:  # noqa: N802
        asked = self.headers.get("Range")
        if asked is None:
            return super().do_GET()
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = (int(place) for place in asked.removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture()
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    write_sample(tmp_path / "cache")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(request.param, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/cache"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("url", [Ranges], indirect=True)
def test_a_cache_on_a_web_server_is_read(url: str, tmp_path: Path):
    cache = cf.open_cache(url)
    assert cache.record_batches() == cf.open_cache(tmp_path / "cache").record_batches()
    assert [row.row for row in cache] == list(range(10))
    assert cf.verify_cache(url) == cf.verify_cache(tmp_path / "cache")
    (tmp_path / "cache/shards/shard-00001.arrow").write_bytes(b"short")
    with pytest.raises(cf.CorruptShardError, match="shard-00001.arrow: found 5 bytes"):
        cache.record_batches()


@pytest.mark.parametrize("url", [WholeFiles], indirect=True)
def test_a_server_without_range_requests_is_refused_as_such(url: str):
    with pytest.raises(cf.CacheError, match="sends the whole file.*Copy the cache to a disk first") as caught:
        cf.open_cache(url)[0]
    assert not isinstance(caught.value, cf.CorruptShardError)
