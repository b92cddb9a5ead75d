"""Options of several processes that write one cache; a part of `cache_config`. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.options import check_ranges, option

PROCESSES = "Several processes"


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """How this process shares the work with others."""

    num_workers: int | None = option(
        None,
        help="Number of processes that write this cache, each started separately.",
        group=PROCESSES,
        default_text="set by torchrun",
        minimum=1,
    )
    worker_index: int | None = option(None, help="Index of this process, from 0.", group=PROCESSES, minimum=0)
    shard_range: str | None = option(
        None, help="Write only shards A up to but not including B.", group=PROCESSES, metavar="A:B"
    )
    allow_rounding: bool = option(
        False,
        help="Continue a cache even if device type, thread count, batch size or library versions differ.",
        group=PROCESSES,
    )
    stale_after: float = option(
        300.0,
        help="Seconds without a sign of life after which a writer on another machine counts as dead.",
        group=PROCESSES,
        above=0,
    )

    def __post_init__(self) -> None:
        check_ranges(self)
