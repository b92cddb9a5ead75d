"""What a manifest records: teacher, text, targets, and all that decided the numbers."""

from __future__ import annotations

import importlib.metadata

import torch

import cache_format as cf
from pipeline.models.loading import model_name
from pipeline.models.objective import ALIGNMENT
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.engines.interface import TeacherEngine
from pipeline.teacher.targets.hidden_targets import with_head
from pipeline.teacher.text.corpus import ONLY_EOS
from pipeline.teacher.text.corpus_protocols import CachedText
from pipeline.teacher.writing.shard_sizes import grouping


def stored_positions(config: CacheTeacherConfig, corpus: CachedText) -> int:
    """Positions that get targets."""
    return corpus.num_tokens if config.all_positions else corpus.num_loss_tokens


def cache_metadata(
    config: CacheTeacherConfig,
    corpus: CachedText,
    engine: TeacherEngine,
    tokenizer: dict[str, str],
) -> cf.CacheMetadata:
    """The metadata of the cache that a run writes.

    Args:
        tokenizer: the fingerprints of the tokenizer.
    """
    rule, hidden = config.targets, engine.hidden
    rule.check_vocabulary(engine.vocab_size)
    libraries = (*engine.libraries, "datasets", "pyarrow", "numpy")
    return cf.CacheMetadata(
        teacher={
            "name": model_name(config.teacher),
            "revision": config.revision or engine.revision,
            **engine.describe_teacher(),
        },
        tokenizer=tokenizer,
        vocab_size=engine.vocab_size,
        alignment=ALIGNMENT[corpus.objective],
        targets={
            **with_head(rule.to_json(), engine.stored_head),
            "positions": "all" if config.all_positions else "counted",
            **({"entropy": "lower-bound"} if config.on_server else {}),
            **({} if hidden is None else {"hidden": hidden.to_json()}),
        },
        corpus={
            **corpus.description,
            "rows": len(corpus),
            "tokens": corpus.num_tokens,
            "counted_tokens": corpus.num_loss_tokens,
            "window_length": config.data.seq_len,
            "token_stream_sha256": corpus.token_stream_sha256,
            "report": {name: count for name, count in corpus.report.items() if name != ONLY_EOS},  # only shown
        },
        capture={
            **engine.describe(),
            **({"tensor_parallel": torch.distributed.get_world_size()} if config.tensor_parallel else {}),
        },
        codebooks=rule.codebooks(engine.vocab_size),
        libraries={name: importlib.metadata.version(name) for name in libraries},
        **grouping(config, hidden, stored_positions(config, corpus) / len(corpus)),
        encoding=config.encoding,
        compression={"codec": "zstd", "level": config.compression_level},
    )
