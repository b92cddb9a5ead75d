"""Packed blocks and lexicons that lie: refused, or rows that obey every rule; never a crash, nor memory without end.

All of it stands under true checksums (`cache_samples.reseal`), so only the rules can notice.
"""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard

import cache_format as cf
from cache_format.codecs.packed.packed_codec import PackedCodec
from cache_format.codecs.packed.rans import Encoder
from cache_format.rows.invariants import find_violation
from cache_format.rows.row_batch import concatenate
from packed_samples import (
    KINDS,
    THRESHOLD,
    TOP_K,
    empty_lexicon,
    lexicon_of,
    metadata_of,
    model_sizes,
    row_of,
    through,
)

pytestmark = pytest.mark.usefixtures("implementation")

HEADER = "<IHI"  # entries, lanes, bytes of the frequencies
MEGABYTE = 2**20
AS_EXPECTED = len(cf.default_codebooks(1000)["residual_logprob"].values) - 1  # a residual that entries tell


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["top-k", "threshold, three samples"])
def block(request):
    """Metadata, lexicon, an encoded record batch, and the arrays in it."""
    metadata = metadata_of(KINDS[request.param], rows=2, encoding="packed")
    rows = [row_of(metadata, row) for row in range(2)]
    lexicon = lexicon_of(rows * 2, metadata.vocab_size, 100.0)
    batch = concatenate(rows)
    return metadata, lexicon, PackedCodec(metadata, lexicon).encode(batch), through(batch, metadata)


def packed_of(encoded: pa.RecordBatch) -> bytes:
    return encoded.column("packed")[0].as_py()


def decode_with(block: tuple[Any, ...], data: bytes, most_entries: int | None = None) -> cf.RowBatch:
    metadata, lexicon, encoded, good = block
    names = encoded.schema.names
    columns = [*encoded.columns[: names.index("packed")], pa.array([data, b""], pa.binary())]
    changed = pa.record_batch(columns, schema=encoded.schema)
    return PackedCodec(metadata, lexicon).decode(changed, good.num_entries if most_entries is None else most_entries)


def outcome(block: tuple[Any, ...], data: bytes) -> str:
    """What a reader makes of it; anything but these three is a crash."""
    metadata, _, _, good = block
    try:
        found = decode_with(block, data)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return "refused by the decoder"
    if find_violation(found, range(2), metadata) is not None:
        return "refused by the rules"
    assert found.num_entries == int(found.counts.sum()) == good.num_entries
    assert found.num_tokens == len(found.counts) == len(found.entropy) == len(found.residual_logprob) == 14
    for name, column in (("logprobs", "target_logprobs"), ("entropy",) * 2, ("residual_logprob",) * 2):
        assert np.isin(getattr(found, name), metadata.codebooks[column].values).all()
    return "rows"


def test_every_truncation(block):
    data = packed_of(block[2])
    assert outcome(block, data) == "rows"
    lengths = {outcome(block, data[:length]) for length in range(len(data))}
    assert lengths == {"refused by the decoder"}


def test_appended_bytes(block):
    data = packed_of(block[2])
    for more in (b"\0", b"\0\0", b"\0" * 100, data):
        assert outcome(block, data + more) == "refused by the decoder"


@pytest.mark.long
def test_random_damage_gives_rows_or_an_error(block):
    """In the header, in the frequencies, in the states and in the words."""
    data, rng = packed_of(block[2]), np.random.default_rng(0)
    _, lanes, length = struct.unpack_from(HEADER, data)
    parts = [0, 10, 10 + length, 10 + length + 4 * lanes, len(data)]
    outcomes = set()
    for start, stop in zip(parts, parts[1:], strict=False):
        for _ in range(60):
            damaged = bytearray(data)
            damaged[rng.integers(start, stop)] ^= 1 << rng.integers(8)
            outcomes.add(outcome(block, bytes(damaged)))
    assert "refused by the decoder" in outcomes


def test_damaged_frequencies_that_still_add_up(block):
    """Under zstd's own check nothing changes by itself, so the tables are changed before they are compressed."""
    data, rng = packed_of(block[2]), np.random.default_rng(0)
    entries, lanes, length = struct.unpack_from(HEADER, data)
    tables = np.frombuffer(zstandard.ZstdDecompressor().decompress(data[10 : 10 + length]), "<u2")
    compress = zstandard.ZstdCompressor(level=1).compress
    outcomes = set()
    for _ in range(100):
        changed = tables.copy()
        few, many = rng.choice(np.flatnonzero(tables < 4096), 2), rng.choice(np.flatnonzero(tables))
        changed[few] = changed[few] + 1
        changed[many] -= min(2, changed[many])
        frame = compress(changed.tobytes())
        outcomes.add(outcome(block, struct.pack(HEADER, entries, lanes, len(frame)) + frame + data[10 + length :]))
    changed = tables.copy()
    changed[[0, 1]] = changed[[1, 0]]  # of the first model: adds up, and says something else
    frame = compress(changed.tobytes())
    outcomes.add(outcome(block, struct.pack(HEADER, entries, lanes, len(frame)) + frame + data[10 + length :]))
    assert "refused by the decoder" in outcomes


