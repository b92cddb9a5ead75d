"""The run: some rows of a cache ─▶ teacher alone, with rounding errors and in a batch ─▶ comparison of each ─▶ result.

Cost: three forward passes over the rows, and for each position a few passes over V log-probabilities in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.models.head import Head, open_head
from pipeline.models.head_export import HeadExport, export_head
from pipeline.models.loading import DTYPES, load_model, load_tokenizer, model_name, weights_fingerprint
from pipeline.models.objective import objective_for
from pipeline.models.teacher_head import TeacherHead
from pipeline.models.tokenizers import tokenizer_fingerprint
from pipeline.teacher.engines.interface import RowRequest
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.generation.answers import place_of
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.verification.criterion import TeacherCheck, mean, worst
from pipeline.teacher.verification.rounding import Rounding
from pipeline.teacher.verification.row_check import RowCheck, RowChecker, TeacherRun
from pipeline.teacher.verification.teacher_reading import Reading, open_reading
from pipeline.teacher.verify_config import TeacherCheckConfig
from pipeline.teacher.writing.worker_config import WorkerConfig
from pipeline.teacher.writing.workers import this_worker


def verify_against_teacher(
    config: TeacherCheckConfig,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TeacherCheck:
    """Runs the teacher over a few rows of its cache.

    Raises:
        MismatchError: the teacher's tokenizer is not the cache's. ConfigError: of this kind of targets nothing can be
        computed again. ModelError, CacheError: either cannot be read.
    """
    worker = this_worker(WorkerConfig(), tensor_parallel=config.tensor_parallel, device_map=config.device_map)
    cache = cf.open_cache(config.cache)
    metadata = cache.metadata
    if not metadata.rounded_once:
        raise ConfigError(
            f"{config.cache}: its values were rounded a second time by distill convert, which would look like another "
            "teacher. Check the cache that it was made from."
        )
    listed = metadata.targets["kind"] == "top-k" and metadata.targets.get("k") is None
    if listed or metadata.renormalised:
        what = "lists of different lengths" if listed else "renormalised values"
        raise ConfigError(
            f"{config.cache}: it was imported and has {what}, which no rule chooses from a teacher's distribution, so "
            "they cannot be computed again. Check it without a teacher."
        )
    tokenizer = load_tokenizer(
        config.tokenizer or config.teacher, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    same_template = _check_tokenizer(config, metadata, tokenizer)
    if metadata.corpus.get("teacher_stream_sha256") is not None:
        on_stage("reading the prompts of the teacher again")
    reading = open_reading(cache, config.cache, tokenizer, config.data)
    on_stage("loading the teacher")
    device = worker.device(config.device)
    objective = objective_for(metadata.alignment)
    recorded = str(metadata.teacher.get("dtype"))
    named = not isinstance(config.teacher, PreTrainedModel)
    model = load_model(
        config.teacher,
        objective=objective,
        dtype=recorded if config.dtype == "auto" and named and recorded in DTYPES else config.dtype,
        device=device,
        device_map=config.device_map,
        tensor_parallel=config.tensor_parallel,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    head = open_head(model, metadata.vocab_size, masked=objective == "masked")
    teacher = _Teacher(cache, head, device, reading)
    chosen = np.unique(np.linspace(0, len(cache) - 1, min(config.rows, len(cache))).round().astype(int)).tolist()
    on_stage(f"computing {len(chosen)} of {len(cache):,} rows again, three times")
    found = []
    for each in teacher.check(cache.rows(chosen)):
        found.append(each)
        on_progress(len(found), len(chosen))
    weights = [each.positions for each in found]
    draws = [each.draws for each in found if each.draws is not None]
    states = [each.states for each in found if each.states is not None]
    same, same_rounding = (
        np.sum([getattr(each, name) for each in found], axis=0) for name in ("same", "same_rounding")
    )
    return TeacherCheck(
        rows=len(found),
        positions=sum(each.positions for each in found),
        entries=sum(each.entries for each in found),
        divergence=mean([each.divergence for each in found], weights),
        deviation=worst(each.deviation for each in found),
        draws=mean(draws, weights) if draws else None,
        states=worst(states) if states else None,
        same_entries=_share(*same),
        same_entries_rounding=_share(*same_rounding),
        same_entries_of=int(same[1]),
        same_weights=metadata.teacher.get("weights_fingerprint") == weights_fingerprint(model),
        same_template=same_template,
        dtype=str(head.weight.dtype).removeprefix("torch."),
        cache_dtype=recorded,
    )


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else 1.0


def _check_tokenizer(
    config: TeacherCheckConfig, metadata: cf.CacheMetadata, tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Whether chats in the cache were written with this tokenizer's template.

    Raises: MismatchError for another vocabulary.
    """
    found, recorded = tokenizer_fingerprint(tokenizer), metadata.tokenizer
    if found["vocabulary"] != recorded.get("vocabulary"):
        raise cf.MismatchError(
            f"{model_name(config.teacher)}: its vocabulary is not that of {config.cache} (fingerprint "
            f"{found['vocabulary'][:8]}…, expected {str(recorded.get('vocabulary'))[:8]}…): it is not the teacher that "
            "wrote this cache. Give that one."
        )
    is_chat = str(metadata.corpus.get("format")).endswith("messages")
    return not is_chat or recorded.get("chat_template") in (None, found["chat_template"])


