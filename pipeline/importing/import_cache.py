"""Import: a source of another tool ─▶ a cache, in two passes (`survey`), resumed as any cache is."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

import cache_format as cf
from cache_format.cores import encoding_threads
from pipeline.importing.exported_facts import ExportedFacts
from pipeline.importing.import_config import ImportConfig
from pipeline.importing.readers.format_reader import Reader
from pipeline.importing.readers.source_formats import open_source
from pipeline.importing.row_mapping import RowMapper
from pipeline.importing.survey import Survey, survey_source, usable_rows
from pipeline.models.loading import load_tokenizer
from pipeline.models.tokenizers import real_vocab_size, tokenizer_files, tokenizer_fingerprint
from pipeline.options import NOT_SAVED, flat
from pipeline.teacher.text.formats.kept_columns import KeptValues, describe_kept
from pipeline.teacher.writing.saved_config import save_config
from pipeline.teacher.writing.shard_sizes import RECORD_BATCH_TOKENS, SHARD_TOKENS

LIBRARIES = ("torch", "transformers", "pyarrow", "numpy")


@dataclass(frozen=True)
class ImportSummary:
    """What was imported.

    Attributes:
        unusable: reason -> number of records that were left out; `examples`: reason -> the first of them.
        changed: what was adjusted, left out or noticed in the other rows -> how often.
        label_logprob: mean log-probability of the next token, nats; one that is not listed counts with its upper bound.
        label_listed: fraction of positions whose next token is among the entries.
    """

    output: str
    rows: int
    tokens: int
    loss_tokens: int
    entries: int
    bytes: int
    renormalised: bool
    label_logprob: float | None
    label_listed: float | None
    unusable: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)


def import_cache(
    config: ImportConfig,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_step: Callable[[float, float], None] = lambda done, total: None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> ImportSummary:
    """Reads the source twice: to check and count, and to write. Continues an unfinished import with the same options,
    and leaves a finished one alone.

    Raises:
        DataError: the source cannot be read, or a row of it is invalid; the message names the row.
        ConfigError, ModelError: the options or the tokenizer cannot be used.
        CacheError: `output` holds something else.
        MismatchError: `output` holds a cache of another source, of a source that was changed, or of other settings.
    """
    cf.check_writable(config.output, replace=True)
    tokenizer = load_tokenizer(config.tokenizer, revision=config.revision, trust_remote_code=config.trust_remote_code)
    reader = open_source(config, tokenizer)
    mapper = RowMapper(
        vocab_size=real_vocab_size(tokenizer, 2**24),
        values=reader.values,
        renormalised=reader.renormalised,
        top_k=config.top_k,
        bos_id=tokenizer.bos_token_id,
        drop_repeated_bos=config.drop_repeated_bos,
        max_error=reader.exported.max_error if reader.exported else 0.0,
    )
    on_stage(f"reading and checking {config.source}")
    survey = survey_source(reader, mapper, config.source, on_step)
    for warning in _warnings(config, reader, survey):
        on_warning(warning)

    record = _config_record(config)
    if config.overwrite:
        cf.remove_cache(config.output)
    documents = _documents_file(config, survey)
    metadata = import_metadata(config, reader, mapper, survey, tokenizer_fingerprint(tokenizer), documents)
    finished = cf.finished_manifest(config.output)
    if finished is not None:
        metadata = _recorded_facts_only(metadata, finished.metadata)
    on_stage(f"writing {config.output}")
    files = tokenizer_files(tokenizer)
    with cf.CacheWriter(
        config.output,
        metadata,
        tokenizer_files=files,
        resume=True,
        allow_finished=True,
        allow_rounding=finished is not None,  # nothing is written with other libraries
        encoding_threads=encoding_threads(),
    ) as writer:
        save_config(config.output, record)
        if documents is not None:
            cf.write_documents(config.output, documents)
        if writer.begin_shard() is not None:
            for number, row in usable_rows(reader, mapper, survey, writer.next_row):
                writer.write([row.numbered(number)])
                on_step(number + 1, survey.rows)
    manifest, evidence = cf.open_cache(config.output).manifest, survey.evidence
    return ImportSummary(
        output=config.output,
        rows=survey.rows,
        tokens=survey.tokens,
        loss_tokens=survey.loss_tokens,
        entries=manifest.num_entries,
        bytes=manifest.stored_bytes,
        renormalised=mapper.renormalised,
        label_logprob=None if evidence.mean_logprob is None else float(evidence.mean_logprob[1]),
        label_listed=evidence.listed / evidence.positions if evidence.positions else None,
        unusable=dict(survey.unusable),
        examples=survey.examples,
        changed=dict(survey.changed),
    )


def _documents_file(config: ImportConfig, survey: Survey) -> bytes | None:
    """Contents of documents.arrow: all documents of a record have its values. Raises: DataError."""
    if not config.keep_columns:
        return None
    documents = np.array(survey.documents)
    kept = KeptValues.of(survey.kept, config.source)
    return kept.file(np.repeat(np.arange(len(documents)), documents), documents)


def import_metadata(
    config: ImportConfig,
    reader: Reader,
    mapper: RowMapper,
    survey: Survey,
    tokenizer: dict[str, str],
    documents: bytes | None,
) -> cf.CacheMetadata:
    """Args: tokenizer: its fingerprint; documents: contents of documents.arrow, with kept columns."""
    together = max(1, RECORD_BATCH_TOKENS // survey.longest)
    whole = -(-max(1, SHARD_TOKENS // survey.longest) // together) * together
    alike = survey.most_entries == survey.fewest_entries
    exported = reader.exported or ExportedFacts(teacher="unknown", temperature=1.0)
    return cf.CacheMetadata(
        teacher={"name": config.teacher or exported.teacher},
        tokenizer=tokenizer,
        vocab_size=mapper.vocab_size,
        alignment="next",
        targets={
            "kind": "top-k",
            "temperature": config.temperature or exported.temperature,
            **({"k": survey.most_entries} if alike else {}),
            "max_entries": survey.most_entries,
            "positions": "counted",
            "entropy": "lower-bound",
            **({"renormalised": True} if mapper.renormalised else {}),
        },
        corpus={
            "source": config.source,
            "rows": survey.rows,
            "tokens": survey.tokens,
            "counted_tokens": survey.loss_tokens,
            "window_length": survey.longest,
            "token_stream_sha256": survey.token_stream_sha256,
            "packing": survey.packed,
            **describe_kept(config.keep_columns, documents),
        },
        capture={
            "imported": {
                "reader": type(reader).__name__.removesuffix("Reader"),
                "values": reader.values,
                "shift": reader.shift,
                **reader.description,
                "top_k": config.top_k,
                "drop_repeated_bos": config.drop_repeated_bos,
                "unusable": dict(sorted(survey.unusable.items())),
                "changed": dict(sorted(survey.changed.items())),
                "rows_sha256": survey.rows_sha256,
            }
        },
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
        rows_per_record_batch=together,
        rows_per_shard=config.rows_per_shard or whole,
        encoding=config.encoding,
        compression={"codec": "zstd", "level": config.compression_level},
    )


def _recorded_facts_only(metadata: cf.CacheMetadata, recorded: cf.CacheMetadata) -> cf.CacheMetadata:
    """The metadata to compare with a finished cache, which an older version may have imported with fewer facts."""
    known = recorded.capture.get("imported", {})
    imported = {name: value for name, value in metadata.capture["imported"].items() if name in known}
    return replace(metadata, capture={"imported": imported})


def _warnings(config: ImportConfig, reader: Reader, survey: Survey) -> list[str]:
    """Warnings about problems that do not stop the import."""
    warnings, evidence = [], survey.evidence
    if (repeated := survey.changed["documents that begin with two BOS tokens"]) and not config.drop_repeated_bos:
        warnings.append(
            f"{repeated:,} documents begin with two BOS tokens, as if special tokens had been added to the text twice. "
            "`drop_repeated_bos=True` removes one of them"
        )
    if evidence.unrelated:
        warnings.append(
            f"only {evidence.listed / evidence.positions:.1%} of the next tokens are among the entries, expected most: "
            "the lists may belong to another text, or the `tokenizer` may not be the teacher's"
        )
    if reader.renormalised:
        warnings.append(
            "the values sum to 1 over the listed tokens, so the teacher's tail mass is unknown. Training compares "
            "teacher and student on the listed tokens only (`tail=renormalise`)"
        )
    return warnings


def _config_record(config: ImportConfig) -> bytes:
    """The contents of distill_config.json, which name the options that made the cache."""
    options = {name: value for name, value in flat(config).items() if name not in NOT_SAVED}
    if not isinstance(config.tokenizer, str):
        options.pop("tokenizer", None)
    return (json.dumps({"config": options}, indent=2, sort_keys=True) + "\n").encode()
