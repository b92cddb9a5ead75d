"""What a cache holds, as numpy arrays: the targets of a sequence, and the sequence itself.

Index t always speaks of the prediction made *from* position t. Nothing here shifts anything, and
nothing downstream should: the one place that knows which token a prediction is about is
`CacheRow.label_ids`.

Shapes: T positions of a row, E entries of all its positions, S documents (segments) packed in it.
Arrays keep the narrow integer types of the file and are read-only views of a decoded record batch:
copy before changing one, widen before arithmetic that could wrap.
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
IGNORE_INDEX = -100  # what the losses of transformers and torch skip


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """A teacher's distribution at every position, as a list of entries and what they leave out.

    The entries of all positions stand one after the other. Those of one position: the exact ones
    first, then the sampled tail, each group by ascending id. An exact entry's `logprobs` is the
    token's log-probability; a sampled entry's is the log of its weight.

    With M > 1 samples of the tail they stand one after the other, each by ascending id, with weights
    that make all of them together one estimate: a token may occur in several. `sample` gives one
    alone, `merged` each token once.
    """

    counts: IntArray  # [T] entries at each position; 0 only where loss_mask is False
    ids: IntArray  # [E] token ids
    logprobs: FloatArray  # [E] natural log
    exact_counts: IntArray  # [T] how many of the entries are exact
    residual_logprob: FloatArray  # [T] log(1 - sum of the exact probabilities), -inf allowed
    entropy: FloatArray  # [T] nats, of the teacher's full distribution
    sample_counts: IntArray | None = None  # [T, M] entries of each sample, where there are several

    @property
    def num_samples(self) -> int:
        """M: estimates of the same tail; 1 also if nothing is sampled. Each is unbiased alone. Those of `random` are
        independent; those of `threshold` share one random number and start 1/M apart, so that all together are one
        systematic sample of τ/M, which varies less than M independent ones would.
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
        """The exact entries and sample `index` (0 to M - 1) alone, an unbiased estimate by itself."""
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
        """All samples as one: each token once, with the sum of its weights."""
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

        Equal probabilities stay by ascending id; the sampled entries stay where they are.
        """
        position = np.repeat(np.arange(len(self.counts)), self.counts)  # [E]
        rank = np.arange(self.num_entries) - self.offsets[position]
        sampled = rank >= np.asarray(self.exact_counts)[position]
        key = np.where(sampled, rank, -self.logprobs)
        order = np.lexsort((self.ids, key, sampled, position))
        return replace(self, ids=self.ids[order], logprobs=self.logprobs[order])


class _Entries(Protocol):
    """What `SparseTargets` and `RowBatch` have in common."""

    @property
    def counts(self) -> IntArray: ...
    @property
    def exact_counts(self) -> IntArray: ...
    @property
    def sample_counts(self) -> IntArray | None: ...


def group_counts(entries: _Entries) -> NDArray[np.int64]:
    """[N, 1 + M] at each position the exact entries, then those of each sample; M is 1 where nothing is sampled."""
    exact, samples = np.asarray(entries.exact_counts, np.int64), entries.sample_counts
    if samples is None:
        samples = np.asarray(entries.counts, np.int64) - exact
    return np.column_stack([exact, samples]).astype(np.int64)


def entry_groups(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """[E] 0 for an exact entry, 1 + i for one of sample i, from `group_counts`."""
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
    loss_mask: NDArray[np.bool_]  # [T] whether the prediction made from t counts
    segment_lengths: IntArray  # [S] lengths of the packed documents; their sum is T
    targets: SparseTargets
    labels: IntArray | None = None  # [T] stored only where the alignment is "same"
    hidden: HiddenStates | None = None  # of the layers that the cache holds and was opened with

    @property
    def label_ids(self) -> NDArray[np.int64]:  # [T]
        """The token that the prediction made from t is about; -100 where it does not count."""
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
