"""Killed, interrupted, started twice, started by torchrun: stage one ends with the bytes of an undisturbed run.

`make torture` does more of it; what the claims and the disk promise is in tests/cache_format.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cache_format as cf
from cache_samples import contents
from pipeline.errors import ConfigError
from pipeline.teacher import capture
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.progress import CaptureProgress
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.writing import shard_sizes as grouping
from pipeline.teacher.writing.worker_config import WorkerConfig
from pipeline.teacher.writing.workers import this_worker
from runs import command as run
from runs import settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def words_of(config: CacheTeacherConfig) -> list[str]:
    """The same on the command line."""
    words = ["cache-teacher", "--teacher", config.teacher, "--data", config.data.data, "--output", config.output]
    words += ["--sample-by", "line", "--seq-len", "48", "--top-k", "8", "--batch-size", "4", "--device", "cpu"]
    return [*words, "--rows-per-shard", "8", "--encoding", config.encoding]


@pytest.fixture(scope="module", params=["columns", "packed"])
def whole(request, teacher_dir: Path, text_file: Path, tmp_path_factory) -> tuple[str, dict[str, bytes]]:
    path = tmp_path_factory.mktemp("whole") / "cache"
    cache_teacher(settings(teacher_dir, text_file, path, encoding=request.param))
    return request.param, contents(path)


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform != "linux", reason="needs fork and prctl")
def test_killed_at_random_moments_with_one_and_two_processes():
    command = [
        sys.executable,
        str(ROOT / "tests/helpers/kills/torture.py"),
        "--kills",
        "8",
        "--no-aimed",
        "--no-disk",
        "--json",
    ]
    command += ["--processes", "1", "--processes", "2", "--seed", str(time.time_ns() % 1000)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)["runs"]
    assert [(r["processes"], r["encoding"]) for r in runs] == [(n, e) for n in (1, 2) for e in ("columns", "packed")]
    assert [len(r["kills"]) for r in runs] == [2, 2, 2, 2] and not any(r["faults"] for r in runs)


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


def test_second_interrupt_during_the_first_one_harms_nothing(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It comes while the first of a shard's record batches is being written, and does not wait for that."""
    monkeypatch.setattr(grouping, "rows_together", lambda config: 32)
    config = replace(settings(teacher_dir, text_file, tmp_path / "cache"), rows_per_shard=64)
    cache_teacher(replace(config, output=str(tmp_path / "whole")))
    expected = contents(tmp_path / "whole")
    shutdown, write = ThreadPoolExecutor.shutdown, cf.CacheWriter.write
    writing = threading.Event()

    def slowly(writer: cf.CacheWriter, rows: list[cf.CacheRow]) -> None:
        writing.set()
        time.sleep(0.3)
        write(writer, rows)

    def again(pool: ThreadPoolExecutor, *args: object, **options: object) -> None:
        shutdown(pool, wait=False)
        raise KeyboardInterrupt  # did not wait for the thread

    def press(progress: CaptureProgress) -> None:
        if writing.is_set():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ThreadPoolExecutor, "shutdown", again)
        patch.setattr(cf.CacheWriter, "write", slowly)
        cache_teacher(config, on_progress=press)
    time.sleep(0.8)  # whatever the thread still does
    left = contents(tmp_path / "cache")
    assert not [name for name in left if name.startswith(("claims/", "shards/"))]
    cache_teacher(config)
    assert contents(tmp_path / "cache") == expected


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signals_one_after_the_other(teacher_dir: Path, text_file: Path, tmp_path: Path, second: int, monkeypatch):
    """As torchrun and impatient people send them."""
    config = settings(teacher_dir, text_file, tmp_path / "cache")
    report, abandon = capture.Capture._report, cf.CacheWriter.abandon_shard

    def first_signal(self: capture.Capture, *reported: Any) -> None:
        report(self, *reported)
        if self.rows_done > 40:  # the first shard of eight rows is complete
            os.kill(os.getpid(), signal.SIGTERM)

    def second_signal(self: cf.CacheWriter) -> None:
        os.kill(os.getpid(), second)
        abandon(self)

    with monkeypatch.context() as patch:
        patch.setattr(capture.Capture, "_report", first_signal)
        patch.setattr(cf.CacheWriter, "abandon_shard", second_signal)
        result = run(*words_of(config), status=130)
    assert result.stderr.splitlines()[-1].endswith("Run the same command again to continue.")
    assert not (tmp_path / "cache/claims").exists()
    result = run(*words_of(config), "--json")
    assert json.loads(result.stdout)["resumed_rows"] >= 8
    assert cf.verify_cache(tmp_path / "cache").rows == json.loads(result.stdout)["rows"]


