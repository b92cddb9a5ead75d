"""A finished cache in the output: whether it is the one that this run would write.

Options are compared first, then tokenizer and prompts. The models are loaded only if their name, dtype or revision
differs from the recorded one: a model may have another path on another machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from transformers import PreTrainedTokenizerBase

import cache_format as cf
from pipeline.models.loading import model_name
from pipeline.models.tokenizers import tokenizer_fingerprint
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.generation.predicates import Predicate
from pipeline.teacher.opening import open_engine
from pipeline.teacher.text.prompts import Prompts
from pipeline.teacher.writing.workers import Worker


def finished_cache(
    config: CacheTeacherConfig, generation: GenerationConfig, predicate: Predicate | None
) -> cf.Manifest | None:
    """The finished cache that this run would write, if it exists already. Names of models and prompts may differ.

    Raises: CacheError if something else is there; MismatchError: a cache that was made with other settings.
    """
    manifest = None if config.overwrite else cf.finished_manifest(config.output)
    replaces, stale_after_s = config.overwrite or manifest is not None, config.workers.stale_after
    cf.check_writable(config.output, replace=replaces, stale_after_s=stale_after_s)
    if manifest is None:
        return None
    recorded = manifest.metadata.to_json()
    corpus = recorded["corpus"]
    compared_options = ("data_config", "split", "text_column", "sample_by", "max_documents", "chat_template_kwargs")
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
    engine = "server" if config.on_server else "vllm" if config.running.engine == "vllm" else "transformers"
    found = cf.differences({"engine": recorded["capture"].get("engine", "transformers")}, {"engine": engine}, "capture")
    found += [d for key, was, given in compared for d in cf.differences({k: was.get(k) for k in given}, given, key)]
    if bool(written.get("writer")) != bool(generation.writer):  # else a name may have changed
        found += cf.differences({"writer": _writer(manifest).get("name")}, {"writer": generation.writer})
    if found:
        raise cf.finished_already(config.output, manifest, found)
    return manifest


def check_same_contents(
    teacher: CacheTeacherConfig,
    writer: CacheTeacherConfig | None,
    manifest: cf.Manifest,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    worker: Worker,
) -> None:
    """Raises: MismatchError if a finished cache was made by other models, or from other prompts."""
    recorded = manifest.metadata.to_json()
    was = {"tokenizer": recorded["tokenizer"], "prompts": recorded["corpus"]}
    given = {"tokenizer": tokenizer_fingerprint(tokenizer), "prompts": json.loads(json.dumps(prompts.description))}
    _check_same(teacher.output, manifest, was, given)

    was = {"teacher": recorded["teacher"], "writer": dict(_writer(manifest))}
    models = {"teacher": (teacher, prompts)}
    if writer is not None:
        models["writer"] = (writer, prompts.for_writer())
    others = {role: each for role, each in models.items() if _may_differ(each[0], was[role])}
    given = {role: _facts(config, read, tokenizer, worker) for role, (config, read) in others.items()}
    _check_same(teacher.output, manifest, was, given)


def _check_same(output: str, manifest: cf.Manifest, was: dict[str, Any], given: dict[str, Any]) -> None:
    """Compares the keys that are given."""
    was = {part: {name: was[part].get(name) for name in values} for part, values in given.items()}
    if found := cf.ignoring_names(cf.differences(was, given), was):
        raise cf.finished_already(output, manifest, found)


def _may_differ(config: CacheTeacherConfig, recorded: Mapping[str, Any]) -> bool:
    """Whether a model may be another one than the recorded: its name differs, or the revision or dtype if given."""
    given = {"name": model_name(config.teacher), "revision": config.revision}
    if config.dtype != "auto":
        given["dtype"] = config.dtype
    return any(value not in (None, recorded.get(name)) for name, value in given.items())


def kept_by(generation: GenerationConfig, predicate: Predicate | None) -> dict[str, Any]:
    """What determines which answers are kept, as in the manifest."""
    return {"keep": generation.keep, "keep_if": None if predicate is None else predicate.to_json()}


def _writer(manifest: cf.Manifest) -> Mapping[str, Any]:
    """What is recorded of the writer; empty if it was the teacher."""
    written = manifest.metadata.corpus.get("generation") or {}
    return written.get("writer") or {}


def _facts(
    config: CacheTeacherConfig, prompts: Prompts, tokenizer: PreTrainedTokenizerBase, worker: Worker
) -> dict[str, str | None]:
    device = worker.device(config.device, config.teacher)
    with closing(open_engine(config, prompts, tokenizer, device)) as engine:
        described = engine.describe_teacher()
        # A server has a name only, that of the model that it runs.
        return {name: described.get(name) for name in ("dtype", *cf.FINGERPRINTS, *({"name"} & described.keys()))}
