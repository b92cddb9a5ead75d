"""Assignment of the rows of an optimizer step to processes: neighbouring rows together, so that reading is divided too.

A process that needs a row decodes its whole record batch, and the rows of a step come from all record batches of a
window. If rows were dealt out in turn, every process would need every record batch, and R processes would decode R
times as much. The loss of a step is one sum over its rows, whichever process computes them. So the rows of a step are
sorted by place and cut into one part per process, and each part into micro-batches:

    rows of a step, sorted    0 1 2 3 4 5 │ 6 7 8 9 10 11         2 processes, 3 micro-batches of 2
                              process 0   │ process 1
    order of the sampler      0 1 6 7 · 2 3 8 9 · 4 5 10 11

Within a window, part r of a step comes from about the same record batches as part r of the next step. The cuts shift a
little from step to step, so some record batches are decoded twice, fewer with larger steps (benchmarks/shuffle.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch.utils.data import Sampler

from pipeline.student.data.dataset import LocalShuffle
from pipeline.student.data.mixed_dataset import MixedShuffle
from pipeline.student.data.row_index import RowIndex


class DividedByPlace(Sampler[int]):
    """The order of a sampler, with the rows of each optimizer step rearranged.

    Laid out for accelerate's `BatchSamplerShard` (split_batches=False), which gives batch k to process k mod R. Trainer
    takes `accumulation` batches per process for a step, so S = accumulation · R · batch_size consecutive rows form a
    step; the last step of an epoch takes the remaining rows, in fewer micro-batches.

    Args:
        sampler: its length is a multiple of processes · batch_size.
        rows: of the dataset, to decode indices with.
        accumulation: micro-batches per process and step.
    """

    def __init__(
        self, sampler: LocalShuffle | MixedShuffle, *, rows: int, processes: int, accumulation: int, batch_size: int
    ) -> None:
        assert len(sampler) % (processes * batch_size) == 0
        self.sampler, self.rows = sampler, rows
        self.processes, self.accumulation, self.batch_size = processes, accumulation, batch_size

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        order, size = iter(self.sampler), self.batch_size
        while step := list(itertools.islice(order, self.accumulation * self.processes * size)):
            step.sort(key=lambda index: RowIndex.decode(index, self.rows).row)
            part = len(step) // self.processes
            for first in range(0, part, size):
                for process in range(self.processes):
                    yield from step[process * part + first : process * part + first + size]


def share_of(rows: int, processes: int, rank: int) -> range:
    """The consecutive rows that a process evaluates, possibly none."""
    most = -(-rows // processes)
    return range(rows)[rank * most : (rank + 1) * most]
