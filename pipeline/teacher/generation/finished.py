"""A finished cache in the output: whether it is the one that this run would write."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

import cache_format as cf
from pipeline.models.loading import model_name
from pipeline.models.tokenizers import tokenizer_fingerprint
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.generation.predicates import Predicate
from pipeline.teacher.opening import open_engine
from pipeline.teacher.text.prompts import Prompts
from pipeline.teacher.text.reading.data_paths import data_name


def finished_cache(
    config: CacheTeacherConfig, generation: GenerationConfig, predicate: Predicate | None
) -> cf.Manifest | None:
    """The finished cache that this run would write, if it exists already. Names of models and prompts may differ.

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
    if config.data.teacher_seq_len is not None:
        data["teacher_window_length"] = config.data.teacher_seq_len
    data["keep_columns"] = list(config.data.keep_columns) or None
    written = corpus.get("generation", {})
    compared = [
        ("targets", recorded["targets"], config.targets.to_json()),
        ("corpus", corpus, {"window_length": config.data.seq_len, **data}),
        ("generation", written, {**generation.to_json(), **kept_by(generation, predicate)}),
        ("manifest", recorded, {"encoding": config.encoding}),
    ]
    found = [d for key, was, given in compared for d in cf.differences({k: was.get(k) for k in given}, given, key)]
    if bool(written.get("writer")) != bool(generation.writer):  # else a name may have changed
        found += cf.differences({"writer": _writer(manifest).get("name")}, {"writer": generation.writer})
    if found:
        raise cf.finished_already(config.output, manifest, f" made with other settings ({cf.listed(found)})")
    return manifest


def has_other_names(config: CacheTeacherConfig, generation: GenerationConfig, manifest: cf.Manifest) -> bool:
    """Whether the name of a model or of the prompts differs from the recorded one. Contents are compared then."""
    recorded = manifest.metadata
    writer = _writer(manifest)
    name, revision = generation.writer_source
    return (model_name(config.teacher), data_name(config.data.data), name, revision or writer.get("revision")) != (
        recorded.teacher.get("name"),
        recorded.corpus.get("source"),
        writer.get("name"),
        writer.get("revision"),
    )


def check_same_contents(
    teacher: CacheTeacherConfig,
    writer: CacheTeacherConfig | None,
    manifest: cf.Manifest,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
) -> None:
    """Loads the models. Raises: CacheError if a finished cache was made by others, or from other prompts."""
    recorded = manifest.metadata.to_json()
    of_prompts = {name: prompts.description[name] for name in ("source", "files")}
    given: dict[str, dict[str, Any]] = {
        "teacher": _facts(teacher, prompts, tokenizer, device),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "prompts": of_prompts,
    }
    was = {
        "teacher": {name: recorded["teacher"].get(name) for name in given["teacher"]},
        "tokenizer": recorded["tokenizer"],
        "prompts": {name: recorded["corpus"].get(name) for name in of_prompts},
    }
    if writer is not None:
        given["writer"] = _facts(writer, prompts, tokenizer, device)
        was["writer"] = {name: recorded["corpus"]["generation"]["writer"].get(name) for name in given["writer"]}
    if found := cf.ignoring_names(cf.differences(was, given), was):
        raise cf.finished_already(teacher.output, manifest, f" made with other settings ({cf.listed(found)})")


def kept_by(generation: GenerationConfig, predicate: Predicate | None) -> dict[str, Any]:
    """What determines which answers are kept, as in the manifest."""
    return {"keep": generation.keep, "keep_if": None if predicate is None else predicate.to_json()}


def _writer(manifest: cf.Manifest) -> Mapping[str, Any]:
    """What is recorded of the writer; empty if it was the teacher."""
    written = manifest.metadata.corpus.get("generation") or {}
    return written.get("writer") or {}


def _facts(
    config: CacheTeacherConfig, prompts: Prompts, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> dict[str, str | None]:
    with closing(open_engine(config, prompts, tokenizer, device)) as engine:
        described = engine.describe_teacher()
        return {name: described.get(name) for name in ("dtype", *cf.FINGERPRINTS)}
