"""Convert a cache: same text, another encoding, codebook, compression or shard size, or fewer entries.

Works on one record batch at a time, so memory does not grow with the cache. If interrupted, the same call continues
after the last complete shard. Exact entries keep their values; the mass of dropped entries joins the tail mass. Values
are rounded again only if their codebook changes. Thinning a sampled tail keeps it unbiased. Hidden targets become top-K
targets, without the states that they were computed from.
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
from cache_format.cores import encoding_threads
from cache_format.manifest.answers_file import ANSWERS
from cache_format.manifest.documents_file import write_documents
from cache_format.manifest.metadata import CacheMetadata
from cache_format.manifest.stored_head import StoredHead
from cache_format.read.reader import Cache, open_cache
from cache_format.rows.fewer import first_samples, most_likely, thinned
from cache_format.rows.invariants import describe_position
from cache_format.rows.rebuilt import top_k_targets
from cache_format.rows.row_batch import RowBatch, concatenate
from cache_format.storage.directory import inside, open_directory, write_bytes
from cache_format.write.writer import CacheWriter

MAX_ENTRIES = 65535  # largest value of a uint16 count


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Changes to make; None keeps what the source has."""

    encoding: str | None = None  # columns or packed
    compression_level: int | None = None  # zstd, 1 to 22
    levels: int | None = None  # values of the codebook of log-probabilities, at most 256
    top_k: int | None = None  # entries to keep per position, most likely first; exact or hidden targets only
    samples: int | None = None  # number of samples to keep; targets with several samples only
    tail_threshold: float | None = None  # larger τ; threshold targets only
    rows_per_shard: int | None = None
    rows_per_record_batch: int | None = None
    drop_hidden: bool | None = None  # leave out the hidden states


def convert_cache(
    source: str | os.PathLike[str], output: str | os.PathLike[str], conversion: Conversion
) -> Iterator[int]:
    """Write the new cache while the result is iterated; yields the number of rows done after each record batch.

    Raises:
        MismatchError: these targets do not allow the change, or `output` holds an unfinished cache of other settings.
        CacheError: `output` is, contains or lies inside `source`, or holds something else; or `source` is unreadable.
    """
    cache = open_cache(source)
    _check_apart(source, output)
    metadata = converted_metadata(cache, conversion)
    if conversion.drop_hidden:
        cache = cache.with_hidden([] if cache.metadata.head is None else [cache.metadata.head.layer])
    answers, documents = cache.answers_bytes(), cache.documents_bytes()
    head = None if metadata.head is None else cache.head_bytes()
    rebuilding = cache.head() if cache.metadata.head is not None and metadata.head is None else None
    options: dict[str, Any] = {"tokenizer_files": cache.tokenizer_files(), "encoding_threads": encoding_threads()}
    with CacheWriter(output, metadata, head=head, resume=True, **options) as writer:
        if answers is not None:
            write_bytes(open_directory(output), ANSWERS, answers)
        if documents is not None:
            write_documents(output, documents)
        for batch in cache.iter_record_batches():
            if int(batch.rows[-1]) >= writer.next_row:
                if rebuilding is not None:
                    batch = _with_entries(batch, rebuilding, metadata)
                batch = _reduce(batch, conversion, cache)
                writer.write([batch.row(i) for i in range(len(batch))])
            yield int(batch.rows[-1]) + 1


