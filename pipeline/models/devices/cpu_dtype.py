"""float32 or bfloat16 for a model on a CPU, found by running it in both.

Where the CPU multiplies bfloat16 in hardware, it is faster; by how much depends on model and machine. Elsewhere it is
several times slower, so nothing is measured on a CPU without such instructions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

GAIN = 1.1
"""bfloat16, which rounds more, must be faster by this factor."""

RUNS = 3


@dataclass(frozen=True)
class DtypeSpeeds:
    """Tokens per second."""

    float32: float
    bfloat16: float

    @property
    def faster(self) -> Literal["float32", "bfloat16"]:
        return "bfloat16" if self.bfloat16 > GAIN * self.float32 else "float32"

    def describe(self) -> str:
        return f"{self.bfloat16:,.0f} tokens/s in bfloat16, {self.float32:,.0f} in float32"


def multiplies_bfloat16() -> bool:
    """Whether this CPU has AMX or AVX512-bf16."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def measure_dtypes(load: Callable[[str], PreTrainedModel], rows: int, tokens: int) -> DtypeSpeeds:
    """Speeds of a model on a batch of `rows` rows of `tokens` random tokens. One copy of the model is there at a time.

    Args:
        load: the model on a CPU, in a dtype by name.
    """
    return DtypeSpeeds(**{dtype: _speed(load(dtype), rows, tokens) for dtype in ("float32", "bfloat16")})


@torch.inference_mode()
def _speed(model: PreTrainedModel, rows: int, tokens: int) -> float:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (rows, tokens), generator=generator)
    seconds = []
    for _ in range(1 + RUNS):  # the first one pays for allocations
        began = time.perf_counter()
        model(input_ids=ids)
        seconds.append(time.perf_counter() - began)
    return ids.numel() / min(seconds[1:])
