"""How many rows are compressed together, and make a shard: by tokens, and by the bytes of states."""

from __future__ import annotations

from dataclasses import replace

import pytest

import cache_format as cf
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.targets.hidden_states import RECORD_BATCH_BYTES, SHARD_BYTES
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.writing.shard_sizes import grouping


def config(window: int, **options: int) -> CacheTeacherConfig:
    data = DataConfig(data="d", seq_len=window)
    return replace(CacheTeacherConfig(teacher="t", data=data, output="o"), **options)


@pytest.mark.parametrize("window, rows", [(2, 16384), (48, 682), (256, 128), (512, 64), (1024, 32), (4096, 8)])
def test_a_record_batch_has_as_many_tokens_whatever_the_rows(window: int, rows: int) -> None:
    found = grouping(config(window), None, window)
    assert found["rows_per_record_batch"] == rows and 2**15 - window < rows * window <= 2**15
    assert found["rows_per_shard"] % rows == 0 and 2**18 - window < found["rows_per_shard"] * window < 2**18 + 2**15


def test_a_forward_pass_is_never_cut() -> None:
    assert grouping(config(16384, batch_size=8), None, 16384) == {"rows_per_record_batch": 8, "rows_per_shard": 16}
    assert grouping(config(1024, batch_size=100), None, 1024)["rows_per_record_batch"] == 100


def test_rows_of_a_shard_stay_as_asked() -> None:
    assert grouping(config(256, rows_per_shard=5), None, 256) == {"rows_per_record_batch": 128, "rows_per_shard": 5}


@pytest.mark.parametrize("window", [64, 256, 1024])
def test_states_are_fewer_rows_whose_bytes_a_reader_can_hold(window: int) -> None:
    spec = cf.HiddenSpec(layers=(30,), teacher_layers=30, width=4096, dtype="float16", every=1)
    per_row = spec.bytes_per_position * window
    found = grouping(config(window, batch_size=1), spec, window)
    assert RECORD_BATCH_BYTES - per_row < found["rows_per_record_batch"] * per_row <= RECORD_BATCH_BYTES
    assert found["rows_per_shard"] * per_row <= SHARD_BYTES + RECORD_BATCH_BYTES
    assert grouping(config(window, batch_size=8), spec, window)["rows_per_record_batch"] >= 8
