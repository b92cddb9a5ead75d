"""A real `llama-server`, on a CPU: `make test-servers`. LLAMA_SERVER names the program if it is not on the PATH."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from test_server_engine import capture, each_text_and_rule, rows_here, same_entries

import cache_format as cf

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]

PROGRAM = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")


@pytest.fixture(scope="module")
def url(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if PROGRAM is None:
        pytest.skip("no llama-server")
    pytest.importorskip("gguf")
    from tiny_gguf import write_gguf

    model = write_gguf(teacher_dir, tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", str(model), "--ctx-size", "1024", "--parallel", "4", "--threads", "1", "--port", str(port)]
    words += ["--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32", "--threads-http", "24"]
    process = subprocess.Popen([PROGRAM, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        stop = time.monotonic() + 120
        while not _is_ready(port):
            assert process.poll() is None and time.monotonic() < stop, "llama-server does not answer"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _is_ready(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health").is_success
    except httpx2.TransportError:
        return False


@each_text_and_rule
def test_log_probabilities_are_those_of_transformers(
    data: str,
    options: dict[str, Any],
    url: str,
    teacher_dir: Path,
    tmp_path: Path,
    raw_rows: list[cf.CacheRow],
    request: pytest.FixtureRequest,
) -> None:
    path, of_data = request.getfixturevalue(data), {"max_documents": 6, "seq_len": 128}
    expected = rows_here(raw_rows, teacher_dir, path, tmp_path, of_data=of_data, **options)
    capture(url, teacher_dir, path, tmp_path / "there", of_data=of_data, **options)
    same_entries(raw_rows, expected, atol=1e-3)
    assert cf.open_cache(tmp_path / "there").metadata.capture["server"] == "llama.cpp"
