"""Errors about imported and converted caches propose the command that wrote them, and only options that it has."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cache_format as cf
from foreign_files import NESTED, import_rows, made_up_rows, nested, write_parquet
from made_up import made_up

OPTIONS = {**NESTED, "rows_per_shard": 2}
PACKED = cf.Conversion(encoding="columns", compression_level=3, rows_per_shard=2, rows_per_record_batch=2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "rows.parquet", nested(made_up_rows(6), 6))


Begin = Callable[[Path], None]


@pytest.fixture(params=["import", "convert"])
def writing(request: pytest.FixtureRequest, tmp_path: Path, source: Path, tokenizer: Any) -> tuple[str, Begin]:
    """Name of a command, and a function that runs it."""
    if request.param == "import":
        return "import", lambda output: import_rows(source, output, tokenizer, **OPTIONS) and None
    own = made_up(tmp_path / "own", rows=6)
    return "convert", lambda output: [*cf.convert_cache(own.path, output, PACKED)] and None


def stop_after_a_shard(begin: Begin, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = cf.CacheWriter.write

    def stopping(writer: cf.CacheWriter, rows: list[cf.CacheRow]) -> None:
        if rows[0].row >= 2:
            raise KeyboardInterrupt
        write(writer, rows)

    with monkeypatch.context() as patched:
        patched.setattr(cf.CacheWriter, "write", stopping)
        with pytest.raises(KeyboardInterrupt):
            begin(output)


def test_unfinished(writing: tuple[str, Begin], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command, begin = writing
    stop_after_a_shard(begin, tmp_path / "cache", monkeypatch)
    with pytest.raises(cf.FormatError, match=rf"\d complete shards.* Run distill {command} again to continue it"):
        cf.open_cache(tmp_path / "cache")
    with pytest.raises(cf.CacheError, match=f"missing shard.* Run {command} again"):
        cf.finish_cache(tmp_path / "cache")
    begin(tmp_path / "cache")
    cf.verify_cache(tmp_path / "cache", deep=True)


@pytest.mark.parametrize("harm", ["flip", "cut", "unlink"])
def test_damaged(harm: str, writing: tuple[str, Begin], tmp_path: Path):
    """The advice is true: the shard is written again."""
    command, begin = writing
    begin(tmp_path / "cache")
    shard = tmp_path / "cache/shards/shard-00001.arrow"
    data = bytearray(shard.read_bytes())
    whole = bytes(data)
    data[len(data) // 2] ^= 1
    shard.unlink()
    if harm != "unlink":
        shard.write_bytes(data if harm == "flip" else data[:-1])
    with pytest.raises(cf.CorruptShardError, match=rf"Delete shards/shard-00001.arrow and run {command} again"):
        cf.verify_cache(tmp_path / "cache")
    shard.unlink(missing_ok=True)
    begin(tmp_path / "cache")
    assert shard.read_bytes() == whole


def test_a_finished_conversion_with_other_settings(tmp_path: Path):
    own = made_up(tmp_path / "own", rows=6)
    list(cf.convert_cache(own.path, tmp_path / "cache", PACKED))
    with pytest.raises(cf.MismatchError) as caught:
        list(cf.convert_cache(own.path, tmp_path / "cache", cf.Conversion(top_k=1)))
    assert str(caught.value).endswith("Choose another directory.")


def test_imports_with_other_settings(tmp_path: Path, source: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    def begin(output: Path) -> None:
        import_rows(source, output, tokenizer, **OPTIONS)

    stop_after_a_shard(begin, tmp_path / "begun", monkeypatch)
    begin(tmp_path / "finished")
    with pytest.raises(cf.MismatchError, match=r"Choose another directory, or replace it with `overwrite=True`\.$"):
        import_rows(source, tmp_path / "finished", tokenizer, **OPTIONS, top_k=2)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == "numpy" else real(name))
    with pytest.raises(cf.MismatchError, match=r"numpy .*throughout\. Use the same, or choose another directory\.$"):
        begin(tmp_path / "begun")
    begin(tmp_path / "finished")
