"""How many rows a record batch and a shard have: by tokens, so that bytes do not depend on how long rows are.

What is compressed together has a price twice: small record batches cost bytes (top-64 some 6 % with a quarter of the
tokens, `benchmarks codebook`), large ones memory, of whoever writes and of every reader: training keeps a fixed number
of them decoded (`pipeline.student.data.dataset`).
"""

from __future__ import annotations

from dataclasses import replace

import cache_format as cf
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.targets import hidden_states

RECORD_BATCH_TOKENS = 2**15  # 32 rows of 1,024
SHARD_TOKENS = 2**18


def rows_together(config: CacheTeacherConfig) -> int:
    """Rows of a record batch: some 32,768 tokens' worth, and at least a forward pass, which is never cut."""
    return max(config.batch_size, RECORD_BATCH_TOKENS // config.data.seq_len)


def grouping(config: CacheTeacherConfig, spec: cf.HiddenSpec | None, positions_per_row: float) -> dict[str, int]:
    """`rows_per_record_batch` and `rows_per_shard` of a cache.

    Args:
        spec: of hidden states, where they are stored: fewer rows then, so that a reader can hold them.
        positions_per_row: that have targets, in the mean.
    """
    together, of_shard = rows_together(config), max(1, SHARD_TOKENS // config.data.seq_len)
    if spec is not None:
        few = hidden_states.rows_within(spec, positions_per_row, hidden_states.RECORD_BATCH_BYTES)
        together = max(config.batch_size, min(together, few))
        of_shard = min(of_shard, hidden_states.rows_within(spec, positions_per_row, hidden_states.SHARD_BYTES))
    whole = -(-of_shard // together) * together
    return {"rows_per_record_batch": together, "rows_per_shard": config.rows_per_shard or whole}


def as_begun(config: CacheTeacherConfig, metadata: cf.CacheMetadata) -> cf.CacheMetadata:
    """The metadata with the grouping of the cache that lies at the output already, if there is one: another release may
    have chosen another. An explicit `rows_per_shard` stays as it is.

    Raises: CacheError if there is something else.
    """
    recorded = None if config.overwrite else cf.recorded_metadata(config.output)
    if recorded is None:
        return metadata
    shard = metadata.rows_per_shard if config.rows_per_shard else recorded.rows_per_shard
    return replace(metadata, rows_per_record_batch=recorded.rows_per_record_batch, rows_per_shard=shard)
