"""Requests of a batch, found by the `custom_id` of their responses, which come back in any order.

Batch files of OpenAI, and of servers that take the same ones (`vllm run-batch`), are JSON lines:

    requests     {"custom_id": "17", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": …}}
    responses    {"custom_id": "17", "response": {"status_code": 200, "body": {"choices": …}}, "error": null}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.importing.readers.source_files import JSON_LINES, find_files, json_object


class BatchRequests:
    """Memory holds where each request is, not the requests.

    Args:
        source: file, directory or pattern.
    """

    def __init__(self, source: str) -> None:
        self.source, self.files = source, find_files(source, endings=JSON_LINES)
        if packed := next((path for path in self.files if path.name.endswith(".gz")), None):
            raise DataError(f"{packed}: found a compressed file of requests, expected a plain one. Unpack it.")

    def __contains__(self, custom_id: Any) -> bool:
        return isinstance(custom_id, str) and custom_id in self._places

    def of(self, custom_id: Any) -> Mapping[str, Any]:
        """A request, with the fields of its body; empty if there is none. Raises: DataError for a file that is not one
        of requests."""
        if custom_id not in self:
            return {}
        path, offset = self._places[custom_id]
        with path.open("rb") as stream:
            stream.seek(offset)
            return opened(json.loads(stream.readline()))

    @cached_property
    def _places(self) -> dict[Any, tuple[Path, int]]:
        """File and offset of each request. Raises: DataError."""
        found: dict[Any, tuple[Path, int]] = {}
        for path in self.files:
            offset = 0
            with path.open("rb") as stream:
                for number, line in enumerate(stream, 1):
                    where = f"{path}, line {number}"
                    if line.strip():
                        custom_id = _custom_id(line, where)
                        if custom_id in found:
                            raise DataError(f"{where}: custom_id {custom_id!r} occurs twice, expected once.")
                        found[custom_id] = path, offset
                    offset += len(line)
        return found


def opened(value: Any) -> Mapping[str, Any]:
    """A request or response with the fields of its `body` beside its own; nothing if it is not an object."""
    if not isinstance(value, Mapping):
        return {}
    body = value.get("body")
    return {**value, **body} if isinstance(body, Mapping) else value


def _custom_id(line: bytes, where: str) -> str:
    custom_id = json_object(line, where).get("custom_id")
    if not isinstance(custom_id, str):
        raise DataError(f"{where}: found custom_id {custom_id!r}, expected text that names the request.")
    return custom_id
