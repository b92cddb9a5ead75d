"""The fingerprint of all rows of a corpus, by which the writers of a cache know that they have the same rows.

Every worker needs it at its start. So it is computed a block of rows at a time, at nearly the speed of SHA-256, and
stored next to the tokenised text in the cache of `datasets`, where the next start on the same machine finds it. The
stored value is valid for files of this name, size and modification time, cut into rows by this code with these options.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from cache_format.storage.claims import Claims, wait_for
from cache_format.storage.directory import open_directory, write_bytes
from pipeline.teacher.targets import philox


@dataclass(frozen=True)
class StreamFacts:
    """Facts about all rows of a corpus together."""

    sha256: str
    tokens: int
    loss_tokens: int


def add_rows_to(
    digest: Any, ids: np.ndarray, mask: np.ndarray, segments: np.ndarray, tokens: np.ndarray, counts: np.ndarray
) -> None:
    """`packing.add_row_to` for each of R rows, which are concatenated.

    Args:
        ids, mask: token ids int32 and loss mask bool of all rows.
        segments: segment lengths of all rows, int32.
        tokens, counts: number of tokens and of segments of each row, int64 [R].
    """
    heads = _bytes(np.stack([tokens, counts], axis=1).astype("<i8"))
    id_bytes, segment_bytes = (_bytes(each.astype("<i4", copy=False)) for each in (ids, segments))
    mask_bytes = _bytes(mask.astype("u1"))
    t = s = 0
    for row, (length, count) in enumerate(zip(tokens.tolist(), counts.tolist(), strict=True)):
        digest.update(heads[16 * row : 16 * row + 16])
        digest.update(id_bytes[4 * t : 4 * (t + length)])
        digest.update(mask_bytes[t : t + length])
        digest.update(segment_bytes[4 * s : 4 * (s + count)])
        t, s = t + length, s + count


def load_or_compute(
    tokens: datasets.Dataset, options: Mapping[str, Any], code: tuple[str, ...], compute: Callable[[], StreamFacts]
) -> StreamFacts:
    """The result of `compute`, or what was stored of it for the same rows; of several processes one computes it.

    Args:
        tokens: the tokenised text; if it is not in a file, nothing is stored.
        options: options that decide how the text is cut into rows.
        code: Python files that decide it.
    """
    files = [Path(file["filename"]) for file in tokens.cache_files]
    if not files:
        return compute()
    facts = {
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "options": dict(options),
        "code": [_sha256(Path(file).read_bytes()) for file in (__file__, philox.__file__, *code)],
    }
    facts = json.loads(json.dumps(facts))  # in the form in which it will be read back
    key = _sha256(json.dumps([facts["files"][0][0], facts["options"]], sort_keys=True).encode())[:16]
    name, directory = f"{files[0].stem}.stream-{key}", open_directory(files[0].parent)
    claims = Claims(directory)
    try:
        wait_for(claims, name)
        if (found := _read(files[0].parent / f"{name}.json", facts)) is None:
            found = compute()
            write_bytes(directory, f"{name}.json", json.dumps({**facts, "stream": asdict(found)}).encode())
        return found
    finally:
        claims.close()


def _read(path: Path, facts: Mapping[str, Any]) -> StreamFacts | None:
    """None if nothing is stored, it cannot be read, or it belongs to another text, options or code."""
    try:
        recorded = json.loads(path.read_bytes())
        stream = StreamFacts(**recorded.pop("stream"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return stream if recorded == facts else None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array without a copy."""
    return memoryview(array.data).cast("B")
