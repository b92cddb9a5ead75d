"""Targets of many positions, by several rules, from logits that come a chunk at a time; both engines use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets, draws, sparse_targets


class ChunkedSelection:
    """Selects targets of n positions.

    Args:
        places, positions: [n] keys of the random numbers.
        clock: seconds; waits for the device if selection is measured.

    Attributes:
        seconds: time that the selection has taken, by rule.
    """

    def __init__(
        self, rules: Sequence[TargetRule], places: np.ndarray, positions: np.ndarray, clock: Callable[[], float]
    ) -> None:
        self.rules, self.clock = rules, clock
        self.seconds = [0.0] * len(rules)
        self._uniforms = [draws(rule, places, positions) for rule in rules]
        self._chunks: list[list[ChunkTargets]] = [[] for _ in rules]

    def add(self, here: slice, logits: Tensor, scratch: Tensor) -> None:
        """Selects the targets of a chunk.

        Args:
            here: its positions among the n.
            logits: [≤n, V].
            scratch: as in `sparse_targets`.
        """
        for i, (rule, uniforms) in enumerate(zip(self.rules, self._uniforms, strict=True)):
            began = self.clock()
            chunk = sparse_targets(logits, rule, None if uniforms is None else uniforms[here], scratch)
            self._chunks[i].append(chunk)
            self.seconds[i] += self.clock() - began

    def targets(self) -> list[ChunkTargets]:
        """By rule, on the device, of all positions that were added."""
        return [ChunkTargets.cat(chunks) for chunks in self._chunks]
