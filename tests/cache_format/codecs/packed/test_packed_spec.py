"""SPEC.md is enough to read the packed encoding: a reader written from it alone finds what the columns hold."""

from __future__ import annotations

import math
import struct

import numpy as np
import pyarrow as pa
import pytest
import zstandard

import cache_format as cf
from cache_format.codecs.packed.block import pack
from cache_format.rows.row_batch import concatenate
from packed_samples import KINDS, lexicon_of, metadata_of, model_sizes, row_of, through

pytestmark = pytest.mark.usefixtures("implementation")


class SpecReader:
    """A block read as SPEC.md §4 says, one symbol and one Python integer at a time."""

    def __init__(self, block: bytes, metadata: cf.CacheMetadata, order: list[int], candidates: list[list[int]]) -> None:
        self.order, self.candidates = order, candidates
        self.entries, self.lanes, length = struct.unpack_from("<IHI", block)
        numbers = np.frombuffer(zstandard.ZstdDecompressor().decompress(block[10 : 10 + length]), "<u2").tolist()
        codes = block[10 + length :]
        self.states = list(struct.unpack_from(f"<{self.lanes}I", codes))
        self.words = list(struct.unpack(f"<{(len(codes) - 4 * self.lanes) // 2}H", codes[4 * self.lanes :]))[::-1]
        books = metadata.to_json()["codebooks"]
        self.values = {name: [float(value) for value in book["values"]] for name, book in books.items()}
        self.r = len(self.values["residual_logprob"])
        self.models = {}
        for name, (contexts, symbols) in model_sizes(metadata, max(map(len, candidates))).items():
            rows = [numbers[c * symbols : (c + 1) * symbols] for c in range(contexts)]
            assert all(sum(row) == 4096 for row in rows)
            numbers = numbers[contexts * symbols :]
            self.models[name] = rows
        assert not numbers

    def _take(self, lane: int, start: int, frequency: int) -> None:
        x = self.states[lane]
        x = frequency * (x // 4096) + x % 4096 - start
        self.states[lane] = x * 65536 + self.words.pop() if x < 65536 else x

    def symbols(self, name: str, contexts: list[int]) -> list[int]:
        model = self.models[name]
        certain = model[0].index(max(model[0]))
        if all(row[certain] == 4096 for row in model):
            return [certain] * len(contexts)
        found = []
        for i, context in enumerate(contexts):
            place, start, symbol = self.states[i % self.lanes] % 4096, 0, 0
            while place >= start + model[context][symbol]:
                start += model[context][symbol]
                symbol += 1
            self._take(i % self.lanes, start, model[context][symbol])
            found.append(symbol)
        return found

    def bits(self, widths: list[int]) -> list[int]:
        found = []
        for i, width in enumerate(widths):
            frequency = 2 ** (12 - width)
            found.append(self.states[i % self.lanes] % 4096 // frequency)
            self._take(i % self.lanes, found[-1] * frequency, frequency)
        return found

    def group(self, which: str, tokens: list[int], counts: list[int]) -> list[list[tuple[int, int]]]:
        """For each position its entries: token and code."""
        ranks: list[list[int]] = [[] for _ in counts]
        turn = 0
        while here := [p for p, count in enumerate(counts) if count > turn]:
            contexts = []
            for p in here:
                nearness = min(exponent(ranks[p][-1] + 1) + 1, 16) if turn else 0
                contexts.append(4 * nearness + min(counts[p] - turn, 4) - 1)
            symbols = self.symbols(f"{which} ranks", contexts)
            left = [max(symbol // 4 - 2, 0) for symbol in symbols]
            x = []
            for symbol, b in zip(symbols, left, strict=True):
                e = symbol // 4
                x.append(1 if e == 0 else symbol % 4 if e == 1 else (4 + symbol % 4) << b)
            shift = [0] * len(here)
            while any(left):
                widths = [min(b, 12) for b in left]
                for i, number in enumerate(self.bits(widths)):
                    x[i] += number << shift[i]
                    shift[i] += widths[i]
                    left[i] -= widths[i]
            for p, value in zip(here, x, strict=True):
                ranks[p].append((ranks[p][-1] if turn else -1) + value)
            turn += 1
        flat = [(rank, len(of)) for of in ranks for rank in of]
        contexts = [4 * min(exponent(rank + 1), 15) + min(count, 4) - 1 for rank, count in flat]
        codes = iter(self.symbols(f"{which} codes", contexts))
        return [sorted((self.token(c, rank), next(codes)) for rank in of) for c, of in zip(tokens, ranks, strict=True)]

    def token(self, context: int, rank: int) -> int:
        mine = self.candidates[context]
        return mine[rank] if rank < len(mine) else self.order[rank - len(mine)]

    def expected(self, entries: list[tuple[int, int]]) -> int:
        left = 2**30 - sum(round(math.exp(self.values["target_logprobs"][code]) * 2**30) for _, code in entries)
        roots = [math.exp(value / 2) for value in self.values["residual_logprob"]]
        thresholds = [round(((a + b) / 2) ** 2 * 2**30) for a, b in zip(roots, roots[1:], strict=False)]
        return sum(threshold < max(left, 0) for threshold in thresholds)


def exponent(x: int) -> int:
    return max(x.bit_length() - 1, 0)


@pytest.mark.parametrize("alignment, tokens", [("next", 40), ("same", 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_that_knows_nothing_but_the_specification(kind, alignment, tokens):
    metadata = metadata_of(KINDS[kind], alignment=alignment, vocab_size=300)
    rows = [row_of(metadata, row, tokens=tokens) for row in range(4)]
    batch, lexicon = concatenate(rows), lexicon_of(rows * 3, 300, 100.0)
    table = pa.ipc.open_file(lexicon.to_bytes()).read_all()
    assert table.schema.names == ["order", "candidate_counts", "candidates"] and table.num_rows == 1
    order, lengths, flat = (column.to_pylist()[0] for column in table.columns)
    order += sorted(set(range(300)) - set(order))
    candidates = [[flat.pop(0) for _ in range(length)] for length in lengths]
    assert max(map(len, candidates)) > 1 and len(candidates) == len(order) == 300 and not flat
    reader = SpecReader(pack(batch, metadata, lexicon), metadata, order, candidates)
    assert reader.entries == batch.num_entries

    tokens, counted = batch.input_ids.tolist(), batch.loss_mask.astype(int).tolist()
    entropy = reader.symbols("entropy", counted)
    levels = len(reader.values["entropy"])
    contexts = [16 * m + 16 * code // levels for m, code in zip(counted, entropy, strict=True)]
    exact = reader.group("exact", tokens, reader.symbols("exact counts", contexts))
    expected = [reader.expected(entries) for entries in exact]
    off = reader.symbols("residual", [16 * code // reader.r for code in expected])
    residual = [symbol + code - reader.r + 1 for symbol, code in zip(off, expected, strict=True)]
    groups = [exact]
    for _ in range(metadata.targets.get("samples", 0)):
        groups.append(reader.group("sample", tokens, reader.symbols("sample counts", residual)))
    assert not reader.words and set(reader.states) == {65536}

    found = through(batch, metadata)
    entries = [entry for position in zip(*groups, strict=True) for group in position for entry in group]
    assert [token for token, _ in entries] == found.ids.tolist()
    book = np.array(reader.values["target_logprobs"], np.float32)
    np.testing.assert_array_equal(book[[code for _, code in entries]], found.logprobs)
    assert [len(of) for of in exact] == found.exact_counts.tolist()
    assert [sum(map(len, position)) for position in zip(*groups, strict=True)] == found.counts.tolist()
    np.testing.assert_array_equal(np.array(reader.values["entropy"], np.float32)[entropy], found.entropy)
    book = np.array(reader.values["residual_logprob"], np.float32)
    np.testing.assert_array_equal(book[residual], found.residual_logprob)
    if found.sample_counts is not None:
        assert np.array([[len(of) for of in group] for group in groups[1:]]).T.tolist() == found.sample_counts.tolist()
