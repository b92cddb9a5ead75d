"""Rows ─▶ teacher engine ─▶ cache: the run that can take days, arranged so that the teacher never waits.

    corpus ─▶ rows of a record batch ─▶ engine: batches of similar length ─▶ targets on their way to the host
           ─▶ one background thread: wait, check, encode, write ─▶ shard ─▶ manifest

The main thread only computes; the background thread is at most two record batches behind, also across the end of a
shard: the next one is claimed and computed while the last record batches of this one are written. The contents of a
shard depend on the corpus, the teacher, the batch size and the device, but not on timing or on which process computes
it (`writing.workers`): batches never cross record batches, and record batches never cross shards. When a batch runs out
of memory, the batch size is halved, the shard is restarted, and the size is recorded in the shard's sidecar. Where the
size is found by trying (`batch_tokens` auto), timing decides it; every sidecar records it, and a later run reuses it.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import cache_format as cf
from cache_format.wording import quantity
from pipeline.models.tokenizers import tokenizer_files, tokenizer_fingerprint
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.engines.interface import BatchSizeHalved, RowRequest, RunningRows, TeacherEngine
from pipeline.teacher.engines.vllm.vllm_version import installed
from pipeline.teacher.opening import (
    CachedText,
    Corpus,
    as_dated,
    check_inputs,
    open_corpus,
    open_engine,
    open_tokenizer,
    row_request,
    with_dtype,
)
from pipeline.teacher.progress import CaptureProgress, CaptureSummary
from pipeline.teacher.targets import hidden_states
from pipeline.teacher.targets.hidden_targets import describe_head
from pipeline.teacher.writing.cache_metadata import cache_metadata, stored_positions
from pipeline.teacher.writing.saved_config import config_record, save_config
from pipeline.teacher.writing.shard_sizes import as_begun
from pipeline.teacher.writing.workers import check_output, this_worker

RECORD_BATCHES_IN_FLIGHT = 2


def cache_teacher(
    config: CacheTeacherConfig,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[CaptureProgress], None] = lambda _: None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> CaptureSummary:
    """Runs the teacher over the text and writes the cache; continues an unfinished run with the same settings, and
    leaves a finished one alone. One of several such processes writes its share (`config.workers`).

    Args:
        on_stage: called at the start of each stage with a description of it.
        on_progress: called after every batch with the progress of the run.
        on_warning: called with messages that the user should see but need not act on.

    Raises:
        DataError, ModelError, ConfigError: the text, the teacher or the options cannot be used.
        CacheError: `output` holds something else, or another process is writing it alone; MismatchError: it holds a
            run with other settings.
    """
    worker = this_worker(config.workers, tensor_parallel=config.tensor_parallel, device_map=config.device_map)
    # Fail on an occupied output before spending minutes on loading.
    check_inputs(config, config.output)
    if not worker.follows:
        check_output(config, worker)
    device = worker.device(config.device)

    if config.running.engine == "auto" and device.type == "cuda" and installed() is not None:
        on_warning("vLLM is installed: `engine=vllm` is usually faster than transformers on a GPU")

    on_stage("reading and tokenising the text")
    tokenizer = open_tokenizer(config)
    recorded = None if config.overwrite else cf.recorded_metadata(config.output)
    corpus = open_corpus(as_dated(config, None if recorded is None else recorded.corpus), tokenizer)
    config = as_dated(config, corpus.description)
    for warning in corpus.warnings:
        on_warning(warning)

    begun = None if recorded is None else recorded.teacher.get("dtype")
    chosen = with_dtype(config, corpus, device, recorded=begun, alone=worker.alone, on_stage=on_stage)
    on_stage(f"asking {config.teacher}" if config.on_server else f"loading the teacher on {device}")
    with closing(open_engine(chosen, corpus, tokenizer, device)) as engine:
        stored_head = engine.stored_head
        metadata = cache_metadata(config, corpus, engine, tokenizer_fingerprint(tokenizer))

        states = "" if metadata.hidden is None else f", {_describe_states(metadata.hidden, config, corpus)}"
        states += describe_head(stored_head, engine.vocab_size)
        on_stage(f"caching {quantity(len(corpus), 'row')}, {quantity(corpus.num_tokens, 'token')}{states}")
        record = config_record(config)
        if config.overwrite and not worker.follows:
            # Not earlier: text and teacher have now been read successfully.
            cf.remove_cache(config.output, stale_after_s=config.workers.stale_after)
        metadata = as_begun(config, metadata)
        options = {"head": None if stored_head is None else stored_head.contents}
        with worker.open_writer(
            config.output, metadata, tokenizer_files(tokenizer), on_stage, device, **options
        ) as writer:
            if not worker.follows:
                save_config(config.output, record)
                if corpus.documents_file is not None:
                    cf.write_documents(config.output, corpus.documents_file)
            for holder in writer.taken_over:
                on_warning(f"{config.output}: {holder} is gone; this run takes over")
            request = partial(row_request, config, corpus, hidden=metadata.hidden)
            capture = Capture(config, corpus, engine, metadata, writer, request, on_progress)
            capture.run()
        return capture.summary()


def _describe_states(spec: cf.HiddenSpec, config: CacheTeacherConfig, corpus: Corpus) -> str:
    positions = -(-stored_positions(config, corpus) // spec.every)
    size = hidden_states.predicted_bytes(spec, stored_positions(config, corpus)) / 1e6
    numbers = f"{quantity(positions, 'position')} × {quantity(len(spec.layers), 'layer')}"
    return f"hidden states of {numbers} × {spec.width} × {spec.dtype} = {size:,.1f} MB"


@dataclass
class _Progress:
    """What this run has computed, of one shard or in all of its finished ones; mass: exact mass of the loss tokens."""

    rows: int = 0
    tokens: int = 0
    mass_sum: float = 0.0
    mass_count: int = 0

    def add(self, other: _Progress) -> None:
        self.rows += other.rows
        self.tokens += other.tokens
        self.mass_sum += other.mass_sum
        self.mass_count += other.mass_count


@dataclass(frozen=True)
class _Written:
    """A record batch on its way through the background thread. The future gives its exact mass and loss tokens."""

    shard: int
    last: bool  # of its shard
    future: Future[tuple[float, int]]


class Capture:
    """One run: owns the background thread and the running sums.

    The main thread alone changes which shards there are. Rows and tokens of a shard are counted in the thread that the
    engine reports in: the main one as forward passes begin, or the background one as rows are done.

    Args:
        request: what the engine is asked about a row.
    """

    def __init__(
        self,
        config: CacheTeacherConfig,
        corpus: CachedText,
        engine: TeacherEngine,
        metadata: cf.CacheMetadata,
        writer: cf.CacheWriter,
        request: Callable[[int], RowRequest],
        on_progress: Callable[[CaptureProgress], None],
    ) -> None:
        self.config, self.corpus, self.engine, self.metadata = config, corpus, engine, metadata
        self.writer, self.request, self.on_progress = writer, request, on_progress
        self.alone = not isinstance(writer, cf.SharedCacheWriter)
        self.resumed_rows, self.resumed_tokens = writer.complete.rows, writer.complete.tokens
        self.begun: set[int] = set()  # shards that this run has begun and not abandoned
        self.unfinished: dict[int, _Progress] = {}  # those of them that are not completely written
        self.finished = _Progress()
        self.others = writer.complete  # the shards that this run has not begun
        self.current: int | None = None  # the shard that is being computed
        self.pending: deque[_Written] = deque()
        self.broken = False  # a record batch could not be written, so those behind it must not be
        self.started = time.perf_counter()

    def run(self) -> None:
        if self.engine.batch_tokens == "auto":  # unless an earlier run has found it
            self.engine.batch_tokens = self.writer.recorded_fact("batch_tokens") or "auto"
        with ThreadPoolExecutor(1, thread_name_prefix="cache-writer") as background:
            while True:
                try:
                    shard = self.writer.begin_shard(wait=not self.pending)
                    if shard is not None:
                        self._shard(shard, background)
                    elif self.pending:
                        self._drain()  # before waiting for other processes: one of these may fail
                    else:
                        return
                except BaseException as error:
                    self._give_up(error)
                    if isinstance(error, BatchSizeHalved) or (isinstance(error, cf.ClaimLostError) and not self.alone):
                        self._forget_unfinished()
                    else:
                        raise

    def _shard(self, shard: int, background: ThreadPoolExecutor) -> None:
        self.current = shard
        self.begun.add(shard)
        self.unfinished[shard] = _Progress()
        # Include the shards that other processes have written in the meantime.
        self.others = self.writer.complete_without(self.begun)
        record_batches = list(self.metadata.record_batch_rows(shard))
        for i, record_batch in enumerate(record_batches):
            requests = [self.request(row) for row in record_batch]
            running = self.engine.run(requests, [self.config.targets], partial(self._report, self.unfinished[shard]))
            written = background.submit(self._write, running, self._batches())
            self.pending.append(_Written(shard, i == len(record_batches) - 1, written))
            in_flight = max(RECORD_BATCHES_IN_FLIGHT, -(-self.engine.rows_in_flight // len(record_batch)))
            self._drain(in_flight)
        self.current = None

    def _batches(self) -> dict[str, Any]:
        """What limits a forward pass now, as a sidecar records it."""
        tokens = self.engine.batch_tokens
        return {"batch_size": self.engine.batch_size} if tokens is None else {"batch_tokens": tokens}

    def _write(self, running: RunningRows, batches: Mapping[str, Any]) -> tuple[float, int]:
        """Background thread: waits for the targets of one record batch and hands its rows to the writer."""
        if self.broken:
            raise CancelledError
        try:
            rows = running.rows()
            self.writer.annotate(**batches)
            self.writer.write(rows)
        except BaseException:
            self.broken = True
            raise
        if self.metadata.head is not None:
            return 0.0, 0  # hidden targets have no tail
        tail = np.concatenate([row.targets.residual_logprob[row.loss_mask] for row in rows], dtype=np.float64)
        return len(tail) - np.exp(tail).sum(), len(tail)

    def _drain(self, in_flight: int = 0) -> None:
        """Waits until at most `in_flight` record batches are left to write."""
        while len(self.pending) > in_flight:
            written = self.pending.popleft()
            progress = self.unfinished[written.shard]
            mass_sum, mass_count = written.future.result()
            progress.mass_sum += mass_sum
            progress.mass_count += mass_count
            if written.last:
                self.finished.add(self.unfinished.pop(written.shard))

    def _give_up(self, error: BaseException) -> None:
        """Finishes what can be finished after an error: the shards before the one that was being computed. Not after
        Ctrl-C: then the writer waits for the current record batch alone."""
        finishing = isinstance(error, Exception)
        for written in self.pending:
            if not finishing or written.shard == self.current:
                written.future.cancel()
        while finishing and self.pending:
            with contextlib.suppress(Exception):
                self._drain(len(self.pending) - 1)
        self.pending.clear()

    def _forget_unfinished(self) -> None:
        self.writer.abandon_shard()
        self.begun -= self.unfinished.keys()
        self.unfinished.clear()
        self.broken = False

    def _report(self, progress: _Progress, batch: Sequence[RowRequest]) -> None:
        """Counts a batch and reports the progress of the run.

        Args:
            progress: that of the batch's shard, which is added to.
        """
        progress.rows += len(batch)
        progress.tokens += sum(request.tokens for request in batch)
        tokens_done = self.others.tokens + self._own().tokens
        speed = (tokens_done - self.resumed_tokens) / (time.perf_counter() - self.started)
        written, tokens = self.writer.tokens_written, self.engine.batch_tokens
        self.on_progress(
            CaptureProgress(
                rows=self.rows_done,
                total_rows=len(self.corpus),
                tokens=tokens_done,
                total_tokens=self.corpus.num_tokens,
                tokens_per_s=speed,
                bytes_per_token=self.writer.bytes_written / written if written else float("nan"),
                exact_mass=self._exact_mass(),
                seconds_left=(self.corpus.num_tokens - tokens_done) / speed,
                batch_size=self.engine.batch_size,
                batch_tokens=None if tokens == "auto" else tokens,
            )
        )

    @property
    def rows_done(self) -> int:
        return self.others.rows + self._own().rows

    def _own(self) -> _Progress:
        """The progress of this run, over all of its shards."""
        total = _Progress()
        for each in (self.finished, *list(self.unfinished.values())):
            total.add(each)
        return total

    def _exact_mass(self) -> float:
        own = self._own()
        return own.mass_sum / own.mass_count if own.mass_count else float("nan")

    def summary(self) -> CaptureSummary:
        seconds = time.perf_counter() - self.started
        size = self.writer.complete
        return CaptureSummary(
            output=self.config.output,
            rows=size.rows,
            tokens=size.tokens,
            counted_tokens=size.counted_tokens,
            bytes=size.bytes,
            head_bytes=size.head_bytes,
            exact_mass=self._exact_mass() if self._own().mass_count == self.corpus.num_loss_tokens else None,
            seconds=seconds,
            tokens_per_s=(size.tokens - self.resumed_tokens) / seconds,
            resumed_rows=self.resumed_rows,
            corpus_report=dict(self.corpus.report),
            wrote_manifest=self.writer.wrote_manifest,
            finished=self.writer.is_finished,
        )
