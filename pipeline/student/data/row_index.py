"""A row of a dataset and how to read it, as the one integer that samplers, Trainer and accelerate pass on.

    index = row + n·is_filler + 2n·(sample + 1)        n rows; the last term is absent without a sample

Whatever resumes, distributes or repeats indices therefore keeps all three.
"""

from __future__ import annotations

from typing import NamedTuple


class RowIndex(NamedTuple):
    """One index of a dataset.

    row:        from 0 to n − 1.
    sample:     use only this stored sample of the tail; None: all samples together.
    is_filler:  the row without loss tokens, to fill up a batch.
    """

    row: int
    sample: int | None = None
    is_filler: bool = False

    def encode(self, rows: int) -> int:
        """The integer, for a dataset of `rows` rows."""
        block = int(self.is_filler) + (0 if self.sample is None else 2 * (self.sample + 1))
        return self.row + rows * block

    @classmethod
    def decode(cls, index: int, rows: int) -> RowIndex:
        """The inverse of `encode`; negative integers count from the last row."""
        if index < 0:
            index = range(rows)[index]
        block, row = divmod(index, rows)
        sample, is_filler = divmod(block, 2)
        return cls(row, sample - 1 if sample else None, bool(is_filler))
