"""Format version 1, pinned: if one of these fails, old caches and new code no longer fit together.

The cache is built from fixed values. Names, types and decoded values hold for any version of
pyarrow; the raw bytes of a shard only for the one that they were recorded with, because Arrow and
zstd are free to lay the same values out differently.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest

import cache_format as cf
from cache_samples import SHARD, SIDECAR, sample_metadata

RECORDED_WITH = "26.0.1"
SHARD_SHA256 = "67328864ad8ce8e4fc8f8271256e99b77a3549ede823d572980c682e17571d58"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden") / "cache"
    metadata = sample_metadata(
        1,
        vocab_size=100,
        targets={"kind": "top-k", "k": 3, "temperature": 1.0},
        codebooks={  # spelled out, because other defaults would be no other format
            "target_logprobs": cf.sqrt_probability_codebook(256, smallest=1e-12),
            "residual_logprob": cf.residual_codebook(256, smallest=1e-12),
            "entropy": cf.entropy_codebook(100, 256),
        },
    )
    row = cf.CacheRow(
        row=0,
        input_ids=np.array([7, 99, 0, 42]),
        loss_mask=np.array([True, False, True, False]),
        segment_lengths=np.array([2, 2]),
        targets=cf.SparseTargets(
            counts=np.array([3, 0, 2, 1]),
            ids=np.array([1, 50, 99, 3, 4, 8]),
            logprobs=np.log([0.5, 0.25, 0.125, 0.9, 1e-6, 1.0]).astype(np.float32),
            exact_counts=np.array([3, 0, 1, 1]),
            residual_logprob=np.array([np.log(0.125), 0.0, np.log(0.1), -np.inf], np.float32),
            entropy=np.array([1.5, 0.0, 0.4, 0.0], np.float32),
        ),
    )
    with cf.CacheWriter(path, metadata) as writer:
        writer.annotate(batch_size=1)
        writer.write([row])
    return path


@pytest.mark.skipif(pa.__version__ != RECORDED_WITH, reason=f"the shard's bytes were recorded with {RECORDED_WITH}")
def test_bytes(path):
    assert hashlib.sha256((path / SHARD).read_bytes()).hexdigest() == SHARD_SHA256


def test_decoded_values(path):
    """Levels are sqrt(p) = i/234 from 2/234 on (256 values less 23 in the tail), i/233 in the
    residual's table. By hand: sqrt(.5) * 234 = 165.5 -> 165, sqrt(.25) -> 117, sqrt(.125) ->
    82.7 -> 83, sqrt(.9) -> 222.0; 1e-6 lies in the geometric tail, 2/234 * (2/3)^5 = .00113 being
    nearest to its root .001. Residual: sqrt(.125) * 233 = 82.4 -> 82, sqrt(.1) -> 73.7 -> 74."""
    targets = cf.open_cache(path)[0].targets
    roots = np.exp(targets.logprobs.astype(np.float64) / 2)
    expected = [165 / 234, 117 / 234, 83 / 234, 222 / 234, 2 / 234 * (2 / 3) ** 5, 1]
    np.testing.assert_allclose(roots, expected, rtol=1e-6)
    residual = np.exp(targets.residual_logprob.astype(np.float64) / 2)
    np.testing.assert_allclose(residual, [82 / 233, 1, 74 / 233, 0], rtol=1e-6)
    # Entropy levels are log(100) * (i/255)^2: sqrt(1.5 / log 100) * 255 = 145.5, and 75.2 for .4.
    np.testing.assert_allclose(targets.entropy, np.log(100) * (np.array([146, 0, 75, 0]) / 255) ** 2, rtol=1e-5)
    row = cf.open_cache(path)[0]
    assert list(row.input_ids) == [7, 99, 0, 42]
    assert list(row.label_ids) == [99, -100, 42, -100]
    assert [list(targets.at(t)[0]) for t in range(4)] == [[1, 50, 99], [], [3, 4], [8]]
    assert list(targets.exact_counts) == [3, 0, 1, 1]


def test_schema(path):
    schema = pa.ipc.open_file(pa.memory_map(str(path / SHARD))).schema
    logprobs = "list<item: dictionary<values=float, indices=uint8, ordered=0> not null>"
    assert {field.name: str(field.type) for field in schema} == {
        "row": "uint64",
        "input_ids": "list<item: uint16 not null>",
        "loss_mask": "list<item: bool not null>",
        "segment_lengths": "list<item: int32 not null>",
        "target_counts": "list<item: uint8 not null>",
        "target_ids": "list<item: uint16 not null>",
        "target_logprobs": logprobs,
        "exact_counts": "list<item: uint8 not null>",
        "residual_logprob": logprobs,
        "entropy": logprobs,
    }
    assert not any(field.nullable for field in schema)
    assert schema.metadata == {
        b"format": b"distill-cache",
        b"format_version": b"1",
        b"spec": b"cache_format/SPEC.md",
    }


def test_files_and_keys(path):
    files = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())
    assert files == ["README.md", "manifest.json", SHARD, SIDECAR]
    manifest = json.loads((path / "manifest.json").read_bytes())
    sidecar = json.loads((path / SIDECAR).read_bytes())
    assert " ".join(sorted(manifest)) == (
        "alignment capture codebooks compression corpus encoding format format_version libraries "
        "manifest_sha256 rows_per_record_batch rows_per_shard shards targets teacher tokenizer "
        "tokenizer_files vocab_size"
    )
    assert " ".join(sorted(manifest["shards"][0])) == ("bytes counted_tokens entries name rows sidecar_sha256 tokens")
    assert " ".join(sorted(manifest["codebooks"]["entropy"])) == "domain max_error name values"
    assert manifest["codebooks"]["residual_logprob"]["values"][0] == "-inf"
    assert " ".join(sorted(sidecar)) == (
        "annotations counted_tokens entries file_bytes first_row footer header record_batches rows tokens"
    )
    assert " ".join(sorted(sidecar["record_batches"][0])) == (
        "counted_tokens entries first_row rows sha256 start stop tokens"
    )
    assert " ".join(sorted(sidecar["header"])) == "sha256 start stop"
    assert sidecar["annotations"] == {"batch_size": 1}
    for name in ("manifest.json", SIDECAR):
        assert (path / name).read_text().endswith("}\n")


def test_checksums_as_the_specification_says(path):
    """Written a second time, with nothing of ours: SPEC.md, section Checksums."""
    text = (path / "manifest.json").read_text()
    manifest, sidecar = json.loads(text), json.loads((path / SIDECAR).read_bytes())
    claimed = manifest["manifest_sha256"]
    member = '"manifest_sha256": "{}"'
    zeroed = text.replace(member.format(claimed), member.format("0" * 64))
    assert hashlib.sha256(zeroed.encode()).hexdigest() == claimed
    (shard,) = manifest["shards"]
    assert hashlib.sha256((path / SIDECAR).read_bytes()).hexdigest() == shard["sidecar_sha256"]
    data, reached = (path / shard["name"]).read_bytes(), 0
    for part in (sidecar["header"], *sidecar["record_batches"], sidecar["footer"]):
        assert part["start"] == reached
        reached = part["stop"]
        assert hashlib.sha256(data[part["start"] : reached]).hexdigest() == part["sha256"]
    assert reached == len(data) == sidecar["file_bytes"] == shard["bytes"]
    batch = sidecar["record_batches"][0]
    stream = data[8 : sidecar["header"]["stop"]] + data[batch["start"] : batch["stop"]]
    assert pa.ipc.open_stream(stream).read_next_batch().num_rows == 1
