"""What a cache says of itself: teacher, text, targets, and all that decided its numbers."""

from __future__ import annotations

import importlib.metadata

import torch

import cache_format as cf
from pipeline.models.head import Head
from pipeline.models.head_export import HeadExport
from pipeline.models.loading import model_name, teacher_fingerprints
from pipeline.models.objective import ALIGNMENT
from pipeline.models.placement import device_names
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.engines.transformers_engine import CHUNK_POSITIONS
from pipeline.teacher.opening import CachedText
from pipeline.teacher.targets.hidden_targets import states_spec, with_head
from pipeline.teacher.text.corpus import ONLY_EOS
from pipeline.teacher.writing.shard_sizes import grouping


def stored_positions(config: CacheTeacherConfig, corpus: CachedText) -> int:
    """Positions that get targets."""
    return corpus.num_tokens if config.all_positions else corpus.num_loss_tokens


def cache_metadata(
    config: CacheTeacherConfig,
    corpus: CachedText,
    head: Head,
    fingerprint: dict[str, str],
    device: torch.device,
    stored_head: HeadExport | None = None,
) -> cf.CacheMetadata:
    rule = config.targets
    rule.check_vocabulary(head.vocab_size)
    hidden = states_spec(config.hidden, head, stored_head)
    libraries = ("torch", "transformers", "datasets", "pyarrow", "numpy")
    return cf.CacheMetadata(
        teacher={
            "name": model_name(config.teacher),
            "revision": config.revision or getattr(head.model.config, "_commit_hash", None),
            "architecture": type(head.model).__name__,
            "dtype": str(head.weight.dtype).removeprefix("torch."),
            **teacher_fingerprints(head.model),
        },
        tokenizer=fingerprint,
        vocab_size=head.vocab_size,
        alignment=ALIGNMENT[corpus.objective],
        targets={
            **with_head(rule.to_json(), stored_head),
            "positions": "all" if config.all_positions else "counted",
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
            "device": device_names(head.model, device),
            # Elsewhere than on a CPU no sum is split over them.
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "batch_size": config.batch_size,
            "head": "linear" if head.linear else "own",
            "chunk_positions": CHUNK_POSITIONS,
            **({"tensor_parallel": torch.distributed.get_world_size()} if config.tensor_parallel else {}),
        },
        codebooks={**cf.default_codebooks(head.vocab_size), "target_logprobs": rule.codebook()},
        libraries={name: importlib.metadata.version(name) for name in libraries},
        **grouping(config, hidden, stored_positions(config, corpus) / len(corpus)),
        encoding=config.encoding,
        compression={"codec": "zstd", "level": config.compression_level},
    )
