"""Rules that every batch of rows obeys, checked over whole arrays.

The writer refuses a batch that breaks one, and the reader refuses such a shard, so no other code checks again. The cost
is a few passes over the entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_format.manifest.fields import MOST_TOKENS
from cache_format.manifest.metadata import CacheMetadata
from cache_format.rows.hidden import find_invalid_state
from cache_format.rows.row_batch import RowBatch
from cache_format.rows.types import entry_groups, group_counts, joint_index


def find_violation(batch: RowBatch, rows: range, metadata: CacheMetadata) -> str | None:
    """The first broken rule as "where: found, expected", or None.

    Args:
        rows: the corpus rows that the batch must hold.
    """
    if len(batch.rows) != len(rows) or (batch.rows != np.arange(rows.start, rows.stop, dtype=np.uint64)).any():
        return f"row numbers {_span(batch.rows)}, expected {rows.start} to {rows.stop - 1} in order"
    if (batch.labels is None) != (metadata.alignment == "next"):
        return f"labels do not go with alignment {metadata.alignment}: stored only for same"
    shape = None if batch.sample_counts is None else batch.sample_counts.shape[1:]
    if shape != (None if metadata.num_samples == 1 else (metadata.num_samples,)):
        return f"sample counts do not go with {metadata.num_samples} samples: stored only for several"
    tokens_per_row = np.diff(batch.token_offsets)
    if (bad := tokens_per_row < 1).any():
        return f"row {rows[int(bad.argmax())]}: no tokens, expected at least one"
    most = metadata.corpus.get("window_length") or MOST_TOKENS
    if (bad := tokens_per_row > most).any():
        row = int(bad.argmax())
        return f"row {rows[row]}: {tokens_per_row[row]:,} tokens, expected at most {most:,}"
    if batch.hidden is not None and (found := find_invalid_state(batch.hidden)):
        return f"{describe_position(batch, rows, found[0])}: {found[1]}"
    head = metadata.head
    if head is not None and batch.hidden is not None and head.layer in batch.hidden.states:
        if (bad := batch.loss_mask & ~batch.hidden.mask).any():
            return _report(batch, rows, bad, "a loss token without the state that is its target")
    return _positions(batch, rows, metadata) or _entries(batch, rows, metadata)


def find_repeated_token(batch: RowBatch, rows: range, metadata: CacheMetadata) -> str | None:
    """A token that is both exact and sampled at one position: a loss would count it twice.

    Not checked on every read, because it sorts the entries.
    """
    counts = group_counts(batch)
    exact = entry_groups(counts) == 0
    keys = joint_index(batch.positions, batch.ids, metadata.vocab_size)
    if (bad := np.isin(keys[~exact], keys[exact], assume_unique=metadata.num_samples == 1)).any():
        index = int(np.flatnonzero(~exact)[bad.argmax()])
        return f"{_describe_entry(batch, rows, index)}: target id {batch.ids[index]} is both exact and sampled"
    return None


def find_invalid_value(batch: RowBatch, rows: range, metadata: CacheMetadata) -> str | None:
    """The first value that its codebook cannot represent (NaN, a log-probability above 0, ...), or None."""
    for name, values in (
        ("target_logprobs", batch.logprobs),
        ("residual_logprob", batch.residual_logprob),
        ("entropy", batch.entropy),
    ):
        if (bad := metadata.codebooks[name].invalid(values)).any():
            index = int(bad.argmax())
            where = _describe_entry if name == "target_logprobs" else describe_position
            highest = metadata.codebooks[name].values[-1]
            return f"{where(batch, rows, index)}: {name} {values[index]}, expected up to {highest}"
    return None


def _positions(batch: RowBatch, rows: range, metadata: CacheMetadata) -> str | None:
    vocab_size, counts = metadata.vocab_size, batch.counts

    # Segments that do not cover the row would put a document boundary in the wrong place.
    lengths = np.asarray(batch.segment_lengths, np.int64)
    if (lengths < 1).any():
        return f"segment length {lengths.min()}, expected at least 1"
    ends = np.concatenate([[0], np.cumsum(lengths)])[batch.segment_offsets]
    if (bad := np.diff(ends) != np.diff(batch.token_offsets)).any():
        row = int(bad.argmax())
        found, expected = np.diff(ends)[row], np.diff(batch.token_offsets)[row]
        return f"row {rows[row]}: segments cover {found} tokens, expected {expected}"

    if (bad := _outside(batch.input_ids, vocab_size)).any():
        return _report(batch, rows, bad, f"input id outside the vocabulary of {vocab_size}")
    if batch.labels is None:
        if (bad := batch.loss_mask[last := np.cumsum(lengths) - 1]).any():
            where = describe_position(batch, rows, int(last[bad.argmax()]))
            return f"{where}: loss_mask set at the end of a segment, where nothing is predicted"
    elif (bad := batch.loss_mask & _outside(batch.labels, vocab_size)).any():
        return _report(batch, rows, bad, f"label outside the vocabulary of {vocab_size}")

    most = metadata.max_entries
    if (bad := _outside(counts, most + 1)).any():
        return _report(batch, rows, bad, f"target count outside 0 to {most}")
    if (bad := _outside(batch.exact_counts, most + 1) | (batch.exact_counts > counts)).any():
        return _report(batch, rows, bad, "more exact entries than entries")
    if batch.sample_counts is not None:
        of_samples = batch.sample_counts.sum(axis=1, dtype=np.int64)
        bad = np.any(batch.sample_counts < 0, axis=1)
        if bad.any():
            return _report(batch, rows, bad, "a negative sample count")
        if (bad := of_samples != counts.astype(np.int64) - batch.exact_counts).any():
            return _report(batch, rows, bad, "sample counts that do not add up to the sampled entries")
    if metadata.head is None and (bad := batch.loss_mask & (counts == 0)).any():
        return _report(batch, rows, bad, "a loss token without targets")
    return None


def _entries(batch: RowBatch, rows: range, metadata: CacheMetadata) -> str | None:
    ids = batch.ids
    starts = batch.entry_starts  # [N + 1]
    if (bad := starts[batch.token_offsets] != batch.entry_offsets).any():
        row = int(bad.argmax()) - 1
        found, expected = np.diff(starts[batch.token_offsets]), np.diff(batch.entry_offsets)
        return f"row {rows[row]}: counts add up to {found[row]}, expected {expected[row]} entries"
    if not len(ids):
        return None
    if ids.max() >= metadata.vocab_size or ids.min() < 0:
        index = int(_outside(ids, metadata.vocab_size).argmax())
        where = _describe_entry(batch, rows, index)
        return f"{where}: target id {ids[index]}, expected below {metadata.vocab_size}"

    # Ids ascend except at the first entry of a position and of each of its samples.
    descends = np.empty(len(ids), np.bool_)
    descends[0] = False
    np.less_equal(ids[1:], ids[:-1], out=descends[1:])
    begins = starts[:-1]
    descends[begins[begins < len(ids)]] = False
    if batch.sample_counts is None:
        first = begins + batch.exact_counts
    else:
        sizes = np.column_stack([batch.exact_counts, batch.sample_counts[:, :-1]]).astype(np.int64)
        first = (begins[:, None] + sizes.cumsum(axis=1)).ravel()
    descends[first[first < len(ids)]] = False
    if descends.any():
        index = int(descends.argmax())
        where = _describe_entry(batch, rows, index)
        return f"{where}: target id {ids[index]} after {ids[index - 1]}, expected ascending ids"
    return None


def _span(rows: NDArray[np.uint64]) -> str:
    return f"{rows[0]} to {rows[-1]}" if len(rows) else "none"


def _outside(values: NDArray[Any], limit: int) -> NDArray[np.bool_]:
    return (values < 0) | (values >= limit)


def _report(batch: RowBatch, rows: range, bad: NDArray[np.bool_], what: str) -> str:
    return f"{describe_position(batch, rows, int(bad.argmax()))}: {what}"


def describe_position(batch: RowBatch, rows: range, index: int) -> str:
    """Row and position of flat position `index`, for messages."""
    row = int(np.searchsorted(batch.token_offsets, index, side="right")) - 1
    return f"row {rows[row]}, position {index - batch.token_offsets[row]}"


def _describe_entry(batch: RowBatch, rows: range, index: int) -> str:
    position = int(np.searchsorted(batch.entry_starts, index, side="right")) - 1
    return describe_position(batch, rows, position)
