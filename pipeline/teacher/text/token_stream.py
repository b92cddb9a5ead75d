"""The fingerprint of all tokens of a corpus: what tells every writer of a cache that it has the same rows.

It is asked for at the start of each worker, so it is made a block of rows at a time, at nearly the speed of SHA-256,
and remembered beside the tokenised text that it is of (`datasets`' cache): the next start on the same machine reads
it. What is remembered holds for files of this name, size and time, cut into rows in this way by this code.
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
    """Of all rows together."""

    sha256: str
    tokens: int
    counted_tokens: int


def add_rows_to(
    digest: Any, ids: np.ndarray, mask: np.ndarray, segments: np.ndarray, tokens: np.ndarray, counts: np.ndarray
) -> None:
    """As `packing.add_row_to` of each of R rows, that lie one behind the other.

    Args:
        ids, mask: of all their tokens, int32 and bool.
        segments: lengths of all their segments, int32.
        tokens, counts: int64 [R], tokens and segments of each row.
    """
    heads = memoryview(np.stack([tokens, counts], axis=1).astype("<i8")).cast("B")
    of_ids, of_segments = (memoryview(each.astype("<i4", copy=False)).cast("B") for each in (ids, segments))
    of_mask = memoryview(mask.astype("u1")).cast("B")
    t = s = 0
    for row, (length, count) in enumerate(zip(tokens.tolist(), counts.tolist(), strict=True)):
        digest.update(heads[16 * row : 16 * row + 16])
        digest.update(of_ids[4 * t : 4 * (t + length)])
        digest.update(of_mask[t : t + length])
        digest.update(of_segments[4 * s : 4 * (s + count)])
        t, s = t + length, s + count


def remembered(
    tokens: datasets.Dataset, decides: Mapping[str, Any], code: tuple[str, ...], compute: Callable[[], StreamFacts]
) -> StreamFacts:
    """What `compute` says of the rows that are cut from `tokens`, or has said before: of several processes that want
    to know one computes.

    Args:
        tokens: the tokenised text; if it lies in no file, everything is computed each time.
        decides: settings that decide the rows, beside the text.
        code: files of Python that do.
    """
    files = [Path(file["filename"]) for file in tokens.cache_files]
    if not files:
        return compute()
    facts = {
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "decides": dict(decides),
        "code": [_sha256(Path(file).read_bytes()) for file in (__file__, philox.__file__, *code)],
    }
    facts = json.loads(json.dumps(facts))  # as it will be read
    key = _sha256(json.dumps([facts["files"][0][0], facts["decides"]], sort_keys=True).encode())[:16]
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
    """None if there is nothing, or it is of another file, other code, or unreadable."""
    try:
        recorded = json.loads(path.read_bytes())
        stream = StreamFacts(**recorded.pop("stream"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return stream if recorded == facts else None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
