"""The cache directory: token rows with a teacher's targets. One cache serves any number of students.

    import cache_format as cf

    cache = cf.open_cache("CACHE")      # reads manifest.json; maps a shard when it is first used
    row = cache[0]                      # cf.CacheRow: input_ids, loss_mask, targets, label_ids, ...
    ids, logprobs = row.targets.at(17)  # the prediction made from position 17

`SPEC.md` in this directory defines the format. The package needs numpy, pyarrow, zstandard and fsspec, never torch or
transformers. Importing it loads only the errors; every other name loads its module when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cache_format.cache_errors import (
    CacheError,
    ClaimLostError,
    CorruptShardError,
    DistillError,
    FormatError,
    MismatchError,
)

if TYPE_CHECKING:  # the same names as in _LAZY, for type checkers and editors
    from cache_format.codecs.codebook import (
        Codebook,
        entropy_codebook,
        residual_codebook,
        sqrt_probability_codebook,
        weight_codebook,
    )
    from cache_format.manifest.answers_file import ANSWERS, write_answers
    from cache_format.manifest.differences import FINGERPRINTS, differences, ignoring_names, listed
    from cache_format.manifest.documents_file import KeptColumn, describe_documents, documents_bytes, write_documents
    from cache_format.manifest.fields import CODEBOOK_COLUMNS
    from cache_format.manifest.manifest import Manifest, sha256
    from cache_format.manifest.metadata import (
        EXACT_LEVELS,
        FORMAT_VERSION,
        CacheMetadata,
        default_codebooks,
    )
    from cache_format.manifest.stored_head import HEAD, HeadSpec, StoredHead, head_contents, head_file_bytes
    from cache_format.read.reader import Cache, open_cache
    from cache_format.read.verify import VerifySummary, verify_cache
    from cache_format.rows.hidden import HiddenSpec, HiddenStates, find_invalid_state
    from cache_format.rows.plausibility import entropy_lower_bound
    from cache_format.rows.rebuilt import rebuilt_targets
    from cache_format.rows.row_batch import RowBatch
    from cache_format.rows.types import IGNORE_INDEX, CacheRow, SparseTargets
    from cache_format.storage.read_cache import ReadCache
    from cache_format.write.convert import Conversion, convert_cache
    from cache_format.write.finishing import finish_cache
    from cache_format.write.occupancy import (
        check_writable,
        finished_already,
        finished_manifest,
        recorded_metadata,
        remove_cache,
    )
    from cache_format.write.shared_writer import Share, SharedCacheWriter, parse_shard_range
    from cache_format.write.unfinished import CacheSize
    from cache_format.write.writer import CacheWriter

__all__ = [
    "ANSWERS",
    "CODEBOOK_COLUMNS",
    "EXACT_LEVELS",
    "FINGERPRINTS",
    "FORMAT_VERSION",
    "HEAD",
    "IGNORE_INDEX",
    "Cache",
    "CacheError",
    "CacheMetadata",
    "CacheRow",
    "CacheSize",
    "CacheWriter",
    "ClaimLostError",
    "Codebook",
    "Conversion",
    "CorruptShardError",
    "DistillError",
    "FormatError",
    "HeadSpec",
    "HiddenSpec",
    "HiddenStates",
    "KeptColumn",
    "Manifest",
    "MismatchError",
    "ReadCache",
    "RowBatch",
    "Share",
    "SharedCacheWriter",
    "SparseTargets",
    "StoredHead",
    "VerifySummary",
    "check_writable",
    "convert_cache",
    "default_codebooks",
    "describe_documents",
    "differences",
    "documents_bytes",
    "entropy_codebook",
    "entropy_lower_bound",
    "find_invalid_state",
    "finish_cache",
    "finished_already",
    "finished_manifest",
    "head_contents",
    "head_file_bytes",
    "ignoring_names",
    "listed",
    "open_cache",
    "parse_shard_range",
    "rebuilt_targets",
    "recorded_metadata",
    "remove_cache",
    "residual_codebook",
    "sha256",
    "sqrt_probability_codebook",
    "verify_cache",
    "weight_codebook",
    "write_answers",
    "write_documents",
]

_LAZY = {
    name: module
    for module, names in {
        "codecs.codebook": (
            "Codebook",
            "entropy_codebook",
            "residual_codebook",
            "sqrt_probability_codebook",
            "weight_codebook",
        ),
        "manifest.answers_file": ("ANSWERS", "write_answers"),
        "manifest.differences": ("FINGERPRINTS", "differences", "ignoring_names", "listed"),
        "manifest.documents_file": ("KeptColumn", "describe_documents", "documents_bytes", "write_documents"),
        "manifest.fields": ("CODEBOOK_COLUMNS",),
        "manifest.manifest": ("Manifest", "sha256"),
        "manifest.metadata": ("EXACT_LEVELS", "FORMAT_VERSION", "CacheMetadata", "default_codebooks"),
        "manifest.stored_head": ("HEAD", "HeadSpec", "StoredHead", "head_contents", "head_file_bytes"),
        "read.reader": ("Cache", "open_cache"),
        "read.verify": ("VerifySummary", "verify_cache"),
        "rows.hidden": ("HiddenSpec", "HiddenStates", "find_invalid_state"),
        "rows.plausibility": ("entropy_lower_bound",),
        "rows.rebuilt": ("rebuilt_targets",),
        "rows.row_batch": ("RowBatch",),
        "rows.types": ("IGNORE_INDEX", "CacheRow", "SparseTargets"),
        "storage.read_cache": ("ReadCache",),
        "write.convert": ("Conversion", "convert_cache"),
        "write.finishing": ("finish_cache",),
        "write.occupancy": (
            "check_writable",
            "finished_already",
            "finished_manifest",
            "recorded_metadata",
            "remove_cache",
        ),
        "write.shared_writer": ("Share", "SharedCacheWriter", "parse_shard_range"),
        "write.unfinished": ("CacheSize",),
        "write.writer": ("CacheWriter",),
    }.items()
    for name in names
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
