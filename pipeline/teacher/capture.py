"""Rows ─▶ teacher engine ─▶ cache: the run that can take days, arranged so that the teacher never waits.

    corpus ─▶ rows of a record batch ─▶ engine: batches of similar length ─▶ targets on their way to the host
           ─▶ one background thread: wait, check, encode, write ─▶ shard ─▶ manifest

The main thread only computes; the background thread is at most two record batches behind. The contents of a shard
depend on the corpus, the teacher, the batch size and the device, but not on timing or on which process computes it
(`writing.workers`): batches never cross record batches, and record batches never cross shards. When a batch runs out of
memory, the batch size is halved, the shard is restarted, and the size is recorded in the shard's sidecar.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import numpy as np

import cache_format as cf
from pipeline.models.tokenizers import tokenizer_files, tokenizer_fingerprint
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.engines.interface import BatchSizeHalved, RowRequest, RunningRows, TeacherEngine
from pipeline.teacher.engines.vllm_version import installed
from pipeline.teacher.opening import (
    Corpus,
    as_dated,
    check_inputs,
    open_corpus,
    open_engine,
    open_tokenizer,
    row_request,
)
from pipeline.teacher.progress import CaptureProgress, CaptureSummary
from pipeline.teacher.targets import hidden_states
from pipeline.teacher.targets.hidden_targets import describe_head
from pipeline.teacher.writing.cache_metadata import cache_metadata, stored_positions
from pipeline.teacher.writing.saved_config import save_config
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

    on_stage(f"asking {config.teacher}" if config.on_server else f"loading the teacher on {device}")
    with closing(open_engine(config, corpus, tokenizer, device)) as engine:
        stored_head = engine.stored_head
        metadata = cache_metadata(config, corpus, engine, tokenizer_fingerprint(tokenizer))

        states = "" if metadata.hidden is None else f", {_describe_states(metadata.hidden, config, corpus)}"
        states += describe_head(stored_head, engine.vocab_size)
        on_stage(f"caching {len(corpus):,} rows, {corpus.num_tokens:,} tokens{states}")
        if config.overwrite and not worker.follows:
            # Not earlier: text and teacher have now been read successfully.
            cf.remove_cache(config.output, stale_after_s=config.workers.stale_after)
        metadata = as_begun(config, metadata)
        options = {"head": None if stored_head is None else stored_head.contents}
        with worker.open_writer(
            config.output, metadata, tokenizer_files(tokenizer), on_stage, device, **options
        ) as writer:
            if not worker.follows:
                save_config(config)
            for holder in writer.taken_over:
                on_warning(f"{config.output}: {holder} is gone; this run takes over")
            capture = _Capture(config, corpus, engine, metadata, writer, on_progress)
            capture.run()
        return capture.summary()


def _describe_states(spec: cf.HiddenSpec, config: CacheTeacherConfig, corpus: Corpus) -> str:
    positions = -(-stored_positions(config, corpus) // spec.every)
    size = hidden_states.predicted_bytes(spec, stored_positions(config, corpus)) / 1e6
    layers = f"{len(spec.layers)} layer{'s' if len(spec.layers) > 1 else ''}"
    return f"hidden states of {positions:,} positions × {layers} × {spec.width} × {spec.dtype} = {size:,.1f} MB"


class _Capture:
    """One run: owns the buffers, the background thread and the running sums."""

    def __init__(
        self,
        config: CacheTeacherConfig,
        corpus: Corpus,
        engine: TeacherEngine,
        metadata: cf.CacheMetadata,
        writer: cf.CacheWriter,
        on_progress: Callable[[CaptureProgress], None],
    ) -> None:
        self.config, self.corpus, self.engine, self.metadata = config, corpus, engine, metadata
        self.writer, self.on_progress = writer, on_progress
        self.alone = not isinstance(writer, cf.SharedCacheWriter)
        self.resumed_rows, self.resumed_tokens = writer.complete.rows, writer.complete.tokens
        self.rows_done, self.tokens_done = self.resumed_rows, self.resumed_tokens
        # Exact mass, summed over the loss tokens written so far, and their number.
        self.mass_sum, self.mass_count = 0.0, 0
        self.mass_before_shard = 0.0, 0
        self.started = time.perf_counter()

    def run(self) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="cache-writer") as background:
            pending: deque[Future[None]] = deque()
            while (shard := self.writer.begin_shard()) is not None:
                try:
                    self._shard(shard, background, pending)
                    _drain(pending)
                except BaseException as error:
                    for future in pending:
                        future.cancel()
                    if not isinstance(error, Exception):  # Ctrl-C: the writer waits for the current record batch
                        raise
                    _drain(pending, ignore=True)
                    if isinstance(error, BatchSizeHalved) or (isinstance(error, cf.ClaimLostError) and not self.alone):
                        self._forget_shard()
                    else:
                        raise

    def _shard(self, shard: int, background: ThreadPoolExecutor, pending: deque[Future[None]]) -> None:
        self.writer.annotate(batch_size=self.engine.batch_size)
        self.mass_before_shard = self.mass_sum, self.mass_count
        # Include the shards that other processes have written in the meantime.
        complete = self.writer.complete
        self.rows_done, self.tokens_done = complete.rows, complete.tokens
        for record_batch in self.metadata.record_batch_rows(shard):
            requests = [row_request(self.config, self.corpus, row, self.metadata.hidden) for row in record_batch]
            running = self.engine.run(requests, [self.config.targets], self._report)
            pending.append(background.submit(self._write, running))
            in_flight = max(RECORD_BATCHES_IN_FLIGHT, -(-self.engine.rows_in_flight // len(record_batch)))
            while len(pending) > in_flight:
                pending.popleft().result()

    def _write(self, running: RunningRows) -> None:
        """Background thread: waits for the targets of one record batch and hands its rows to the writer."""
        rows = running.rows()
        self.writer.write(rows)
        if self.metadata.head is not None:
            return  # hidden targets have no tail
        tail = np.concatenate([row.targets.residual_logprob[row.loss_mask] for row in rows], dtype=np.float64)
        self.mass_sum += len(tail) - np.exp(tail).sum()
        self.mass_count += len(tail)

    def _forget_shard(self) -> None:
        self.writer.abandon_shard()
        self.mass_sum, self.mass_count = self.mass_before_shard

    def _report(self, batch: Sequence[RowRequest]) -> None:
        self.rows_done += len(batch)
        self.tokens_done += sum(request.tokens for request in batch)
        speed = (self.tokens_done - self.resumed_tokens) / (time.perf_counter() - self.started)
        written = self.writer.tokens_written
        self.on_progress(
            CaptureProgress(
                rows=self.rows_done,
                total_rows=len(self.corpus),
                tokens=self.tokens_done,
                total_tokens=self.corpus.num_tokens,
                tokens_per_s=speed,
                bytes_per_token=self.writer.bytes_written / written if written else float("nan"),
                exact_mass=self._exact_mass(),
                seconds_left=(self.corpus.num_tokens - self.tokens_done) / speed,
                batch_size=self.engine.batch_size,
            )
        )

    def _exact_mass(self) -> float:
        return self.mass_sum / self.mass_count if self.mass_count else float("nan")

    def summary(self) -> CaptureSummary:
        seconds = time.perf_counter() - self.started
        size = self.writer.complete
        return CaptureSummary(
            output=self.config.output,
            rows=size.rows,
            tokens=size.tokens,
            counted_tokens=size.counted_tokens,
            bytes=size.bytes,
            exact_mass=self._exact_mass() if self.mass_count == self.corpus.num_loss_tokens else None,
            seconds=seconds,
            tokens_per_s=(size.tokens - self.resumed_tokens) / seconds,
            resumed_rows=self.resumed_rows,
            corpus_report=dict(self.corpus.report),
            wrote_manifest=self.writer.wrote_manifest,
            finished=self.writer.is_finished,
        )


def _drain(pending: deque[Future[None]], ignore: bool = False) -> None:
    while pending:
        future = pending.popleft()
        if not (ignore and (future.cancelled() or future.exception())):
            future.result()
