"""Types and ranges of the fields of manifest and sidecars: one table per object, and one check for all tables.

Checksums do not prove who wrote a cache, so every value is checked before use, on writing and on reading: a digest
later becomes a file name in `read_cache`, a count the size of an array, text a part of a message.

A table maps an object's field names to kinds; a field whose name ends in `?` may be missing or null. Fields that are
not in a table may hold anything, because nothing uses them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any, TypeAlias

MOST = 2**63 - 1  # maximum of any count
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Kind:
    """A kind of value; `items`: the table for the items of a list, or for the values of an object with free keys."""

    expected: str  # description for error messages
    holds: Callable[[Any], bool]
    items: Any = None  # a table


Table: TypeAlias = Kind | Mapping[str, Any]  # of tables


def whole(least: int = 0, most: int = MOST) -> Kind:
    words = f"a whole number, {least} to {most}" if most < MOST else f"a whole number from {least} on"
    words = "a count" if (least, most) == (0, MOST) else words
    return Kind(words, lambda value: type(value) is int and least <= value <= most)


def is_digest(value: Any) -> bool:
    """Whether it is a SHA-256 in lower-case hex."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def number(least: float = 0.0, most: float = MOST, *, above: bool = True) -> Kind:
    """`above`: strictly greater than `least`."""
    words = "a number above 0" if (least, most, above) == (0.0, MOST, True) else f"a number, {least:g} to {most:g}"

    def holds(value: Any) -> bool:  # NaN never holds
        return type(value) in (int, float) and (least < value <= most or (not above and value == least))

    return Kind(words, holds)


def is_kept_text(value: Any) -> bool:
    """Whether it may be a value of a kept column: it becomes part of tables and messages."""
    return isinstance(value, str) and 1 <= len(value) <= MOST_KEPT_CHARACTERS and value.isprintable()


def one_of(*names: str) -> Kind:
    return Kind(" or ".join(names), lambda value: isinstance(value, str) and value in names)


def list_of(items: Table) -> Kind:
    return Kind("a list", lambda value: isinstance(value, list | tuple), items)


def object_of(items: Table) -> Kind:
    """An object with arbitrary keys."""
    return Kind("an object", lambda value: isinstance(value, Mapping), items)


ANYTHING = Kind("anything", lambda value: True)
COUNT = whole()
TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
DIGEST = Kind("a SHA-256, 64 digits of lower-case hex", is_digest)
POSITIVE = number()
LEVEL = Kind(
    'a number or "-inf"', lambda value: value == "-inf" or (type(value) in (int, float) and abs(value) <= MOST)
)

MOST_VOCABULARY = MOST_TOKENS = 2**24  # MOST_TOKENS: of a row
KINDS = ("top-k", "top-p", "threshold", "random", "hidden")
MOST_KEPT_VALUES, MOST_KEPT_CHARACTERS = 256, 100  # of documents.arrow
LOWER_BOUND = "lower-bound"  # of targets.entropy
CODEBOOK_COLUMNS = ("target_logprobs", "residual_logprob", "entropy")
"""Columns whose values are rounded to those of a codebook."""

COUNTS: dict[str, Any] = {"rows": COUNT, "tokens": COUNT, "counted_tokens": COUNT, "entries": COUNT}
BYTE_RANGE: dict[str, Any] = {"start": COUNT, "stop": COUNT, "sha256": DIGEST}
SIDECAR = {
    **COUNTS,
    "file_bytes": COUNT,
    "first_row": COUNT,
    "header": BYTE_RANGE,
    "record_batches": list_of({**BYTE_RANGE, **COUNTS, "first_row": COUNT}),
    "footer": BYTE_RANGE,
    "annotations": {"lexicon_sha256?": DIGEST},
}
FILE = {"bytes": COUNT, "sha256": DIGEST}
FILES = {"tokenizer_files": object_of(DIGEST)}
SHARDS = {"shards": list_of({**COUNTS, "name": TEXT, "bytes": COUNT, "sidecar_sha256": DIGEST})}
HEAD = {
    **FILE,
    "layer": COUNT,
    "dtype": TEXT,
    "bias": FLAG,
    "logit_scale": POSITIVE,
    "softcap?": POSITIVE,
}


