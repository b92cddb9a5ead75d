"""A batch that does not fit is halved, and the cache is the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_capture import check_cache, contents, settings, shards
from torch import Tensor

import cache_format as cf
from pipeline.models.head import Head
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.progress import CaptureProgress
from pipeline.teacher.writing import shard_sizes as grouping


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, text_file: Path) -> Path:
    path = tmp_path_factory.mktemp("caches") / "packed"
    cache_teacher(settings(teacher_dir, text_file, path))
    return path


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, *, above: int, after_calls: int = 0) -> list[int]:
    """Batches of more than so many rows fail like CUDA does, from some call on. Returns the batch sizes tried."""
    states = Head.hidden_states
    tried: list[int] = []

    def limited(head: Head, input_ids: Tensor, position_ids: Tensor, **_: object) -> Tensor:
        if input_ids.shape[1] > 12:  # not the probes at the start
            tried.append(len(input_ids))
            if len(input_ids) > above and len(tried) > after_calls:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.")
        return states(head, input_ids, position_ids)

    monkeypatch.setattr(Head, "hidden_states", limited)
    return tried


def batch_sizes(path: Path) -> list[int]:
    return [json.loads(p.read_text())["annotations"]["batch_size"] for p in sorted(path.glob("shards/*.json"))]


def test_the_batch_is_halved_until_it_fits(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_teacher(settings(teacher_dir, text_file, tmp_path / "two", batch_size=2))
    tried = run_out_of_memory(monkeypatch, above=2)
    seen: list[CaptureProgress] = []
    summary = cache_teacher(settings(teacher_dir, text_file, tmp_path / "cache", batch_size=8), on_progress=seen.append)
    assert tried[:3] == [8, 4, 2] and set(tried[3:]) <= {1, 2}
    assert set(batch_sizes(tmp_path / "cache")) == {2} == {p.batch_size for p in seen}
    assert shards(tmp_path / "cache") == shards(tmp_path / "two")
    assert cf.open_cache(tmp_path / "cache").metadata.capture["batch_size"] == 8  # what was asked for
    assert summary.rows == seen[-1].rows == cf.open_cache(tmp_path / "cache").num_rows
    check_cache(tmp_path / "cache", teacher_dir)


def test_out_of_memory_later_keeps_the_complete_shards(
    packed: Path, teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out_of_memory(monkeypatch, above=4, after_calls=3)  # two batches of 8 make the first shard
    summary = cache_teacher(settings(teacher_dir, text_file, tmp_path / "cache"))
    sizes = batch_sizes(tmp_path / "cache")
    assert sizes[0] == 8 and set(sizes[1:]) == {4}
    first = "shards/shard-00000.arrow"
    assert contents(tmp_path / "cache")[first] == contents(packed)[first]
    check_cache(tmp_path / "cache", teacher_dir)
    residual = [row.targets.residual_logprob[row.loss_mask] for row in cf.open_cache(packed).iter_rows()]
    assert summary.exact_mass == pytest.approx(1 - np.exp(np.concatenate(residual)).mean(), abs=1e-3)


def test_out_of_memory_in_the_middle_of_a_shard_begins_it_anew(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record batch of 32 rows has gone to the writer when a batch of the next one fails."""
    monkeypatch.setattr(grouping, "rows_together", lambda config: 32)
    options = {"rows_per_shard": 40}
    cache_teacher(settings(teacher_dir, text_file, tmp_path / "four", batch_size=4, **options))
    run_out_of_memory(monkeypatch, above=4, after_calls=4)
    cache_teacher(settings(teacher_dir, text_file, tmp_path / "cache", batch_size=8, **options))
    assert shards(tmp_path / "cache") == shards(tmp_path / "four")


@pytest.mark.long
def test_a_single_row_that_does_not_fit_ends_the_run(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = run_out_of_memory(monkeypatch, above=0)
    with pytest.raises(torch.OutOfMemoryError):
        cache_teacher(settings(teacher_dir, text_file, tmp_path / "cache", batch_size=4))
    assert tried == [4, 2, 1]
    assert not (tmp_path / "cache" / "manifest.json").exists()
