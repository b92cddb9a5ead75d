"""The Triton kernels compiled for real GPUs, in a process without the interpreter; and rows that a GPU reads well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.simulated_gpu import simulated_gpu
from pipeline.models.devices.buffers import empty_rows


@pytest.mark.long
def test_kernels_compile_into_wide_accesses_without_spilling(tmp_path: Path) -> None:
    """For an H100, also with a vocabulary of 50,257; `make bench` compiles for other generations too."""
    pytest.importorskip("triton", reason="needs Triton, which torch's builds for CUDA bring")
    command = [sys.executable, "-m", "benchmarks", "compiled_kernels", "--quick", "--results", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    (rows,) = json.loads((tmp_path / "compiled_kernels.json").read_text())["tables"].values()
    assert len(rows) == 6
    for row in rows:
        assert row["bytes per access"] == 16, row
        assert row["spilled, bytes"] <= 16, row  # two registers: nothing next to a tile
        assert row["KB in flight/SM"] >= 16, row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 64, 50_257])
def test_rows_are_aligned_on_a_gpu_and_compact_on_a_cpu(width: int, dtype: torch.dtype) -> None:
    with simulated_gpu(shapes_only=True):
        there = empty_rows(3, width, dtype, torch.device("cuda"))
        assert there.shape == (3, width) and there.dtype == dtype
        assert there.stride(1) == 1 and there.stride(0) * dtype.itemsize % 128 == 0
    assert empty_rows(3, width, dtype, torch.device("cpu")).is_contiguous()
