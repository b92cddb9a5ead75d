"""The benchmark of a GPU, tiny and on a CPU: all its parts run, and what they are compared with is the same work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import cache_format as cf
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import stages
from benchmarks.gpu.bench import BF16, QUICK, RATE, Bench
from benchmarks.shapes import TINY, mean_length
from pipeline.models.padding import pad_rows


def run(results: Path, *parts: str) -> tuple[Any, dict[str, Any]]:
    done = CliRunner().invoke(gpu.main, ["--quick", "--results", str(results), *parts])
    return done, json.loads((results / "gpu.json").read_text(encoding="utf-8"))


def test_a_part_that_fails_is_recorded_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(bench: Bench) -> None:
        raise ValueError("CUDA error: no kernel image\nis available")

    monkeypatch.setitem(gpu.PARTS, "selection", fails)
    done, found = run(tmp_path, "selection", "head")
    assert done.exit_code == 1 and done.output.endswith("Error: failed: selection\n")
    assert list(found["tables"]) == ["Card", "Head and loss alone, forward and backward, N = 128", "Failed parts"]
    assert found["tables"]["Failed parts"] == [
        {"part": "selection", "error": "ValueError: CUDA error: no kernel image is available"}
    ]


@pytest.mark.long
def test_every_part_runs(tmp_path: Path) -> None:
    done, found = run(tmp_path)
    assert done.exit_code == 0
    titles = [title.split(",")[0] for title in found["tables"]]
    assert titles == [
        "Card", "Capture", "Selection of one chunk", "Training", "Head and loss alone", "Loader"
    ]  # fmt: skip


def test_attention_is_counted_token_by_token() -> None:
    lengths = [5, 64, 1, 30]
    pairs = sum(np.tril(np.ones((n, n))).sum() - n / 2 for n in lengths)  # T²/2: half of the diagonal
    attention = sum(lengths) * (TINY.forward_flops(mean_length(lengths)) - TINY.forward_flops(0.0))
    assert attention == pytest.approx(4 * TINY.layers * TINY.width * pairs)


def test_the_bare_model_runs_the_rows_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(device=torch.device("cpu"), sizes=QUICK, scratch=tmp_path, flops=1e12)
    cache = cf.open_cache(stages._cache_for(bench, TINY, 256))
    rows = stages._rows_of(tmp_path / "cache-tiny")
    assert sum(len(row.input_ids) for row in rows) == cache.num_tokens
    assert any(len(row.segment_lengths) > 1 for row in rows)
    seen: list[object] = []
    monkeypatch.setattr(stages, "pad_rows", lambda rows: seen.extend(rows) or pad_rows(rows))
    assert stages._bare(bench, TINY.model(bench.device, BF16, 257), TINY, rows, 256, 4) > 0
    assert seen == rows


def test_each_way_of_training_is_charged_with_its_own_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(device=torch.device("cpu"), sizes=QUICK, scratch=tmp_path, flops=1e12)
    for name in ("_plain", "_distilled"):
        monkeypatch.setattr(stages, name, lambda *_: 1000.0)
    (table,) = stages.training(bench)
    shares = {row[1]: row[table.columns.index(RATE)] for row in table.rows}
    segments = [int(each) for row in stages._rows_of(tmp_path / "cache-tiny") for each in row.segment_lengths]
    assert shares == {
        "cross-entropy, plain loop": pytest.approx(1e-9 * TINY.training_flops(64)),
        "distill": pytest.approx(1e-9 * TINY.training_flops(mean_length(segments))),
    }
