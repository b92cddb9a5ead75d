"""Targets of many positions, by several rules, from logits that come a chunk at a time; both engines use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets, draws, precise_dtype, sparse_targets

CHUNK_BYTES = 2**28
"""Size of a chunk's fp32 logits: large enough to read the head's weights seldom."""

CHUNK_STEP, MOST_CHUNK_POSITIONS = 128, 4096


def chunk_positions(vocab_size: int) -> int:
    """Positions per chunk of the head."""
    fit = CHUNK_BYTES // (4 * vocab_size) // CHUNK_STEP * CHUNK_STEP
    return min(max(CHUNK_STEP, fit), MOST_CHUNK_POSITIONS)


def random_numbers(
    rules: Sequence[TargetRule], places: np.ndarray, positions: np.ndarray, device: torch.device
) -> list[Tensor]:
    """[n, rule.uniforms] by rule, on the host, in the dtype that `device` computes with.

    Args:
        places, positions: [n] keys of the random numbers.
    """
    drawn = [draws(rule, places, positions) for rule in rules]
    return [torch.zeros(len(places), 0) if each is None else each.to(precise_dtype(device)) for each in drawn]


class ChunkedSelection:
    """Selects targets of n positions.

    Args:
        uniforms: `random_numbers` of these rules at the n positions, on the device of the logits.
        clock: seconds; waits for the device if selection is measured.

    Attributes:
        seconds: time that the selection has taken, by rule.
    """

    def __init__(self, rules: Sequence[TargetRule], uniforms: Sequence[Tensor], clock: Callable[[], float]) -> None:
        self.rules, self.clock = rules, clock
        self.seconds = [0.0] * len(rules)
        self._uniforms = uniforms
        self._chunks: list[list[ChunkTargets]] = [[] for _ in rules]

    def add(self, here: slice, logits: Tensor, scratch: Tensor | None) -> None:
        """Selects the targets of a chunk.

        Args:
            here: its positions among the n.
            logits: [≤n, V].
            scratch: as in `sparse_targets`, for as many positions as are to be looked at together.
        """
        together = len(logits) if scratch is None else len(scratch)
        for i, (rule, uniforms) in enumerate(zip(self.rules, self._uniforms, strict=True)):
            began = self.clock()
            for part, drawn in zip(logits.split(together), uniforms[here].split(together), strict=True):
                self._chunks[i].append(sparse_targets(part, rule, drawn, scratch))
            self.seconds[i] += self.clock() - began

    def targets(self) -> list[ChunkTargets]:
        """By rule, on the device, of all positions that were added."""
        return [ChunkTargets.cat(chunks) for chunks in self._chunks]
