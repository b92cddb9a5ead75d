"""Caches made through a server equal those of the same model in this process, whatever the network does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cache_format as cf
from fake_servers import FAULTS, MODEL, SLOW_S, FakeServer, Faults
from pipeline.errors import ModelError
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.engines.server import http_client
from pipeline.teacher.engines.server.server_config import ServerConfig
from pipeline.teacher.progress import CaptureSummary
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from tiny import english

pytestmark = pytest.mark.usefixtures("impatient")

KINDS = ("vllm", "sglang")
TOP, NUCLEUS = TargetRule(top_k=8), TargetRule(kind="top-p", top_p=0.4, max_entries=24)


def capture(teacher: str, tokenizer: Path, data: Path, output: Path, **options: Any) -> CaptureSummary:
    """On a server, or in this process if `teacher` is a path. Keywords that begin with on_ are callbacks."""
    callbacks = {name: options.pop(name) for name in list(options) if name.startswith("on_")}
    of_data = {"sample_by": "line", "seq_len": 48, "max_documents": 20, **options.pop("of_data", {})}
    here = {} if teacher.startswith("http") else {"device": "cpu"}
    options = {"targets": TOP, "rows_per_shard": 8, **here, **options}
    config = CacheTeacherConfig(
        teacher=teacher,
        tokenizer=str(tokenizer),
        data=DataConfig(data=str(data), **of_data),
        output=str(output),
        **options,
    )
    return cache_teacher(config, **callbacks)


def each_text_and_rule(test: Callable[..., None]) -> Callable[..., None]:
    """A test of a whole server: each kind of text, by fixture, with each kind of targets that a server gives."""
    rules = [{}, {"targets": NUCLEUS, "all_positions": True}]
    test = pytest.mark.parametrize("options", rules, ids=["top-k", "top-p, all"])(test)
    return pytest.mark.parametrize("data", ["text_file", "chat_file", "completion_file", "letters"])(test)


def rows_here(
    raw_rows: list[cf.CacheRow], teacher: Path, data: Path, folder: Path, **options: Any
) -> list[cf.CacheRow]:
    """The rows of the same cache made in this process."""
    raw_rows.clear()
    capture(str(teacher), teacher, data, folder / "here", **options)
    found = list(raw_rows)
    raw_rows.clear()
    return found


def same_entries(rows: list[cf.CacheRow], expected: list[cf.CacheRow], atol: float) -> None:
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        for name in ("input_ids", "loss_mask", "segment_lengths"):
            np.testing.assert_array_equal(getattr(row, name), getattr(other, name))
        for name in ("counts", "exact_counts", "ids"):
            np.testing.assert_array_equal(getattr(row.targets, name), getattr(other.targets, name))
        np.testing.assert_allclose(row.targets.logprobs, other.targets.logprobs, atol=atol)


def same(rows: list[cf.CacheRow], expected: list[cf.CacheRow]) -> None:
    same_entries(rows, expected, atol=1e-4)
    for row, other in zip(rows, expected, strict=True):
        tail, expected_tail = (np.exp(each.targets.residual_logprob) for each in (row, other))
        np.testing.assert_allclose(tail, expected_tail, atol=1e-5)
        assert (row.targets.entropy <= other.targets.entropy + 1e-4).all()


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"targets": NUCLEUS, "all_positions": True}, {"of_data": {"packing": False}}], ids=str
)
def test_rows_are_those_of_the_model_in_this_process(
    kind: str,
    options: dict[str, Any],
    teacher_dir: Path,
    text_file: Path,
    tmp_path: Path,
    raw_rows: list[cf.CacheRow],
) -> None:
    expected = rows_here(raw_rows, teacher_dir, text_file, tmp_path, **options)
    with FakeServer(teacher_dir, kind) as server:
        capture(server.url, teacher_dir, text_file, tmp_path / "there", server=ServerConfig(concurrency=3), **options)
    same(raw_rows, expected)
    assert 1 < server.most_in_work <= 3
    metadata = cf.open_cache(tmp_path / "there").metadata
    assert metadata.teacher["name"] == MODEL and metadata.targets["entropy"] == "lower-bound"
    assert metadata.capture["engine"] == "server" and metadata.capture["server"] == kind
    assert metadata.capture["server_version"] in ("0.32.0", "0.5.23")
    cf.verify_cache(tmp_path / "there", deep=True)


@pytest.mark.long
def test_a_cache_of_answers_sends_no_more_than_it_stores(
    teacher_dir: Path, completion_file: Path, tmp_path: Path, raw_rows: list[cf.CacheRow]
) -> None:
    """Targets are on the completions; what follows the last of them is not sent, padding never."""
    expected = rows_here(raw_rows, teacher_dir, completion_file, tmp_path)
    with FakeServer(teacher_dir, "vllm") as server:
        capture(server.url, teacher_dir, completion_file, tmp_path / "there")
    same(raw_rows, expected)
    documents = [
        document
        for row in raw_rows
        for document, mask in zip(
            np.split(row.input_ids, np.cumsum(row.segment_lengths)[:-1]),
            np.split(row.loss_mask, np.cumsum(row.segment_lengths)[:-1]),
            strict=True,
        )
        for document in [tuple(document[: np.flatnonzero(mask)[-1] + 2].tolist())]
    ]
    assert set(documents) <= set(server.answered) and len(server.answered) <= len(documents) + 1  # and the probe


@pytest.mark.long
def test_the_key_is_sent_and_nowhere_written(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-1234")
    config = ServerConfig(api_key_env="MY_KEY", model=MODEL)
    with FakeServer(teacher_dir, "vllm", api_key="sk-secret-1234") as server:
        capture(server.url, teacher_dir, text_file, tmp_path / "cache", server=config)
        monkeypatch.setenv("MY_KEY", "sk-wrong-5678")
        with pytest.raises(ModelError, match="status 401: Incorrect API key provided: ….*MY_KEY") as error:
            capture(server.url, teacher_dir, text_file, tmp_path / "other", server=config)
    assert "5678" not in str(error.value)
    for path in (tmp_path / "cache").rglob("*"):
        assert not path.is_file() or b"sk-secret" not in path.read_bytes()
    saved = json.loads((tmp_path / "cache/distill_config.json").read_text())["config"]
    assert saved["teacher"] == server.url and saved["server_api_key_env"] == "MY_KEY" and saved["model"] == MODEL


@pytest.mark.long
def test_an_interrupted_run_is_continued_on_a_server_that_started_again_elsewhere(
    teacher_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    def interrupt(progress: Any) -> None:
        if progress.rows >= 9:
            raise KeyboardInterrupt

    with FakeServer(teacher_dir, "vllm") as server, pytest.raises(KeyboardInterrupt):
        capture(server.url, teacher_dir, text_file, tmp_path / "cache", on_progress=interrupt)
    with FakeServer(teacher_dir, "vllm") as another:
        summary = capture(another.url, teacher_dir, text_file, tmp_path / "cache")
        capture(another.url, teacher_dir, text_file, tmp_path / "whole")
    assert summary.resumed_rows == 8 and summary.finished
    for one, other in zip(
        cf.open_cache(tmp_path / "cache").iter_rows(), cf.open_cache(tmp_path / "whole").iter_rows(), strict=True
    ):
        np.testing.assert_array_equal(one.targets.ids, other.targets.ids)


def check_with_faults(kind: str, faults: Faults, teacher: Path, data: Path, tmp_path: Path, raw_rows: Any) -> None:
    """Nothing is lost, nothing twice."""
    of_data = {"seq_len": 32, "packing": False, "max_documents": None}
    expected = rows_here(raw_rows, teacher, data, tmp_path, of_data=of_data)
    with FakeServer(teacher, kind, faults=faults) as server:
        capture(server.url, teacher, data, tmp_path / "there", of_data=of_data)
    same(raw_rows, expected)
    assert sum(server.answered.values()) == len(expected) + 2  # the probe is sent twice


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_fail_are_sent_again(
    kind: str, teacher_dir: Path, text_file: Path, tmp_path: Path, raw_rows: list[cf.CacheRow]
) -> None:
    faults = Faults(0.3)
    check_with_faults(kind, faults, teacher_dir, text_file, tmp_path, raw_rows)
    assert faults.seen.keys() == FAULTS.keys() - {"slow"}


@pytest.mark.long
def test_an_answer_that_does_not_come_in_time_is_asked_for_again(
    teacher_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    faults, of_data = Faults(0.3, kinds=("slow",), seed=1), {"max_documents": 6}
    with FakeServer(teacher_dir, "vllm", faults=faults) as server:
        config = ServerConfig(timeout=SLOW_S / 2)
        capture(server.url, teacher_dir, text_file, tmp_path / "cache", server=config, of_data=of_data)
    assert faults.seen["slow"] > 0


@pytest.mark.servers
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_requests_with_faults(
    kind: str, teacher_dir: Path, tmp_path: Path, raw_rows: list[cf.CacheRow]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(english(2500).replace("\n", " ").split(". ")))
    faults = Faults(0.05)
    check_with_faults(kind, faults, teacher_dir, text, tmp_path, raw_rows)
    assert len(raw_rows) > 2000 and faults.seen.total() > 100


def test_a_server_that_never_gives_a_usable_answer_ends_the_run(
    teacher_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    def spoil(answer: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        if server.answered.total() >= 2:  # not the probes
            answer["choices"][0]["prompt_logprobs"].pop()
        return answer

    with FakeServer(teacher_dir, "vllm", change=spoil) as server:
        with pytest.raises(ModelError, match=r"row 0: .* found \d+ prompt_logprobs, expected \d+, in 8 answers"):
            capture(server.url, teacher_dir, text_file, tmp_path / "cache", of_data={"seq_len": 24})


def test_a_server_that_stays_down_is_reported_once_and_ends_the_run(
    teacher_dir: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(http_client, "REPORTED_AFTER_S", 0.05)
    with FakeServer(teacher_dir, "vllm") as server:
        url = server.url
    with pytest.raises(ModelError, match="no answer: .*`server_patience` 0.2.*run the same command again"):
        capture(url, teacher_dir, text_file, tmp_path / "cache", server=ServerConfig(patience=0.2))
    (report,) = caplog.messages
    assert report.startswith(f"{url}/models: no answer: ") and "for up to 0.2 seconds" in report
