"""What the streams of a packed block take: against the block's length, and against entropies counted one by one."""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from math import log2

import pytest

import cache_format as cf
from cache_format.codecs.packed.block import LANES, pack, unpack
from cache_format.codecs.packed.coders import HEADER
from cache_format.codecs.packed.streams import FREQUENCIES, PackedStreams
from cache_format.rows.row_batch import concatenate
from packed_samples import KINDS, lexicon_of, metadata_of, row_of


def measured(kind: str, tokens: int = 300, rows: int = 8) -> tuple[PackedStreams, bytes, cf.RowBatch, cf.CacheMetadata]:
    metadata = metadata_of(KINDS[kind])
    made = [row_of(metadata, row, tokens=tokens) for row in range(rows)]
    batch, lexicon, streams = concatenate(made), lexicon_of(made, metadata.vocab_size), PackedStreams()
    data = pack(batch, metadata, lexicon)
    unpack(memoryview(data), batch.input_ids, batch.loss_mask, metadata, lexicon, batch.num_entries, streams)
    return streams, data, batch, metadata


def entropy_in_contexts(symbols: list[int], contexts: list[int]) -> float:
    """Bits, by the definition: Σ over symbols of -log2 of its share of its context."""
    by_context = defaultdict(Counter)
    for symbol, context in zip(symbols, contexts, strict=True):
        by_context[context][symbol] += 1
    return sum(n * log2(sum(c.values()) / n) for c in by_context.values() for n in c.values())


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_the_block_up_to_the_states_of_its_lanes(kind):
    streams, data, _, _ = measured(kind)
    _, lanes, table = struct.unpack_from("<IHI", data)
    assert lanes <= LANES and streams.bits[FREQUENCIES] == 8 * table
    coded = len(data) - HEADER.size - table
    in_streams = (sum(streams.bits.values()) - streams.bits[FREQUENCIES]) / 8
    # A state begins at 2^16 and is written as 32 bits, so it wastes 16 to 32; a step rounds by 2^-16 at most.
    assert 2 * lanes - 1 <= coded - in_streams <= 4 * lanes + 1 + 0.001 * in_streams


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_no_stream_takes_less_than_its_entropy_nor_much_more(kind):
    streams, _, _, metadata = measured(kind)
    assert set(streams.entropy_bits) == {name for name in streams.bits if "low_bits" not in name} - {FREQUENCIES}
    for name, floor in streams.entropy_bits.items():
        assert floor - 1e-6 <= streams.bits[name] <= 1.02 * floor + 200, name
    assert (streams.entropy_bits["sample_ranks"] > 0) == metadata.sampled


def test_entropies_are_those_of_the_symbols_in_their_contexts():
    streams, _, batch, metadata = measured("threshold, one sample")
    books = metadata.codebooks
    codes = {name: books[name].encode(getattr(batch, name)).tolist() for name in ("entropy", "residual_logprob")}
    mask = batch.loss_mask.astype(int).tolist()
    exact = batch.exact_counts.tolist()
    sampled = (batch.counts.astype(int) - batch.exact_counts).tolist()
    levels = len(metadata.codebooks["entropy"].values)
    of_entropy = [16 * m + 16 * code // levels for m, code in zip(mask, codes["entropy"], strict=True)]
    expected = {
        "entropy": entropy_in_contexts(codes["entropy"], mask),
        "exact_counts": entropy_in_contexts(exact, of_entropy),
        "sample_counts": entropy_in_contexts(sampled, codes["residual_logprob"]),
    }
    assert min(expected.values()) > 100
    assert {name: streams.entropy_bits[name] for name in expected} == pytest.approx(expected, rel=1e-9)


def test_blocks_are_summed_and_not_mixed():
    """Frequencies are a block's own: two blocks have the sum of their entropies, not that of both together."""
    (once, *_), (other, *_) = measured("top-k"), measured("top-k", rows=2)
    metadata, both = metadata_of(KINDS["top-k"]), PackedStreams()
    for rows in (8, 2):
        made = [row_of(metadata, row, tokens=300) for row in range(rows)]
        batch, lexicon = concatenate(made), lexicon_of(made, metadata.vocab_size)
        data = memoryview(pack(batch, metadata, lexicon))
        unpack(data, batch.input_ids, batch.loss_mask, metadata, lexicon, batch.num_entries, both)
    for kind in ("bits", "entropy_bits"):
        sums = {name: getattr(once, kind)[name] + getattr(other, kind)[name] for name in getattr(both, kind)}
        assert dict(getattr(both, kind)) == pytest.approx(sums)