class _Teacher:
    """Computes rows of a cache again and compares them.

    Args:
        device: the one that was asked for.
        reading: what the teacher of the cache read.
    """

    def __init__(self, cache: cf.Cache, head: Head, device: torch.device, reading: Reading) -> None:
        metadata, model = cache.metadata, head.model
        self.metadata, self.model, self.reading = metadata, model, reading
        self.rule = TargetRule.from_json(metadata.targets)
        export: HeadExport | None = None if metadata.head is None else export_head(head)
        self.engine = TransformersEngine(
            head,
            device=device,
            batch_size=int(metadata.capture.get("batch_size") or 8),
            export=export,
            hidden=None if metadata.hidden is None else replace(metadata.hidden, dtype="float32"),
        )
        recorded = DTYPES.get(str(metadata.teacher.get("dtype")))
        self.rounding = Rounding(at_least=0.0 if recorded is None else torch.finfo(recorded).eps)
        stored_head = None if metadata.head is None else TeacherHead(cache)
        self.checker = RowChecker(metadata, self.rule, head, stored_head, self.rounding)
        places = np.array([(line["document"], line["answer"]) for line in cache.answers()], np.uint64).reshape(-1, 2)
        # What the draws of each row are keyed by: its number, or whose answer it is.
        self.places = place_of(*places.T) if len(places) else np.arange(len(cache))

    def check(self, rows: Sequence[cf.CacheRow]) -> Iterator[RowCheck]:
        together = self.engine.batch_size
        for start in range(0, len(rows), together):
            batch = rows[start : start + together]
            for row, in_batch in zip(batch, self._runs(batch), strict=True):
                (alone,) = self._runs([row])
                with self.rounding.inside(self.model):
                    (rounded,) = self._runs([row])
                yield self.checker.check(row, int(self.places[row.row]), alone, rounded, in_batch)

    def _runs(self, rows: Sequence[cf.CacheRow]) -> list[TeacherRun]:
        """One forward pass over these rows together."""
        requests = [
            RowRequest(
                index=row.row,
                row=row,
                place=int(self.places[row.row]),
                stored=self.checker.stored(row),
                with_states=None if row.hidden is None else np.array(row.hidden.mask),
                teacher=self.reading(row),
            )
            for row in rows
        ]
        running = self.engine.forward.run(requests, [self.rule], keep_inputs=True)
        assert running.inputs is not None
        inputs = running.inputs.split([int(request.stored.sum()) for request in requests])
        return [TeacherRun(*each) for each in zip(running.rows(), inputs, strict=True)]
