"""Kept answers ─▶ numbered rows ─▶ the cache: with the targets that were made with them, or scored by the teacher.

Scoring is what capture does with any other text; only the random numbers of a row are keyed by its answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

import cache_format as cf
from pipeline.models.tokenizers import tokenizer_files, tokenizer_fingerprint
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import Capture
from pipeline.teacher.engines.interface import RowRequest, TeacherEngine
from pipeline.teacher.generation.answers import place_of
from pipeline.teacher.generation.kept_answers import AnswerCorpus, KeptAnswers
from pipeline.teacher.opening import row_request
from pipeline.teacher.progress import CaptureProgress
from pipeline.teacher.writing.cache_metadata import cache_metadata
from pipeline.teacher.writing.saved_config import config_record, save_config
from pipeline.teacher.writing.shard_sizes import SHARD_TOKENS, as_begun, rows_together
from pipeline.teacher.writing.workers import Worker


def cache_answers(
    config: CacheTeacherConfig,
    worker: Worker,
    corpus: AnswerCorpus,
    engine: TeacherEngine,
    *,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    on_stage: Callable[[str], None],
    scored: Callable[[CaptureProgress], None] | None = None,
) -> float | None:
    """Writes the cache, or what is missing of it.

    Args:
        engine: the teacher.
        scored: the teacher computes the targets now, because another model wrote the answers; called with the progress.

    Returns: mean mass of the exact entries, where all rows were scored now.
    """
    grouped = config
    if config.rows_per_shard is None:
        # Answers are shorter than their window, so size shards by the actual number of tokens.
        together = rows_together(config)
        per_shard = SHARD_TOKENS * len(corpus) // corpus.num_tokens // together * together
        grouped = replace(config, rows_per_shard=max(together, per_shard))
    metadata = cache_metadata(grouped, corpus, engine, tokenizer_fingerprint(tokenizer))
    record = config_record(config)
    if config.overwrite:
        # Not earlier: only now is there something to replace it.
        cf.remove_cache(config.output, stale_after_s=config.workers.stale_after)
    metadata = as_begun(config, metadata)
    with worker.open_writer(config.output, metadata, tokenizer_files(tokenizer), on_stage, device) as writer:
        save_config(config.output, record)
        cf.write_answers(config.output, corpus.kept.lines())
        if corpus.documents_file is not None:
            cf.write_documents(config.output, corpus.documents_file)
        if scored is None:
            _copy(corpus.kept, writer)
            return None

        def request(row: int) -> RowRequest:
            answer = corpus.kept[row]
            (place,) = place_of(np.array([answer.document]), np.array([answer.index])).tolist()
            read = corpus.prompts.teacher_text(answer.document, answer.row.input_ids, answer.prompt_tokens)
            return replace(row_request(config, corpus, row, metadata.hidden, place=place), teacher=read)

        capture = Capture(config, corpus, engine, metadata, writer, request, scored)
        capture.run()
        return capture.summary().exact_mass


def _copy(kept: KeptAnswers, writer: cf.CacheWriter) -> None:
    number = 0
    for group in kept.groups():
        writer.annotate(batch_size=group.batch_size)
        rows = [replace(answer.row, row=number + i) for i, answer in enumerate(group.answers)]
        writer.write(rows)
        number += len(rows)
