"""How many rows a record batch and a shard have: a number of tokens, so that sizes do not depend on the row length.

Small record batches compress worse (top-64: about 6 % more bytes with a quarter of the tokens, `benchmarks codebook`).
Large ones take memory in the writer and in every reader: training keeps a fixed number of them decoded
(`pipeline.student.data.dataset`).
"""

from __future__ import annotations

from dataclasses import replace

import cache_format as cf
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.engines.engine_config import most_rows_per_pass
from pipeline.teacher.targets import hidden_states

RECORD_BATCH_TOKENS = 2**15  # 32 rows of 1,024
SHARD_TOKENS = 2**18


def rows_together(config: CacheTeacherConfig) -> int:
    """Rows of a record batch: about 32,768 tokens, and at least one forward pass, which is never split."""
    return max(most_rows_per_pass(config), RECORD_BATCH_TOKENS // config.data.seq_len)


def grouping(config: CacheTeacherConfig, spec: cf.HiddenSpec | None, positions_per_row: float) -> dict[str, int]:
    """`rows_per_record_batch` and `rows_per_shard` of a cache.

    Args:
        spec: the stored hidden states, if any. They are large, so fewer rows go together.
        positions_per_row: mean number of positions with targets.
    """
    together, of_shard = rows_together(config), max(1, SHARD_TOKENS // config.data.seq_len)
    if spec is not None:
        few = hidden_states.rows_within(spec, positions_per_row, hidden_states.RECORD_BATCH_BYTES)
        together = max(most_rows_per_pass(config), min(together, few))
        of_shard = min(of_shard, hidden_states.rows_within(spec, positions_per_row, hidden_states.SHARD_BYTES))
    whole = -(-of_shard // together) * together
    return {"rows_per_record_batch": together, "rows_per_shard": config.rows_per_shard or whole}


def as_begun(config: CacheTeacherConfig, metadata: cf.CacheMetadata) -> cf.CacheMetadata:
    """The metadata with the grouping of the cache that is in the output already, if any: another release may have
    grouped rows differently. An explicit `rows_per_shard` stays as it is.

    Raises: CacheError if the output holds something else.
    """
    recorded = None if config.overwrite else cf.recorded_metadata(config.output)
    if recorded is None:
        return metadata
    shard = metadata.rows_per_shard if config.rows_per_shard else recorded.rows_per_shard
    return replace(metadata, rows_per_record_batch=recorded.rows_per_record_batch, rows_per_shard=shard)
