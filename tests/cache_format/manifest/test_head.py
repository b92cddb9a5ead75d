"""Hidden targets: the head beside them, distributions made of both, and what is refused."""

from __future__ import annotations

import json
import struct
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch

import cache_format as cf
from cache_format.manifest.stored_head import _header, widened
from cache_samples import complaint, edit_json, forge_shard, sample_metadata, sample_row, seal_manifest

VOCAB, WIDTH, LAYER = 1000, 6, 5


def numbers(dtype: str = "float32", bias: bool = False, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """Of a head, as `head_contents` takes them."""
    rng = np.random.default_rng(seed)
    values = [rng.standard_normal((VOCAB, WIDTH)).astype(np.float32), rng.standard_normal(VOCAB).astype(np.float32)]
    if dtype == "bfloat16":
        values = [(each.view(np.uint32) >> 16).astype(np.uint16) for each in values]
    else:
        values = [each.astype(dtype) for each in values]
    return values[0], values[1] if bias else None


def head_metadata(
    contents: bytes, *, dtype: str = "float16", rows: int = 10, layers: tuple[int, ...] = (LAYER,), **changes: Any
) -> cf.CacheMetadata:
    head = {"layer": LAYER, "dtype": "float32", "bias": False, "logit_scale": 1.0, "softcap": None}
    head |= {"bytes": len(contents), "sha256": cf.sha256(contents), **changes.pop("head", {})}
    hidden = {"layers": list(layers), "teacher_layers": 5, "width": WIDTH, "dtype": dtype, "every": 1}
    hidden |= changes.pop("hidden", {})
    targets = {"kind": "hidden", "temperature": 1.0, "max_entries": 0, "head": head, "hidden": hidden}
    return sample_metadata(rows, targets={**targets, **changes.pop("targets", {})}, **changes)


def logprobs_of(states: np.ndarray, head: dict[str, Any], weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """By the book, in float64."""
    logits = states.astype(np.float64) @ weight.astype(np.float64).T
    if bias is not None:
        logits = logits + bias
    logits = logits * head.get("logit_scale", 1.0)
    if (cap := head.get("softcap")) is not None:
        logits = cap * np.tanh(logits / cap)
    largest = logits.max(axis=1, keepdims=True)
    return logits - largest - np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))


def head_row(row: int, metadata: cf.CacheMetadata, weight: np.ndarray) -> cf.CacheRow:
    """As a teacher would leave it: the entropy is that of its states."""
    spec, found = metadata.hidden, sample_row(row)
    assert spec is not None and metadata.head is not None
    rng = np.random.default_rng(500 + row)
    mask = found.loss_mask | (rng.random(len(found.input_ids)) < 0.3)
    states: dict[int, np.ndarray] = {}
    scales: dict[int, np.ndarray] = {}
    for layer in spec.layers:
        values = 0.5 * rng.standard_normal((int(mask.sum()), WIDTH)).astype(np.float32)
        if spec.dtype == "int8":
            scales[layer] = np.abs(values).max(axis=1, initial=1e-3) / 127
            states[layer] = np.rint(values / scales[layer][:, None]).astype(np.int8)
        else:
            states[layer] = values.astype(spec.dtype)
    hidden = cf.HiddenStates(mask, states, scales)
    exact = logprobs_of(hidden.values(LAYER), metadata.targets["head"], weight, None)
    entropy, nothing = np.zeros(len(mask), np.float32), np.zeros(len(mask), np.int64)
    entropy[mask] = -(np.exp(exact) * exact).sum(axis=1)
    targets = cf.SparseTargets(
        counts=nothing,
        ids=np.zeros(0, np.int64),
        logprobs=np.zeros(0, np.float32),
        exact_counts=nothing,
        residual_logprob=np.zeros(len(mask), np.float32),
        entropy=entropy,
    )
    return cf.CacheRow(**{**vars(found), "targets": targets, "hidden": hidden})


def write(path: Path, **changes: Any) -> list[cf.CacheRow]:
    weight, _ = numbers()
    contents = cf.head_contents(weight, None, "float32")
    metadata = head_metadata(contents, **changes)
    rows = [head_row(i, metadata, weight) for i in range(metadata.num_rows)]
    with cf.CacheWriter(path, metadata, head=contents) as writer:
        writer.write(rows)
    return rows


