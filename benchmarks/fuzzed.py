"""Caches for `benchmarks.fuzz`: small valid ones, and the same with one part replaced by other bytes.

The checksums of a replaced part are made valid again, as an attacker would do, so that reading gets past them.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import cache_format as cf
from cache_format.manifest.documents_file import DOCUMENTS

SHARD, SIDECAR, LEXICON = "shards/shard-00000.arrow", "shards/shard-00000.json", "lexicon.arrow"
VOCAB, ROWS, TOKENS, WIDTH = 300, 6, 9, 4
HIDDEN_LAYER = 2

Files = dict[str, bytes]


def sound_cache(kind: str) -> Files:
    """Files of a small cache by name.

    Args:
        kind: `columns` or `packed`, with exact entries and two samples of the tail; `hidden`, with head, answers and
            a kept column.
    """
    rng = np.random.default_rng(0)
    common: dict[str, Any] = {
        "teacher": {"name": "fuzz"},
        "tokenizer": {"vocabulary": "0" * 64},
        "vocab_size": VOCAB,
        "alignment": "next",
        "rows_per_shard": 4,
        "rows_per_record_batch": 2,
    }
    with tempfile.TemporaryDirectory() as folder:
        cache, contents = Path(folder) / "cache", None
        if kind == "hidden":
            contents = cf.head_contents(rng.standard_normal((VOCAB, WIDTH)).astype(np.float32), None, "float32")
            recorded = cf.write_answers(Path(folder), map(_answer, range(ROWS)))
            documents = cf.documents_bytes({"domain": _kept_column()})
            kept = {"keep_columns": ["domain"], "documents_file": cf.describe_documents(documents)}
            corpus = {"rows": ROWS, "generation": {"answers_file": recorded}, **kept}
            metadata = cf.CacheMetadata(**common, targets=_hidden_targets(contents), corpus=corpus)
            rows = [_hidden_row(i, rng) for i in range(ROWS)]
        else:
            rule = {"kind": "threshold", "k": 1, "temperature": 1.0, "tail_threshold": 0.2}
            targets = {**rule, "samples": 2, "max_entries": 11}
            metadata = cf.CacheMetadata(**common, targets=targets, corpus={"rows": ROWS}, encoding=kind)
            rows = [_row(i, rng) for i in range(ROWS)]
        with cf.CacheWriter(cache, metadata, tokenizer_files={"tokenizer.json": b"{}"}, head=contents) as writer:
            writer.write(rows)
            if kind == "hidden":
                (Path(folder) / cf.ANSWERS).rename(cache / cf.ANSWERS)
                cf.write_documents(cache, documents)
        return {str(f.relative_to(cache)): f.read_bytes() for f in sorted(cache.rglob("*")) if f.is_file()}


def _hidden_targets(contents: bytes) -> dict[str, Any]:
    head = {"layer": HIDDEN_LAYER, "dtype": "float32", "bias": False, "logit_scale": 1.0, "softcap": None}
    return {
        "kind": "hidden",
        "temperature": 1.0,
        "max_entries": 0,
        "head": {**head, "bytes": len(contents), "sha256": _digest(contents)},
        "hidden": {"layers": [HIDDEN_LAYER], "teacher_layers": 2, "width": WIDTH, "dtype": "int8", "every": 1},
    }


def _kept_column() -> cf.KeptColumn:
    """One document in each row, as `_row` has."""
    return cf.KeptColumn.of(("web", "code", "books"), np.arange(ROWS) % 3, np.ones(ROWS, np.int64))


def _answer(row: int) -> dict[str, Any]:
    place = {"row": row, "document": row // 2, "answer": row % 2, "prompt_tokens": 3}
    return {**place, "stop_reason": "eos", "mean_logprob": -0.5, "text": "four", "token_logprobs": [-0.25, -0.75]}


def _hidden_row(index: int, rng: np.random.Generator) -> cf.CacheRow:
    row, nothing = _row(index, rng), np.zeros(TOKENS, np.int64)
    states = rng.integers(-127, 128, (int(row.loss_mask.sum()), WIDTH)).astype(np.int8)
    scales = rng.random(len(states)).astype(np.float32) / 100
    targets = cf.SparseTargets(
        counts=nothing,
        ids=np.zeros(0, np.int64),
        logprobs=np.zeros(0, np.float32),
        exact_counts=nothing,
        residual_logprob=np.zeros(TOKENS, np.float32),
        entropy=np.full(TOKENS, 2.0, np.float32),
    )
    hidden = cf.HiddenStates(row.loss_mask, {HIDDEN_LAYER: states}, {HIDDEN_LAYER: scales})
    return replace(row, targets=targets, hidden=hidden)


def _row(index: int, rng: np.random.Generator) -> cf.CacheRow:
    exact, sampled = rng.integers(1, 4, TOKENS), rng.integers(0, 4, (TOKENS, 2))
    ids, probs = [], []
    for count, samples in zip(exact, sampled, strict=True):
        order = rng.permutation(VOCAB)
        ids += [np.sort(order[:count]), *(np.sort(rng.permutation(order[count:])[:n]) for n in samples)]
        probs += [rng.dirichlet(np.ones(count + 1))[:count], np.full(samples.sum(), 0.1)]
    mask = np.arange(TOKENS) % 4 != 3
    mask[-1] = False
    return cf.CacheRow(
        row=index,
        input_ids=rng.integers(0, VOCAB, TOKENS),
        loss_mask=mask,
        segment_lengths=np.array([TOKENS]),
        targets=cf.SparseTargets(
            counts=exact + sampled.sum(axis=1),
            ids=np.concatenate(ids),
            logprobs=np.log(np.concatenate(probs)).astype(np.float32),
            exact_counts=exact,
            residual_logprob=np.full(TOKENS, -1.0, np.float32),
            entropy=np.full(TOKENS, 2.0, np.float32),
            sample_counts=sampled,
        ),
    )


def resealed(files: Files) -> Files:
    """The files with valid checksums, where they can still be parsed."""
    files = dict(files)
    for seal in (_seal_shard, _seal_lexicon, _seal_head, _seal_answers, _seal_documents, seal_manifest):
        with suppress(ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
            seal(files)
    return files


def _seal_shard(files: Files) -> None:
    sidecar, manifest = json.loads(files[SIDECAR]), json.loads(files["manifest.json"])
    for part in (sidecar["header"], *sidecar["record_batches"], sidecar["footer"]):
        part["sha256"] = _digest(files[SHARD][part["start"] : part["stop"]])
    if LEXICON in files:
        sidecar["annotations"]["lexicon_sha256"] = _digest(files[LEXICON])
    sidecar["file_bytes"] = manifest["shards"][0]["bytes"] = len(files[SHARD])
    files[SIDECAR] = json.dumps(sidecar).encode()
    manifest["shards"][0]["sidecar_sha256"] = _digest(files[SIDECAR])
    files["manifest.json"] = json.dumps(manifest).encode()


def _seal_lexicon(files: Files) -> None:
    _record(files, LEXICON, lambda manifest: manifest["lexicon"])


def _seal_head(files: Files) -> None:
    _record(files, cf.HEAD, lambda manifest: manifest["targets"]["head"])


def _seal_answers(files: Files) -> None:
    _record(files, cf.ANSWERS, lambda manifest: manifest["corpus"]["generation"]["answers_file"])


def _seal_documents(files: Files) -> None:
    _record(files, DOCUMENTS, lambda manifest: manifest["corpus"]["documents_file"])


def _record(files: Files, name: str, place: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    manifest = json.loads(files["manifest.json"])
    place(manifest).update(bytes=len(files[name]), sha256=_digest(files[name]))
    files["manifest.json"] = json.dumps(manifest).encode()


def seal_manifest(files: Files) -> None:
    files["manifest.json"] = with_own_digest(json.loads(files["manifest.json"]))


def with_own_digest(manifest: dict[str, Any]) -> bytes:
    member = '"manifest_sha256": "{}"'
    text = json.dumps({**manifest, "manifest_sha256": "0" * 64})
    return text.replace(member.format("0" * 64), member.format(_digest(text.encode()))).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def part_of(kind: str, name: str) -> tuple[bytes, Callable[[bytes], Files]]:
    """A part of a valid cache, and a function that replaces this part and returns the files."""
    files = sound_cache(kind)
    if name in files:
        return files[name], lambda data: resealed({**files, name: data})
    span = json.loads(files[SIDECAR])
    span = span["header"] if name == "header" else span["record_batches"][0]
    shard, start, stop = files[SHARD], span["start"], span["stop"]

    def instead(data: bytes) -> Files:
        # The part keeps its length, so the ranges in the sidecar stay valid.
        data = data[: stop - start].ljust(stop - start, b"\0")
        return resealed({**files, SHARD: shard[:start] + data + shard[stop:]})

    return shard[start:stop], instead


TARGETS: dict[str, tuple[str, str]] = {
    "manifest": ("columns", "manifest.json"),
    "sidecar": ("columns", SIDECAR),
    "header": ("columns", "header"),
    "shard": ("columns", "record batch"),
    "packed": ("packed", "record batch"),
    "lexicon": ("packed", LEXICON),
    "manifest-of-head": ("hidden", "manifest.json"),
    "head": ("hidden", cf.HEAD),
    "states": ("hidden", "record batch"),
    "answers": ("hidden", cf.ANSWERS),
    "documents": ("hidden", DOCUMENTS),
}


def read(files: Files, folder: Path) -> bool:
    """Whether the files are a valid cache; reads everything a user can. Raises: any exception except CacheError."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    try:
        read_all(cf.open_cache(folder))
        return True
    except cf.CacheError:
        return False


def read_all(cache: cf.Cache) -> None:
    """Reads everything in the first rows. Raises: CacheError."""
    cache.tokenizer_files()
    cache.column_bytes()
    head = cache.head()
    sum(1 for _ in cache.answers())
    kept = cache.kept
    for index in range(min(len(cache), ROWS)):
        row = cache[index]
        _, _, targets = row.label_ids, row.position_ids, row.targets
        if head is not None:
            targets = cf.rebuilt_targets(row, head, 3, slice(None))
        targets.merged().sorted_by_probability()
        for column in kept.values():
            _ = column[index]
        for sample in range(row.targets.num_samples):
            row.targets.sample(sample)
