"""The Triton kernels compiled for NVIDIA GPUs on a machine that has none: that they compile, and into what.

Triton compiles for a GPU that it is told of, with the compiler inside its own package. The functions of
`pipeline.models.devices.triton_kernels` are called with tensors on the CPU, and each launch ends when its kernel is
compiled: so strides, alignment and constants are those of real calls. Registers, memory and the width of each access
are then read from the machine code.

An access of 16 bytes by each thread is the widest there is. Kernels treat whole tiles and the last
one of a row, which is masked, in different instructions; what is reported is the wider of the two.

    python -m benchmarks compiled_kernels
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.measure import Result, Settings, Table
from pipeline.models.devices.buffers import aligned_stride
from pipeline.models.devices.kernels import TILE

BLOCK = 32
GPUS = {"A100": 80, "L40S": 89, "H100, H200": 90, "B200": 100}  # compute capability, times ten
WARPS_PER_SM = {80: 64, 89: 48, 90: 64, 100: 64}
REGISTERS_PER_SM = 65_536
VOCABULARIES = (49_152, 50_257)  # a multiple of 16, and an odd number
DTYPES = (torch.float32, torch.bfloat16)
IN_FLIGHT_KB = 18
"""3.35e12 bytes/s · 0.7 µs / 132 multiprocessors: what an H100 must have asked for while it waits for memory."""


@dataclass(frozen=True)
class Compiled:
    """A kernel as it is in the machine code for one GPU.

    Attributes:
        spilled: bytes of local memory for each thread, which registers do not suffice for.
        access: bytes that one instruction loads for a thread from a whole tile, or stores to one if that is less.
    """

    name: str
    capability: int
    dtype: torch.dtype
    threads: int
    registers: int
    spilled: int
    access: int

    @property
    def warps(self) -> int:
        """That a multiprocessor can hold at a time."""
        each = self.threads // 32
        registers = -(-self.registers // 8) * 8 * self.threads
        return min(WARPS_PER_SM[self.capability] // each, REGISTERS_PER_SM // registers) * each

    @property
    def kb_in_flight(self) -> float:
        """Kilobytes of logits that the programs on one multiprocessor have asked for."""
        return self.warps * 32 / self.threads * TILE * self.dtype.itemsize / 1024


def run(settings: Settings) -> Result:
    rows = []
    gpus = {"H100, H200": 90} if settings.quick else GPUS
    for gpu, capability in gpus.items():
        for name, kernels in _by_name(capability).items():
            rows.append(
                [gpu, name, max(each.registers for each in kernels), max(each.spilled for each in kernels)]
                + [min(each.access for each in kernels), min(each.warps for each in kernels)]
                + [min(each.kb_in_flight for each in kernels)]
            )
    columns = ["GPU", "kernel", "registers", "spilled, bytes", "bytes per access", "warps/SM", "KB in flight/SM"]
    return Result(
        name="compiled_kernels",
        question="Do the Triton kernels compile for each generation of GPUs, and into what? Compiled, not run.",
        bound=f"16 bytes per access, nothing spilled; {IN_FLIGHT_KB} KB in flight on each multiprocessor of an H100.",
        settings={
            "V": " and ".join(map(str, VOCABULARIES)),
            "tile": TILE,
            "triton": importlib.metadata.version("triton"),
        },
        tables=[Table("Machine code: the worst of both V, float32 and bfloat16", columns, rows)],
        summary={
            "registers": max(row[2] for row in rows),
            "spilled_bytes": max(row[3] for row in rows),
            "bytes_per_access": min(row[4] for row in rows),
            "kb_in_flight": min(row[6] for row in rows),
        },
    )


def _by_name(capability: int) -> dict[str, list[Compiled]]:
    found: dict[str, list[Compiled]] = {}
    for vocab_size in VOCABULARIES:
        for dtype in DTYPES:
            for kernel in compiled(capability, vocab_size, dtype):
                found.setdefault(kernel.name, []).append(kernel)
    return found


def compiled(capability: int, vocab_size: int, dtype: torch.dtype) -> list[Compiled]:
    """What is launched for logits [n, V] of this dtype."""
    from pipeline.models.devices import triton_kernels as kernels

    logits, gradient = (_rows(vocab_size, each) for each in (dtype, torch.bfloat16))
    row = torch.ones(len(logits))
    launches: Mapping[str, Callable[[], object]] = {
        "sums, T = 1": lambda: kernels.sums(logits),
        "sums, T = 2": lambda: kernels.sums(logits, temperature=2.0),
        "sums and block maxima": lambda: kernels.sums(logits, temperature=2.0, block=BLOCK),
        "block sums": lambda: kernels.block_sums(logits, row, temperature=2.0, block=BLOCK),
        "gradient, T = 1": lambda: kernels.write_gradient(logits, row, row, None, 1.0, gradient),
        "gradient, T = 2": lambda: kernels.write_gradient(logits, row, row, row, 2.0, gradient),
    }
    found = []
    with compiling_for(capability) as kernels_compiled:
        for name, launch in launches.items():
            launch()
            found.append(_described(name, capability, dtype, kernels_compiled.pop()))
    return found


@contextmanager
def compiling_for(capability: int) -> Iterator[list[Any]]:
    """Inside the block, launching a kernel compiles it for this GPU, adds it to the list and does nothing else."""
    import triton
    from triton.backends.compiler import GPUTarget

    found: list[Any] = []
    launch = triton.JITFunction.run
    gpu = SimpleNamespace(
        get_current_device=lambda: capability,  # compiled kernels are kept by device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(launch(self, *args, grid=grid, warmup=True, **options))

    driver = SimpleNamespace(active=gpu)
    with mock.patch("triton.runtime.jit.driver", driver), mock.patch.object(triton.JITFunction, "run", compile_only):
        yield found


def _described(name: str, capability: int, dtype: torch.dtype, kernel: Any) -> Compiled:
    usage = _resource_usage(kernel.asm["cubin"])
    return Compiled(
        name=name,
        capability=capability,
        dtype=dtype,
        threads=kernel.metadata.num_warps * 32,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        access=_access(kernel.asm["ptx"], stores=name.startswith("gradient")),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}


def _access(ptx: str, *, stores: bool) -> int:
    """Bytes of the widest load; of the widest store if `stores` and that is less."""
    kinds = ("ld", "st") if stores else ("ld",)
    return min(max(_bytes(each) for each in re.findall(rf"{kind}\.global[.\w:]*", ptx)) for kind in kinds)


def _bytes(instruction: str) -> int:
    """16 of ld.global.v4.b32."""
    vector, bits = re.search(r"\.v(\d)", instruction), re.search(r"\.[bu](\d+)$", instruction)
    assert bits is not None, instruction
    return int(bits[1]) // 8 * (int(vector[1]) if vector else 1)


def _rows(vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    """[3, V] with the strides that it would have on a GPU."""
    return torch.empty((3, aligned_stride(vocab_size, dtype)), dtype=dtype)[:, :vocab_size]
