"""What a cache will cost, before the days of work: bytes, time, entries and mass kept, for several kinds of targets.

One record batch of rows from all over the corpus goes through the real teacher, the real selection of entries and the
real writer, once for every kind of targets and encoding; everything is then in proportion to the tokens.

    seconds a token = forward pass and head (the same for all kinds) + choosing and sampling entries (of the kind),
                      or what the background thread takes to encode and write, if that is more

For a teacher on a server, the forward pass is the time from the first request to the last answer, with as many requests
at once as the run will send.

Estimates of bytes are a little high for packed caches (the lexicon is learned from one record batch here, from a whole
shard in a run) and for hidden states stored beside the targets (counted uncompressed). Text that changes along the
corpus costs more than the sample suggests.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import cache_format as cf
from cache_format.wording import quantity
from pipeline.errors import ConfigError
from pipeline.models.loading import model_name
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.engines.interface import BatchSizeHalved, Measured, RowRequest, StoredHead, TeacherEngine
from pipeline.teacher.engines.server.server_config import SERVED_KINDS
from pipeline.teacher.opening import (
    Corpus,
    open_corpus,
    open_engine,
    open_tokenizer,
    opening_stage,
    row_request,
    with_dtype,
)
from pipeline.teacher.position_loss import PositionLoss, PositionLossMeter
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.targets.hidden_states import predicted_bytes
from pipeline.teacher.targets.hidden_targets import (
    states_spec,
    with_head,
    without_states_of,
)
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.packing import TokenCorpus
from pipeline.teacher.writing.cache_metadata import stored_positions
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
    loss_tokens: int
    sample_rows: int
    sample_tokens: int
    forward_tokens_per_s: tuple[float, float]  # slowest and fastest batch, without choosing entries
    rules: tuple[RulePlan, ...]
    encoding: str  # asked for
    free_bytes: int | None  # where the cache is to lie; None on an object store
    cost_per_hour: float | None
    position_loss: PositionLoss | None  # None for a masked teacher, and for one on a server

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
    on_warning: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Runs the teacher over a sample of the text that `config` names; writes nothing to its output.

    Args:
        sample_rows: evenly spaced over the corpus; default: as many as a record batch has. With fewer, bytes come out
            higher.
        cost_per_hour: of the machine, in any currency.
        on_warning: called with messages that the user should see but need not act on.

    Raises: DataError, ModelError, ConfigError, as `cache_teacher` would.
    """
    if config.generation is not None:
        raise ConfigError(
            f"{config.given('generation')}: plans are made for given text only; here it is not written yet. Plan "
            "without it, with text of the same kind and length as `data`."
        )
    worker = this_worker(config.workers, tensor_parallel=config.tensor_parallel, device_map=config.device_map)
    device = worker.device(config.device, config.teacher)
    on_stage("reading and tokenising the text")
    tokenizer = open_tokenizer(config)
    corpus = open_corpus(config, tokenizer)
    for warning in corpus.warnings:
        on_warning(warning)
    config = with_dtype(config, corpus, device, recorded=None, alone=worker.alone, on_stage=on_stage)
    on_stage(opening_stage(config, device))
    with closing(open_engine(config, corpus, tokenizer, device, timed=True)) as engine:
        config.targets.check_vocabulary(engine.vocab_size)
        others = [_beside(rule, config.targets) for rule in _others(config, engine.vocab_size)]
        rules = [config.targets, *(rule for rule in others if _main_part(rule) != _main_part(config.targets))]

        taken = min(sample_rows or rows_together(config), len(corpus))
        chosen = np.unique(np.linspace(0, len(corpus) - 1, taken).round().astype(int)).tolist()
        rows, kinds = quantity(len(corpus), "row"), quantity(len(rules), "kind")
        on_stage(f"running the teacher on {len(chosen)} of {rows}, with {kinds} of targets")
        stored_head = engine.stored_head
        beside = None if engine.hidden is None else without_states_of(engine.hidden, stored_head)
        states = 0 if beside is None else predicted_bytes(beside, stored_positions(config, corpus))
        # States beside the targets need not be computed: their size is known beforehand.
        engine.hidden = None if stored_head is None else _states_of_targets(config, engine, stored_head)
        requests = [row_request(config, corpus[index], index, engine.hidden) for index in chosen]
        sample = _Sample(config, engine, rules, states)
        while True:
            try:
                sample.run(requests, on_progress)
                break
            except BatchSizeHalved:
                pass
        return Plan(
            rows=len(corpus),
            tokens=corpus.num_tokens,
            loss_tokens=corpus.num_loss_tokens,
            sample_rows=len(requests),
            sample_tokens=sample.tokens,
            forward_tokens_per_s=sample.forward_speeds,
            rules=tuple(sample.plan(rule, corpus, chosen=i == 0) for i, rule in enumerate(rules)),
            encoding=config.encoding,
            free_bytes=_free_bytes(config.output),
            cost_per_hour=cost_per_hour,
            position_loss=sample.position_loss(corpus),
        )


def _others(config: CacheTeacherConfig, vocab_size: int) -> list[TargetRule]:
    """Kinds of targets to compare with the user's own. A server's lists must be long enough for them."""
    if config.on_server:
        return [rule for rule in OTHERS if rule.kind in SERVED_KINDS and rule.candidates < config.targets.candidates]
    return [rule for rule in OTHERS if (rule.top_k or 0) <= vocab_size]


def _beside(rule: TargetRule, chosen: TargetRule) -> TargetRule:
    """`rule` with the user's temperature and number of samples, so that only the kinds are compared."""
    samples = chosen.samples if rule.sampled and chosen.sampled else rule.samples
    return replace(rule, samples=samples, temperature=chosen.temperature)