def _check_apart(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Refuse a cache inside another one: no command would accept either of them afterwards."""
    within, around = inside(output, source), inside(source, output)
    if within or around:
        how = "is" if within and around else "lies inside" if within else "contains"
        raise CacheError(
            f"{os.fspath(output)}: it {how} the cache to convert ({os.fspath(source)}); a conversion writes a new "
            "cache. Nothing was changed. Choose another `output`."
        )


def converted_metadata(cache: Cache, conversion: Conversion) -> CacheMetadata:
    """The metadata of the new cache. Raises: MismatchError."""
    old, targets, codebooks = cache.metadata, dict(cache.metadata.targets), dict(cache.metadata.codebooks)
    if (problem := _problem(old, conversion)) is not None:
        raise MismatchError(f"{cache.path}, {problem}. Leave this change out.")
    if conversion.top_k is not None:
        targets |= {"k": conversion.top_k, "max_entries": conversion.top_k}
        if old.head is not None:
            targets = {name: value for name, value in targets.items() if name not in ("head", "hidden")}
            targets |= {"kind": "top-k", **_remaining_states(old)}
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


def _problem(metadata: CacheMetadata, conversion: Conversion) -> str | None:
    """The first change that the targets do not allow, or None."""
    kind, sampled, top_k = metadata.targets["kind"], metadata.sampled, conversion.top_k
    samples, threshold, levels = conversion.samples, conversion.tail_threshold, conversion.levels
    if conversion.drop_hidden and metadata.hidden is None:
        return "`drop_hidden=True`: there are no hidden states"
    if metadata.head is not None and top_k is None:
        return _problem_of_hidden(conversion)
    if metadata.head is not None and (top_k or 0) > metadata.vocab_size:
        return f"`top_k` {top_k}: the vocabulary has {metadata.vocab_size:,} tokens"
    if top_k is not None and sampled:
        thin = "" if metadata.targets.get("tail_threshold") is None else " (a larger `tail_threshold` thins them)"
        return f"`top_k`: {kind} targets are unbiased only with all their entries{thin}"
    if top_k is not None and metadata.head is None and top_k > metadata.max_entries:
        return f"`top_k` {top_k}: found up to {metadata.max_entries} entries per position"
    if samples is not None and not sampled:
        return f"`samples` {samples}: {kind} targets have none"
    if samples is not None and not 1 <= samples <= metadata.num_samples:
        return f"`samples` {samples}: found {metadata.num_samples} per position"
    if threshold is not None and (why := _problem_of_thinning(metadata, threshold)):
        return f"`tail_threshold` {threshold}: {why}"
    return None if levels is None else _problem_of_levels(metadata, levels)


def _problem_of_levels(metadata: CacheMetadata, levels: int) -> str | None:
    if metadata.sampled and metadata.targets.get("tail_threshold") is None:
        kind = metadata.targets["kind"]
        return f"`levels`: the codebook of {kind} targets holds the weights of their samples exactly"
    try:
        _codebook(levels, metadata.targets)
    except ValueError as error:
        return f"`levels` {levels}: {error}"
    return None


def _problem_of_thinning(metadata: CacheMetadata, threshold: float) -> str | None:
    old = metadata.targets.get("tail_threshold")
    if old is None or not metadata.sampled:
        return f"{metadata.targets['kind']} targets have none"
    if not old < threshold <= 1:
        return f"found {old:g}, expected a larger one, up to 1: tokens that were not drawn are not in the cache"
    if not metadata.targets["k"]:
        return "targets with K = 0 could lose all entries of a position"
    return None


def _problem_of_hidden(conversion: Conversion) -> str | None:
    """The first change that hidden targets do not allow, or None."""
    for asked, problem in (
        (
            conversion.drop_hidden,
            "`drop_hidden=True`: the hidden states are the targets; `top_k` replaces them with entries",
        ),
        (conversion.encoding == "packed", "`encoding=packed`: hidden targets have no entries to pack"),
        (conversion.levels is not None, "`levels`: hidden targets have no log-probabilities to round"),
        (conversion.samples is not None, f"`samples` {conversion.samples}: hidden targets have none"),
        (conversion.tail_threshold is not None, "`tail_threshold`: hidden targets have no tail"),
    ):
        if asked:
            return problem
    return None


def _codebook(levels: int, targets: Mapping[str, Any]) -> Codebook:
    """The codebook that capture would make with this many values. Raises: ValueError for too few or too many."""
    threshold, samples = targets.get("tail_threshold"), targets.get("samples")
    if threshold is None or samples is None:
        return sqrt_probability_codebook(levels)
    return weight_codebook(levels, threshold / samples)


def _reweighted(old: CacheMetadata, targets: Mapping[str, Any]) -> Codebook:
    """The old codebook with the sample weight of the new targets; for `random` targets all weights times M / S."""
    codebook = old.codebooks["target_logprobs"]
    if targets.get("tail_threshold") is not None:
        return codebook.including(np.log(targets["tail_threshold"] / targets["samples"]))
    values = codebook.values[:-1].astype(np.float64) + np.log(old.num_samples / targets["samples"])
    values = np.unique(np.minimum(np.append(values, 0.0), 0.0).astype(np.float32))
    return Codebook(codebook.name, codebook.domain, values)


def _remaining_states(old: CacheMetadata) -> dict[str, Any]:
    """`hidden` of the new targets: the layers that the head was not applied to."""
    assert old.hidden is not None and old.head is not None
    layers = tuple(layer for layer in old.hidden.layers if layer != old.head.layer)
    return {"hidden": replace(old.hidden, layers=layers).to_json()} if layers else {}


def _with_entries(batch: RowBatch, head: StoredHead, metadata: CacheMetadata) -> RowBatch:
    """Hidden targets as top-K entries."""
    rows, others = [], () if metadata.hidden is None else metadata.hidden.layers
    for i in range(len(batch)):
        row = batch.row(i)
        assert row.hidden is not None
        targets = top_k_targets(row.targets, row.hidden, head, metadata.max_entries)
        rows.append(replace(row, targets=targets, hidden=row.hidden.only(others)))
    return concatenate(rows)


def _reduce(batch: RowBatch, conversion: Conversion, cache: Cache) -> RowBatch:
    if conversion.top_k is not None:
        batch = most_likely(batch, conversion.top_k)
    if conversion.samples is not None and batch.sample_counts is not None:
        batch = first_samples(batch, conversion.samples)
    if conversion.tail_threshold is not None:
        targets, earlier = cache.metadata.targets, cache.metadata.capture.get("converted") or ()
        if (bad := batch.loss_mask & (batch.exact_counts == 0)).any():
            rows = range(int(batch.rows[0]), int(batch.rows[-1]) + 1)
            raise CacheError(
                f"{cache.path}: {describe_position(batch, rows, int(bad.argmax()))}: no exact entry, expected at least "
                "one, the most likely token. Was it written by another program? Make the cache again."
            )
        # A new key for each thinning: with the same points, the second would select what the first has selected.
        key = targets["seed"], 1 + len(earlier)
        batch = thinned(batch, targets["tail_threshold"], conversion.tail_threshold, always_exact=targets["k"], key=key)
    return batch
