"""The cache directory: what a teacher said, in a form that any number of students can read.

    import cache_format as cf

    cache = cf.open_cache("CACHE")      # reads manifest.json; shards are mapped when first used
    row = cache[0]                      # cf.CacheRow: input_ids, loss_mask, targets, label_ids, ...
    ids, logprobs = row.targets.at(17)  # what the teacher expects after token 17

`SPEC.md` beside this file is the format itself. The package needs numpy, pyarrow and fsspec, never
torch or transformers: a cache must be readable from anywhere.
"""

from __future__ import annotations

from cache_format.cache_errors import (
    CacheError,
    ClaimLostError,
    CorruptShardError,
    DistillError,
    FormatError,
    MismatchError,
)
from cache_format.codecs.codebook import (
    Codebook,
    entropy_codebook,
    residual_codebook,
    sqrt_probability_codebook,
    weight_codebook,
)
from cache_format.manifest.answers_file import ANSWERS, write_answers
from cache_format.manifest.differences import FINGERPRINTS, but_for_names, differences, listed
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
from cache_format.rows.rebuilt import rebuilt_targets
from cache_format.rows.row_batch import RowBatch
from cache_format.rows.types import IGNORE_INDEX, CacheRow, SparseTargets
from cache_format.storage.read_cache import ReadCache
from cache_format.write.convert import Conversion, convert_cache
from cache_format.write.occupancy import (
    check_writable,
    finished_already,
    finished_manifest,
    recorded_metadata,
    remove_cache,
)
from cache_format.write.shared_writer import Share, SharedCacheWriter, parse_shard_range
from cache_format.write.unfinished import CacheSize, finish_cache
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
    "Manifest",
    "MismatchError",
    "ReadCache",
    "RowBatch",
    "Share",
    "SharedCacheWriter",
    "SparseTargets",
    "StoredHead",
    "VerifySummary",
    "but_for_names",
    "check_writable",
    "convert_cache",
    "default_codebooks",
    "differences",
    "entropy_codebook",
    "find_invalid_state",
    "finish_cache",
    "finished_already",
    "finished_manifest",
    "head_contents",
    "head_file_bytes",
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
]
