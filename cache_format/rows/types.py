"""Contents of a cache as numpy arrays: a token row, and the teacher's targets for it.

Index t always describes the prediction made *from* position t. Nothing here shifts anything, and nothing downstream
should: `CacheRow.label_ids` alone knows which token a prediction is about.

Shapes: T positions of a row, E entries of all its positions, S documents (segments) packed in it, M samples. Arrays
keep the narrow integer types of the file and are read-only views of a decoded record batch: copy before you change one,
widen before arithmetic that could overflow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cache_format.rows.hidden import HiddenStates

IntArray = NDArray[np.integer[Any]]
FloatArray = NDArray[np.float32]

Alignment = Literal["next", "same"]  # next: a causal model; same: a masked model
IGNORE_INDEX = -100
"""Label of a position that is not in the loss, as the losses of transformers and torch skip it."""


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """A teacher's distribution at every position of a row: a list of entries and the tail mass.

    The entries of all positions are concatenated. Within a position the exact entries come first, then the sampled
    ones, each group by ascending id. `logprobs` of an exact entry is the token's log-probability, of a sampled entry
    the log of its weight.

    M > 1 samples of the tail follow one another, each by ascending id. Their weights make all of them together one
    estimate, and a token may occur in several. `sample` returns one of them, `merged` each token once.
    """

    counts: IntArray  # [T] entries at each position; 0 only where loss_mask is False
    ids: IntArray  # [E] token ids
    logprobs: FloatArray  # [E] natural log
    exact_counts: IntArray  # [T] number of exact entries
    residual_logprob: FloatArray  # [T] log of the tail mass, 1 - sum of the exact probabilities; may be -inf
    entropy: FloatArray  # [T] nats, of the teacher's full distribution
    sample_counts: IntArray | None = None  # [T, M] entries of each sample; None unless M > 1

    @property
    def num_samples(self) -> int:
        """M, number of samples of the tail; 1 if nothing is sampled. Each sample alone is unbiased. Samples of `random`
        targets are independent; those of `threshold` targets share one random number and start 1/M apart, so that
        together they are one systematic sample with threshold τ/M and have less variance than independent samples.
        """
        return 1 if self.sample_counts is None else self.sample_counts.shape[1]

    @property
    def num_entries(self) -> int:
        return len(self.ids)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:  # [T + 1]
        """Position t owns entries offsets[t] to offsets[t + 1]."""
        return np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])

    def at(self, position: int) -> tuple[IntArray, FloatArray]:
        """The entries of one position: (ids, logprobs), exact ones first."""
        position = range(len(self.counts))[position]
        entries = slice(self.offsets[position], self.offsets[position + 1])
        return self.ids[entries], self.logprobs[entries]

    def sample(self, index: int) -> SparseTargets:
        """The exact entries and sample `index` (0 to M - 1): an unbiased estimate."""
        index = range(self.num_samples)[index]
        if self.sample_counts is None:
            return self
        group = entry_groups(group_counts(self))
        chosen = group == 1 + index
        exact = group == 0
        kept = exact | chosen
        logprobs = np.where(exact, self.logprobs, self.logprobs + np.float32(np.log(self.num_samples)))
        return replace(
            self,
            counts=np.asarray(self.exact_counts, np.int64) + self.sample_counts[:, index],
            ids=self.ids[kept],
            logprobs=np.minimum(logprobs[kept], np.float32(0)),
            sample_counts=None,
        )

    def merged(self) -> SparseTargets:
        """All samples as one: each token once per position, with the sum of its weights."""
        if self.sample_counts is None:
            return self
        sampled = entry_groups(group_counts(self)) > 0
        position = np.repeat(np.arange(len(self.counts)), self.counts)  # [E]
        order = np.lexsort((self.ids, sampled, position))
        position, ids, sampled = position[order], self.ids[order], sampled[order]
        same = (position[1:] == position[:-1]) & (ids[1:] == ids[:-1]) & sampled[1:] & sampled[:-1]
        starts = np.flatnonzero(np.concatenate([[True], ~same])) if len(ids) else np.zeros(0, np.int64)
        logprobs = self.logprobs[order].astype(np.float64)
        if len(ids):
            logprobs = np.log(np.add.reduceat(np.exp(logprobs), starts))
        return replace(
            self,
            counts=np.bincount(position[starts], minlength=len(self.counts)),
            ids=ids[starts],
            logprobs=np.minimum(logprobs, 0).astype(np.float32),
            sample_counts=None,
        )

    def sorted_by_probability(self) -> SparseTargets:
        """The same targets with the exact entries of each position most likely first.

        Equal probabilities stay in order of their ids; sampled entries keep their order.
        """
        position = np.repeat(np.arange(len(self.counts)), self.counts)  # [E]
        rank = np.arange(self.num_entries) - self.offsets[position]
        sampled = rank >= np.asarray(self.exact_counts)[position]
        key = np.where(sampled, rank, -self.logprobs)
        order = np.lexsort((self.ids, key, sampled, position))
        return replace(self, ids=self.ids[order], logprobs=self.logprobs[order])


class _Entries(Protocol):
    """The counts that `SparseTargets` and `RowBatch` both have."""

    @property
    def counts(self) -> IntArray: ...
    @property
    def exact_counts(self) -> IntArray: ...
    @property
    def sample_counts(self) -> IntArray | None: ...


def group_counts(entries: _Entries) -> NDArray[np.int64]:
    """[N, 1 + M] exact entries of each position, then entries of each sample; M is 1 if nothing is sampled."""
    exact, samples = np.asarray(entries.exact_counts, np.int64), entries.sample_counts
    if samples is None:
        samples = np.asarray(entries.counts, np.int64) - exact
    return np.column_stack([exact, samples]).astype(np.int64)


def entry_groups(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """[E] 0 for an exact entry, 1 + i for an entry of sample i; `counts` as from `group_counts`."""
    return np.repeat(np.tile(np.arange(counts.shape[1]), len(counts)), counts.ravel())


def joint_index(first: NDArray[np.int64], second: NDArray[Any], size: int) -> NDArray[np.int64]:
    """One integer for each pair: first · size + second, with 0 ≤ second < size. It sorts like (first, second), several
    times faster than `np.lexsort`."""
    return np.asarray(first * size + second, np.int64)


@dataclass(frozen=True, eq=False)
class CacheRow:
    """One token sequence with the teacher's targets for it."""

    row: int  # index in the tokenised corpus
    input_ids: IntArray  # [T]
    loss_mask: NDArray[np.bool_]  # [T] whether t is a loss token
    segment_lengths: IntArray  # [S] lengths of the packed documents; their sum is T
    targets: SparseTargets
    labels: IntArray | None = None  # [T] only with alignment "same"
    hidden: HiddenStates | None = None  # of the layers that the cache was opened with

    @property
    def label_ids(self) -> NDArray[np.int64]:  # [T]
        """The token that the prediction made from t is about; -100 where t is not a loss token."""
        if self.labels is None:
            labels = np.empty(len(self.input_ids), np.int64)
            labels[:-1] = self.input_ids[1:]
            labels[-1:] = IGNORE_INDEX
        else:
            labels = self.labels.astype(np.int64)
        labels[~self.loss_mask] = IGNORE_INDEX
        return labels

    @property
    def position_ids(self) -> NDArray[np.int64]:  # [T]
        """0, 1, 2, ... within each packed document."""
        lengths = self.segment_lengths.astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        return np.arange(len(self.input_ids)) - np.repeat(starts, lengths)
