"""What a cache will cost, before the days of work: bytes, time, entries and mass kept, for several kinds of targets.

One record batch of rows from all over the corpus goes through the real teacher, the real selection of entries and the
real writer, once for every kind of targets and encoding; everything is then in proportion to the tokens.

    seconds a token = forward pass and head (the same for all kinds) + choosing and sampling entries (of the kind),
                      or what the background thread takes to encode and write, if that is more

Bytes come out a little high for packed caches, whose table of likely tokens is learned here from one record batch and
there from a whole shard, and with hidden states beside the targets, which are counted as they are before compression.
Text that changes on its way through the corpus costs more than a sample says.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import cache_format as cf
from pipeline.models.head import Head
from pipeline.models.loading import model_name
from pipeline.models.padding import model_inputs
from pipeline.teacher.cache_config import CacheTeacherConfig, HiddenRule
from pipeline.teacher.opening import Corpus, open_corpus, open_teacher, open_tokenizer
from pipeline.teacher.targets.cache_rows import cache_rows
from pipeline.teacher.targets.hidden_states import predicted_bytes, quantised
from pipeline.teacher.targets.hidden_targets import (
    WrittenHead,
    states_spec,
    with_head,
    without_states_of,
    write_down,
)
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets, draws, sparse_targets
from pipeline.teacher.text.packing import TokenRow
from pipeline.teacher.writing.cache_metadata import CHUNK_POSITIONS, stored_positions
from pipeline.teacher.writing.shard_sizes import grouping, rows_together
from pipeline.teacher.writing.workers import this_worker

OTHERS = (
    TargetRule(top_k=16),
    TargetRule(top_k=64),
    TargetRule(kind="random"),
    TargetRule(kind="threshold", tail_threshold=1 / 8),
    TargetRule(kind="threshold", tail_threshold=1 / 20),
    TargetRule(kind="threshold", tail_threshold=1 / 50),
)
"""Shown beside the user's own."""

ENCODINGS = ("columns", "packed")


@dataclass(frozen=True, kw_only=True)
class RulePlan:
    """One kind of targets on the whole corpus."""

    targets: dict[str, object]  # as in a manifest
    chosen: bool  # the one that was asked for
    bytes_per_token: dict[str, float]  # by encoding
    bytes: dict[str, int]  # of the whole cache
    entries_per_token: float  # at positions that have targets
    exact_mass: float  # mean probability of the exact entries
    tokens_per_s: float
    seconds: float
    writer_bound: bool  # whether encoding and writing take longer than the teacher


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was measured, on what, and what follows from it."""

    rows: int
    tokens: int
    counted_tokens: int
    sample_rows: int
    sample_tokens: int
    forward_tokens_per_s: tuple[float, float]  # slowest and fastest batch, without choosing entries
    rules: tuple[RulePlan, ...]
    encoding: str  # asked for
    free_bytes: int | None  # where the cache is to lie; None on an object store
    cost_per_hour: float | None

    @property
    def chosen(self) -> RulePlan:
        return next(rule for rule in self.rules if rule.chosen)

    def cost_per_million_tokens(self, rule: RulePlan) -> float | None:
        """In the currency of `cost_per_hour`."""
        return None if self.cost_per_hour is None else self.cost_per_hour / 3600 / rule.tokens_per_s * 1e6

    @property
    def fits(self) -> bool:
        return self.free_bytes is None or self.chosen.bytes[self.encoding] < self.free_bytes


def plan_cache(
    config: CacheTeacherConfig,
    *,
    sample_rows: int | None = None,
    cost_per_hour: float | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """Runs the teacher over a sample of the text that `config` names; writes nothing to its output.

    Args:
        sample_rows: evenly spaced over the corpus; default: as many as a record batch has. With fewer, bytes come out
            higher.
        cost_per_hour: of the machine, in any currency.

    Raises: DataError, ModelError, ConfigError, as `cache_teacher` would.
    """
    worker = this_worker(config.workers, tensor_parallel=config.tensor_parallel, device_map=config.device_map)
    device = worker.device(config.device)
    on_stage("reading and tokenising the text")
    tokenizer = open_tokenizer(config)
    corpus = open_corpus(config, tokenizer)
    on_stage(f"loading the teacher on {device}")
    head = open_teacher(config, corpus, tokenizer, device)
    config.targets.check_vocabulary(head.vocab_size)
    others = [_beside(rule, config.targets) for rule in OTHERS if (rule.top_k or 0) <= head.vocab_size]
    rules = [config.targets, *(rule for rule in others if _main_part(rule) != _main_part(config.targets))]

    taken = min(sample_rows or rows_together(config), len(corpus))
    chosen = np.unique(np.linspace(0, len(corpus) - 1, taken).round().astype(int)).tolist()
    rows = sorted((corpus[index] for index in chosen), key=lambda row: -len(row.input_ids))
    on_stage(f"running the teacher on {len(rows)} of {len(corpus):,} rows, with {len(rules)} kinds of targets")
    written = write_down(config, head)
    spec = states_spec(config.hidden, head, written)
    beside = None if spec is None else without_states_of(spec, written)
    states = 0 if beside is None else predicted_bytes(beside, stored_positions(config, corpus))
    sample = _Sample(config, head, rules, states, written)
    for start in range(0, len(rows), config.batch_size):
        sample.run(rows[start : start + config.batch_size])
        on_progress(min(start + config.batch_size, len(rows)), len(rows))
    return Plan(
        rows=len(corpus),
        tokens=corpus.num_tokens,
        counted_tokens=corpus.num_counted_tokens,
        sample_rows=len(rows),
        sample_tokens=sample.tokens,
        forward_tokens_per_s=sample.forward_speeds,
        rules=tuple(sample.plan(rule, corpus, chosen=i == 0) for i, rule in enumerate(rules)),
        encoding=config.encoding,
        free_bytes=_free_bytes(config.output),
        cost_per_hour=cost_per_hour,
    )


def _beside(rule: TargetRule, chosen: TargetRule) -> TargetRule:
    """With what the user's own has besides its kind, so that the kinds are compared and nothing else."""
    samples = chosen.samples if rule.sampled and chosen.sampled else rule.samples
    return replace(rule, samples=samples, temperature=chosen.temperature)