# -- lies -------------------------------------------------------------------------------------------------------------


def forged(
    metadata: cf.CacheMetadata, entries: int, certain: dict[str, int | list[int]], longest: int = 0, lanes: int = 1
) -> bytes:
    """A block in which every symbol of a model is the same, or the same in each context: all of it costs nothing."""
    tables = []
    for name, (contexts, symbols) in model_sizes(metadata, longest).items():
        table = np.zeros((contexts, symbols), "<u2")
        table[np.arange(contexts), certain.get(name, 0)] = 4096
        tables.append(table.tobytes())
    frame = zstandard.ZstdCompressor().compress(b"".join(tables))
    return struct.pack(HEADER, entries, lanes, len(frame)) + frame + struct.pack("<I", 2**16) * lanes


def unpacked(metadata: cf.CacheMetadata, data: bytes, most_entries: int) -> cf.RowBatch:
    """The block for two rows of seven tokens, of which those count that do in `row_of`; no lexicon to speak of."""
    batch = concatenate([row_of(metadata, row) for row in range(2)])
    lexicon = empty_lexicon(metadata.vocab_size)
    packed = PackedCodec(metadata, lexicon).encode(batch)
    return decode_with((metadata, lexicon, packed, batch), data, most_entries)


def top_k(**changes: Any) -> cf.CacheMetadata:
    return metadata_of({**TOP_K, **changes}, rows=2, encoding="packed")


def threshold(samples: int, **changes: Any) -> cf.CacheMetadata:
    return metadata_of({**THRESHOLD, "samples": samples, **changes}, rows=2, encoding="packed")


def test_what_is_certain_takes_no_codes():
    """The forger's tool, on something that is true: three entries everywhere, 0 1 2 as there are no candidates."""
    found = unpacked(top_k(), forged(top_k(), 42, {"exact counts": 3, "residual": AS_EXPECTED}), 42)
    assert found.counts.tolist() == [3] * 14 and found.ids.tolist() == list(range(3)) * 14
    assert find_violation(found, range(2), top_k()) is None


