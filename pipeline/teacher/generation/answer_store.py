"""Answers of an unfinished run, in a directory next to its output: OUTPUT.answers.

The number of rows of a cache is only known once all answers have been generated and judged, so they are kept here until
then. There is one file per group of prompts, written atomically and never changed; its name contains the checksum of
its bytes, so a file is either complete or ignored. A run that was killed at any point continues with the first missing
group. The directory is removed when the cache is finished.

    OUTPUT.answers/settings.json                 settings that determine the answers; a resumed run must match them
    OUTPUT.answers/group-00007-1f3a….arrow       one group: answers with their targets, as computed
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

import cache_format as cf
from cache_format.json_object import json_object
from cache_format.storage.claims import CLAIMS, STALE_AFTER_S, WHOLE, Claims, Holder
from cache_format.storage.directory import is_temporary, open_directory, write_bytes
from pipeline.teacher.engines.answers import Answer

SETTINGS = "settings.json"
_GROUP = re.compile(r"group-(\d{5,})-([0-9a-f]{16})\.arrow")

_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
_SCHEMA = pa.schema(
    {
        "document": pa.int64(),
        "index": pa.int32(),
        "prompt_tokens": pa.int32(),
        "stop_reason": pa.string(),
        "text": pa.string(),
        "logprobs": _FLOATS,
        "input_ids": _INTS,
        "counts": _INTS,
        "ids": _INTS,
        "target_logprobs": _FLOATS,
        "exact_counts": _INTS,
        "sample_counts": _INTS,  # T·M, or null
        "residual_logprob": _FLOATS,
        "entropy": _FLOATS,
    }
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """The answers to consecutive prompts."""

    answers: Sequence[Answer]  # by document, then index
    batch_size: int  # the smallest one used
    skipped: Sequence[tuple[int, int]] = ()  # document and index of those that a server gave no usable answer to


def store_location(output: str) -> str:
    return output.rstrip("/") + ".answers"


class AnswerStore:
    """The directory; `location` is a path or an fsspec URL. As a context manager it releases its claim on exit."""

    def __init__(self, location: str, stale_after_s: float = STALE_AFTER_S) -> None:
        self._directory = open_directory(location)
        self._claims = Claims(self._directory, stale_after_s)
        self._names: dict[int, str] = {}  # by group

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._claims.close()

    @property
    def location(self) -> str:
        return self._directory.path()

    def check(self) -> None:
        """Raises: CacheError if the directory holds anything but a run's answers, or if another process uses it."""
        for holder in self._claims.others():
            raise self._refused(holder)
        names = [name for name in self._directory.names() if not is_temporary(name) and name != CLAIMS]
        foreign = [name for name in names if name not in (SETTINGS, cf.ANSWERS) and not _GROUP.fullmatch(name)]
        if foreign or (names and SETTINGS not in names):
            raise cf.CacheError(
                f"{self.location}: found {sorted(foreign or names)[0]!r}, expected nothing there, or the answers of an "
                "unfinished run, which are kept there until the cache is written. Choose another `output`."
            )

    def open(self, settings: Mapping[str, Any], *, replace: bool, allow_rounding: bool) -> dict[str, Any]:
        """Starts a new store, or continues an existing one.

        Args:
            replace: remove answers made with other settings.
            allow_rounding: continue with answers that differ only by rounding.

        Returns: the settings of the run that began the store.

        Raises: CacheError if something else is there or another process uses it; MismatchError if settings differ.
        """
        self.check()
        if (holder := self._claims.take(WHOLE)) is not None:
            raise self._refused(holder)
        given: dict[str, Any] = json.loads(json.dumps(settings))  # as it will be read back
        recorded = None
        names = self._directory.names()
        if SETTINGS in names:
            try:
                recorded = self._recorded()
                self._check_same(recorded, given, allow_rounding=allow_rounding)
            except cf.CacheError:
                if not replace:
                    raise
                for name in names:
                    if name not in (CLAIMS, SETTINGS):
                        self._directory.remove(name)
                self._directory.remove(SETTINGS)  # last: a directory without settings is not ours
                names, recorded = [], None
        for name in names:
            if is_temporary(name):
                self._directory.remove(name)
        if recorded is None:
            data = json.dumps(given, indent=1, sort_keys=True).encode()
            write_bytes(self._directory, SETTINGS, data)
        self._names = {int(match[1]): name for name in names if (match := _GROUP.fullmatch(name))}
        return given if recorded is None else recorded

    def _recorded(self) -> dict[str, Any]:
        return json_object(
            self._directory.read_bytes(SETTINGS),
            f"{self.location}/{SETTINGS}",
            expected="the settings of the unfinished run whose answers are in this directory",
            next_step="Restore it from a copy, or start again with `overwrite`.",
            error=cf.CacheError,
        )

    def _check_same(self, recorded: Mapping[str, Any], given: Mapping[str, Any], *, allow_rounding: bool) -> None:
        found = cf.ignoring_names(cf.differences(recorded, given), recorded)
        if different := [each for each in found if not (allow_rounding and each.rounding)]:
            raise cf.MismatchError(
                f"{self.location}: holds answers of an unfinished run with other settings: "
                f"{cf.listed(different)}. Use the same, choose another `output`, or start again with `overwrite`."
            )

    def prompts(self) -> dict[str, Any] | None:
        """The description of the prompts of the unfinished run that has answers here, if there is one."""
        if SETTINGS not in self._directory.names():
            return None
        found = self._recorded().get("prompts")
        return found if isinstance(found, dict) else None

    def load(self, number: int, expected: Sequence[tuple[int, int]] | None = None) -> Group | None:
        """A stored group; None if it is missing or damaged, or if it holds other answers than the expected ones.

        Args:
            expected: document and index of each answer, if they are to be checked.
        """
        if number not in self._names:
            return None
        name = self._names[number]
        data = self._directory.read_bytes(name)
        if _digest(data) == name.rpartition("-")[2].removesuffix(".arrow"):
            group = _decode(data)
            found = sorted([*((answer.document, answer.index) for answer in group.answers), *group.skipped])
            if expected is None or found == list(expected):
                return group
        self._directory.remove(name)
        del self._names[number]
        return None

    def save(self, number: int, group: Group) -> None:
        data = _encode(group)
        name = f"group-{number:05d}-{_digest(data)}.arrow"
        write_bytes(self._directory, name, data)
        self._names[number] = name

    def holds(self, answers_file: Mapping[str, Any]) -> bool:
        """Whether these are the answers that a cache's `answers_file` entry describes."""
        if cf.ANSWERS not in self._directory.names():
            return False
        return hashlib.sha256(self._directory.read_bytes(cf.ANSWERS)).hexdigest() == answers_file["sha256"]

    def remove(self) -> None:
        self._claims.close()
        self._directory.remove_tree("")

    def _refused(self, holder: Holder) -> cf.CacheError:
        return cf.CacheError(
            f"{self.location}: {holder} writes these answers, so this run stopped: nothing was changed. Wait for it "
            "or stop it."
        )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _encode(group: Group) -> bytes:
    def column(name: str) -> list[Any]:
        return [_value(answer, name) for answer in group.answers]

    skipped = {"skipped": json.dumps(group.skipped)} if group.skipped else {}
    schema = _SCHEMA.with_metadata({"batch_size": str(group.batch_size), **skipped})
    arrays = [pa.array(column(field.name), field.type) for field in schema]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return bytes(sink.getvalue())


