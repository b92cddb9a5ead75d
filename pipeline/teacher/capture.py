"""Rows ─▶ teacher ─▶ cache: the run that costs days, arranged so that the teacher never waits.

    a group of rows (one record batch) ─▶ batches of similar length ─▶ decoder ─▶ hidden states [B, T, D]
        ─▶ head and targets on a chunk of positions ─▶ copy to the host ─▶ one background thread: check, encode, write

The main thread only computes. Copies off the device are asynchronous into pinned memory, and the background thread
waits for them; it quantises, compresses and writes while the next batch computes, at most two groups behind.

What a shard holds depends on the corpus, the teacher, the batch size and the device, never on timing, nor on which of
several processes computes it (`workers`): batches are cut inside record batches, record batches inside shards. A batch
size that did not fit the memory is halved, the shard begun anew, and the size recorded in its sidecar.

Cost beside the bare forward pass, per position: the head's product is the same; softmax, top-K and entropy are some
five reads of V floats; the [B, T, V] logits, and their memory, are saved. `benchmarks/capture.py` measures it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.models.head import Head
from pipeline.models.padding import model_inputs
from pipeline.models.tokenizers import tokenizer_files, tokenizer_fingerprint
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.opening import Corpus, open_corpus, open_teacher, open_tokenizer
from pipeline.teacher.progress import CaptureProgress, CaptureSummary
from pipeline.teacher.targets import hidden_states
from pipeline.teacher.targets.cache_rows import cache_rows
from pipeline.teacher.targets.hidden_targets import WrittenHead, in_words, write_down
from pipeline.teacher.targets.selection import ChunkTargets, draws, sparse_targets
from pipeline.teacher.text.packing import TokenRow
from pipeline.teacher.writing.cache_metadata import CHUNK_POSITIONS, cache_metadata, stored_positions
from pipeline.teacher.writing.saved_config import save_config
from pipeline.teacher.writing.shard_sizes import as_begun
from pipeline.teacher.writing.workers import check_output, this_worker

GROUPS_IN_FLIGHT = 2


def cache_teacher(
    config: CacheTeacherConfig,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[CaptureProgress], None] = lambda _: None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> CaptureSummary:
    """Runs the teacher over the text and writes the cache; continues an unfinished run of the same settings, and does
    nothing to a finished one. One of several such processes writes its share (`config.workers`).

    Args:
        on_stage: told what happens next, once a stage, in words.
        on_progress: told where the run stands, after every batch.
        on_warning: told what the user should know and need not act on.

    Raises:
        DataError, ModelError, ConfigError: the text, the teacher or the options cannot be used.
        CacheError: `output` holds something else, or another process is writing it alone; MismatchError: it holds a
            run with other settings.
    """
    worker = this_worker(config.workers, tensor_parallel=config.tensor_parallel, device_map=config.device_map)
    # An occupied output is found out before minutes go into loading.
    if not worker.follows:
        check_output(config, worker)
    device = worker.device(config.device)

    on_stage("reading and tokenising the text")
    tokenizer = open_tokenizer(config)
    corpus = open_corpus(config, tokenizer)

    on_stage(f"loading the teacher on {device}")
    head = open_teacher(config, corpus, tokenizer, device)
    written = write_down(config, head)
    metadata = cache_metadata(config, corpus, head, tokenizer_fingerprint(tokenizer), device, written)

    states = "" if metadata.hidden is None else f", {_states_in_words(metadata.hidden, config, corpus)}"
    states += in_words(written, head.vocab_size)
    on_stage(f"caching {len(corpus):,} rows, {corpus.num_tokens:,} tokens{states}")
    if config.overwrite and not worker.follows:
        # Only now that text and teacher have been read.
        cf.remove_cache(config.output, stale_after_s=config.workers.stale_after)
    metadata = as_begun(config, metadata)
    options = {"head": None if written is None else written.contents}
    with worker.open_writer(config.output, metadata, tokenizer_files(tokenizer), on_stage, device, **options) as writer:
        for holder in writer.taken_over:
            on_warning(f"{config.output}: {holder} is gone; this run takes over")
        capture = _Capture(config, corpus, head, metadata, writer, on_progress, written)
        capture.run()
    if not worker.follows and capture.writer.is_finished:
        save_config(config)
    return capture.summary()


def _states_in_words(spec: cf.HiddenSpec, config: CacheTeacherConfig, corpus: Corpus) -> str:
    positions = -(-stored_positions(config, corpus) // spec.every)
    size = hidden_states.predicted_bytes(spec, stored_positions(config, corpus)) / 1e6
    layers = f"{len(spec.layers)} layer{'s' if len(spec.layers) > 1 else ''}"
    return f"hidden states of {positions:,} positions × {layers} × {spec.width} × {spec.dtype} = {size:,.1f} MB"


@dataclass
class _HostBatch:
    """Targets of one forward pass, on their way to the host."""

    rows: list[TokenRow]
    indices: list[int]  # corpus row numbers
    stored: list[np.ndarray]  # [T] bool per row: positions that have targets, in order
    with_states: list[np.ndarray]  # [T] bool per row: positions that have hidden states; empty if none are kept
    targets: ChunkTargets  # host tensors, filled once `copied` has happened
    copied: torch.cuda.Event | None
    source: object  # keeps the device tensors alive until then
    states: dict[int, Tensor] = field(default_factory=dict)  # layer -> [n, D] on the host
    scales: dict[int, Tensor] = field(default_factory=dict)  # layer -> [n], with int8


class _Capture:
    """One run: owns the buffers, the background thread and the running sums."""

    def __init__(
        self,
        config: CacheTeacherConfig,
        corpus: Corpus,
        head: Head,
        metadata: cf.CacheMetadata,
        writer: cf.CacheWriter,
        on_progress: Callable[[CaptureProgress], None],
        written: WrittenHead | None = None,
    ) -> None:
        self.form = None if written is None else written.form
        self.config, self.corpus, self.head, self.metadata = config, corpus, head, metadata
        self.hidden = metadata.hidden
        self.writer, self.on_progress = writer, on_progress
        self.batch_size = config.batch_size
        self.alone = not isinstance(writer, cf.SharedCacheWriter)
        self.resumed_rows, self.resumed_tokens = writer.complete.rows, writer.complete.tokens
        self.rows_done, self.tokens_done = self.resumed_rows, self.resumed_tokens
        self.kept_sum, self.kept_count = 0.0, 0
        self.kept_before_shard = 0.0, 0
        self.started = time.perf_counter()
        device, width = head.device, head.vocab_size
        self.logits_buffer = torch.empty((CHUNK_POSITIONS, width), dtype=head.weight.dtype, device=device)
        self.scratch = torch.empty((CHUNK_POSITIONS, width), dtype=torch.float32, device=device)

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
                    if not isinstance(error, Exception):  # Ctrl-C: the writer waits for the record batch in hand
                        raise
                    _drain(pending, ignore=True)
                    if isinstance(error, cf.ClaimLostError) and not self.alone:
                        self._forget_shard()
                    elif should_reduce_batch_size(error) and self.config.tensor_parallel:
                        raise ConfigError(
                            f"`batch_size` {self.batch_size}: out of memory. With `tensor_parallel` it is not halved, "
                            "since all processes would have to. Use a smaller one; complete shards are kept."
                        ) from error
                    elif should_reduce_batch_size(error) and self.batch_size > 1:
                        self._halve_batch()
                    else:
                        raise

    def _shard(self, shard: int, background: ThreadPoolExecutor, pending: deque[Future[None]]) -> None:
        self.writer.annotate(batch_size=self.batch_size)
        self.kept_before_shard = self.kept_sum, self.kept_count
        # Shards that others have written meanwhile count as well.
        complete = self.writer.complete
        self.rows_done, self.tokens_done = complete.rows, complete.tokens
        for group in self.metadata.record_batch_rows(shard):
            batches = []
            for indices in self._batches(group):
                batches.append(self._forward(indices))
                self._report(indices)
            pending.append(background.submit(self._write, batches))
            while len(pending) > GROUPS_IN_FLIGHT:
                pending.popleft().result()

    def _batches(self, group: Sequence[int]) -> Iterator[list[int]]:
        """Rows of a record batch, longest first (out of memory shows at once), so that little is padded."""
        lengths = {row: len(self.corpus[row].input_ids) for row in group}
        order = sorted(group, key=lambda row: (-lengths[row], row))
        for i in range(0, len(order), self.batch_size):
            yield order[i : i + self.batch_size]

    @torch.inference_mode()
    def _forward(self, indices: list[int]) -> _HostBatch:
        rows = [self.corpus[index] for index in indices]
        device = self.head.device
        inputs = model_inputs(rows, masked=self.head.masked)
        stored = [
            np.ones_like(row.loss_mask) if self.config.all_positions else np.asarray(row.loss_mask, bool)
            for row in rows
        ]
        mask = torch.zeros(inputs[0].shape, dtype=torch.bool)
        for i, here in enumerate(stored):
            mask[i, : len(here)] = torch.from_numpy(here)

        inputs = [tensor.to(device) for tensor in inputs]
        with_states, states, scales = [], {}, {}
        if self.hidden is None:
            hidden = self.head.hidden_states(*inputs)
        else:
            hidden, by_layer = self._states(inputs)
            every = self.hidden.every
            with_states = [hidden_states.chosen(*each, every) for each in zip(stored, indices, strict=True)]
            if by_layer:
                states, scales = hidden_states.of_batch(by_layer, with_states, self.hidden.dtype)
        hidden = hidden[mask.to(device)]  # [n, D]
        multiplied: list[Tensor] = []  # by the head, where that is something else than its layer's states
        row_of, position = (place.numpy() for place in mask.nonzero(as_tuple=True))
        rule = self.config.targets
        drawn = draws(rule, np.array(indices)[row_of], position)
        chunks = []
        for start in range(0, max(1, len(hidden)), CHUNK_POSITIONS):
            here = slice(start, start + CHUNK_POSITIONS)
            if self.form is not None and self.form.transforms:
                logits, inner = self.form.logits(hidden[here])
                multiplied.append(inner)
            else:
                logits = self.head.logits(hidden[here], out=self.logits_buffer)
            chunks.append(sparse_targets(logits, rule, None if drawn is None else drawn[here], self.scratch))
        targets = ChunkTargets.cat(chunks)
        if multiplied and self.hidden is not None:
            last = self.hidden.layers[-1]
            states[last], scale = hidden_states.quantised(torch.cat(multiplied), self.hidden.dtype)
            scales |= {} if scale is None else {last: scale}
        host = ChunkTargets(*(_to_host(tensor) for tensor in targets))
        of_layers = {layer: _to_host(each) for layer, each in states.items()}
        of_scales = {layer: _to_host(each) for layer, each in scales.items()}
        copied = None
        if device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        source = targets, states, scales
        return _HostBatch(rows, indices, stored, with_states, host, copied, source, of_layers, of_scales)

    def _states(self, inputs: list[Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        """What the head is applied to, and the states of the layers asked for, in their order, [B, T, D] each."""
        assert self.hidden is not None
        last = self.hidden.teacher_layers
        inner = [layer for layer in self.hidden.of_layers if layer < last]
        if inner:
            hidden, found = self.head.states(inner, *inputs)
        else:  # without keeping those of all layers
            hidden, found = self.head.hidden_states(*inputs), {}
        return hidden, found | ({last: hidden} if last in self.hidden.layers else {})

    def _write(self, batches: list[_HostBatch]) -> None:
        """Background thread: checks one record batch's targets and hands its rows to the writer in order."""
        rows = []
        for batch in batches:
            if batch.copied is not None:
                batch.copied.synchronize()
            batch.source = None
            of_batch = cache_rows(batch.indices, batch.rows, batch.stored, batch.targets)
            if batch.with_states:
                found = hidden_states.of_rows(batch.states, batch.scales, batch.with_states, batch.indices)
                of_batch = [replace(row, hidden=each) for row, each in zip(of_batch, found, strict=True)]
            rows += of_batch
        self.writer.write(sorted(rows, key=lambda row: row.row))
        if self.metadata.head is not None:
            return  # nothing is left out
        counted = np.concatenate([row.targets.residual_logprob[row.loss_mask] for row in rows], dtype=np.float64)
        self.kept_sum += len(counted) - np.exp(counted).sum()
        self.kept_count += len(counted)

    def _halve_batch(self) -> None:
        self._forget_shard()
        clear_device_cache(garbage_collection=True)
        self.batch_size //= 2

    def _forget_shard(self) -> None:
        self.writer.abandon_shard()
        self.kept_sum, self.kept_count = self.kept_before_shard

    def _report(self, indices: list[int]) -> None:
        self.rows_done += len(indices)
        self.tokens_done += sum(len(self.corpus[index].input_ids) for index in indices)
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
                batch_size=self.batch_size,
            )
        )

    def _exact_mass(self) -> float:
        return self.kept_sum / self.kept_count if self.kept_count else float("nan")

    def summary(self) -> CaptureSummary:
        seconds = time.perf_counter() - self.started
        size = self.writer.complete
        return CaptureSummary(
            output=self.config.output,
            rows=size.rows,
            tokens=size.tokens,
            counted_tokens=size.counted_tokens,
            bytes=size.bytes,
            exact_mass=self._exact_mass() if self.kept_count == self.corpus.num_counted_tokens else None,
            seconds=seconds,
            tokens_per_s=(size.tokens - self.resumed_tokens) / seconds,
            resumed_rows=self.resumed_rows,
            corpus_report=dict(self.corpus.report),
            wrote_manifest=self.writer.wrote_manifest,
            finished=self.writer.is_finished,
        )


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _drain(pending: deque[Future[None]], ignore: bool = False) -> None:
    while pending:
        future = pending.popleft()
        if not (ignore and (future.cancelled() or future.exception())):
            future.result()
