"""answers.arrow: of a cache whose text the teacher wrote, one line for each row, beside the shards.

An Arrow IPC file, read by any Arrow reader. Its size and checksum are in the manifest's
`corpus.generation.answers_file`, so that the chain of checksums covers it like everything else.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from cache_format.errors import FormatError
from cache_format.metadata import CacheMetadata
from cache_format.storage import Directory, open_directory

ANSWERS = "answers.arrow"

ANSWERS_SCHEMA = pa.schema(
    {
        "row": pa.uint64(),
        "document": pa.uint64(),  # row of the source
        "answer": pa.uint32(),  # among those to the same prompt
        "prompt_tokens": pa.uint32(),  # of the row; the others are the answer's
        "stop_reason": pa.string(),  # eos, stop-string, length
        "mean_logprob": pa.float32(),  # nats
        "text": pa.string(),
        "token_logprobs": pa.list_(pa.float32()),  # of the tokens written, nats, not quantised
    }
)


def recorded_answers(metadata: CacheMetadata) -> dict[str, Any] | None:
    """`bytes` and `sha256` of the file, if this cache has one."""
    generation = metadata.corpus.get("generation")
    return None if generation is None else generation.get("answers_file")


def write_answers(path: str | os.PathLike[str], batches: Iterable[pa.RecordBatch]) -> dict[str, Any]:
    """Writes the file into a directory; returns what a manifest records of it. Equal batches give equal bytes."""
    directory = open_directory(path)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with directory.create(ANSWERS) as name:
        with pa.ipc.new_file(name, ANSWERS_SCHEMA, options=options) as writer:
            for batch in batches:
                writer.write_batch(batch)
        data = Path(name).read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def answers_bytes(directory: Directory, recorded: dict[str, Any]) -> bytes:
    """The whole file. Raises: FormatError if it is missing or not as it was written."""
    where = directory.path(ANSWERS)
    try:
        data = directory.read_bytes(ANSWERS)
    except OSError as error:
        raise _damaged(where, "no such file") from error
    if (found := hashlib.sha256(data).hexdigest()) != recorded.get("sha256"):
        raise _damaged(where, f"checksum {found[:8]}…, expected {str(recorded.get('sha256'))[:8]}…")
    return data


def read_answers(directory: Directory, recorded: dict[str, Any]) -> pa.Table:
    """Raises: FormatError if the file is missing or not as it was written."""
    data = answers_bytes(directory, recorded)
    try:
        return pa.ipc.open_file(pa.py_buffer(data)).read_all()
    except pa.ArrowException as error:  # with a right checksum: written by something else
        raise _damaged(directory.path(ANSWERS), " ".join(str(error).split())) from error


def _damaged(where: str, problem: str) -> FormatError:
    return FormatError(
        f"{where}: {problem}: it was changed or damaged after writing. Restore it from a copy, or make the cache again."
    )
