"""Caches small enough to write in a test, and a forger that makes lies pass the checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import cache_format as cf
from cache_format.codecs.ipc import cut_points

VOCAB = 1000
SHARD = "shards/shard-00000.arrow"
SIDECAR = "shards/shard-00000.json"


def sample_metadata(rows: int = 10, **changes: Any) -> cf.CacheMetadata:
    """Shards of 4 rows in record batches of 2, so that 10 rows end in a partial shard."""
    settings: dict[str, Any] = {
        "teacher": {"name": "sample", "revision": None, "dtype": "float32"},
        "tokenizer": {"vocabulary": "0" * 64},  # on purpose like an empty self checksum
        "vocab_size": VOCAB,
        "alignment": "next",
        "targets": {"kind": "top-k", "k": 5, "temperature": 1.0, "max_entries": 9},
        "corpus": {"source": "nowhere", "rows": rows},
        "rows_per_shard": 4,
        "rows_per_record_batch": 2,
    }
    return cf.CacheMetadata(**{**settings, **changes})


def sample_row(
    row: int, *, vocab: int = VOCAB, tokens: int = 7, most: int = 9, alignment: str = "next", samples: int = 1
) -> cf.CacheRow:
    """A random valid row that depends on its number only."""
    rng = np.random.default_rng(row)
    cut = int(rng.integers(1, tokens)) if tokens > 1 else tokens
    segments = np.array([length for length in (cut, tokens - cut) if length])
    loss_mask = rng.random(tokens) < 0.8
    if alignment == "next":
        loss_mask[np.cumsum(segments) - 1] = False
    counts = rng.integers(1, min(most, vocab) + 1, tokens) * (loss_mask | (rng.random(tokens) < 0.5))
    exact = np.array([int(rng.integers(0, c + 1)) for c in counts])
    ids = [_entry_ids(rng, int(e), int(c), vocab) for e, c in zip(exact, counts, strict=True)]
    probs = [rng.dirichlet(np.ones(c + 1))[:c] for c in counts]
    kept = np.array([p[:e].sum() for p, e in zip(probs, exact, strict=True)])
    sample_counts = None
    if samples > 1:
        sample_counts = np.array(
            [rng.multinomial(c - e, np.ones(samples) / samples) for c, e in zip(counts, exact, strict=True)]
        )
        for position, (e, sizes) in enumerate(zip(exact, sample_counts, strict=True)):
            exact_ids = ids[position][:e]
            tokens_of = [rng.permutation(vocab) for _ in sizes]  # in several, but not exact too
            drawn = [np.sort(t[~np.isin(t, exact_ids)][:size]) for t, size in zip(tokens_of, sizes, strict=True)]
            ids[position] = np.concatenate([exact_ids, *drawn])
    with np.errstate(divide="ignore"):
        return cf.CacheRow(
            row=row,
            input_ids=rng.integers(0, vocab, tokens),
            loss_mask=loss_mask,
            segment_lengths=segments,
            targets=cf.SparseTargets(
                counts=counts,
                ids=np.concatenate(ids).astype(np.int64),
                logprobs=np.log(np.concatenate(probs)).astype(np.float32),
                exact_counts=exact,
                residual_logprob=np.log1p(-kept).astype(np.float32),
                entropy=rng.uniform(0, np.log(vocab), tokens).astype(np.float32),
                sample_counts=sample_counts,
            ),
            labels=rng.integers(0, vocab, tokens) if alignment == "same" else None,
        )


def _entry_ids(rng: np.random.Generator, exact: int, count: int, vocab: int) -> np.ndarray:
    ids = rng.permutation(vocab)[:count]
    return np.concatenate([np.sort(ids[:exact]), np.sort(ids[exact:])])


def write_sample(path: Path | str, rows: int = 10, **changes: Any) -> cf.CacheMetadata:
    metadata = sample_metadata(rows, **changes)
    options = {"alignment": metadata.alignment, "samples": metadata.num_samples}
    with cf.CacheWriter(path, metadata, tokenizer_files={"tokenizer.json": b"{}"}) as writer:
        writer.write([sample_row(row, **options) for row in range(rows)])
    return metadata


def several_samples(samples: int = 3, most: int = 9) -> dict[str, Any]:
    """Metadata of targets with so many samples of the tail at each position."""
    targets = {"kind": "threshold", "k": 1, "temperature": 1.0, "tail_threshold": 0.4, "seed": 0}
    return {"targets": {**targets, "samples": samples, "max_entries": most}}


def contents(path: Path, without: str = "") -> dict[str, bytes]:
    """The bytes of every file below a directory, except those of a name."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != without]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def shards(path: Path) -> dict[str, bytes]:
    """The bytes of shards and sidecars."""
    return {file.name: file.read_bytes() for file in sorted((path / "shards").iterdir())}


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(file.read_bytes())
    change(data)
    file.write_text(json.dumps(data, indent=1))


def forge_shard(path: Path, change: Callable[[dict[str, pa.Array]], Any]) -> None:
    """Rewrite shard 0 with changed columns, then make every checksum true again.

    `change` gets the columns of a record batch by name and edits the dict in place.
    """
    with pa.OSFile(str(path / SHARD)) as file:
        reader = pa.ipc.open_file(file.read_buffer())
    batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
    known = {field.name: field for field in reader.schema}
    forged = []
    for batch in batches:
        columns = dict(zip(known, batch.columns, strict=True))
        change(columns)
        fields = [
            known[name].with_type(array.type) if name in known else pa.field(name, array.type)
            for name, array in columns.items()
        ]
        schema = pa.schema(fields, reader.schema.metadata)
        forged.append(pa.record_batch(list(columns.values()), schema=schema))
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(str(path / SHARD), schema, options=options) as out:
        for batch in forged:
            out.write_batch(batch)
    reseal(path)


def reseal(path: Path) -> None:
    """What a liar with a hash function would do, following SPEC.md and not our code."""
    shard = (path / SHARD).read_bytes()
    cuts = cut_points(str(path / SHARD))

    def seal_sidecar(data: dict[str, Any]) -> None:
        ranges = [data["header"], *data["record_batches"], data["footer"]]
        starts, stops = [0, *cuts], [*cuts, len(shard)]
        for part, start, stop in zip(ranges, starts, stops, strict=True):
            part.update(start=start, stop=stop, sha256=hashlib.sha256(shard[start:stop]).hexdigest())
        data["file_bytes"] = len(shard)

    edit_json(path / SIDECAR, seal_sidecar)
    seal_manifest(path)


def seal_manifest(path: Path, change: Callable[[dict[str, Any]], Any] = lambda data: None) -> None:
    def seal(data: dict[str, Any]) -> None:
        change(data)
        for shard in data["shards"]:
            sidecar = path / str(shard["name"]).replace(".arrow", ".json")
            if sidecar.is_file():
                shard["sidecar_sha256"] = hashlib.sha256(sidecar.read_bytes()).hexdigest()
                shard["bytes"] = json.loads(sidecar.read_bytes())["file_bytes"]
        data["manifest_sha256"] = "0" * 64

    file = path / "manifest.json"
    edit_json(file, seal)
    text = file.read_text()
    digest = hashlib.sha256(text.encode()).hexdigest()
    member = '"manifest_sha256": "{}"'
    file.write_text(text.replace(member.format("0" * 64), member.format(digest)))


def complaint(path: Path, error: type[cf.CacheError] = cf.CacheError) -> str:
    """What is said of a damaged cache: one line that names it."""
    with pytest.raises(error) as caught:
        cf.verify_cache(path, deep=True)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message and message.endswith(".")
    return message