# -- run again ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_same_command_on_a_finished_cache_succeeds_and_changes_nothing(
    whole, teacher_dir: Path, text_file: Path, tmp_path: Path
):
    encoding, expected = whole
    config = settings(teacher_dir, text_file, tmp_path / "cache", encoding=encoding)
    cache_teacher(config)
    summary = cache_teacher(config)
    assert summary.resumed_rows == summary.rows and summary.finished
    assert contents(tmp_path / "cache") == expected
    with pytest.raises(cf.CacheError, match=r"finished cache .* other settings \(targets.k recorded 8, given 9"):
        cache_teacher(replace(config, targets=TargetRule(top_k=9)))
    with pytest.raises(cf.MismatchError, match=r"capture.batch_size recorded 4, given 2 \(only rounding"):
        cache_teacher(replace(config, batch_size=2))
    assert contents(tmp_path / "cache") == expected


def interrupted(config: CacheTeacherConfig) -> dict[str, bytes]:
    """Ended behind its first batch; what it leaves."""

    def interrupt(progress: CaptureProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_teacher(config, on_progress=interrupt)
    return contents(Path(config.output))


@pytest.mark.long
@pytest.mark.parametrize("finished", [False, True])
def test_a_cache_goes_on_with_the_rows_together_that_it_was_begun_with(
    finished: bool, teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By a release that put other numbers of rows together: they are no setting that anybody could give again."""
    config = replace(settings(teacher_dir, text_file, tmp_path / "cache"), rows_per_shard=None)
    with monkeypatch.context() as patch:
        patch.setattr(grouping, "RECORD_BATCH_TOKENS", 3 * config.data.seq_len)
        patch.setattr(grouping, "SHARD_TOKENS", 12 * config.data.seq_len)
        cache_teacher(replace(config, output=str(tmp_path / "whole")))
        cache_teacher(config) if finished else interrupted(config)
    summary = cache_teacher(config)
    assert summary.finished and contents(tmp_path / "cache") == contents(tmp_path / "whole")
    metadata = cf.open_cache(config.output).metadata
    assert (metadata.rows_per_record_batch, metadata.rows_per_shard) == (4, 12) and metadata.num_shards > 2
    with pytest.raises(cf.MismatchError, match="rows_per_shard recorded 12, given 8"):
        cache_teacher(replace(config, rows_per_shard=8))
    cache_teacher(replace(config, overwrite=True))
    assert cf.open_cache(config.output).metadata.num_shards == 1


def test_every_setting_that_changes_bytes_is_named(teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch):
    config = settings(teacher_dir, text_file, tmp_path / "cache")
    before = interrupted(config)
    other_text = tmp_path / "other.txt"
    other_text.write_text(text_file.read_text() + "One line more.\n")
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    other = replace(config, batch_size=64, dtype="bfloat16", data=replace(config.data, data=str(other_text)))
    with pytest.raises(cf.MismatchError) as caught:
        cache_teacher(replace(other, rows_per_shard=64))
    message = str(caught.value)
    for key in (
        *("capture.batch_size recorded 4, given 64", "capture.threads recorded 1, given 64"),
        'teacher.dtype recorded "float32", given "bfloat16"',
        *("rows_per_shard recorded 8, given 64", "teacher.weights_fingerprint", "corpus.token_stream_sha256"),
    ):
        assert key in message, key
    with pytest.raises(cf.MismatchError, match="allow it with `allow_rounding=True`"):
        cache_teacher(replace(config, batch_size=2))
    assert contents(tmp_path / "cache") == before
    summary = cache_teacher(replace(config, batch_size=2, workers=WorkerConfig(allow_rounding=True)))
    made = {"capture.batch_size": 2, "capture.threads": 64}
    notes = [json.loads(p.read_text())["annotations"] for p in sorted((tmp_path / "cache/shards").glob("*.json"))]
    assert notes[-1] == {"batch_size": 2, "made_with": made} and summary.finished
    assert cf.open_cache(tmp_path / "cache").metadata.capture["batch_size"] == 4


def test_second_run_is_refused_before_it_loads_anything(teacher_dir: Path, text_file: Path, tmp_path: Path):
    config = settings(teacher_dir, text_file, tmp_path / "cache")
    said: list[str] = []

    def second(progress: CaptureProgress) -> None:
        if said:
            return
        before = contents(tmp_path / "cache")
        for words in (words_of(config), [*words_of(config), "--overwrite"], ["merge", config.output]):
            said.append(run(*words, status=1).stderr)
        said.append(run(*words_of(config), "--num-workers", 2, "--worker-index", 0, status=1).stderr)
        assert contents(tmp_path / "cache") == before

    cache_teacher(config, on_progress=second)
    for line in said:
        assert f"process {os.getpid()} on " in line and "writes this cache" in line and line.count("\n") == 1
    assert cf.verify_cache(tmp_path / "cache").rows > 0


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_shard_ranges_of_two_machines_are_merged(whole, teacher_dir: Path, text_file: Path, tmp_path: Path):
    encoding, expected = whole
    config = settings(teacher_dir, text_file, tmp_path / "cache", encoding=encoding)
    first = run(*words_of(config), "--shard-range", ":2")
    assert "is not complete yet" in first.stdout and "distill merge" in first.stdout
    failed = run("merge", config.output, status=1)
    assert "missing shards (2, 3" in failed.stderr and "Run cache-teacher again" in failed.stderr
    second = json.loads(run(*words_of(config), "--shard-range", "2:", "--json").stdout)
    assert second["finished"] and second["resumed_rows"] == 16 and second["exact_mass"] is None
    assert contents(tmp_path / "cache") == expected
    assert "finished" in run("merge", config.output).stdout
    assert json.loads(run("merge", config.output, "--json").stdout)["rows"] == second["rows"]
    assert contents(tmp_path / "cache") == expected


def test_worker_that_comes_late_has_nothing_to_do(whole, teacher_dir: Path, text_file: Path, tmp_path: Path):
    encoding, expected = whole
    config = settings(teacher_dir, text_file, tmp_path / "cache", encoding=encoding)
    for index in (1, 0):  # the first does the whole work, since nobody else is there
        result = run(*words_of(config), "--num-workers", 2, "--worker-index", index, "--json")
        assert json.loads(result.stdout)["finished"]
        assert contents(tmp_path / "cache") == expected
    assert json.loads(result.stdout)["resumed_rows"] == json.loads(result.stdout)["rows"]


def test_only_the_first_process_prints_and_any_says_what_failed(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = settings(teacher_dir, text_file, tmp_path / "cache")
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    result = run(*words_of(config))
    assert result.stdout == "" and result.stderr == ""
    failed = run(*words_of(replace(config, teacher="nowhere/at/all")), status=1)
    assert failed.stderr.startswith("Error: process 1: ") and failed.stderr.count("\n") == 1
    failed = run(*words_of(config), "--overwrite", status=1)
    assert "each of several processes would delete" in failed.stderr
    assert cf.verify_cache(tmp_path / "cache").rows > 0


@pytest.mark.parametrize(
    "environment, options, expected",
    [
        ({}, {}, None),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, {}, None),
        ({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, {}, cf.Share(index=5, count=8)),
        ({}, {"num_workers": 3, "worker_index": 2}, cf.Share(index=2, count=3)),
        ({}, {"shard_range": "4:6"}, cf.Share(first=4, stop=6)),
        (
            {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},  # two nodes, which torchrun does not know of
            {"num_workers": 2, "worker_index": 1, "shard_range": "10:"},
            cf.Share(index=3, count=4, first=10),
        ),
    ],
)
def test_who_this_process_is(environment, options, expected, monkeypatch: pytest.MonkeyPatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    worker = this_worker(WorkerConfig(**options))
    assert worker.share == expected and worker.alone == (expected is None)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_workers": 2, "worker_index": 2}, "writer 2 of 2"),
        ({"shard_range": "5"}, "'5' is not a range of shards"),
        ({"shard_range": "5:5"}, "shards 5 to 5: none"),
    ],
)
def test_workers_that_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        this_worker(WorkerConfig(**options))


# Rank 1 dies after its first shard, in its first life.
WORKER = """
import os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import cache_format as cf
after_shard = cf.SharedCacheWriter._after_shard

def die(writer, shard):
    after_shard(writer, shard)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if os.environ["RANK"] == "1":
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while not Path("died").exists():  # leaves a shard to the other process, however late it starts
            time.sleep(0.01)

cf.SharedCacheWriter._after_shard = die
from cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_torchrun_that_loses_a_process_starts_again_and_finishes(teacher_dir: Path, text_file: Path, tmp_path: Path):
    cache_teacher(settings(teacher_dir, text_file, tmp_path / "whole"))
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["--max-restarts", "1", str(tmp_path / "worker.py")]
    command += words_of(settings(teacher_dir, text_file, tmp_path / "cache"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert "Cached " in done.stdout  # twice, if the survivor finished before torchrun noticed the death
    assert "Signal 9 (SIGKILL)" in done.stderr or "exitcode: -9" in done.stderr
