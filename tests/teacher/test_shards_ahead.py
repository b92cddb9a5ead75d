"""The next shard is computed while the last one is written; whatever fails on the way, the bytes are the same."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_capture import contents, shards

import cache_format as cf
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.engines.interface import BatchSizeHalved, RowRequest
from pipeline.teacher.engines.transformers_engine import RunningBatches, TransformersEngine
from pipeline.teacher.progress import CaptureProgress
from pipeline.teacher.writing.worker_config import WorkerConfig
from runs import settings

SHARED = WorkerConfig(num_workers=1, worker_index=0)
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, text_file: Path) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("caches") / "whole"
    cache_teacher(settings(teacher_dir, text_file, path))
    return shards(path)


class Engine:
    """Watches the shards of eight rows that the engine computes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.runs: list[int] = []  # shard of each call
        self.reached = threading.Condition()
        run = TransformersEngine.run

        def watched(engine: Any, requests: Sequence[RowRequest], *more: Any) -> RunningBatches:
            with self.reached:
                self.runs.append(requests[0].index // 8)
                self.reached.notify_all()
            self.before(engine)
            return run(engine, requests, *more)

        patch.setattr(TransformersEngine, "run", watched)

    def before(self, engine: Any) -> None:
        """Replaced by what goes wrong."""

    def wait_for(self, shard: int) -> bool:
        with self.reached:
            return self.reached.wait_for(lambda: shard in self.runs, timeout=PATIENCE_S)


def before_writing(patch: pytest.MonkeyPatch, shard: int, act: Any) -> None:
    """Calls `act` once in the background thread, before the rows of a shard are written."""
    write, done = cf.CacheWriter.write, []

    def watched(writer: cf.CacheWriter, rows: Sequence[cf.CacheRow]) -> None:
        if rows[0].row == 8 * shard and not done:
            done.append(True)
            act(writer)
        write(writer, rows)

    patch.setattr(cf.CacheWriter, "write", watched)


@pytest.mark.parametrize("workers", [WorkerConfig(), SHARED], ids=["alone", "shared"])
def test_the_next_shard_begins_before_the_last_one_is_written(
    workers: WorkerConfig,
    teacher_dir: Path,
    text_file: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, seen = Engine(monkeypatch), list[CaptureProgress]()
    before_writing(monkeypatch, 1, lambda _: found.append(engine.wait_for(2)))
    found: list[bool] = []
    config = settings(teacher_dir, text_file, tmp_path / "cache", workers=workers)
    summary = cache_teacher(config, on_progress=seen.append)
    assert found == [True]
    assert shards(tmp_path / "cache") == expected
    assert engine.runs == sorted(set(engine.runs))
    assert [each.rows for each in seen] == sorted(each.rows for each in seen) and seen[-1].rows == summary.rows
    tails = [row.targets.residual_logprob[row.loss_mask] for row in cf.open_cache(tmp_path / "cache").iter_rows()]
    assert summary.exact_mass == pytest.approx(1 - np.exp(np.concatenate(tails)).mean(), abs=1e-3)


def test_out_of_memory_in_the_next_shard_leaves_the_last_one_whole(
    teacher_dir: Path, text_file: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch size recorded for a shard is the one that it was computed with, not the one of its successor."""
    engine = Engine(monkeypatch)
    halved: list[bool] = []

    def before(engine_: Any) -> None:
        if engine.runs[-1] == 2 and not halved:
            halved.append(True)
            engine_.batch_size //= 2
            raise BatchSizeHalved

    engine.before = before  # type: ignore[method-assign]
    before_writing(monkeypatch, 1, lambda _: engine.wait_for(2))
    cache_teacher(settings(teacher_dir, text_file, tmp_path / "cache"))
    assert engine.runs[:4] == [0, 1, 2, 2]
    found = shards(tmp_path / "cache")
    sizes = [json.loads(found[f"shards/shard-0000{i}.json"])["annotations"]["batch_size"] for i in range(3)]
    assert sizes == [4, 4, 2]
    before_it = sorted(expected)[:4]
    assert [found[name] for name in before_it] == [expected[name] for name in before_it]


def test_a_shard_that_cannot_be_written_ends_the_run_and_the_shards_behind_it(
    teacher_dir: Path, text_file: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: cf.CacheWriter) -> None:
        raise OSError(28, "No space left on device")

    config = settings(teacher_dir, text_file, tmp_path / "cache")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        engine = Engine(patch)
        before_writing(patch, 1, lambda writer: engine.wait_for(3) and full(writer))
        cache_teacher(config)
    left = contents(tmp_path / "cache")
    assert [name for name in left if name.endswith(".arrow")] == ["shards/shard-00000.arrow"]
    assert not [name for name in left if name.startswith("claims/") or name.endswith(".tmp")]
    cache_teacher(config)
    assert shards(tmp_path / "cache") == expected


def test_a_failing_teacher_lets_the_shard_before_be_written(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(monkeypatch)

    def before(_: Any) -> None:
        if engine.runs[-1] == 2:
            raise RuntimeError("device-side assert")

    engine.before = before  # type: ignore[method-assign]
    before_writing(monkeypatch, 1, lambda _: engine.wait_for(2))
    with pytest.raises(RuntimeError, match="device-side"):
        cache_teacher(settings(teacher_dir, text_file, tmp_path / "cache"))
    arrows = [name for name in contents(tmp_path / "cache") if name.endswith(".arrow")]
    assert arrows == ["shards/shard-00000.arrow", "shards/shard-00001.arrow"]


def test_a_lost_claim_gives_up_one_shard_and_computes_the_others_again(
    teacher_dir: Path, text_file: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if this process had been suspended while shard 1 was being written: another one has written it."""
    engine, path = Engine(monkeypatch), tmp_path / "cache"

    def overtaken(writer: cf.CacheWriter) -> None:
        assert engine.wait_for(2)
        for name in ("arrow", "json"):
            (path / f"shards/shard-00001.{name}").write_bytes(expected[f"shards/shard-00001.{name}"])
        (claim,) = (path / "claims").glob("shard-00001.*")
        claim.unlink()

    before_writing(monkeypatch, 1, overtaken)
    cache_teacher(settings(teacher_dir, text_file, path, workers=SHARED))
    assert shards(path) == expected
    assert engine.runs.count(1) == 1 and engine.runs.count(2) == 2
