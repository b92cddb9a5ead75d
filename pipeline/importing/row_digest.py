"""SHA-256 of the rows of an import, as they will be stored: it tells whether a source is still the one of a cache.

Values are digested after rounding, so that the last bits of a logarithm, which differ between processors, do not count.
"""

from __future__ import annotations

import hashlib

import numpy as np

import cache_format as cf
from pipeline.importing.row_mapping import MappedRow


class RowDigest:
    """`add` rows in order. Cost: 9 bytes of SHA-256 for each entry."""

    def __init__(self, vocab_size: int) -> None:
        self._sum = hashlib.sha256()
        self._codebooks = cf.default_codebooks(vocab_size)

    def add(self, row: MappedRow) -> None:
        targets, rounded = row.targets, self._codebooks
        self._sum.update(np.array([len(row.input_ids), len(row.segment_lengths)], "<i8").tobytes())
        for whole in (row.input_ids, row.segment_lengths, targets.counts, targets.ids):
            self._sum.update(np.asarray(whole).astype("<i8").tobytes())
        self._sum.update(row.loss_mask.tobytes())
        self._sum.update(rounded["target_logprobs"].encode(targets.logprobs).tobytes())
        self._sum.update(rounded["residual_logprob"].encode(targets.residual_logprob).tobytes())
        self._sum.update(rounded["entropy"].encode(targets.entropy).tobytes())

    def hexdigest(self) -> str:
        return self._sum.hexdigest()
