"""Which process gets which rows of an optimizer step: those that lie together, so that reading is divided as well.

Who needs a row decodes its whole record batch, and the rows of a step come from all record batches of a window. Dealt
out in turn, every process needs some row of each, and R of them decode R times as much as one. What a step computes
depends on which rows it has, not on who has them: its loss is one sum over all of them. So the rows of a step are
sorted by place and cut into as many parts as there are processes, and those into micro-batches:

    rows of a step, sorted    0 1 2 3 4 5 │ 6 7 8 9 10 11         2 processes, 3 micro-batches of 2
                              process 0   │ process 1
    order of the sampler      0 1 6 7 · 2 3 8 9 · 4 5 10 11

Part r of a step is from about the same record batches as part r of the next one, while they are of one window. It stays
above one decoding of each record batch because the cuts wander from step to step, the less the larger a step is
(benchmarks/shuffle.py counts).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch.utils.data import Sampler

from pipeline.student.data.dataset import LocalShuffle
from pipeline.student.data.mixed_dataset import MixedShuffle


class DividedByPlace(Sampler[int]):
    """The order of a sampler, with the rows of each optimizer step in another one.

    Laid out for accelerate's `BatchSamplerShard` (split_batches=False), which gives batch k to process k mod R. Trainer
    takes `accumulation` batches of each process for a step, so S = accumulation · R · batch_size consecutive rows are
    one; the last step of an epoch takes what is left, in fewer micro-batches.

    Args:
        sampler: whose length is a multiple of processes · batch_size; any fillers stand beside the row that they name.
        rows: in the dataset: i and i + k · rows lie at one place, see `data.CacheDataset`.
        accumulation: micro-batches of a process in a step.
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
            step.sort(key=lambda index: index % self.rows)
            part = len(step) // self.processes
            for first in range(0, part, size):
                for process in range(self.processes):
                    yield from step[process * part + first : process * part + first + size]


def share_of(rows: int, processes: int, rank: int) -> range:
    """Of rows that are gone through once, in order: the consecutive ones that a process takes, maybe none."""
    most = -(-rows // processes)
    return range(rows)[rank * most : (rank + 1) * most]