HIDDEN = {
    "layers": list_of(COUNT),
    "teacher_layers": whole(0, 4096),
    "width": whole(1, 2**17),
    "dtype": TEXT,
    "every": whole(1),
}
TARGETS = {
    "kind": one_of(*KINDS),
    "temperature": POSITIVE,
    "max_entries?": whole(0, 2**16 - 1),
    "k?": whole(0, 2**16 - 1),
    "top_p?": number(0, 1),
    "tail_threshold?": number(0, 1),
    "draws?": whole(1, 255),
    "samples?": whole(1, 255),
    "seed?": whole(0, 2**64 - 1),
    "positions?": TEXT,
    "entropy?": one_of(LOWER_BOUND),
    "renormalised?": FLAG,
    "hidden?": HIDDEN,
    "head?": HEAD,
}
GENERATION = {
    "temperature?": number(above=False),
    "top_p?": number(above=False),
    "top_k?": COUNT,
    "answers?": COUNT,
    "passed?": COUNT,
    "keep?": TEXT,
    "writer?": {
        "name": TEXT,
        "revision?": TEXT,
        "weights_fingerprint?": TEXT,
        "config_fingerprint?": TEXT,
    },
    "answers_file?": FILE,
}
METADATA = {
    "teacher": {
        "name": TEXT,
        "revision?": TEXT,
        "dtype?": TEXT,
        "weights_fingerprint?": TEXT,
        "config_fingerprint?": TEXT,
    },
    "tokenizer": object_of(DIGEST),
    "vocab_size": whole(2, MOST_VOCABULARY),
    "alignment": one_of("next", "same"),
    "targets": TARGETS,
    "corpus": {
        "rows": whole(1),
        "tokens?": COUNT,
        "window_length?": whole(1, MOST_TOKENS),
        "window_prefix?": list_of(COUNT),
        "overlap?": whole(1, MOST_TOKENS),
        "token_stream_sha256?": DIGEST,
        "teacher_window_length?": whole(1, MOST_TOKENS),
        "teacher_stream_sha256?": DIGEST,
        "packing?": FLAG,
        "keep_columns?": list_of(TEXT),
        "documents_file?": FILE,
        "generation?": GENERATION,
    },
    "capture": {"batch_size?": whole(1), "converted?": list_of(object_of(ANYTHING))},
    "libraries": object_of(TEXT),
    "rows_per_shard": whole(1),
    "rows_per_record_batch": whole(1),
    "compression": {"codec": one_of("zstd"), "level": whole(1, 22)},
    "encoding?": one_of("columns", "packed"),
}
CODEBOOK = {"name": TEXT, "domain": TEXT, "values": list_of(LEVEL)}
CODEBOOKS = {"codebooks": dict.fromkeys(CODEBOOK_COLUMNS, CODEBOOK)}


def check_fields(value: Any, table: Table, name: str = "") -> None:
    """Raises: ValueError for the first value that does not match its table, with its name, value and expected kind."""
    if isinstance(table, Kind):
        if not table.holds(value):
            raise ValueError(f"{name} is {shortened(value)}, expected {table.expected}")
        if table.items is not None:
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in items:
                check_fields(item, table.items, f"{name}[{key!r}]")
        return
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {shortened(value)}, expected an object")
    for key, kind in table.items():
        plain = key.removesuffix("?")
        if plain is not key and value.get(plain) is None:
            continue
        inside = f"{name}.{plain}" if name else plain
        if plain not in value:
            raise ValueError(f"no key {inside!r}")
        check_fields(value[plain], kind, inside)