def _main_part(rule: TargetRule) -> tuple[object, object]:
    """The kind and its main option, by which tables name it."""
    return rule.kind, rule.tail_threshold or rule.draws or rule.top_p or rule.top_k


class _Sample:
    """The rows that were run, with the targets that each rule makes of them, and the seconds of each part."""

    def __init__(
        self,
        config: CacheTeacherConfig,
        engine: TeacherEngine,
        rules: Sequence[TargetRule],
        states: int,
    ) -> None:
        self.config, self.engine, self.rules, self.states = config, engine, rules, states
        self.rows: list[list[cf.CacheRow]] = []  # by rule
        self.tokens = 0
        self.measured: list[Measured] = []

    def run(self, requests: Sequence[RowRequest], on_progress: Callable[[int, int], None]) -> None:
        self.tokens = sum(request.tokens for request in requests)
        done = 0

        def on_batch(batch: Sequence[RowRequest]) -> None:
            nonlocal done
            done += len(batch)
            on_progress(done, len(requests))

        if not self.config.on_server:  # which has answered a few questions already
            longest_first = sorted(requests, key=lambda request: -request.tokens)
            self.engine.run(longest_first[: self.engine.batch_size], self.rules).rows()  # pays for allocations
        running = self.engine.run(requests, self.rules, on_batch)
        self.rows = [running.rows(i) for i in range(len(self.rules))]
        self.measured = running.measured()
        # Only hidden targets, the first rule if any, consist of states.
        self.rows[1:] = [[replace(row, hidden=None) for row in rows] for rows in self.rows[1:]]

    def position_loss(self, corpus: Corpus) -> PositionLoss | None:
        if not isinstance(corpus, TokenCorpus):
            return None
        meter = PositionLossMeter(corpus)
        for batch in self.measured:
            if batch.label_logprobs is None:
                return None
            meter.add(batch.requests, batch.label_logprobs)
        return meter.result()

    @property
    def forward_speeds(self) -> tuple[float, float]:
        speeds = [each.timing.tokens / each.timing.forward for each in self.measured]
        return min(speeds), max(speeds)

    def plan(self, rule: TargetRule, corpus: Corpus, *, chosen: bool) -> RulePlan:
        index = self.rules.index(rule)
        rows = self.rows[index]
        bytes_per_token, total, writing = {}, {}, {}
        full = self.engine.stored_head if rule.kind == "hidden" else None
        per_row = stored_positions(self.config, corpus) / len(corpus)
        hidden = self.config.hidden
        if full is None and hidden is not None and hidden.layers is None:
            hidden = None  # only the dtype of hidden targets, which these are not
        spec = states_spec(hidden, self.engine, full)
        per_shard = grouping(self.config, spec, per_row)["rows_per_shard"]
        for encoding in ENCODINGS if full is None else ENCODINGS[:1]:
            began = time.perf_counter()
            columns, of_shard, once = _written(rows, rule, self.config, self.engine, encoding, full, per_shard)
            writing[encoding] = (time.perf_counter() - began) / self.tokens
            shards = -(-len(corpus) // per_shard)
            total[encoding] = round(columns / self.tokens * corpus.num_tokens + of_shard * shards + once) + self.states
            bytes_per_token[encoding] = total[encoding] / corpus.num_tokens
        timings = [batch.timing for batch in self.measured]
        computing = statistics.median((each.forward + each.selection[index]) / each.tokens for each in timings)
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


def _written(
    rows: Sequence[cf.CacheRow],
    rule: TargetRule,
    config: CacheTeacherConfig,
    engine: TeacherEngine,
    encoding: str,
    stored_head: StoredHead | None,
    rows_per_shard: int,
) -> tuple[int, int, int]:
    """Bytes of these rows, of the rest of every shard, and of the files that a cache has once."""
    vocab_size, targets = engine.vocab_size, rule.to_json()
    if stored_head is not None:
        targets = {
            **with_head(targets, stored_head),
            "hidden": _states_of_targets(config, engine, stored_head).to_json(),
        }
    metadata = cf.CacheMetadata(
        teacher={"name": model_name(config.teacher)},
        tokenizer={},
        vocab_size=vocab_size,
        alignment="next" if rows[0].labels is None else "same",
        targets=targets,
        corpus={"rows": len(rows)},
        codebooks=rule.codebooks(vocab_size),
        rows_per_shard=min(len(rows), rows_per_shard),  # few rows are compressed together, and worse
        rows_per_record_batch=len(rows),
        encoding=encoding,
        compression={"codec": "zstd", "level": config.compression_level},
    )
    with tempfile.TemporaryDirectory(prefix="distill-plan-") as folder:
        with cf.CacheWriter(folder, metadata, head=None if stored_head is None else stored_head.contents) as writer:
            writer.write([replace(row, row=i) for i, row in enumerate(rows)])
        cache = cf.open_cache(folder)
        columns, manifest = sum(cache.column_bytes().values()), cache.manifest
        of_shard = (manifest.shard_bytes - columns) // len(manifest.shards)
        return columns, of_shard, manifest.stored_bytes - manifest.shard_bytes


def _states_of_targets(config: CacheTeacherConfig, engine: TeacherEngine, stored_head: StoredHead) -> cf.HiddenSpec:
    """The hidden states that hidden targets consist of, without other layers."""
    spec = states_spec(replace(config.hidden or HiddenRule(), layers=None), engine, stored_head)
    assert spec is not None
    return spec


def _free_bytes(output: str) -> int | None:
    if "://" in output:
        return None
    place = Path(os.path.abspath(output))
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
