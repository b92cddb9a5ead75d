"""A teacher in `vllm serve`, as fast as the server itself? Targets of the same rows, by concurrency.

    cache-teacher    `ServerEngine`: requests, reading and checking the answers, targets
    bare loop        the same requests by the same number of tasks; answers are received and thrown away

Needs vLLM in this environment (`make test-vllm` makes one): `.venv-vllm/bin/python -m benchmarks servers`.

Bound: the bare loop; nothing that asks this server for these log-probabilities is faster.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import httpx2
import numpy as np
from transformers import PreTrainedTokenizerBase

from benchmarks.measure import Result, Settings, Table, interleave, ratio, spread
from benchmarks.teacher import describe, open_teacher
from benchmarks.text import prose
from pipeline.teacher.engines.interface import RowRequest
from pipeline.teacher.engines.server.dialect import Prompt
from pipeline.teacher.engines.server.server_config import ServerConfig
from pipeline.teacher.engines.server.server_engine import ServerEngine
from pipeline.teacher.engines.server.server_opening import open_server
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.packing import build_corpus

TOP_K, ROW_TOKENS = 50, 64
ARGUMENTS = ("--max-logprobs", str(TOP_K), "--max-model-len", str(ROW_TOKENS + 1))
CONCURRENCY = (1, 8, 32)
START_S = 900.0


@contextlib.contextmanager
def vllm_server(model: Path, *arguments: str, port: int | None = None) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URL of a `vllm serve` of this environment once it answers, and its process, which is killed at the end."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    words = ["--model", str(model), "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", **os.environ}
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=Path(sys.prefix),  # not here, where the tests have a folder that shadows a package
    )
    try:
        stop = time.monotonic() + START_S
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > stop:
                raise RuntimeError(f"vllm serve does not answer (status {process.returncode})")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        stop_server(process)


def _answers(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health").is_success
    except httpx2.TransportError:
        return False


def stop_server(process: subprocess.Popen[bytes]) -> None:
    """Kills it with the processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def run(settings: Settings) -> Result:
    model, tokenizer = open_teacher(settings.teacher)
    requests = rows_of(tokenizer, 4 if settings.quick else 32)
    rule = TargetRule(top_k=TOP_K)
    table, ratios = [], {}
    with vllm_server(settings.teacher.resolve(), *ARGUMENTS) as (url, _):
        for concurrency in CONCURRENCY:
            asked = requests[: max(8, 2 * concurrency)]
            tokens = sum(request.tokens for request in asked)
            config = ServerConfig(concurrency=concurrency)
            engine = open_server(url, config, tokenizer, rule=rule, seq_len=ROW_TOKENS, all_positions=False)
            with contextlib.closing(engine):
                times = interleave(
                    {
                        "cache-teacher": lambda engine=engine, asked=asked: engine.run(asked, [rule]).rows(),
                        "bare loop": lambda engine=engine, asked=asked: asyncio.run(bare_loop(engine, asked)),
                    },
                    settings.rounds,
                )
            ratios[concurrency] = ratio(times, "bare loop", "cache-teacher")
            speeds = [tokens / min(times[way]) for way in ("cache-teacher", "bare loop")]
            table.append(
                [concurrency, tokens, *speeds, ratios[concurrency], spread(times, "bare loop", "cache-teacher")]
            )
    return Result(
        name="servers",
        question="Targets of the same rows through a server, beside what the server gives to a bare loop.",
        bound="the bare loop: the same requests, whose answers are thrown away.",
        settings={
            "teacher": describe(model),
            "rows": len(requests),
            "row_tokens": ROW_TOKENS,
            "top_k": TOP_K,
            "dtype": "float32",
            "rounds": settings.rounds,
        },
        tables=[
            Table(
                "Speed through a server",
                ["concurrency", "tokens", "cache-teacher, tokens/s", "bare loop, tokens/s", "÷ bare loop", "range"],
                table,
            )
        ],
        summary={f"server_speed_ratio_{n}": round(value, 3) for n, value in ratios.items()},
    )


def rows_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[RowRequest]:
    """Windows of prose, one document to a row."""
    data = DataConfig(data=[{"text": text} for text in islice(prose(500), 4 * rows)], seq_len=ROW_TOKENS, packing=False)
    corpus = build_corpus(data, tokenizer)
    return [
        RowRequest(index=i, row=corpus[i], place=i, stored=np.asarray(corpus[i].loss_mask))
        for i in range(min(rows, len(corpus)))
    ]


async def bare_loop(engine: ServerEngine, requests: list[RowRequest]) -> int:
    """Bytes that the server answers to the same requests, as many at once."""
    slots = asyncio.Semaphore(engine.batch_size)
    async with httpx2.AsyncClient(base_url=engine.client.root, timeout=None) as client:

        async def ask(request: RowRequest) -> int:
            token_ids = request.row.input_ids[: request.row.segment_lengths[0]].tolist()
            prompt = Prompt(token_ids=token_ids, positions=range(len(token_ids) - 1), k=TOP_K)
            query = engine.dialect.prompt(prompt, engine.vocab_size)
            async with slots:
                response = await client.post(query.path, json=query.body)
            return len(response.raise_for_status().content)

        return sum(await asyncio.gather(*map(ask, requests)))
