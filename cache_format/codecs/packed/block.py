"""Targets of a record batch as one entropy-coded block of bytes: the same numbers as in columns.

Coded in this order, each with what is already decoded as context:

    entropy         code            loss token or not
    exact entries   counts          loss token or not, entropy
                    ranks           rank of the entry before, entries left      (`lexicon`)
                    codes           rank, number of entries
    residual        code            1 - Σp of the decoded entries
    each sample     counts, ranks, codes as above; counts in the context of the residual

Entries of a position are a set, so their ranks are sorted and coded as distances: an entropy-coded bucket (exponent and
the next two bits) and the low bits as they are. All first entries are coded, then all second ones, so that numpy can
code each turn at once. Frequencies precede the codes: a block needs only itself and the lexicon.
Shapes: N positions of a record batch, E entries, M samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_format.codecs.codebook import Codebook
from cache_format.codecs.packed.coders import Alphabets, BlockReader, BlockWriter, Coder
from cache_format.codecs.packed.lexicon import Lexicon
from cache_format.codecs.packed.loops import I32, LEFT, QUARTERS, RANK, U8, U32, Ints, loops
from cache_format.codecs.packed.streams import PackedStreams
from cache_format.manifest.metadata import CacheMetadata
from cache_format.rows.row_batch import RowBatch
from cache_format.rows.types import entry_groups, group_counts, joint_index

LANES = 512
PREDICTED, ENTROPY = 16, 16  # number of context classes of: predicted residual, entropy
CODE_BITS = 8  # of a log-probability


@dataclass(frozen=True, eq=False)
class Codes:
    """The targets of a record batch as integers: input of `_walk` when packing, its result when unpacking."""

    entropy: Ints  # [N]
    exact_counts: Ints  # [N]
    exact_ranks: I32  # [of exact entries] ascending within a position
    exact_codes: U8  # [of exact entries]
    residual: Ints  # [N]
    sample_counts: Ints  # [M, N]
    sample_ranks: list[I32]  # M times [of entries]
    sample_codes: list[U8]


def pack(batch: RowBatch, metadata: CacheMetadata, lexicon: Lexicon) -> bytes:
    """The targets of a checked batch. Raises: ValueError for a value that no code represents."""
    lanes = min(LANES, 1 << max(0, batch.num_entries.bit_length() - 7))  # a lane costs four bytes
    coder = BlockWriter(_alphabets(metadata, lexicon), lanes)
    tokens = batch.input_ids.astype(np.int64)
    _walk(coder, batch.loss_mask, _codes(batch, tokens, metadata, lexicon), metadata)
    return coder.finish(batch.num_entries)


def unpack(
    data: memoryview,
    tokens: Ints,
    loss_mask: NDArray[np.bool_],
    metadata: CacheMetadata,
    lexicon: Lexicon,
    most_entries: int,
    streams: PackedStreams | None = None,
) -> dict[str, NDArray[Any]]:
    """Inverse of `pack`: the fields of `RowBatch` that describe targets.

    Args:
        tokens: [N] input ids.
        most_entries: limit, checked before anything is allocated for the entries.
        streams: collects the size of each stream.

    Raises: ValueError for bytes that `pack` would not write.
    """
    coder = BlockReader(data, _alphabets(metadata, lexicon), most_entries, measured=streams is not None)
    codes = _walk(coder, loss_mask, None, metadata)
    coder.finish()
    if streams is not None:
        coder.add_to(streams)
    return _fields(codes, tokens, metadata, lexicon)


def _alphabets(metadata: CacheMetadata, lexicon: Lexicon) -> Alphabets:
    books = {name: len(book.values) for name, book in metadata.codebooks.items()}
    most = metadata.max_entries + 1
    longest = int(np.diff(lexicon.starts).max(initial=0))
    buckets = QUARTERS * ((metadata.vocab_size + longest).bit_length() + 1)
    ranks = ((1 + RANK) * LEFT, buckets)
    codes = (RANK * LEFT, books["target_logprobs"])
    return {
        "entropy": (2, books["entropy"]),
        "exact_counts": (2 * ENTROPY, most),
        "exact_ranks": ranks,
        "exact_codes": codes,
        "residual": (PREDICTED, 2 * books["residual_logprob"] - 1),
        "sample_counts": (books["residual_logprob"], most),
        "sample_ranks": ranks,
        "sample_codes": codes,
    }


def _codes(batch: RowBatch, tokens: Ints, metadata: CacheMetadata, lexicon: Lexicon) -> Codes:
    books = metadata.codebooks
    counts = group_counts(batch)  # [N, 1 + M]
    if not metadata.sampled and counts[:, 1:].any():
        raise ValueError("there are sampled entries, but no `samples` in the targets of the metadata")
    group = entry_groups(counts)  # [E]
    position = batch.positions
    ranks = lexicon.ranks(tokens[position], batch.ids.astype(np.int64))
    codes = books["target_logprobs"].encode(batch.logprobs)
    ordered = np.argsort(joint_index(joint_index(group, position, batch.num_tokens), ranks, 2**32))
    ends = np.cumsum(counts.sum(axis=0))[:-1]
    of_ranks, of_codes = np.split(ranks[ordered].astype(np.int32), ends), np.split(codes[ordered], ends)
    return Codes(
        entropy=books["entropy"].encode(batch.entropy).astype(np.int64),
        exact_counts=np.ascontiguousarray(counts[:, 0]),
        exact_ranks=of_ranks[0],
        exact_codes=of_codes[0],
        residual=books["residual_logprob"].encode(batch.residual_logprob).astype(np.int64),
        sample_counts=counts[:, 1:].T,
        sample_ranks=of_ranks[1:],
        sample_codes=of_codes[1:],
    )


def _fields(codes: Codes, tokens: Ints, metadata: CacheMetadata, lexicon: Lexicon) -> dict[str, NDArray[Any]]:
    books = metadata.codebooks
    counts = np.concatenate([codes.exact_counts[None], codes.sample_counts])  # [1 + M, N]
    ranks, of_entries = codes.exact_ranks, codes.exact_codes
    if codes.sample_ranks:
        ranks = np.concatenate([ranks, *codes.sample_ranks])
        of_entries = np.concatenate([of_entries, *codes.sample_codes])
    keys = _by_id(lexicon.ids(np.tile(tokens, len(counts)), ranks, counts.ravel()), of_entries, counts)
    narrow = metadata.count_type
    fields = {
        "counts": counts.sum(axis=0).astype(narrow),
        "logprobs": books["target_logprobs"].decode(keys.astype(np.uint8)),
        "ids": np.right_shift(keys, np.uint32(CODE_BITS), out=keys).astype(metadata.id_type),
        "exact_counts": codes.exact_counts.astype(narrow),
        "residual_logprob": books["residual_logprob"].decode(codes.residual.astype(np.uint8)),
        "entropy": books["entropy"].decode(codes.entropy.astype(np.uint8)),
    }
    if metadata.num_samples > 1:
        fields["sample_counts"] = codes.sample_counts.T.astype(narrow)
    return fields


def _by_id(ids: U32, codes: U8, counts: Ints) -> U32:
    """[E] id and code of each entry in one number, ordered by position, group and id.

    Args:
        ids, codes: [E] by group, position and turn. The ids are overwritten: arrays of this size are few on purpose.
        counts: [1 + M, N].
    """
    keys = ids
    keys <<= np.uint32(CODE_BITS)  # an id has at most 24 bits
    keys |= codes
    longest = counts.max(initial=0)
    if len(counts) > 1 or ((counts != 0) & (counts != longest)).any():
        return loops().arranged(keys, counts)
    keys.reshape(-1, max(longest, 1)).sort(axis=1)
    return keys


def _walk(coder: Coder, loss_mask: NDArray[np.bool_], known: Codes | None, metadata: CacheMetadata) -> Codes:
    """Code `known`, or decode if it is None: one function, so that both use the same order and contexts."""
    books, counted = metadata.codebooks, loss_mask.astype(np.int64)

    def given(name: str, sample: int | None = None) -> Any:
        values: Any = None if known is None else getattr(known, name)
        return values if known is None or sample is None else values[sample]

    levels = len(books["entropy"].values)
    entropy = coder.symbols("entropy", counted, given("entropy"))
    context = joint_index(counted, entropy * ENTROPY // levels, ENTROPY)
    exact_counts = coder.symbols("exact_counts", context, given("exact_counts"))
    exact_ranks = coder.ranks("exact_ranks", exact_counts, given("exact_ranks"))
    exact_codes = coder.codes("exact_codes", exact_counts, exact_ranks, given("exact_codes"))
    expected = _expected_residual(books, exact_counts, exact_codes)
    top = len(books["residual_logprob"].values) - 1
    off = None if known is None else known.residual - expected + top
    off = coder.symbols("residual", expected * PREDICTED // (top + 1), off)
    residual = off + expected - top
    if (residual < 0).any() or (residual > top).any():
        raise ValueError("packed targets hold a residual that no code represents")
    samples: list[tuple[Ints, I32, U8]] = []
    for i in range(metadata.num_samples if metadata.sampled else 0):
        counts = coder.symbols("sample_counts", residual, given("sample_counts", i))
        ranks = coder.ranks("sample_ranks", counts, given("sample_ranks", i))
        codes = coder.codes("sample_codes", counts, ranks, given("sample_codes", i))
        samples.append((counts, ranks, codes))
    return Codes(
        entropy=entropy,
        exact_counts=exact_counts,
        exact_ranks=exact_ranks,
        exact_codes=exact_codes,
        residual=residual,
        sample_counts=np.array([counts for counts, _, _ in samples], np.int64).reshape(len(samples), len(counted)),
        sample_ranks=[ranks for _, ranks, _ in samples],
        sample_codes=[codes for _, _, codes in samples],
    )


def _expected_residual(books: Mapping[str, Codebook], counts: Ints, codes: U8) -> Ints:
    """[N] the code of 1 - Σp, from the decoded entries. In integers, so that every machine gets the same."""
    one = 2.0**30
    shares = np.rint(np.exp(books["target_logprobs"].values.astype(np.float64)) * one).astype(np.int64)
    left = np.maximum(one - loops().sums(counts, codes, shares), 0.0)
    roots = np.exp(books["residual_logprob"].values.astype(np.float64) / 2)
    thresholds = np.rint(((roots[1:] + roots[:-1]) / 2) ** 2 * one)
    expected: Ints = np.searchsorted(thresholds, left).astype(np.int64)
    return expected