def _main_part(rule: TargetRule) -> tuple[str, object]:
    """What a kind is called by in a table."""
    return rule.kind, rule.tail_threshold or rule.draws or rule.top_p or rule.top_k


class _Sample:
    """The rows that were run, with the targets that each rule makes of them, and the seconds of each part."""

    def __init__(
        self,
        config: CacheTeacherConfig,
        head: Head,
        rules: Sequence[TargetRule],
        states: int,
        written: WrittenHead | None = None,
    ) -> None:
        self.config, self.head, self.rules, self.states, self.written = config, head, rules, states, written
        self.rows: dict[int, list[cf.CacheRow]] = {i: [] for i in range(len(rules))}
        self.tokens = 0
        self.forward: list[tuple[int, float]] = []  # of each batch: tokens, seconds
        self.choosing: list[list[float]] = [[] for _ in rules]  # seconds of each batch
        device, width = head.device, head.vocab_size
        self.logits = torch.empty((CHUNK_POSITIONS, width), dtype=head.weight.dtype, device=device)
        self.scratch = torch.empty((CHUNK_POSITIONS, width), dtype=torch.float32, device=device)

    @torch.inference_mode()
    def run(self, rows: Sequence[TokenRow]) -> None:
        if not self.forward:
            self._hidden(rows)  # the first pass pays for allocations
        tokens = sum(len(row.input_ids) for row in rows)
        began = self._clock()
        hidden, stored = self._hidden(rows)
        forward, choosing = self._clock() - began, [0.0] * len(self.rules)
        first = len(self.rows[0])
        row_of = np.repeat(np.arange(first, first + len(rows)), [mask.sum() for mask in stored])
        position = np.concatenate([np.flatnonzero(mask) for mask in stored])
        chunks: list[list[ChunkTargets]] = [[] for _ in self.rules]
        multiplied = []  # by the head; only where it is the targets
        for start in range(0, len(hidden), CHUNK_POSITIONS):
            here = slice(start, start + CHUNK_POSITIONS)
            began = self._clock()
            if self.written is None:
                logits = self.head.logits(hidden[here], out=self.logits)
            else:
                logits, inner = self.written.form.logits(hidden[here], out=self.logits)
                multiplied.append(inner.cpu())
            forward += self._clock() - began
            for i, rule in enumerate(self.rules):
                began = self._clock()
                drawn = draws(rule, row_of[here], position[here])
                chunks[i].append(sparse_targets(logits, rule, drawn, self.scratch))
                choosing[i] += self._clock() - began
        self.tokens += tokens
        self.forward.append((tokens, forward))
        indices = range(first, first + len(rows))
        for i, found in enumerate(chunks):
            self.choosing[i].append(choosing[i])
            self.rows[i] += cache_rows(indices, rows, stored, ChunkTargets.cat(found).cpu())
        if self.written is not None:
            self._add_states(torch.cat(multiplied), stored)

    def _add_states(self, states: torch.Tensor, stored: Sequence[np.ndarray]) -> None:
        """To the rows of the last batch, those that hidden targets are [n, D]."""
        assert self.written is not None and self.rules[0].kind == "hidden"
        layer, dtype = self.written.layer, "float16" if self.config.hidden is None else self.config.hidden.dtype
        kept, scale = quantised(states, dtype)
        scales = {} if scale is None else {layer: scale.numpy()}
        whole = cf.HiddenStates(np.concatenate(stored), {layer: kept.numpy()}, scales)
        rows, start = self.rows[0], 0
        for i, mask in enumerate(stored, start=len(rows) - len(stored)):
            rows[i] = replace(rows[i], hidden=whole.cut(slice(start, start + len(mask))))
            start += len(mask)

    @property
    def forward_speeds(self) -> tuple[float, float]:
        speeds = [tokens / seconds for tokens, seconds in self.forward]
        return min(speeds), max(speeds)

    def plan(self, rule: TargetRule, corpus: Corpus, *, chosen: bool) -> RulePlan:
        index = self.rules.index(rule)
        rows = self.rows[index]
        bytes_per_token, total, writing = {}, {}, {}
        full = self.written if rule.kind == "hidden" else None
        per_row = stored_positions(self.config, corpus) / len(corpus)
        hidden = self.config.hidden
        if full is None and hidden is not None and hidden.layers is None:
            hidden = None  # it says of what dtype hidden targets are, which these are not
        spec = states_spec(hidden, self.head, full)
        per_shard = grouping(self.config, spec, per_row)["rows_per_shard"]
        for encoding in ENCODINGS if full is None else ENCODINGS[:1]:
            began = time.perf_counter()
            columns, of_shard, once = _written(rows, rule, self.config, self.head, encoding, full, per_shard)
            writing[encoding] = (time.perf_counter() - began) / self.tokens
            shards = -(-len(corpus) // per_shard)
            total[encoding] = round(columns / self.tokens * corpus.num_tokens + of_shard * shards + once) + self.states
            bytes_per_token[encoding] = total[encoding] / corpus.num_tokens
        batches = zip(self.forward, self.choosing[index], strict=True)
        computing = statistics.median((seconds + choosing) / tokens for (tokens, seconds), choosing in batches)
        per_token = max(computing, writing[self.config.encoding])
        counts = np.concatenate([row.targets.counts[row.loss_mask] for row in rows])
        residual = np.concatenate([row.targets.residual_logprob[row.loss_mask] for row in rows])
        return RulePlan(
            targets=rule.to_json(),
            chosen=chosen,
            bytes_per_token=bytes_per_token,
            bytes=total,
            entries_per_token=float(counts.mean()),
            exact_mass=1.0 if full is not None else float((1.0 - np.exp(residual.astype(np.float64))).mean()),
            tokens_per_s=1 / per_token,
            seconds=corpus.num_tokens * per_token,
            writer_bound=writing[self.config.encoding] > computing,
        )

    def _hidden(self, rows: Sequence[TokenRow]) -> tuple[torch.Tensor, list[np.ndarray]]:
        """States [n, D] of the positions that get targets, and which of each row they are."""
        device = self.head.device
        inputs = model_inputs(rows, masked=self.head.masked)
        everywhere = self.config.all_positions
        stored = [np.ones(len(row.loss_mask), bool) if everywhere else np.array(row.loss_mask, bool) for row in rows]
        mask = torch.zeros(inputs[0].shape, dtype=torch.bool)
        for i, of_row in enumerate(stored):
            mask[i, : len(of_row)] = torch.from_numpy(of_row)
        hidden = self.head.hidden_states(*(tensor.to(device) for tensor in inputs))
        return hidden[mask.to(device)], stored

    def _clock(self) -> float:
        if self.head.device.type == "cuda":
            torch.cuda.synchronize(self.head.device)
        return time.perf_counter()


def _written(
    rows: Sequence[cf.CacheRow],
    rule: TargetRule,
    config: CacheTeacherConfig,
    head: Head,
    encoding: str,
    written: WrittenHead | None,
    rows_per_shard: int,
) -> tuple[int, int, int]:
    """Bytes of these rows, of what every shard has besides, and of what a cache has once."""
    vocab_size, targets = head.vocab_size, rule.to_json()
    if written is not None:
        spec = states_spec(replace(config.hidden or HiddenRule(), layers=None), head, written)
        assert spec is not None
        targets = {**with_head(targets, written), "hidden": spec.to_json()}
    metadata = cf.CacheMetadata(
        teacher={"name": model_name(config.teacher)},
        tokenizer={},
        vocab_size=vocab_size,
        alignment="next" if rows[0].labels is None else "same",
        targets=targets,
        corpus={"rows": len(rows)},
        codebooks={**cf.default_codebooks(vocab_size), "target_logprobs": rule.codebook()},
        rows_per_shard=min(len(rows), rows_per_shard),  # few rows are compressed together, and worse
        rows_per_record_batch=len(rows),
        encoding=encoding,
        compression={"codec": "zstd", "level": config.compression_level},
    )
    with tempfile.TemporaryDirectory(prefix="distill-plan-") as folder:
        with cf.CacheWriter(folder, metadata, head=None if written is None else written.contents) as writer:
            writer.write([replace(row, row=i) for i, row in enumerate(rows)])
        cache = cf.open_cache(folder)
        columns, manifest = sum(cache.column_bytes().values()), cache.manifest
        of_shard = (manifest.shard_bytes - columns) // len(manifest.shards)
        return columns, of_shard, manifest.stored_bytes - manifest.shard_bytes


def _free_bytes(output: str) -> int | None:
    if "://" in output:
        return None
    place = Path(os.path.abspath(output))
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
