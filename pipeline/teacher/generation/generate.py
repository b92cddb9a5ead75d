"""Generation: prompts ─▶ answers by the teacher, or by another writer ─▶ a cache of the answers, with targets.

    1  write     a group of prompts ─▶ batches of similar length ─▶ answers with their targets ─▶ OUTPUT.answers
    2  judge     a predicate accepts or rejects every answer as soon as its group is complete
    3  cache     kept answers ─▶ numbered rows ─▶ OUTPUT, an ordinary cache; OUTPUT.answers is removed

There are two directories because a cache must know its number of rows before the first row is written, and the number
of accepted answers is known only after the last answer. After a kill at any point, the same command continues with the
missing group of answers or shard, and ends with the same bytes. The predicate is not part of the settings recorded with
the answers, so a corrected predicate can judge existing answers again, even after a run that kept none.

If another model writes (`writer`), such as a student, the targets come from a second pass: the writer leaves the
device, the teacher is loaded, and the kept answers are captured like any given text. The store then holds what the
writer computed, and its settings say nothing of the teacher or its targets.

One answer is one row: its prompt, outside the loss mask, and its tokens, inside it, including the one that ended it.

Cost per token on top of generating the answers: choosing entries, about five reads of V floats. A prompt passes through
the teacher once for all its answers that share a batch.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedTokenizerBase

import cache_format as cf
from cache_format.wording import quantity
from pipeline.errors import ConfigError
from pipeline.models.loading import load_config, model_name
from pipeline.models.objective import most_positions, objective_of
from pipeline.models.tokenizers import check_same_tokenizer, tokenizer_fingerprint
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.engines.answers import AnswerSettings, find_stop_tokens
from pipeline.teacher.engines.decoding import check_decoding
from pipeline.teacher.engines.engine_config import rows_per_pass
from pipeline.teacher.engines.interface import TeacherEngine, Usage
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.generation.answer_store import AnswerStore, store_location
from pipeline.teacher.generation.answering import Answering, prompts_per_group
from pipeline.teacher.generation.caching import cache_answers
from pipeline.teacher.generation.finished import check_same_contents, finished_cache, kept_by
from pipeline.teacher.generation.generation_config import LOADING_THE_WRITER, GenerationConfig
from pipeline.teacher.generation.kept_answers import AnswerCorpus, KeptAnswers
from pipeline.teacher.generation.other_writer import check_writer, is_teacher, writer_config
from pipeline.teacher.generation.predicates import Predicate, load_predicate
from pipeline.teacher.opening import as_dated, check_inputs, open_engine, open_tokenizer, opening_stage
from pipeline.teacher.progress import CaptureProgress, GenerationProgress, GenerationSummary
from pipeline.teacher.text.formats.kept_columns import describe_kept
from pipeline.teacher.text.prompts import Prompts, open_prompts
from pipeline.teacher.writing.workers import this_worker


def generate_cache(
    config: CacheTeacherConfig,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[GenerationProgress], None] = lambda _: None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> GenerationSummary:
    """Answers the prompts of `config.data` as `config.generation` says, and caches the answers; continues an
    unfinished run.

    Packing and loss options of `config.data` are not used; `config.batch_size` counts answers.

    Raises:
        DataError, ModelError, ConfigError: prompts, teacher, options or predicate cannot be used, or no answer passed.
        CacheError: the output holds something else; MismatchError: it holds a run with other settings.
    """
    generation = config.generation
    assert generation is not None
    if generation.writer is not None and is_teacher(generation, config):
        unused: dict[str, Any] = dict.fromkeys(("writer", *LOADING_THE_WRITER))
        generation = replace(generation, **unused)
        config = replace(config, generation=generation)
    worker = this_worker(config.workers, tensor_parallel=config.tensor_parallel, device_map=config.device_map)
    if not worker.alone or worker.rank is not None:
        raise ConfigError(
            "`generate`: one process writes the answers, found several (torchrun, `num_workers`, `shard_range` or "
            "`tensor_parallel`). Start one."
        )
    # Check what can be checked before spending minutes on loading.
    check_writer(config, generation)
    predicate = None if generation.keep_if is None else load_predicate(generation.keep_if)
    check_inputs(config, config.output, store_location(config.output))
    store = AnswerStore(store_location(config.output), config.workers.stale_after)
    manifest = finished_cache(config, generation, predicate)
    store.check()
    device = worker.device(config.device, config.teacher)
    started = time.perf_counter()

    on_stage("reading the prompts")
    tokenizer = open_tokenizer(config)
    positions = _check_causal(config)
    writer = None if generation.writer is None else writer_config(config, generation)
    if writer is not None:
        _check_causal(writer)
        for warning in check_same_tokenizer(tokenizer, open_tokenizer(writer), role="writer"):
            on_warning(f"{generation.writer}: {warning}")
    earlier: Mapping[str, Any] | None = None
    if not config.overwrite:
        earlier = store.prompts() if manifest is None else manifest.metadata.corpus
    prompts = open_prompts(as_dated(config, earlier).data, tokenizer, positions=positions)
    config = as_dated(config, prompts.description)
    for warning in prompts.warnings:
        on_warning(warning)
    if config.server.kind == "openai":
        prompts.check_messages()
    if manifest is not None:
        on_stage("comparing with the finished cache")
        check_same_contents(config, writer, manifest, prompts, tokenizer, worker)
        if store.holds(manifest.metadata.corpus["generation"]["answers_file"]):
            store.remove()  # killed between the last two steps
        return _summary_of(config.output, manifest)

    cache = partial(cache_answers, config, worker, tokenizer=tokenizer, device=device, on_stage=on_stage)
    read = prompts if writer is None else prompts.for_writer()
    with store:
        place = device if writer is None else worker.device(writer.device, writer.teacher)
        on_stage(opening_stage(writer or config, place, role="teacher" if writer is None else "writer"))
        with closing(open_engine(writer or config, read, tokenizer, place)) as engine:
            corpus, answering = _answer(
                writer or config, generation, prompts, store, engine, tokenizer, predicate, on_stage, on_progress
            )
            tokens_per_s = answering.tokens_written / (time.perf_counter() - answering.started)
            resumed, selection, usage = answering.resumed, answering.selection, engine.usage
            if writer is None:
                on_stage(f"caching {len(corpus):,} of {quantity(selection.answers, 'answer')}")
                cache(corpus, engine)
                exact_mass: float | None = 1.0 - selection.outside_sum / selection.loss_tokens
        if writer is not None:
            del engine, answering  # the device has room for the teacher
            clear_device_cache(garbage_collection=True)
            exact_mass, usage = _score(config, corpus, tokenizer, device, cache, on_stage, on_progress)
        store.remove()
    return replace(
        _summary_of(config.output, cf.open_cache(config.output).manifest),
        exact_mass=exact_mass,
        seconds=time.perf_counter() - started,
        tokens_per_s=tokens_per_s,
        resumed_answers=resumed,
        usage=usage,
    )


def _answer(
    config: CacheTeacherConfig,
    generation: GenerationConfig,
    prompts: Prompts,
    store: AnswerStore,
    engine: TeacherEngine,
    tokenizer: PreTrainedTokenizerBase,
    predicate: Predicate | None,
    on_stage: Callable[[str], None],
    on_progress: Callable[[GenerationProgress], None],
) -> tuple[AnswerCorpus, Answering]:
    """Answers all prompts that are not answered in the store. Args: config: of the teacher or the writer."""
    config.targets.check_vocabulary(engine.vocab_size)
    if isinstance(engine, TransformersEngine):
        longest = (prompts if generation.writer is None else prompts.for_writer()).longest_read
        check_decoding(engine.head, padding=rows_per_pass(config) > 1, longest=longest)
    stop_tokens = find_stop_tokens(engine.eos_token_ids, tokenizer, is_chat=prompts.columns.is_chat)
    settings = _settings(config, generation, prompts, engine, tokenizer, stop_tokens)
    begun = store.open(settings, replace=config.overwrite, allow_rounding=config.workers.allow_rounding)

    answers, asked = quantity(generation.answers_per_prompt, "answer"), quantity(prompts.answerable.sum(), "prompt")
    on_stage(f"writing {answers} to each of {asked}")
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
            longest_read=prompts.longest_read,
        ),
        answers_per_prompt=generation.answers_per_prompt,
        prompts_per_group=prompts_per_group(begun["capture"]["batch_size"], generation.answers_per_prompt),
        predicate=predicate,
        keep=generation.keep,
        on_progress=on_progress,
    )
    kept = answering.run()
    writer = None
    if generation.writer is not None:
        name, revision = generation.writer_source
        writer = {"name": name, "revision": revision or engine.revision, **engine.describe_teacher()}
    return _corpus(generation, prompts, stop_tokens, predicate, kept, writer), answering


def _score(
    config: CacheTeacherConfig,
    corpus: AnswerCorpus,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    cache: Callable[..., float | None],
    on_stage: Callable[[str], None],
    on_progress: Callable[[GenerationProgress], None],
) -> tuple[float | None, Usage | None]:
    """The second pass: the teacher computes the targets of another writer's answers.

    Args: cache: `cache_answers` of this run.

    Returns: mean mass of the exact entries, and the tokens that a server counted.
    """
    on_stage(opening_stage(config, device))
    rows = config.batch_size if config.batch_tokens is None else None
    scoring = replace(config, generation=None, batch_size=rows)
    with closing(open_engine(scoring, corpus, tokenizer, device)) as engine:
        on_stage(f"scoring {len(corpus):,} of {quantity(corpus.kept.selection.answers, 'answer')}")
        exact_mass = cache(corpus, engine, on_scored=lambda state: on_progress(_scored(state)))
        return exact_mass, engine.usage


def _scored(state: CaptureProgress) -> GenerationProgress:
    return GenerationProgress(
        answers=state.rows,
        total_answers=state.total_rows,
        passed=None,
        tokens_per_s=state.tokens_per_s,
        seconds_left=state.seconds_left,
        batch_size=state.batch_size,
    )


def _check_causal(config: CacheTeacherConfig) -> int | None:
    """The longest text that a model reads, if there is a limit.

    Raises: ConfigError for a masked language model, which cannot generate.
    """
    if config.on_server:
        return None
    found = load_config(config.teacher, revision=config.revision, trust_remote_code=config.trust_remote_code)
    if config.objective == "masked" or (found is not None and objective_of(found) == "masked"):
        raise ConfigError(
            f"`generate`: {model_name(config.teacher)} is a masked language model, which cannot continue "
            "a text. Use a causal one."
        )
    return None if found is None else most_positions(found)


def _settings(
    config: CacheTeacherConfig,
    generation: GenerationConfig,
    prompts: Prompts,
    engine: TeacherEngine,
    tokenizer: PreTrainedTokenizerBase,
    stop_tokens: list[int],
) -> dict[str, Any]:
    """What a continued run must have in common with the answers in the store; not which of them are kept."""
    answers = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocab_size": engine.vocab_size,
        "prompts": {**prompts.description, "number": len(prompts), **prompts.findings},
        "max_length": config.data.seq_len,
        "generation": {**generation.to_json(), "stop_tokens": stop_tokens},
        "capture": engine.describe(),
        "libraries": {name: importlib.metadata.version(name) for name in engine.libraries},
    }
    if generation.writer is not None:
        return {"writer": engine.describe_teacher(), **answers}
    return {"teacher": engine.describe_teacher(), "targets": config.targets.to_json(), **answers}


def _corpus(
    generation: GenerationConfig,
    prompts: Prompts,
    stop_tokens: list[int],
    predicate: Predicate | None,
    kept: KeptAnswers,
    writer: Mapping[str, str | None] | None,
) -> AnswerCorpus:
    """Args: writer: name and fingerprints, if it is not the teacher."""
    selection = kept.selection
    counts = {"answers": selection.answers, "passed": selection.passed, "prompts_kept": selection.prompts_kept}
    written = {
        **generation.to_json(),
        "stop_tokens": stop_tokens,
        **({} if writer is None else {"writer": writer}),
        **kept_by(generation, predicate),
        **counts,
        "stop_reasons": dict(selection.stop_reasons),
        # Written here for its checksum, which the manifest needs from the beginning; written to the cache later.
        "answers_file": cf.write_answers(kept.store.location, kept.lines()),
    }
    report: dict[str, int | float] = {
        "documents": len(prompts),
        "empty_prompts": int(np.count_nonzero(prompts.empty)),
        "long_prompts": int(np.count_nonzero(prompts.too_long)),
        **({"skipped_answers": selection.skipped} if selection.skipped else {}),
        **counts,
        "rows": len(kept),
        "tokens": selection.tokens,
        "counted_tokens": selection.loss_tokens,
        "ignored_files": prompts.source.ignored_files,
        **prompts.findings,
    }
    file = None
    if prompts.kept is not None:
        origin = np.array([answer.document for group in kept.groups() for answer in group.answers])
        file = prompts.kept.file(origin, np.ones_like(origin))
    about = describe_kept(prompts.config.keep_columns, file)
    description = {**prompts.description, **about, "generation": written}
    return AnswerCorpus(kept, prompts, description, report, file)


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
        loss_tokens=manifest.num_loss_tokens,
        bytes=manifest.stored_bytes,
        exact_mass=None,
        seconds=0.0,
        tokens_per_s=0.0,
        resumed_answers=written["answers"],
        corpus_report=dict(corpus["report"]),
    )
