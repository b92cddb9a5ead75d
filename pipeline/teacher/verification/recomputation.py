"""The run: some rows of a cache ─▶ teacher alone, with rounding errors and in a batch ─▶ comparison of each ─▶ result.

Cost: three forward passes over the rows (two by a teacher on a server, see `served_teacher`), and for each position a
few passes over V log-probabilities in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import numpy as np
from transformers import PreTrainedTokenizerBase

import cache_format as cf
from cache_format.wording import quantity
from pipeline.errors import ConfigError
from pipeline.models.loading import load_tokenizer, model_name
from pipeline.models.tokenizers import tokenizer_fingerprint
from pipeline.teacher.verification.criterion import UNKNOWN, TeacherCheck, mean, worst
from pipeline.teacher.verification.loaded_teacher import LoadedTeacher
from pipeline.teacher.verification.served_teacher import ServedTeacher
from pipeline.teacher.verification.teacher_reading import open_reading
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
        MismatchError: the teacher's tokenizer is not the cache's.
        ConfigError: targets of this kind cannot be computed again.
        ModelError, CacheError: the teacher or the cache cannot be read.
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
    chosen = np.unique(np.linspace(0, len(cache) - 1, min(config.rows, len(cache))).round().astype(int)).tolist()
    rows = cache.rows(chosen)
    on_stage(f"asking {config.teacher}" if config.on_server else "loading the teacher")
    teacher: LoadedTeacher | ServedTeacher = (
        ServedTeacher(config, cache, tokenizer, rows, reading)
        if config.on_server
        else LoadedTeacher(config, cache, worker.device(config.device, config.teacher), reading)
    )
    with closing(teacher):
        on_stage(f"computing {len(chosen)} of {quantity(len(cache), 'row')} again, {teacher.times}")
        found = []
        for each in teacher.check(rows):
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
        same_weights=teacher.same_weights,
        same_template=same_template,
        dtype=teacher.dtype,
        cache_dtype=str(metadata.teacher.get("dtype", UNKNOWN)),
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
