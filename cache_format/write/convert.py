"""One cache ─▶ another with the same text: other encoding, codebook or compression, other shards, fewer entries.

A record batch at a time, so memory does not grow with the cache; interrupted, the same call goes on after the last
complete shard. What was exact stays what it was unless entries are dropped: their mass then joins the residual. Values
are quantised again only if the codebook changes. A sampled tail can be thinned, and stays unbiased. Hidden targets
become top-K ones: the states are what they are made of, and are left out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from cache_format.cache_errors import CacheError, MismatchError
from cache_format.codecs.codebook import Codebook, sqrt_probability_codebook, weight_codebook
from cache_format.manifest.answers_file import ANSWERS
from cache_format.manifest.metadata import CacheMetadata
from cache_format.manifest.stored_head import StoredHead
from cache_format.read.reader import Cache, open_cache
from cache_format.rows.fewer import first_samples, most_likely, thinned
from cache_format.rows.invariants import of_position
from cache_format.rows.rebuilt import sparse
from cache_format.rows.row_batch import RowBatch, concatenate
from cache_format.storage.directory import inside, open_directory, write_bytes
from cache_format.write.writer import CacheWriter

MAX_ENTRIES = 65535  # that a count can say


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is to be different. None: as it is."""

    encoding: str | None = None  # columns or packed
    compression_level: int | None = None  # zstd, 1 to 22
    levels: int | None = None  # values of the codebook of log-probabilities, at most 256
    top_k: int | None = None  # entries per position, the most likely ones; of exact or hidden targets
    samples: int | None = None  # the first so many; of targets with several samples
    tail_threshold: float | None = None  # τ, a larger one; of threshold targets
    rows_per_shard: int | None = None
    rows_per_record_batch: int | None = None
    drop_hidden: bool | None = None  # without the hidden states


def convert_cache(
    source: str | os.PathLike[str], output: str | os.PathLike[str], conversion: Conversion
) -> Iterator[int]:
    """Writes the new cache while it is iterated over; yields the number of rows done, after every record batch.

    Raises:
        MismatchError: a change that these targets do not admit, or an unfinished cache of other settings in `output`.
        CacheError: `output` is `source`, in it or around it, or holds something else; or `source` cannot be read.
    """
    cache = open_cache(source)
    _check_apart(source, output)
    metadata = converted_metadata(cache, conversion)
    if conversion.drop_hidden:
        cache = cache.with_hidden([] if cache.metadata.head is None else [cache.metadata.head.layer])
    answers = cache.answers_bytes()
    head = None if metadata.head is None else cache.head_bytes()
    rebuilding = cache.head() if cache.metadata.head is not None and metadata.head is None else None
    with CacheWriter(output, metadata, tokenizer_files=cache.tokenizer_files(), head=head, resume=True) as writer:
        if answers is not None:
            write_bytes(open_directory(output), ANSWERS, answers)
        for batch in cache.iter_record_batches():
            if int(batch.rows[-1]) >= writer.next_row:
                if rebuilding is not None:
                    batch = _rebuilt(batch, rebuilding, metadata)
                batch = _fewer(batch, conversion, cache)
                writer.write([batch.row(i) for i in range(len(batch))])
            yield int(batch.rows[-1]) + 1


