"""Metadata of a cache: known before the first row is written, constant afterwards.

Stage one supplies it; the manifest is the metadata plus the list of shards. It determines the layout of every shard
(rows per shard, codebooks, compression, integer widths), so an interrupted run can only continue with equal metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from cache_format.codecs.codebook import (
    Codebook,
    entropy_codebook,
    residual_codebook,
    sqrt_probability_codebook,
)
from cache_format.manifest.fields import CODEBOOK_COLUMNS, CODEBOOKS, METADATA, check_fields
from cache_format.manifest.stored_head import HeadSpec
from cache_format.rows.hidden import HiddenSpec
from cache_format.rows.types import Alignment

FORMAT_NAME = "distill-cache"
FORMAT_VERSION = 1
"""Version of the format that a reader must support, for caches without a head."""
WITH_HEAD = 2  # for those with one

MOST_RECORD_BATCHES = 2**20  # per shard
LEAST_BYTES = 256  # per record batch: the flatbuffer that lists its buffers is longer
ROWS_PER_BYTE = 8  # maximum in a shard: consecutive row numbers cost zstd more than half a byte each

UnsignedType = type[np.uint8] | type[np.uint16] | type[np.uint32]

EXACT_LEVELS = 112
"""Number of values of the codebook of exact entries."""
POSITION_LEVELS = 64  # of the tail mass and the entropy


def default_codebooks(vocab_size: int, *, entropy_levels: int = POSITION_LEVELS) -> dict[str, Codebook]:
    """More values would not pay: quantising 50 exact entries costs 0.0008 nats of KL (docs/measurements.md).

    Args:
        entropy_levels: more for a sampled tail at a temperature other than 1. Entropies of hot distributions are so
            near to log V that all of them may be rounded in the same direction, and the KL is estimated from them.
    """
    return {
        "target_logprobs": sqrt_probability_codebook(EXACT_LEVELS),
        "residual_logprob": residual_codebook(POSITION_LEVELS),
        "entropy": entropy_codebook(vocab_size, entropy_levels),
    }


@dataclass(frozen=True, kw_only=True)
class CacheMetadata:
    """The descriptive part of the manifest. Mappings may hold keys beyond those listed here."""

    teacher: Mapping[str, Any]  # name, revision, dtype, weights_fingerprint, config_fingerprint
    tokenizer: Mapping[str, str]  # fingerprint: component -> sha256 in hex
    vocab_size: int  # real vocabulary size, without padding rows of the embedding
    alignment: Alignment
    targets: Mapping[str, Any]  # kind, temperature, max_entries (or k); other keys of the kind
    corpus: Mapping[str, Any]  # source, rows, tokens, window_length, token_stream_sha256
    capture: Mapping[str, Any] = field(default_factory=dict)  # device, threads, dtype
    libraries: Mapping[str, str] = field(default_factory=dict)  # name -> version
    rows_per_shard: int = 512
    rows_per_record_batch: int = 32
    encoding: str = "columns"  # or packed
    compression: Mapping[str, Any] = field(default_factory=lambda: {"codec": "zstd", "level": 9})
    codebooks: Mapping[str, Codebook] = field(default_factory=dict)  # by column; empty: defaults

    def __post_init__(self) -> None:
        check_fields({f.name: getattr(self, f.name) for f in fields(self)}, METADATA)
        if self.targets.get("max_entries") is None and self.targets.get("k") is None:
            raise ValueError("no key 'targets.max_entries'")
        if self.max_entries < 1 and self.head is None:
            raise ValueError(f"targets.max_entries is {self.max_entries}, expected 1 to 65535")
        if self.num_record_batches(0) > MOST_RECORD_BATCHES:
            raise ValueError(
                f"metadata: {self.num_record_batches(0):,} record batches in a shard, expected at most "
                f"{MOST_RECORD_BATCHES:,}"
            )
        if not self.codebooks:
            object.__setattr__(self, "codebooks", default_codebooks(self.vocab_size))
        if bool(self.corpus.get("keep_columns")) != (self.corpus.get("documents_file") is not None):
            raise ValueError("metadata.corpus: keep_columns and documents_file belong together, found one of them")
        _ = self.hidden  # raises if it is invalid
        self._check_head()
        if set(self.codebooks) != set(CODEBOOK_COLUMNS):
            raise ValueError(f"metadata.codebooks must be {', '.join(CODEBOOK_COLUMNS)}")

    @property
    def num_rows(self) -> int:
        return int(self.corpus["rows"])

    @property
    def max_entries(self) -> int:
        """Maximum number of entries at a position."""
        most = self.targets.get("max_entries")
        return int(self.targets["k"] if most is None else most)

    @property
    def num_samples(self) -> int:
        """Independent samples of the tail at each position; 1 even if nothing is sampled."""
        return int(self.targets.get("samples") or 1)

    @property
    def sampled(self) -> bool:
        """Whether positions may have sampled entries besides exact ones."""
        return self.targets.get("samples") is not None

    @property
    def entropy_known(self) -> bool:
        """Whether stored entropies are those of the teacher's full distributions, and not only lower bounds."""
        return self.targets.get("entropy") is None

    @property
    def renormalised(self) -> bool:
        """Whether the exact entries were rescaled to sum to 1, so that the teacher's tail mass is unknown."""
        return bool(self.targets.get("renormalised"))

    @property
    def command(self) -> str:
        """The command that writes this cache, for messages that propose to run it again."""
        if self.capture.get("converted"):
            return "convert"
        return "import" if "imported" in self.capture else "cache-teacher"

    @property
    def rounded_once(self) -> bool:
        """Whether values are within their codebook's rounding of the teacher's: not if `convert` rounded them again."""
        changes = self.capture.get("converted") or ()
        again = ("levels", "top_k", "samples", "tail_threshold")
        return not any(name in change for change in changes for name in again)

    @cached_property
    def hidden(self) -> HiddenSpec | None:
        """The hidden states stored alongside the targets, if any."""
        data = self.targets.get("hidden")
        return None if data is None else HiddenSpec.from_json(data)

    @cached_property
    def head(self) -> HeadSpec | None:
        """With hidden targets: the head that turns the stored states into distributions."""
        data = self.targets.get("head")
        return None if data is None else HeadSpec.from_json(data)

    @property
    def format_version(self) -> int:
        """The lowest version whose readers read this cache correctly."""
        return FORMAT_VERSION if self.head is None else WITH_HEAD

    def _check_head(self) -> None:
        head, hidden = self.head, self.hidden
        if (head is None) != (self.targets["kind"] != "hidden"):
            raise ValueError("metadata.targets: hidden targets and a head belong together, found one of them")
        if head is None and hidden is not None and hidden.layers[-1] > hidden.teacher_layers:
            raise ValueError(
                f"metadata.targets: hidden layer {hidden.layers[-1]} of {hidden.teacher_layers}, and no head"
            )
        if head is None:
            return
        if hidden is None or head.layer not in hidden.layers or hidden.every != 1:
            raise ValueError(f"metadata.targets: the head takes states of layer {head.layer} at every position")
        if self.max_entries or self.sampled or self.encoding != "columns":
            raise ValueError("metadata.targets: hidden targets have no entries, and nothing to pack")

    @property
    def id_type(self) -> UnsignedType:
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    @property
    def count_type(self) -> UnsignedType:
        return np.uint8 if self.max_entries < 2**8 else np.uint16

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """Rows of a shard. Shard boundaries depend only on row numbers, so any number of processes, interrupted any
        number of times, cut the corpus at the same places."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.num_rows))

    def num_record_batches(self, shard: int) -> int:
        return -(-len(self.shard_rows(shard)) // self.rows_per_record_batch)

    def record_batch_rows(self, shard: int) -> Iterator[range]:
        """Rows of each record batch of a shard; batches never cross a shard boundary."""
        rows = self.shard_rows(shard)
        for start in range(rows.start, rows.stop, self.rows_per_record_batch):
            yield range(start, min(start + self.rows_per_record_batch, rows.stop))

    def to_json(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["codebooks"] = {name: book.to_json() for name, book in self.codebooks.items()}
        plain: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False, default=dict))
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CacheMetadata:
        """Raises: ValueError for malformed data."""
        check_fields(data, METADATA | CODEBOOKS)
        known = {f.name: data[f.name] for f in fields(cls) if data.get(f.name) is not None}  # encoding may be missing
        books = {name: Codebook.from_json(book) for name, book in known["codebooks"].items()}
        return cls(**{**known, "codebooks": books})