# ---- the file


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_file_is_what_safetensors_reads_and_writes(dtype: str, bias: bool, tmp_path: Path) -> None:
    weight, offset = numbers(dtype, bias)
    contents = cf.head_contents(weight, offset, dtype)
    assert len(contents) == cf.head_file_bytes(VOCAB, WIDTH, dtype, bias=bias)
    found = safetensors.torch.load(contents)
    assert found.keys() == {"weight", *(["bias"] if bias else [])}
    assert str(found["weight"].dtype) == f"torch.{dtype}"
    assert np.array_equal(found["weight"].float().numpy(), widened(weight, dtype))
    theirs = safetensors.torch.save(found, {"made": "by them"})
    spec = cf.HeadSpec(
        layer=5, dtype=dtype, bias=bias, logit_scale=1.0, softcap=None, bytes=len(theirs), sha256=cf.sha256(theirs)
    )
    for data in (contents, theirs):
        head = cf.StoredHead.of(memoryview(data), spec, VOCAB, WIDTH, "x")  # type: ignore[arg-type]
        assert np.array_equal(head.rows(slice(None)), widened(weight, dtype))
        assert (head.bias is not None) == bias and np.array_equal(head.bias, offset) if bias else head.bias is None


@pytest.mark.parametrize(
    "head",
    [{}, {"logit_scale": 0.0625}, {"softcap": 3.0}, {"logit_scale": 2.5, "softcap": 4.0}],
    ids=["plain", "scale", "cap", "both"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_distributions_are_those_of_the_formula(
    head: dict[str, Any], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache_format.manifest.stored_head.VOCAB_BLOCK", 300)
    weight, offset = numbers(bias=bias)
    data = cf.head_contents(weight, offset, "float32")
    plain = {"logit_scale": 1.0, "softcap": None, **head}
    spec = cf.HeadSpec(layer=5, dtype="float32", bias=bias, bytes=len(data), sha256="", **plain)
    stored = cf.StoredHead.of(memoryview(data), spec, VOCAB, WIDTH, "x")  # type: ignore[arg-type]
    states = np.random.default_rng(1).standard_normal((7, WIDTH)).astype(np.float32)
    expected = logprobs_of(states, head, weight, offset)
    assert np.abs(stored.logprobs(states) - expected).max() < 1e-5
    assert np.abs(np.exp(stored.logprobs(states).astype(np.float64)).sum(axis=1) - 1).max() < 1e-6


def lying(**changes: Any) -> bytes:
    """A head whose header says something else of its weight."""
    contents = cf.head_contents(*numbers(), "float32")
    header, _ = _header(VOCAB, WIDTH, "float32", False)
    told = json.loads(header[8:])
    told["weight"] |= changes
    text = json.dumps({name: each for name, each in told.items() if each}).encode()
    return struct.pack("<Q", len(text)) + text + contents[len(header) :]


LIES = {
    "another dtype": lying(dtype="F16"),
    "another shape": lying(shape=[WIDTH, VOCAB]),
    "numbers that are not there": lying(data_offsets=[4, 4 + 4 * VOCAB * WIDTH]),
    "fewer numbers": lying(data_offsets=[0, 8]),
    "offsets that are no numbers": lying(data_offsets=["a", "b"]),
    "a long header": struct.pack("<Q", 2**40) + b"{}",
    "no JSON": struct.pack("<Q", 2) + b"[[",
    "a list": struct.pack("<Q", 2) + b"[]",
    "nothing in it": struct.pack("<Q", 2) + b"{}",
    "a bias besides": cf.head_contents(*numbers(bias=True), "float32"),
    "empty": b"",
}


@pytest.mark.long
@pytest.mark.parametrize("lie", LIES)
def test_a_head_that_lies_is_refused_with_its_name(lie: str, tmp_path: Path) -> None:
    write(tmp_path / "cache")
    data = LIES[lie]
    (tmp_path / "cache/head.safetensors").write_bytes(data)

    def seal(manifest: dict[str, Any]) -> None:
        manifest["targets"]["head"] |= {"bytes": len(data), "sha256": cf.sha256(data)}

    seal_manifest(tmp_path / "cache", seal)
    assert "head.safetensors: not the head that the manifest describes" in complaint(tmp_path / "cache", cf.FormatError)


def test_damage_is_found_with_the_name_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "cache")
    file = tmp_path / "cache/head.safetensors"
    whole = file.read_bytes()
    for damaged, words in (
        (whole[:500] + bytes([whole[500] ^ 1]) + whole[501:], "checksum"),
        (whole[:-1], f"{len(whole) - 1:,} bytes, expected {len(whole):,}"),
        (None, "no such file"),
    ):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        for deep in (False, True):
            with pytest.raises(cf.FormatError, match=f"head.safetensors: {words}"):
                cf.verify_cache(tmp_path / "cache", deep=deep)


# ---- the cache


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_round_trip_and_every_check(dtype: str, tmp_path: Path) -> None:
    rows = write(tmp_path / "cache", dtype=dtype)
    cache = cf.open_cache(tmp_path / "cache")
    summary = cf.verify_cache(tmp_path / "cache", deep=True)
    on_disk = sum(
        file.stat().st_size
        for file in [tmp_path / "cache/head.safetensors", *(tmp_path / "cache/shards").glob("*.arrow")]
    )
    assert summary.bytes == cache.manifest.stored_bytes == on_disk and summary.entries == 0
    head, (weight, _) = cache.head(), numbers()
    assert head is not None
    for found, row in zip(cache, rows, strict=True):
        assert found.hidden is not None and row.hidden is not None
        assert np.array_equal(found.hidden.states[LAYER], row.hidden.states[LAYER])
        states = row.hidden.values(LAYER)
        if len(states):
            assert np.abs(head.logprobs(states) - logprobs_of(states, {}, weight, None)).max() < 1e-5


def test_the_card_shows_how_to_read_it_without_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its block is run as it stands, in the directory of a cache of every kind of number and head."""
    for i, (dtype, head) in enumerate((("float16", {}), ("int8", {"logit_scale": 0.5, "softcap": 2.0}))):
        rows = write(tmp_path / str(i), dtype=dtype, head=head)
        monkeypatch.chdir(tmp_path / str(i))
        card = Path("README.md").read_text()
        found: dict[str, Any] = {}
        exec(card.partition("```python\n")[2].partition("```")[0], found)
        expected = logprobs_of(rows[0].hidden.values(LAYER), head, numbers()[0], None)
        assert np.abs(found["logprobs"].numpy() - expected).max() < 1e-5
        assert "residual_logprob" not in card and "target entries | 0" in card


def test_only_caches_with_a_head_need_readers_of_version_2(tmp_path: Path) -> None:
    """A reader that knows version 1 alone refuses them by their version, instead of calling them damaged."""
    write(tmp_path / "cache")
    assert json.loads((tmp_path / "cache/manifest.json").read_text())["format_version"] == 2
    schema = pa.ipc.open_file(tmp_path / "cache/shards/shard-00000.arrow").schema
    assert schema.metadata[b"format_version"] == b"2"
    assert sample_metadata().format_version == 1
    seal_manifest(tmp_path / "cache", lambda manifest: manifest.update(format_version=1))
    with pytest.raises(cf.FormatError, match="format version 1, targets like these have 2"):
        cf.open_cache(tmp_path / "cache")


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": {"head": None}},
        {"targets": {"kind": "top-k", "max_entries": 5}},
        {"targets": {"max_entries": 3}},
        {"targets": {"samples": 1}},
        {"hidden": {"every": 2}},
        {"hidden": {"layers": [4]}},
        {"targets": {"hidden": None}},
        {"head": {"dtype": "float64"}},
        {"head": {"layer": -1}},
        {"head": {"softcap": 0.0}},
        {"head": {"logit_scale": float("inf")}},
        {"head": {"logit_scale": "1"}},
        {"head": {"bytes": "many"}},
        {"encoding": "packed"},
    ],
    ids=str,
)
def test_metadata_that_mean_nothing(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="head|hidden|entries"):
        head_metadata(b"", **changes)


def test_a_layer_above_the_last_belongs_to_a_head() -> None:
    head_metadata(b"", head={"layer": 6}, hidden={"layers": [5, 6]})
    hidden = {"layers": [6], "teacher_layers": 5, "width": WIDTH, "dtype": "int8", "every": 1}
    with pytest.raises(ValueError, match="hidden layer 6 of 5, and no head"):
        sample_metadata(targets={"kind": "top-k", "k": 5, "temperature": 1.0, "hidden": hidden})


def test_the_writer_wants_the_head_that_the_metadata_describe(tmp_path: Path) -> None:
    contents = cf.head_contents(*numbers(), "float32")
    metadata = head_metadata(contents)
    with pytest.raises(ValueError, match="need the contents of their head"):
        cf.CacheWriter(tmp_path / "a", metadata)
    with pytest.raises(ValueError, match="not those that metadata"):
        cf.CacheWriter(tmp_path / "b", metadata, head=cf.head_contents(*numbers(seed=1), "float32"))
    with pytest.raises(ValueError, match="not those that metadata"):
        cf.CacheWriter(tmp_path / "c", sample_metadata(), head=contents)


def test_an_interrupted_run_goes_on_with_its_own_head_only(tmp_path: Path) -> None:
    weight, _ = numbers()
    contents = cf.head_contents(weight, None, "float32")
    metadata = head_metadata(contents)
    rows = [head_row(i, metadata, weight) for i in range(metadata.num_rows)]
    with pytest.raises(KeyboardInterrupt), cf.CacheWriter(tmp_path / "cache", metadata, head=contents) as writer:
        writer.write(rows[:5])
        raise KeyboardInterrupt
    other = cf.head_contents(*numbers(seed=1), "float32")
    with pytest.raises(cf.MismatchError, match="targets.head.sha256"):
        cf.CacheWriter(tmp_path / "cache", head_metadata(other), head=other, resume=True)
    (tmp_path / "cache/head.safetensors").write_bytes(contents[:100])  # half a file, as if the disk had been full
    with cf.CacheWriter(tmp_path / "cache", metadata, head=contents, resume=True) as writer:
        assert writer.next_row == 4
        writer.write(rows[4:])
    cf.verify_cache(tmp_path / "cache", deep=True)
    (tmp_path / "cache/manifest.json").rename(tmp_path / "cache/manifest.partial.json")
    (tmp_path / "cache/head.safetensors").unlink()
    with pytest.raises(cf.CacheError, match="head.safetensors: missing or not the recorded file"):
        cf.finish_cache(tmp_path / "cache")
    (tmp_path / "cache/head.safetensors").write_bytes(contents)
    cf.finish_cache(tmp_path / "cache")
    cf.remove_cache(tmp_path / "cache")
    assert not (tmp_path / "cache/head.safetensors").exists()


def without_a_state(columns: dict[str, Any]) -> None:
    mask, loss = columns["hidden_mask"].to_pylist(), columns["loss_mask"].to_pylist()
    states = columns[f"hidden_{LAYER}"].to_pylist()
    row = next(i for i, each in enumerate(loss) if any(each))
    position = loss[row].index(True)
    del states[row][sum(mask[row][:position])]
    mask[row][position] = False
    columns["hidden_mask"] = pa.array(mask, columns["hidden_mask"].type)
    columns[f"hidden_{LAYER}"] = pa.array(states, columns[f"hidden_{LAYER}"].type)


def test_a_counted_position_without_its_state_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "cache")
    forge_shard(tmp_path / "cache", without_a_state)
    assert "a loss token without the state that is its target" in complaint(tmp_path / "cache")


# ---- wrong numbers that no checksum can find


def test_a_head_of_other_weights_is_found_by_the_entropies(tmp_path: Path) -> None:
    write(tmp_path / "cache")
    other = cf.head_contents(1.5 * numbers(seed=1)[0], None, "float32")
    (tmp_path / "cache/head.safetensors").write_bytes(other)
    seal_manifest(tmp_path / "cache", lambda manifest: manifest["targets"]["head"].update(sha256=cf.sha256(other)))
    cf.verify_cache(tmp_path / "cache")
    assert "its state and the head have an entropy of" in complaint(tmp_path / "cache", cf.CorruptShardError)


def test_a_forgotten_scale_is_found_by_the_entropies(tmp_path: Path) -> None:
    write(tmp_path / "cache", dtype="int8", head={"logit_scale": 3.0})
    cf.verify_cache(tmp_path / "cache", deep=True)
    seal_manifest(tmp_path / "cache", lambda manifest: manifest["targets"]["head"].update(logit_scale=1.0))
    assert "its state and the head have an entropy of" in complaint(tmp_path / "cache", cf.CorruptShardError)


def test_states_one_position_late_are_found_by_the_entropies(tmp_path: Path) -> None:
    weight, _ = numbers()
    contents = cf.head_contents(weight, None, "float32")
    metadata = head_metadata(contents)
    rows = [head_row(i, metadata, weight) for i in range(10)]
    for row in rows:
        row.hidden.states[LAYER][:] = np.roll(row.hidden.states[LAYER], 1, axis=0)
    with cf.CacheWriter(tmp_path / "cache", metadata, head=contents) as writer:
        writer.write(rows)
    assert "its state and the head have an entropy of" in complaint(tmp_path / "cache", cf.CorruptShardError)


# ---- converted


def convert(path: Path, output: Path, **changes: Any) -> cf.Cache:
    list(cf.convert_cache(path, output, cf.Conversion(**changes)))
    return cf.open_cache(output)


def test_top_k_targets_are_made_of_states_and_head(tmp_path: Path) -> None:
    rows = write(tmp_path / "cache", dtype="float32", layers=(3, LAYER))
    made = convert(tmp_path / "cache", tmp_path / "made", top_k=7)
    assert made.metadata.targets["kind"] == "top-k" and made.metadata.targets["k"] == 7
    assert made.metadata.head is None and made.metadata.format_version == 1
    assert made.metadata.hidden is not None and made.metadata.hidden.layers == (3,)  # no target is made of these
    assert not (tmp_path / "made/head.safetensors").exists()
    cf.verify_cache(tmp_path / "made", deep=True)
    codes = made.metadata.codebooks["target_logprobs"]
    for found, row in zip(made, rows, strict=True):
        exact = logprobs_of(row.hidden.values(LAYER), {}, numbers()[0], None)
        for of_position, t in zip(exact, np.flatnonzero(row.hidden.mask), strict=True):
            ids, logprobs = found.targets.at(t)
            best = np.sort(np.argsort(-of_position)[:7])
            assert np.array_equal(ids, best)
            assert np.array_equal(logprobs, codes.decode(codes.encode(of_position[best])))
            left = np.sqrt(1 - np.exp(of_position[best]).sum())
            off = abs(np.exp(found.targets.residual_logprob[t] / 2) - left)
            assert off <= made.metadata.codebooks["residual_logprob"].max_error
    packed = convert(tmp_path / "cache", tmp_path / "packed", top_k=7, encoding="packed", drop_hidden=True)
    assert packed.metadata.hidden is None and np.array_equal(packed[3].targets.ids, made[3].targets.ids)


def test_other_changes_keep_them_hidden_or_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "cache")
    kept = convert(tmp_path / "cache", tmp_path / "kept", rows_per_shard=3, compression_level=3)
    assert kept.metadata.head == cf.open_cache(tmp_path / "cache").metadata.head
    cf.verify_cache(tmp_path / "kept", deep=True)
    for change, words in (
        ({"encoding": "packed"}, "no entries to pack"),
        ({"levels": 64}, "no log-probabilities to round"),
        ({"drop_hidden": True}, "the hidden states are the targets"),
        ({"samples": 1}, "hidden targets have none"),
        ({"top_k": VOCAB + 1}, "the vocabulary has 1,000 tokens"),
    ):
        with pytest.raises(cf.MismatchError, match=words):
            convert(tmp_path / "cache", tmp_path / "refused", **change)
        assert not (tmp_path / "refused").exists()


def test_unknown_keys_of_the_head_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "cache")
    seal_manifest(tmp_path / "cache", lambda manifest: manifest["targets"]["head"].update(later="something"))
    assert cf.open_cache(tmp_path / "cache").head() is not None
    edit_json(tmp_path / "cache/manifest.json", lambda manifest: manifest["targets"].pop("head"))
    with pytest.raises(cf.FormatError, match="checksum"):
        cf.open_cache(tmp_path / "cache")


def test_a_head_on_an_object_store_is_kept_on_the_disk(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}/cache"
    write(url)  # type: ignore[arg-type]
    copies = cf.ReadCache(tmp_path / "copies", 10**7)
    first = cf.open_cache(url, read_cache=copies).head()
    fsspec.filesystem("memory").rm(f"{url.removeprefix('memory:/')}/head.safetensors")
    with pytest.raises(cf.FormatError, match="head.safetensors: no such file"):
        cf.open_cache(url).head()
    second = cf.open_cache(url, read_cache=copies).head()
    assert first is not None and second is not None and np.array_equal(first.weight, second.weight)
    (copy,) = (file for file in copies.directory.rglob("*") if file.is_file())
    copy.write_bytes(copy.read_bytes()[:-1] + b"!")  # what is damaged there is fetched again, and here cannot be
    with pytest.raises(cf.FormatError, match="head.safetensors: no such file"):
        cf.open_cache(url, read_cache=copies).head()


def test_a_head_that_may_not_be_read_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{uuid.uuid4().hex}/cache"
    write(url)  # type: ignore[arg-type]

    def refused(*_: object, **__: object) -> bytes:
        raise PermissionError("Forbidden")

    cache = cf.open_cache(url)
    monkeypatch.setattr(fsspec.filesystem("memory").__class__, "cat_file", refused)
    with pytest.raises(PermissionError, match=f"Forbidden.*{url}/head.safetensors"):
        cache.head()