LIES = {
    "more entries than announced": (top_k(), 41, {"exact counts": 3}, "hold more entries than they announce"),
    "fewer entries than announced": (top_k(), 42, {"exact counts": 2}, "hold fewer entries than they announce"),
    "a rank below 0": (top_k(), 14, {"exact counts": 1, "exact ranks": 4}, "a rank that no token has"),
    "a residual below the lowest": (top_k(), 14, {"exact counts": 1, "exact codes": -1}, "a residual that no code"),
    "a residual above the highest": (top_k(), 14, {"exact counts": 1, "residual": -1}, "a residual that no code"),
    "no entries where they count": (top_k(), 0, {"residual": AS_EXPECTED}, "a loss token without targets"),
    "a token twice": (
        top_k(),
        28,
        {"exact counts": 2, "residual": AS_EXPECTED, "exact ranks": [0] * 4 + [4] * 64},
        "expected ascending ids",
    ),
    "too many in all": (
        threshold(1),
        14 * 18,
        {"exact counts": 9, "sample counts": 9, "residual": AS_EXPECTED},
        "target count outside 0 to 9",
    ),
    "so many that a count wraps": (
        threshold(3, max_entries=255),
        14 * 3 * 86,  # 258 at each position
        {"sample counts": 86, "residual": AS_EXPECTED},
        "sample counts that do not add up",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_lying_block(name):
    metadata, entries, certain, expected = LIES[name]
    try:
        problem = find_violation(unpacked(metadata, forged(metadata, entries, certain), entries), range(2), metadata)
    except ValueError as error:
        problem = str(error)
    assert problem is not None and expected in problem


@pytest.mark.parametrize("low_bits", [[0] * 14, [255] * 14])
def test_a_rank_beyond_all_tokens(low_bits):
    """Distances of 2^10 and 2^11 - 1, less one, in a vocabulary of 1000."""
    codes = Encoder(1)
    codes.bits(np.array(low_bits), np.full(14, 8))
    block = forged(
        top_k(), 14, {"exact counts": 1, "exact ranks": 43 if any(low_bits) else 40, "residual": AS_EXPECTED}
    )
    with pytest.raises(ValueError, match="a rank that no token has"):
        unpacked(top_k(), block[:-4] + codes.finish(), 14)


@pytest.mark.parametrize("lanes", [0, 2**12 + 1, 2**16 - 1])
def test_lanes_that_nobody_needs(lanes):
    data = forged(top_k(), 42, {"exact counts": 3, "residual": AS_EXPECTED}, lanes=lanes)
    with pytest.raises(ValueError, match=f"announce 42 entries in {lanes} lanes"):
        unpacked(top_k(), data, 42)


def test_frequencies_that_do_not_add_up():
    good = forged(top_k(), 42, {"exact counts": 3, "residual": AS_EXPECTED})
    entries, lanes, length = struct.unpack_from(HEADER, good)
    tables = zstandard.ZstdDecompressor().decompress(good[10 : 10 + length])
    spoilt = {
        tables[:-2]: "bytes, expected",
        tables + b"\0\0": "bytes, expected",
        b"": "bytes, expected",
        b"\1" + tables[1:]: "do not add up",
        b"\xff" * len(tables): "do not add up",
    }
    for other, expected in spoilt.items():
        stream = zstandard.ZstdCompressor().compressobj()  # which does not say how much it holds
        for frame in (zstandard.ZstdCompressor().compress(other), stream.compress(other) + stream.flush()):
            data = struct.pack(HEADER, entries, lanes, len(frame)) + frame + b"\0\0\1\0"
            with pytest.raises(ValueError, match=f"{expected}|did not decompress full frame"):
                unpacked(top_k(), data, 42)
    for length in (0, 3, 2**32 - 1):
        with pytest.raises(ValueError, match="frequencies of packed targets|cut short"):
            unpacked(top_k(), struct.pack(HEADER, entries, lanes, length) + good[10:], 42)


# -- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(call: Any) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("announced", [2**31, 2**32 - 1, 1001])
def test_entries_beyond_what_the_sidecar_allows(announced):
    """Refused for what the header says; nothing has been decoded then."""
    data = forged(top_k(), announced, {"exact counts": 9})

    def read():
        with pytest.raises(ValueError, match=f"announce {announced} entries"):
            unpacked(top_k(), data, 1000)

    assert peak_bytes(read) < 4 * MEGABYTE


@pytest.mark.long
@pytest.mark.parametrize("samples", [None, 3])
def test_entries_beyond_what_the_header_announces(samples):
    """Fifty million of them, out of a few hundred bytes: refused before there is an array for them."""
    metadata = top_k(k=4000) if samples is None else threshold(samples, max_entries=4000)
    tokens = 4000
    rows = [row_of(metadata, 0, tokens=tokens)]
    batch, lexicon = concatenate(rows), empty_lexicon(metadata.vocab_size)
    counts = {"exact counts": 4000} if samples is None else {"sample counts": 4000}
    data = forged(metadata, 1000, {**counts, "residual": AS_EXPECTED})
    packed = PackedCodec(metadata, lexicon).encode(batch)
    names = packed.schema.names
    changed = pa.record_batch(
        [*packed.columns[: names.index("packed")], pa.array([data], pa.binary())], schema=packed.schema
    )

    def read():
        with pytest.raises(ValueError, match="hold more entries than they announce"):
            PackedCodec(metadata, lexicon).decode(changed, 1000)

    assert len(data) < 1000
    assert peak_bytes(read) < 32 * MEGABYTE < 8 * 4000 * tokens


@pytest.mark.long
@pytest.mark.parametrize("size_is_known", [True, False])
def test_frequencies_that_expand_without_end(size_is_known):
    """A frame of a few kilobytes for a gigabyte of zeros."""
    size = 2**30
    compressor = zstandard.ZstdCompressor(level=1)
    stream = compressor.compressobj(size=size) if size_is_known else compressor.compressobj()
    zeros = bytes(2**24)
    frame = b"".join([*(stream.compress(zeros) for _ in range(size // len(zeros))), stream.flush()])
    data = struct.pack(HEADER, 42, 1, len(frame)) + frame + struct.pack("<I", 2**16)

    def read():
        with pytest.raises(ValueError, match="the frequencies of packed targets"):
            unpacked(top_k(), data, 42)

    assert len(frame) < MEGABYTE
    assert peak_bytes(read) < 8 * MEGABYTE
