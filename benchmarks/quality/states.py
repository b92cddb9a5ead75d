"""The teacher's last hidden states on a corpus, from its only pass.

A state has 576 numbers, a distribution 49,152; the head computes distributions from states when an arm or a metric
needs them. States are float16 on disk. The teacher's distribution is defined as the head applied to these rounded
states, the same for all arms.

Each file holds a few rows and is written to a temporary name and renamed, so a pass that was killed continues.

Shapes: D the teacher's width; positions are the loss tokens, row after row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.corpora import Corpus
from pipeline.models.head import Head
from pipeline.models.padding import pad_rows

ROWS_PER_FILE = 64
BATCH_ROWS = 8


class States:
    """Memory-mapped states of a corpus."""

    def __init__(self, directory: Path, corpus: Corpus) -> None:
        files = range(-(-len(corpus.rows) // ROWS_PER_FILE))
        self._files = [np.load(directory / f"{i:05}.npy", mmap_mode="r") for i in files]
        self._offsets = np.concatenate([[0], np.cumsum(corpus.loss_tokens)])

    def of_rows(self, rows: Sequence[int]) -> Tensor:
        """[n, D] float32 at the loss tokens of these rows, in this order."""
        parts = []
        for row in rows:
            file = row // ROWS_PER_FILE
            base = self._offsets[file * ROWS_PER_FILE]
            parts.append(self._files[file][self._offsets[row] - base : self._offsets[row + 1] - base])
        return torch.from_numpy(np.concatenate(parts).astype(np.float32))


@torch.inference_mode()
def run_teacher(head: Head, corpus: Corpus, directory: Path) -> None:
    """Computes the states of a corpus that are missing in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(corpus.rows), ROWS_PER_FILE)
    for i, start in enumerate(starts):
        file = directory / f"{i:05}.npy"
        if file.exists():
            continue
        began, parts = time.monotonic(), []
        rows = corpus.rows[start : start + ROWS_PER_FILE]
        for first in range(0, len(rows), BATCH_ROWS):
            batch = rows[first : first + BATCH_ROWS]
            input_ids, position_ids = pad_rows(batch)
            hidden = head.hidden_states(input_ids, position_ids)
            parts += [hidden[j, : len(row.loss_mask)][torch.from_numpy(row.loss_mask)] for j, row in enumerate(batch)]
        states = torch.cat(parts).to(torch.float16).numpy()
        if not np.isfinite(states).all():
            raise ValueError(f"{corpus.name}: the teacher's states are too large for float16")
        partial = file.with_suffix(".partial")
        with partial.open("wb") as stream:
            np.save(stream, states)
        partial.rename(file)
        speed = len(states) / (time.monotonic() - began)
        print(f"teacher: {corpus.name} {i + 1}/{len(starts)}, {speed:,.0f} tokens/s", flush=True)
