"""The caches that `cache-teacher` would write with each rule, all computed together from the stored states.

From the logits on, this is the code of stage one: `sparse_targets`, the rule's codebook, the writer. Quantisation,
sampling and bytes per token are therefore those of stage one; only the teacher's forward pass is not repeated.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import cache_format as cf
from benchmarks.quality.corpora import Corpus
from benchmarks.quality.states import States
from benchmarks.quality.tracks import Arm, Track
from pipeline.models.head import Head
from pipeline.teacher.targets.cache_rows import cache_rows
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets, draws, sparse_targets

CHUNK_POSITIONS = 256
TEXT_COLUMNS = ("row", "input_ids", "loss_mask", "segment_lengths")


def cache_name(rule: TargetRule) -> str:
    """Name of a rule's cache. Arms with the same rule share it; arms of several epochs read its first rows."""
    parts = {"top-k": rule.top_k, "random": rule.draws}.get(rule.kind) or f"{1 / (rule.tail_threshold or 1):.0f}"
    return f"{rule.kind}-{parts}" + (f"-samples-{rule.samples}" if (rule.samples or 1) > 1 else "")


def rows_of(arm: Arm, rows: int) -> int:
    """Number of rows of the corpus that an arm sees, `arm.epochs` times each."""
    return int(rows * arm.share) // arm.epochs


@torch.inference_mode()
def build_caches(
    track: Track,
    arms: Sequence[Arm],
    corpus: Corpus,
    states: States,
    head: Head,
    fingerprint: dict[str, str],
    directory: Path,
) -> dict[str, Path]:
    """Path of the cache of each arm that reads one, by the arm's name. Continues unfinished caches."""
    paths = {}
    wanted: dict[Path, tuple[TargetRule, int]] = {}
    for arm in arms:
        if arm.rule is not None:
            path = paths[arm.name] = directory / cache_name(arm.rule)
            rows = rows_of(arm, len(corpus.rows)) if (arm.rule.samples or 1) > 1 else len(corpus.rows)
            if not (path / "manifest.json").exists():
                wanted[path] = arm.rule, rows
    if not wanted:
        return paths
    began = time.monotonic()
    logits = torch.empty(CHUNK_POSITIONS, head.vocab_size)
    scratch = torch.empty_like(logits)
    with contextlib.ExitStack() as stack:
        writers = {
            path: stack.enter_context(
                cf.CacheWriter(path, _metadata(track, rule, rows, head, fingerprint), resume=True)
            )
            for path, (rule, rows) in wanted.items()
        }
        for start in range(0, len(corpus.rows), track.record_batch_rows):
            group = range(start, min(start + track.record_batch_rows, len(corpus.rows)))
            here = {path: writer for path, writer in writers.items() if writer.next_row == start < wanted[path][1]}
            if not here:
                continue
            chunks: dict[Path, list[ChunkTargets]] = {path: [] for path in here}
            row_of = np.repeat(np.array(group), corpus.loss_tokens[group.start : group.stop])
            position = np.concatenate([np.flatnonzero(corpus.rows[row].loss_mask) for row in group])
            hidden = states.of_rows(group)
            for first in range(0, len(hidden), CHUNK_POSITIONS):
                chunk = slice(first, first + CHUNK_POSITIONS)
                found = head.logits(hidden[chunk], out=logits)
                for path in here:
                    rule = wanted[path][0]
                    random = draws(rule, row_of[chunk], position[chunk])
                    chunks[path].append(sparse_targets(found, rule, random, scratch))
            for path, writer in here.items():
                rows = corpus.rows[group.start : group.stop]
                stored = [np.asarray(row.loss_mask, bool) for row in rows]
                writer.write(cache_rows(group, rows, stored, ChunkTargets.cat(chunks[path])))
            if group.stop % track.shard_rows == 0 or group.stop == len(corpus.rows):
                minutes = (time.monotonic() - began) / 60
                print(f"caches: {group.stop:,} of {len(corpus.rows):,} rows, {minutes:.1f} minutes", flush=True)
    return paths


def _metadata(track: Track, rule: TargetRule, rows: int, head: Head, fingerprint: dict[str, str]) -> cf.CacheMetadata:
    return cf.CacheMetadata(
        teacher={"name": f"teacher of track {track.number}"},
        tokenizer=fingerprint,
        vocab_size=head.vocab_size,
        alignment="next",
        targets={**rule.to_json(), "positions": "counted"},
        corpus={"rows": rows, "window_length": track.window},
        codebooks={**cf.default_codebooks(head.vocab_size), "target_logprobs": rule.codebook()},
        rows_per_shard=track.shard_rows,
        rows_per_record_batch=track.record_batch_rows,
    )


def sizes(path: Path) -> dict[str, float]:
    """Bytes per token of a cache, with every column, and its entries per loss token."""
    cache = cf.open_cache(path)
    exact = sum(int(np.asarray(row.targets.exact_counts, np.int64).sum()) for row in cache.iter_rows())
    text = sum(size for name, size in cache.column_bytes().items() if name in TEXT_COLUMNS)
    return {
        "bytes_per_token": sum(shard.bytes for shard in cache.manifest.shards) / cache.num_tokens,
        "text_bytes_per_token": text / cache.num_tokens,
        "entries_per_token": sum(shard.entries for shard in cache.manifest.shards) / cache.num_loss_tokens,
        "exact_entries_per_token": exact / cache.num_loss_tokens,
    }
