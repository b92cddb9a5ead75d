"""A real `llama-server`, on a CPU: `make test-servers`. LLAMA_SERVER names the program if it is not on the PATH."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from test_server_answers import generate
from test_server_engine import capture, each_text_and_rule, rows_here, same_entries

import cache_format as cf
from generating import load, logprobs_of
from tiny import conversations, english, write_jsonl

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]

PROGRAM = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
SLOTS = 4


@contextlib.contextmanager
def llama_server(teacher: Path, folder: Path, *, pre: str = "gpt-2") -> Iterator[str]:
    """The URL of a `llama-server` that computes in float32, once it answers. Args: pre: as in `write_gguf`."""
    if PROGRAM is None:
        pytest.skip("no llama-server")
    pytest.importorskip("gguf")
    from tiny_gguf import write_gguf

    model = write_gguf(teacher, folder / "teacher.gguf", pre=pre)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", str(model), "--ctx-size", "1024", "--parallel", str(SLOTS), "--threads", "1"]
    words += ["--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32", "--port", str(port)]
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


@pytest.fixture(scope="module")
def url(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with llama_server(teacher_dir, tmp_path_factory.mktemp("gguf")) as found:
        yield found


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


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.5, "answers_per_prompt": 2}], ids=str)
@pytest.mark.parametrize("stop", [(), ("e",)], ids=str)
def test_answers_have_the_models_own_log_probabilities(
    options: dict[str, Any], stop: tuple[str, ...], url: str, teacher_dir: Path, chat_file: Path, tmp_path: Path
) -> None:
    """A random model writes text that is not valid UTF-8 nearly always."""
    options = {**options, "stop": stop, "max_new_tokens": 24}
    generate(url, teacher_dir, chat_file, tmp_path / "cache", seq_len=160, **options)
    cache = cf.open_cache(tmp_path / "cache")
    check_answers(cache, teacher_dir, 400)
    assert stop or any("\ufffd" in line["text"] for line in cache.answers())
    if options["temperature"] == 0.0:
        generate(str(teacher_dir), teacher_dir, chat_file, tmp_path / "here", seq_len=160, **options)
        here = cf.open_cache(tmp_path / "here")
        assert [line["text"] for line in cache.answers()] == [line["text"] for line in here.answers()]


def test_a_real_model(real_teacher: Path, tmp_path: Path, raw_rows: list[cf.CacheRow]) -> None:
    """SmolLM2: its own text and answers of it, some cut within an emoji."""
    (tmp_path / "text.txt").write_text(english(4) + "\n東京 is 10°C 😀😀 “far too small”\n", encoding="utf-8")
    prompts = [{"prompt": [{"role": "user", "content": "Answer with twenty emojis, nothing else."}]}]
    prompts += [{"prompt": each["messages"][-2:-1]} for each in conversations(2)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    with llama_server(real_teacher, tmp_path, pre="smollm") as url:
        capture(str(real_teacher), real_teacher, tmp_path / "text.txt", tmp_path / "here")
        expected = list(raw_rows)
        raw_rows.clear()
        capture(url, real_teacher, tmp_path / "text.txt", tmp_path / "there")
        same_entries(raw_rows, expected, atol=5e-3)
        options: dict[str, Any] = {"temperature": 1.0, "answers_per_prompt": 3, "max_new_tokens": 22}
        generate(url, real_teacher, tmp_path / "prompts.jsonl", tmp_path / "answers", seq_len=160, **options)
    check_answers(cf.open_cache(tmp_path / "answers"), real_teacher, 49_152)


def check_answers(cache: cf.Cache, teacher: Path, vocab_size: int) -> None:
    model = load(teacher)
    assert len(cache) > 0
    for line, row in zip(cache.answers(), cache.iter_rows(), strict=True):
        expected = logprobs_of(model, row.input_ids, vocab_size)
        at = np.flatnonzero(row.loss_mask)
        np.testing.assert_allclose(line["token_logprobs"], expected[at, row.input_ids[at + 1]], atol=5e-3)
