"""answers.jsonl: one line per row of a cache whose text was generated.

    {"row": 0, "document": 7, "answer": 2, "prompt_tokens": 31, "stop_reason": "eos", "mean_logprob": -0.41,
     "text": "…", "token_logprobs": [-0.02, …]}

`document` is the row of the source, `answer` the index among the answers to it; logarithms are natural. The manifest
records its size and checksum in `corpus.generation.answers_file`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cache_format.manifest.metadata import CacheMetadata
from cache_format.storage.checked_file import damaged, read_checked
from cache_format.storage.directory import Directory, open_directory

ANSWERS = "answers.jsonl"
"""File of the generated answers, in caches of generated text."""
KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("row", "document", "answer", "prompt_tokens"), int),
    **dict.fromkeys(("stop_reason", "text"), str),
    "mean_logprob": (int, float),
    "token_logprobs": list,
}


def recorded_answers(metadata: CacheMetadata) -> Mapping[str, Any] | None:
    """`bytes` and `sha256` of the file, if this cache has one."""
    generation: Mapping[str, Any] = metadata.corpus.get("generation") or {}
    return generation.get("answers_file")


def write_answers(path: str | os.PathLike[str], lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Writes the file into a directory; returns its entry for the manifest. Deterministic."""
    digest, size = hashlib.sha256(), 0
    with open_directory(path).create(ANSWERS) as name, open(name, "wb") as file:
        for line in lines:
            data = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()
            digest.update(data)
            size += file.write(data)
    return {"bytes": size, "sha256": digest.hexdigest()}


def answers_bytes(directory: Directory, recorded: Mapping[str, Any]) -> bytes:
    """The whole file. Raises: FormatError if it is missing or not as it was written."""
    return read_checked(directory, ANSWERS, recorded["sha256"])


def read_answers(directory: Directory, metadata: CacheMetadata) -> Iterator[dict[str, Any]]:
    """Line by line. Raises: FormatError."""
    recorded = recorded_answers(metadata)
    if recorded is None:
        return
    where = directory.path(ANSWERS)
    lines = answers_bytes(directory, recorded).split(b"\n")
    if lines.pop() or len(lines) != metadata.num_rows:
        raise damaged(where, f"{len(lines)} lines, expected {metadata.num_rows}, one for each row")
    for number, data in enumerate(lines):
        try:
            line = json.loads(data)
            wrong = [key for key, kind in KINDS.items() if not isinstance(line[key], kind)]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise damaged(where, f"line {number + 1} is not an answer ({' '.join(str(error).split())})") from error
        if wrong or line["row"] != number:
            raise damaged(where, f"line {number + 1} is not an answer (row {line['row']!r}; wrong: {', '.join(wrong)})")
        yield line