def _value(answer: Answer, name: str) -> Any:
    row, targets = answer.row, answer.row.targets
    if name == "sample_counts":
        return None if targets.sample_counts is None else targets.sample_counts.ravel()
    if name == "input_ids":
        return row.input_ids
    if name in ("counts", "ids", "exact_counts", "residual_logprob", "entropy"):
        return getattr(targets, name)
    return targets.logprobs if name == "target_logprobs" else getattr(answer, name)


def _decode(data: bytes) -> Group:
    table = pa.ipc.open_file(pa.py_buffer(data))
    batch = table.get_batch(0)
    answers = []
    for i in range(len(batch)):
        values = {
            field.name: batch.column(field.name)[i].values.to_numpy(zero_copy_only=False)
            for field in _SCHEMA
            if pa.types.is_list(field.type) and batch.column(field.name)[i].is_valid
        }
        plain = {field.name: batch.column(field.name)[i].as_py() for field in _SCHEMA if field.name not in values}
        tokens, first = values["input_ids"], plain["prompt_tokens"]
        counted = np.zeros(len(tokens), bool)
        counted[first - 1 : -1] = True
        samples = values.get("sample_counts")
        answers.append(
            Answer(
                document=plain["document"],
                index=plain["index"],
                prompt_tokens=first,
                stop_reason=plain["stop_reason"],
                text=plain["text"],
                logprobs=values["logprobs"],
                row=cf.CacheRow(
                    row=0,
                    input_ids=tokens,
                    loss_mask=counted,
                    segment_lengths=np.array([len(tokens)], np.int32),
                    targets=cf.SparseTargets(
                        counts=values["counts"],
                        ids=values["ids"],
                        logprobs=values["target_logprobs"],
                        exact_counts=values["exact_counts"],
                        residual_logprob=values["residual_logprob"],
                        entropy=values["entropy"],
                        sample_counts=None if samples is None else samples.reshape(len(tokens), -1),
                    ),
                ),
            )
        )
    about = table.schema.metadata
    skipped = [(document, index) for document, index in json.loads(about.get(b"skipped", b"[]"))]
    return Group(answers=answers, batch_size=int(about[b"batch_size"]), skipped=skipped)
