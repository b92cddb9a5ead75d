"""Generation: prompts ─▶ the teacher's own answers ─▶ a cache of the answers, with targets.

    1  write     a group of prompts ─▶ batches of similar length ─▶ answers with their targets ─▶ OUTPUT.answers
    2  judge     a predicate accepts or rejects every answer as soon as its group is complete
    3  cache     kept answers ─▶ numbered rows ─▶ OUTPUT, an ordinary cache; OUTPUT.answers is removed

There are two directories because a cache must know its number of rows before the first row is written, and the number
of accepted answers is known only after the last answer. After a kill at any point, the same command continues with the
missing group of answers or shard, and ends with the same bytes. The predicate is not part of the settings recorded with
the answers, so a corrected predicate can judge existing answers again, even after a run that kept none.

One answer is one row: its prompt, outside the loss mask, and its tokens, inside it, including the one that ended it.

Cost per token on top of generating the answers: choosing entries, about five reads of V floats. A prompt passes through
the teacher once for all its answers that share a batch.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.models.loading import load_config, model_name
from pipeline.models.objective import Objective, objective_of
from pipeline.models.tokenizers import tokenizer_files, tokenizer_fingerprint
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.engines.decoding import check_decoding
from pipeline.teacher.engines.interface import TeacherEngine
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.generation.answer_store import AnswerStore, store_location
from pipeline.teacher.generation.answering import Answering, GenerationProgress, Selection
from pipeline.teacher.generation.answers import AnswerSettings, find_stop_tokens
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.generation.predicates import Predicate, load_predicate
from pipeline.teacher.opening import as_dated, check_inputs, open_engine, open_tokenizer
from pipeline.teacher.text.data_paths import data_name
from pipeline.teacher.text.prompts import Prompts, open_prompts
from pipeline.teacher.writing.cache_metadata import cache_metadata
from pipeline.teacher.writing.saved_config import save_config
from pipeline.teacher.writing.shard_sizes import SHARD_TOKENS, as_begun, rows_together
from pipeline.teacher.writing.workers import this_worker

DECIMALS = 6  # of log-probabilities in answers.jsonl


@dataclass(frozen=True, kw_only=True)
class GenerationSummary:
    """What a finished run wrote."""

    output: str
    prompts: int
    answers: int
    passed: int  # answers that passed the predicate; all answers without a predicate
    rows: int  # answers that were kept
    prompts_kept: int  # prompts with at least one kept answer
    stop_reasons: dict[str, int]  # of all answers
    mean_logprob: float  # per token of the answers kept, nats
    tokens: int
    counted_tokens: int
    bytes: int
    exact_mass: float | None  # mean probability mass of the exact entries; None if the cache was already finished
    seconds: float
    tokens_per_s: float  # written by this run
    resumed_answers: int  # found complete from an earlier run
    corpus_report: dict[str, float]


def generate_cache(
    config: CacheTeacherConfig,
    generation: GenerationConfig,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[GenerationProgress], None] = lambda _: None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> GenerationSummary:
    """Lets the teacher answer the prompts of `config.data` and caches its answers; continues an unfinished run.

    Packing and loss options of `config.data` are not used; `config.batch_size` counts answers.

    Raises:
        DataError, ModelError, ConfigError: prompts, teacher, options or predicate cannot be used, or no answer passed.
        CacheError: the output holds something else; MismatchError: it holds an unfinished run with other settings.
    """
    config = replace(config, generation=generation)  # checks that they fit together
    worker = this_worker(config.workers, tensor_parallel=config.tensor_parallel, device_map=config.device_map)
    if not worker.alone or worker.rank is not None:
        raise ConfigError(
            "`generate`: one process writes the answers, found several (torchrun, `num_workers`, `shard_range` or "
            "`tensor_parallel`). Start one."
        )
    # Check what can be checked before spending minutes on loading.
    predicate = None if generation.keep_if is None else load_predicate(generation.keep_if)
    check_inputs(config, config.output, store_location(config.output))
    store = AnswerStore(store_location(config.output), config.workers.stale_after)
    manifest = _finished(config, generation, predicate)
    store.check()
    if manifest is not None and not _other_names(config, manifest):
        if store.holds(manifest.metadata.corpus["generation"]["answers_file"]):
            store.remove()  # killed between the last two steps
        return _summary_of(config.output, manifest)
    device = worker.device(config.device)
    started = time.perf_counter()

    on_stage("reading the prompts")
    tokenizer = open_tokenizer(config)
    _check_writes(config)
    earlier: Mapping[str, Any] | None = None
    if not config.overwrite:
        earlier = store.prompts() if manifest is None else manifest.metadata.corpus
    prompts = open_prompts(as_dated(config, earlier).data, tokenizer)
    config = as_dated(config, prompts.description)
    for warning in prompts.warnings:
        on_warning(warning)

    on_stage(f"asking {config.teacher}" if config.on_server else f"loading the teacher on {device}")
    with closing(open_engine(config, prompts, tokenizer, device)) as engine:
        config.targets.check_vocabulary(engine.vocab_size)
        if isinstance(engine, TransformersEngine):
            check_decoding(engine.head, padding=config.batch_size > 1, longest=config.data.seq_len)
        stop_tokens = find_stop_tokens(engine.eos_token_ids, tokenizer, is_chat=prompts.columns.is_chat)
        settings = _settings(config, generation, prompts, engine, tokenizer, stop_tokens)
        if manifest is not None:
            _check_same_things(config, manifest, settings)
            return _summary_of(config.output, manifest)
        with store:
            store.open(settings, replace=config.overwrite, allow_rounding=config.workers.allow_rounding)

            on_stage(f"writing {generation.answers_per_prompt} answers to each of {prompts.answerable.sum():,} prompts")
            answering = Answering(
                prompts,
                store,
                engine,
                AnswerSettings(
                    tokenizer=tokenizer,
                    rule=config.targets,
                    sampling=generation,
                    stop_tokens=frozenset(stop_tokens),
                    max_length=config.data.seq_len,
                ),
                answers_per_prompt=generation.answers_per_prompt,
                predicate=predicate,
                keep=generation.keep,
                on_progress=on_progress,
            )
            selection = answering.run()

            on_stage(f"caching {len(selection.chosen):,} of {selection.answers:,} answers")
            corpus = _corpus(generation, prompts, stop_tokens, predicate, answering)
            grouped = config
            if config.rows_per_shard is None:
                # Answers are shorter than their window, so size shards by the actual number of tokens.
                together = rows_together(config)
                per_shard = SHARD_TOKENS * len(corpus) // corpus.num_tokens // together * together
                grouped = replace(config, rows_per_shard=max(together, per_shard))
            metadata = cache_metadata(grouped, corpus, engine, tokenizer_fingerprint(tokenizer))
            if config.overwrite:
                # Not earlier: only now is there something to replace it.
                cf.remove_cache(config.output, stale_after_s=config.workers.stale_after)
            metadata = as_begun(config, metadata)
            with worker.open_writer(config.output, metadata, tokenizer_files(tokenizer), on_stage, device) as writer:
                save_config(config)
                _write_cache(config.output, writer, answering)
            store.remove()
        return replace(
            _summary_of(config.output, cf.open_cache(config.output).manifest),
            exact_mass=1.0 - selection.outside_sum / selection.counted_tokens,
            seconds=time.perf_counter() - started,
            tokens_per_s=answering.tokens_written / (time.perf_counter() - answering.started),
            resumed_answers=answering.resumed,
        )


def _check_writes(config: CacheTeacherConfig) -> None:
    """Raises: ConfigError for a masked language model, which cannot generate."""
    if config.on_server:
        return
    found = load_config(config.teacher, revision=config.revision, trust_remote_code=config.trust_remote_code)
    if config.objective == "masked" or (found is not None and objective_of(found) == "masked"):
        raise ConfigError(
            f"`generate`: {model_name(config.teacher)} is a masked language model, which cannot continue "
            "a text. Use a causal one."
        )


def _finished(
    config: CacheTeacherConfig, generation: GenerationConfig, predicate: Predicate | None
) -> cf.Manifest | None:
    """The finished cache that this run would write, if it exists already. Names of teacher and prompts may differ.

    Raises: CacheError if a different cache exists.
    """
    manifest = None if config.overwrite else cf.finished_manifest(config.output)
    replaces, stale_after_s = config.overwrite or manifest is not None, config.workers.stale_after
    cf.check_writable(config.output, replace=replaces, stale_after_s=stale_after_s)
    if manifest is None:
        return None
    recorded = manifest.metadata.to_json()
    corpus = recorded["corpus"]
    compared_options = ("data_config", "split", "text_column", "max_documents", "chat_template_kwargs")
    data = {name: getattr(config.data, name) for name in compared_options}
    if config.data.template_date is not None:
        data["template_date"] = config.data.template_date
    compared = [
        ("targets", recorded["targets"], config.targets.to_json()),
        ("corpus", corpus, {"window_length": config.data.seq_len, **data}),
        ("generation", corpus.get("generation", {}), {**generation.to_json(), **_kept_by(generation, predicate)}),
        ("manifest", recorded, {"encoding": config.encoding}),
    ]
    found = [d for key, was, given in compared for d in cf.differences({k: was.get(k) for k in given}, given, key)]
    if found:
        raise cf.finished_already(config.output, manifest, f" made with other settings ({cf.listed(found)})")
    return manifest


def _other_names(config: CacheTeacherConfig, manifest: cf.Manifest) -> bool:
    """Whether the name of the teacher or of the prompts differs from the recorded one. Contents are compared then."""
    recorded = manifest.metadata
    return (model_name(config.teacher), data_name(config.data.data)) != (
        recorded.teacher.get("name"),
        recorded.corpus.get("source"),
    )


def _check_same_things(config: CacheTeacherConfig, manifest: cf.Manifest, settings: dict[str, Any]) -> None:
    """Raises: CacheError if a finished cache was made by another teacher, or from other prompts."""
    recorded = manifest.metadata.to_json()
    of_prompts = {name: settings["prompts"][name] for name in ("source", "files")}
    of_teacher = {name: settings["teacher"].get(name) for name in ("dtype", *cf.FINGERPRINTS)}
    given = {"teacher": of_teacher, "tokenizer": settings["tokenizer"], "prompts": of_prompts}
    was = {
        "teacher": {name: recorded["teacher"].get(name) for name in of_teacher},
        "tokenizer": recorded["tokenizer"],
        "prompts": {name: recorded["corpus"].get(name) for name in of_prompts},
    }
    if found := cf.ignoring_names(cf.differences(was, given), was):
        raise cf.finished_already(config.output, manifest, f" made with other settings ({cf.listed(found)})")


def _kept_by(generation: GenerationConfig, predicate: Predicate | None) -> dict[str, Any]:
    return {"keep": generation.keep, "keep_if": None if predicate is None else predicate.to_json()}


def _settings(
    config: CacheTeacherConfig,
    generation: GenerationConfig,
    prompts: Prompts,
    engine: TeacherEngine,
    tokenizer: PreTrainedTokenizerBase,
    stop_tokens: list[int],
) -> dict[str, Any]:
    """The settings that determine answers and targets, without those that determine which answers are kept."""
    return {
        "teacher": engine.describe_teacher(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocab_size": engine.vocab_size,
        "prompts": {**prompts.description, "number": len(prompts), **prompts.findings},
        "max_length": config.data.seq_len,
        "generation": {**generation.to_json(), "stop_tokens": stop_tokens},
        "targets": config.targets.to_json(),
        "capture": engine.describe(),
        "libraries": {name: importlib.metadata.version(name) for name in engine.libraries},
    }


@dataclass(frozen=True)
class _Corpus:
    """The text of the future cache, in the form that `cache_metadata` expects."""

    selection: Selection
    description: dict[str, Any]
    report: dict[str, int | float]
    objective: Objective = "causal"

    def __len__(self) -> int:
        return len(self.selection.chosen)

    @property
    def num_tokens(self) -> int:
        return self.selection.tokens

    @property
    def num_loss_tokens(self) -> int:
        return self.selection.counted_tokens

    @property
    def token_stream_sha256(self) -> str:
        return self.selection.stream.hexdigest()


def _corpus(
    generation: GenerationConfig,
    prompts: Prompts,
    stop_tokens: list[int],
    predicate: Predicate | None,
    answering: Answering,
) -> _Corpus:
    selection = answering.selection
    counts = {"answers": selection.answers, "passed": selection.passed, "prompts_kept": selection.prompts_kept}
    written = {
        **generation.to_json(),
        "stop_tokens": stop_tokens,
        **_kept_by(generation, predicate),
        **counts,
        "stop_reasons": dict(selection.stop_reasons),
        # Written here for its checksum, which the manifest needs from the beginning; written to the cache later.
        "answers_file": cf.write_answers(answering.store.location, _answers(answering)),
    }
    report: dict[str, int | float] = {
        "documents": len(prompts),
        "empty_prompts": int(np.count_nonzero(prompts.lengths == 0)),
        "long_prompts": int(np.count_nonzero(prompts.lengths >= prompts.config.seq_len)),
        **counts,
        "rows": len(selection.chosen),
        "tokens": selection.tokens,
        "counted_tokens": selection.counted_tokens,
        "ignored_files": prompts.source.ignored_files,
        **prompts.findings,
    }
    description = {**prompts.description, "generation": written}
    return _Corpus(selection, description, report)


def _answers(answering: Answering) -> Iterator[dict[str, Any]]:
    """One line per row of the future cache."""
    number = 0
    for group in answering.groups():
        for answer in group.answers:
            yield {
                "row": number,
                "document": answer.document,
                "answer": answer.index,
                "prompt_tokens": answer.prompt_tokens,
                "stop_reason": answer.stop_reason,
                "mean_logprob": round(answer.mean_logprob, DECIMALS),
                "text": answer.text,
                "token_logprobs": [round(each, DECIMALS) for each in answer.logprobs.tolist()],
            }
            number += 1


def _write_cache(output: str, writer: Any, answering: Answering) -> None:
    cf.write_answers(output, _answers(answering))
    number = 0
    for group in answering.groups():
        writer.annotate(batch_size=group.batch_size)
        rows = [replace(answer.row, row=number + i) for i, answer in enumerate(group.answers)]
        writer.write(rows)
        number += len(rows)


def _summary_of(output: str, manifest: cf.Manifest) -> GenerationSummary:
    """The summary of a finished cache, from what it records."""
    corpus = manifest.metadata.corpus
    written = corpus["generation"]
    logprobs = [logprob for line in cf.open_cache(output).answers() for logprob in line["token_logprobs"]]
    return GenerationSummary(
        output=output,
        prompts=corpus["report"]["documents"],
        answers=written["answers"],
        passed=written["passed"],
        rows=manifest.num_rows,
        prompts_kept=written["prompts_kept"],
        stop_reasons=dict(written["stop_reasons"]),
        mean_logprob=float(np.mean(logprobs)),
        tokens=manifest.num_tokens,
        counted_tokens=manifest.num_loss_tokens,
        bytes=manifest.stored_bytes,
        exact_mass=None,
        seconds=0.0,
        tokens_per_s=0.0,
        resumed_answers=written["answers"],
        corpus_report=dict(corpus["report"]),
    )