def _check_apart(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """A cache in another one's directory makes both of them something that no command will touch."""
    within, around = inside(output, source), inside(source, output)
    if within or around:
        how = "is the cache" if within and around else "lies inside of the cache" if within else "is around the cache"
        raise CacheError(
            f"{os.fspath(output)}: found that it {how} which is to be converted ({os.fspath(source)}), expected "
            "another place: a conversion reads one cache and writes another. Nothing was changed. Choose another one."
        )


def converted_metadata(cache: Cache, conversion: Conversion) -> CacheMetadata:
    """The metadata of the new cache. Raises: MismatchError."""
    old, targets, codebooks = cache.metadata, dict(cache.metadata.targets), dict(cache.metadata.codebooks)
    _check(cache, conversion)
    if conversion.top_k is not None:
        targets |= {"k": conversion.top_k, "max_entries": conversion.top_k}
        if old.head is not None:
            targets = {name: value for name, value in targets.items() if name not in ("head", "hidden")}
            targets |= {"kind": "top-k", **_other_states(old)}
    if conversion.samples is not None:
        targets |= {"samples": conversion.samples}
    if conversion.tail_threshold is not None:
        most = targets["k"] + targets["samples"] * (math.ceil(1 / conversion.tail_threshold) + 1)
        targets |= {"tail_threshold": conversion.tail_threshold, "max_entries": min(most, MAX_ENTRIES)}
    if conversion.levels is not None:
        codebooks["target_logprobs"] = _codebook(conversion.levels, targets)
    elif conversion.samples is not None or conversion.tail_threshold is not None:
        codebooks["target_logprobs"] = _reweighted(old, targets)
    if conversion.drop_hidden:
        targets.pop("hidden", None)
    level = conversion.compression_level or old.compression["level"]
    changes = {f.name: value for f in fields(conversion) if (value := getattr(conversion, f.name)) is not None}
    geometry = {name: changes[name] for name in ("rows_per_shard", "rows_per_record_batch") if name in changes}
    return replace(
        old,
        targets=targets,
        codebooks=codebooks,
        compression={**old.compression, "level": level},
        encoding=conversion.encoding or old.encoding,
        capture={**old.capture, "converted": [*(old.capture.get("converted") or ()), changes]},
        **geometry,
    )


def _check(cache: Cache, conversion: Conversion) -> None:
    targets, metadata = cache.metadata.targets, cache.metadata
    thin = " (--tail-threshold thins them)" if targets.get("tail_threshold") is not None else ""
    problem = None
    if conversion.drop_hidden and metadata.hidden is None:
        problem = "--drop-hidden: there are no hidden states"
    elif metadata.head is not None and conversion.top_k is None:
        problem = _problem_of_hidden(conversion)
    elif metadata.head is not None and (conversion.top_k or 0) > metadata.vocab_size:
        problem = f"--top-k {conversion.top_k}: the vocabulary has {metadata.vocab_size:,} tokens"
    elif conversion.top_k is not None and metadata.sampled:
        problem = f"--top-k: {targets['kind']} targets are unbiased only with all their entries{thin}"
    elif conversion.top_k is not None and metadata.head is None and conversion.top_k > metadata.max_entries:
        problem = f"--top-k {conversion.top_k}: found up to {metadata.max_entries} entries per position"
    elif conversion.samples is not None and not metadata.sampled:
        problem = f"--samples {conversion.samples}: {targets['kind']} targets have none"
    elif conversion.samples is not None and not 1 <= conversion.samples <= metadata.num_samples:
        problem = f"--samples {conversion.samples}: found {metadata.num_samples} per position"
    elif conversion.tail_threshold is not None and (why := _problem_of_thinning(metadata, conversion.tail_threshold)):
        problem = f"--tail-threshold {conversion.tail_threshold}: {why}"
    elif conversion.levels is not None and metadata.sampled and targets.get("tail_threshold") is None:
        problem = f"--levels: the codebook of {targets['kind']} targets holds the weights of their samples exactly"
    elif conversion.levels is not None:
        try:
            _codebook(conversion.levels, targets)
        except ValueError as error:
            problem = f"--levels {conversion.levels}: {error}"
    if problem is not None:
        raise MismatchError(f"{cache.path}, {problem}. Leave this change out.")


def _problem_of_thinning(metadata: CacheMetadata, threshold: float) -> str | None:
    old = metadata.targets.get("tail_threshold")
    if old is None or not metadata.sampled:
        return f"{metadata.targets['kind']} targets have none"
    if not old < threshold <= 1:
        return f"found {old:g}, expected a larger one, up to 1: what was not drawn then is not there"
    if not metadata.targets["k"]:
        return "targets with K = 0 could lose all entries of a position"
    return None


def _problem_of_hidden(conversion: Conversion) -> str | None:
    """What hidden targets do not admit as long as they are."""
    for asked, problem in (
        (conversion.drop_hidden, "--drop-hidden: the hidden states are the targets; --top-k leaves them out"),
        (conversion.encoding == "packed", "--encoding packed: hidden targets have no entries to pack"),
        (conversion.levels is not None, "--levels: hidden targets have no log-probabilities to round"),
        (conversion.samples is not None, f"--samples {conversion.samples}: hidden targets have none"),
        (conversion.tail_threshold is not None, "--tail-threshold: hidden targets have no tail"),
    ):
        if asked:
            return problem
    return None


def _codebook(levels: int, targets: Mapping[str, Any]) -> Codebook:
    """Of so many values, as capture makes it. Raises: ValueError for too few or too many."""
    threshold, samples = targets.get("tail_threshold"), targets.get("samples")
    if threshold is None or samples is None:
        return sqrt_probability_codebook(levels)
    return weight_codebook(levels, threshold / samples)


def _reweighted(old: CacheMetadata, targets: Mapping[str, Any]) -> Codebook:
    """The old codebook, with the weight of the new targets' samples; of draws, all weights times M/S."""
    codebook = old.codebooks["target_logprobs"]
    if targets.get("tail_threshold") is not None:
        return codebook.including(np.log(targets["tail_threshold"] / targets["samples"]))
    values = codebook.values[:-1].astype(np.float64) + np.log(old.num_samples / targets["samples"])
    values = np.unique(np.minimum(np.append(values, 0.0), 0.0).astype(np.float32))
    return Codebook(codebook.name, codebook.domain, values)


def _other_states(old: CacheMetadata) -> dict[str, Any]:
    """Of a cache of hidden targets the states that no target is made of."""
    assert old.hidden is not None and old.head is not None
    layers = tuple(layer for layer in old.hidden.layers if layer != old.head.layer)
    return {"hidden": replace(old.hidden, layers=layers).to_json()} if layers else {}


def _rebuilt(batch: RowBatch, head: StoredHead, metadata: CacheMetadata) -> RowBatch:
    """With entries instead of the states that they follow from."""
    rows, others = [], () if metadata.hidden is None else metadata.hidden.layers
    for i in range(len(batch)):
        row = batch.row(i)
        assert row.hidden is not None
        targets = sparse(row.targets, row.hidden, head, metadata.max_entries)
        rows.append(replace(row, targets=targets, hidden=row.hidden.only(others)))
    return concatenate(rows)


def _fewer(batch: RowBatch, conversion: Conversion, cache: Cache) -> RowBatch:
    if conversion.top_k is not None:
        batch = most_likely(batch, conversion.top_k)
    if conversion.samples is not None and batch.sample_counts is not None:
        batch = first_samples(batch, conversion.samples)
    if conversion.tail_threshold is not None:
        targets, earlier = cache.metadata.targets, cache.metadata.capture.get("converted") or ()
        if (bad := batch.loss_mask & (batch.exact_counts == 0)).any():
            rows = range(int(batch.rows[0]), int(batch.rows[-1]) + 1)
            raise CacheError(
                f"{cache.path}: {of_position(batch, rows, int(bad.argmax()))}: no exact entry, expected at least "
                "one: the most likely token of threshold targets is. Was it written by another program? Make it again."
            )
        # Points of their own: a second thinning with those of the first would find again what these have found.
        key = targets["seed"], 1 + len(earlier)
        batch = thinned(batch, targets["tail_threshold"], conversion.tail_threshold, head=targets["k"], key=key)
    return batch
