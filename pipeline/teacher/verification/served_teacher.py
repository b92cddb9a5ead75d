"""A teacher on a server that is asked for rows of its cache again: one row at a time, and all of them together.

What random rounding errors do to the teacher cannot be tried on a server. In their place stands how far its two answers
are from each other, since it computes a row in another way when others share the batch, plus `ROUNDING`: two servers
that run one model, or a server and transformers, differ by that much (docs/servers.md).

A server lists the K most likely tokens. The rest of its distribution is spread evenly over the other tokens, so that
distances are those of entries and tail. A stored token that is not listed has at most the probability of the last one
that is, which is what it gets, or less if less is stored, or if the list leaves less for all of them.

Shapes: n positions that have targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.teacher.engines.interface import RowRequest
from pipeline.teacher.engines.server.server_config import SERVED_KINDS
from pipeline.teacher.engines.server.server_engine import entries
from pipeline.teacher.engines.server.server_opening import open_server
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.verification.criterion import UNKNOWN, Comparison
from pipeline.teacher.verification.row_check import RowCheck, RowChecker
from pipeline.teacher.verification.teacher_reading import Reading
from pipeline.teacher.verify_config import TeacherCheckConfig

ROUNDING = {
    "float32": {"divergence": 2e-6, "deviation": 5e-4},
    "float16": {"divergence": 1e-5, "deviation": 1e-2},
    "bfloat16": {"divergence": 1e-3, "deviation": 5e-2},
}
"""How far two engines are from each other, by the dtype that they compute in.

Δ nats more or less in every log-probability amount to a divergence of Δ²/2, and to a deviation of √p·Δ/2 at p = 1/4.
In float32 Δ is 0.002. In the other two it is 0.0045 and 0.045 on average, and 0.04 and 0.2 where it is largest.
"""

LEAST_REST = 1e-7
"""Least probability outside of a list. Listed probabilities are rounded, and may sum to 1 or slightly more."""


@dataclass(frozen=True, eq=False)
class _Run:
    """See `TeacherRun`.

    Attributes:
        row: by the rule of the cache.
        listed: with all K entries.
        cached: as stored.
        stored: [T] bool, positions that have targets.
    """

    row: cf.CacheRow
    listed: cf.CacheRow
    cached: cf.CacheRow
    stored: np.ndarray
    vocab_size: int

    def logprobs(self, here: slice) -> Tensor:
        positions = np.flatnonzero(self.stored)[here].tolist()
        probs = torch.zeros((len(positions), self.vocab_size), dtype=torch.float64)
        for of_position, t in zip(probs, positions, strict=True):
            ids, listed = _entries(self.listed, t)
            of_position[ids] = listed
            ids, cached = _entries(self.cached, t)
            unlisted = of_position[ids] == 0.0
            guessed = cached[unlisted].clamp(max=listed.min())
            room = (1.0 - listed.sum()).clamp(min=LEAST_REST)
            of_position[ids[unlisted]] = guessed * (room / guessed.sum().clamp(min=room))
        others = probs == 0.0
        rest = (1.0 - probs.sum(dim=1, keepdim=True)).clamp(min=LEAST_REST)
        return torch.where(others, rest / others.sum(dim=1, keepdim=True).clamp(min=1), probs).log()


def _entries(row: cf.CacheRow, position: int) -> tuple[Tensor, Tensor]:
    """Ids and probabilities."""
    ids, logprobs = row.targets.at(position)
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(np.exp(logprobs.astype(np.float64)))


class ServedTeacher:
    """Asks a server for rows of a cache again and compares them; owns the connections.

    Args:
        tokenizer: the tokenizer of the cache.
        rows: the rows to check.
        reading: what the teacher of the cache read.

    Raises: ConfigError if a server cannot compute targets of this kind again, or as `open_server`.
    """

    times = "twice"
    same_weights = None
    dtype = UNKNOWN

    def __init__(
        self,
        config: TeacherCheckConfig,
        cache: cf.Cache,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[cf.CacheRow],
        reading: Reading,
    ) -> None:
        metadata, self.reading = cache.metadata, reading
        self.rule = TargetRule.from_json(metadata.targets)
        _check_kind(config.cache, metadata, self.rule)
        # A server gives a lower bound of the entropy, like that of a cache made through one.
        metadata = replace(metadata, targets={**metadata.targets, "entropy": "lower-bound"})
        self.checker = RowChecker(metadata, self.rule)
        self.vocab_size = metadata.vocab_size
        # As in float32 if a server computed the cache, which does not tell.
        self.rounding = ROUNDING.get(str(metadata.teacher.get("dtype")), ROUNDING["float32"])
        requests = [self._request(row) for row in rows]
        self.engine = open_server(
            config.teacher,
            config.server,
            tokenizer,
            rule=self.rule,
            seq_len=max(int(np.max(request.read.segment_lengths)) for request in requests),
            all_positions=any(request.stored[-1] for request in requests),
            cache=config.cache,
        )

    def close(self) -> None:
        self.engine.close()

    def check(self, rows: Sequence[cf.CacheRow]) -> Iterator[RowCheck]:
        together = self._runs(rows)
        for row, in_batch in zip(rows, together, strict=True):
            (alone,) = self._runs([row])
            found = self.checker.check(row, row.row, alone, in_batch, in_batch)
            yield replace(found, divergence=self._widened(found.divergence), deviation=self._widened(found.deviation))

    def _widened(self, comparison: Comparison) -> Comparison:
        return replace(comparison, rounding=comparison.rounding + self.rounding[comparison.name])

    def _runs(self, rows: Sequence[cf.CacheRow]) -> list[_Run]:
        requests = [self._request(row) for row in rows]
        running = self.engine.run(requests, [self.rule, TargetRule(top_k=entries(self.rule, self.vocab_size))])
        return [
            _Run(found, listed, row, request.stored, self.vocab_size)
            for found, listed, row, request in zip(running.rows(0), running.rows(1), rows, requests, strict=True)
        ]

    def _request(self, row: cf.CacheRow) -> RowRequest:
        stored = self.checker.stored(row)
        return RowRequest(index=row.row, row=row, place=row.row, stored=stored, teacher=self.reading(row))


def _check_kind(location: str, metadata: cf.CacheMetadata, rule: TargetRule) -> None:
    """Raises: ConfigError."""
    problem = None
    if metadata.alignment != "next":
        problem = "its teacher is a masked language model"
    elif rule.kind not in SERVED_KINDS:
        problem = f"its targets are of kind {rule.kind}, which depend on more than the most likely tokens"
    elif rule.temperature != 1.0:
        problem = f"its targets are at temperature {rule.temperature:g}, and a server gives those at 1"
    elif metadata.hidden is not None:
        problem = "it has hidden states"
    if problem is not None:
        raise ConfigError(f"{location}: {problem}, so a server cannot compute it again. Give the teacher's directory.")
