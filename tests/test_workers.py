"""Several processes and machines before one output: who is refused, by which name things go, and who finishes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import cache_format as cf
from cache_format.claims import this_process
from cli import main


@pytest.fixture(autouse=True)
def _handler_of_the_test_runner() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(*words: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == status, (result.output, result.exc_info)
    return result


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def capture(teacher: object, text: object, output: object, *more: object) -> list[object]:
    words: list[Any] = ["cache-teacher", "--teacher", teacher, "--data", text, "--output", output, "--seq-len", 48]
    return [*words, "--sample-by", "line", "--rows-per-shard", 16, "--top-k", 8, "--device", "cpu", *more]


# -- claims of machines that are gone ---------------------------------------------------------------------------------


def test_writer_elsewhere_counts_as_gone_when_the_user_says_so(tmp_path: Path, teacher_dir: Path, text_file: Path):
    """A plain run, its --overwrite, and merge; silent for 74 seconds, which is less than the default."""
    words = capture(teacher_dir, text_file, tmp_path / "cache")

    def claimed() -> None:
        claim = tmp_path / "cache" / "claims" / "all.0.json"
        claim.parent.mkdir(parents=True, exist_ok=True)
        claim.write_text(json.dumps(asdict(replace(this_process(), host="other", machine="another boot", pid=1))))
        os.utime(claim, (time.time() - 74, time.time() - 74))

    claimed()
    line = run(*words, status=1).stderr.splitlines()[-1]
    assert "seconds ago" in line and "its claim ends 5 minutes after" in line
    assert "is gone; this run takes over" in run(*words, "--stale-after", 10).stderr
    assert "(--stale-after of cache-teacher and merge)" in line
    claimed()
    assert run(*words, "--overwrite", status=1).stderr.count("--stale-after") == 1
    run(*words, "--overwrite", "--stale-after", 10)
    manifest = tmp_path / "cache" / "manifest.json"
    manifest.rename(tmp_path / "cache" / "manifest.partial.json")
    claimed()
    assert "writes this cache" in run("merge", tmp_path / "cache", status=1).stderr
    run("merge", tmp_path / "cache", "--stale-after", 10)
    assert cf.verify_cache(tmp_path / "cache").rows > 0
