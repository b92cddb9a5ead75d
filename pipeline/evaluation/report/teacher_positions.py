"""The text of a cache and its teacher at every loss token, as flat arrays.

Costs a pass over the rows; with hidden targets also the teacher's head, once for each loss token.

Shapes: N tokens of all rows read, L loss tokens among them, K = `TOP` candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

import cache_format as cf
from pipeline.losses import FullTargets
from pipeline.student.data.dataset import CacheDataset, to_device
from pipeline.student.validation.loss_checks import loss_for_cache

TOP = 5
CHUNK_POSITIONS = 128
"""The largest tensors are a dozen of that many rows of V numbers."""

OnProgress = Callable[[int, int], None]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False, kw_only=True)
class TextPositions:
    """The tokens of some rows.

    Attributes:
        input_ids: [N]
        documents: [D + 1] first token of each document, and N.
        rows: [D] the row of each document.
        predictions: [N] the loss token whose prediction is about this token, as its number from 0 to L − 1; -1 if none.
    """

    input_ids: NDArray[np.int64]
    documents: NDArray[np.int64]
    rows: NDArray[np.int64]
    predictions: NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class TeacherPositions:
    """The teacher at L loss tokens, at the temperature of the cache.

    Attributes:
        labels: [L] the true tokens.
        entropy: [L] nats; lower bounds unless `entropy_known`.
        tail: [L] tail mass; meaningless unless `tail_known`.
        top_ids: [L, K] the most likely tokens, most likely first, then sampled ones; -1 where there are fewer.
        top_probs: [L, K] their probabilities; of sampled tokens their weights.
        sampled: [L, K] which of them are sampled.
        label_probs: [L] probability of the true token; NaN where it is not an exact entry.
    """

    labels: NDArray[np.int64]
    entropy: Floats
    tail: Floats
    top_ids: NDArray[np.int64]
    top_probs: Floats
    sampled: NDArray[np.bool_]
    label_probs: Floats
    entropy_known: bool = True
    tail_known: bool = True

    @property
    def entropy_name(self) -> str:
        return "teacher entropy" if self.entropy_known else "teacher entropy, at least"

    @property
    def confidence(self) -> Floats:
        """[L] probability of the most likely token; NaN where no entry is exact."""
        return np.where(self.sampled[:, 0] | (self.top_ids[:, 0] < 0), np.float32(np.nan), self.top_probs[:, 0])

    @property
    def right(self) -> NDArray[np.bool_]:
        """[L] whether the true token is as likely as any; False where no entry is exact."""
        return np.asarray(self.label_probs >= self.confidence)


def read_positions(
    cache: cf.Cache,
    rows: int,
    device: torch.device,
    *,
    batch_size: int,
    on_progress: OnProgress = lambda done, total: None,
) -> tuple[TextPositions, TeacherPositions]:
    """Text and teacher of the first rows of a cache."""
    texts: list[dict[str, NDArray[Any]]] = []
    teachers: list[dict[str, NDArray[Any]]] = []
    dataset, loss = CacheDataset(cache), loss_for_cache(cache, kd_weight=1.0)
    done = 0
    for batch in DataLoader(dataset, batch_size=batch_size, sampler=range(rows), collate_fn=list):
        texts += map(_text, batch)
        if cache.metadata.head is None:
            teachers += map(_sparse, batch)
        else:
            targets = to_device(dataset.collate(batch), device)["targets"].prepare(loss)
            teachers.append(_full(targets[targets.loss_mask], loss.temperature))
        done += len(batch)
        on_progress(done, rows)
    text, teacher = (
        {name: np.concatenate([each[name] for each in parts]) for name in parts[0]} for parts in (texts, teachers)
    )
    return (
        TextPositions(
            input_ids=text["tokens"],
            documents=np.concatenate([[0], np.cumsum(text["lengths"])]),
            rows=np.repeat(np.arange(rows), [len(each["lengths"]) for each in texts]),
            predictions=np.where(text["predicted"], np.cumsum(text["predicted"]) - 1, -1),
        ),
        TeacherPositions(
            **teacher, entropy_known=cache.metadata.entropy_known, tail_known=not cache.metadata.renormalised
        ),
    )


def _text(row: cf.CacheRow) -> dict[str, NDArray[Any]]:
    """Tokens, whether a loss token's prediction is about each of them, and lengths of documents."""
    labels = row.label_ids
    about = np.flatnonzero(labels != cf.IGNORE_INDEX) + (1 if row.labels is None else 0)
    predicted = np.zeros(len(labels), bool)
    predicted[about] = True
    tokens = np.asarray(row.input_ids, np.int64)
    return {
        "tokens": tokens if row.labels is None else np.where(labels >= 0, labels, tokens),
        "predicted": predicted,
        "lengths": np.asarray(row.segment_lengths, np.int64),
    }


def _sparse(row: cf.CacheRow) -> dict[str, NDArray[Any]]:
    """The fields of `TeacherPositions` from the entries of one row."""
    targets, labels = row.targets.merged(), row.label_ids
    here = np.flatnonzero(labels != cf.IGNORE_INDEX)
    counts = np.asarray(targets.counts, np.int64)
    position = np.repeat(np.arange(len(counts)), counts)  # [E]
    sampled = np.arange(targets.num_entries) - targets.offsets[position] >= np.asarray(targets.exact_counts)[position]
    label_probs = np.full(len(counts), np.nan, np.float32)
    is_label = (targets.ids == labels[position]) & ~sampled
    label_probs[position[is_label]] = np.exp(targets.logprobs[is_label])
    order = np.lexsort((targets.ids, -targets.logprobs, sampled, position))
    # One more entry, for places beyond the last of a position.
    ids = np.append(targets.ids[order].astype(np.int64), -1)
    probs = np.append(np.exp(targets.logprobs[order]), np.float32(np.nan))
    sampled = np.append(sampled[order], False)
    place = np.arange(TOP)
    index = np.where(place < counts[here, None], targets.offsets[here, None] + place, len(ids) - 1)  # [L, K]
    return {
        "labels": labels[here],
        "entropy": np.asarray(targets.entropy)[here],
        "tail": np.exp(np.asarray(targets.residual_logprob)[here]),
        "top_ids": ids[index],
        "top_probs": probs[index],
        "sampled": sampled[index],
        "label_probs": label_probs[here],
    }


@torch.no_grad()
def _full(targets: FullTargets, temperature: float) -> dict[str, NDArray[Any]]:
    """The fields of `TeacherPositions` from stored states."""
    ids, probs, label_probs = [], [], []
    for start in range(0, max(1, len(targets)), CHUNK_POSITIONS):
        chunk = targets[start : start + CHUNK_POSITIONS]
        found = (chunk.logits(torch.float32) / temperature).softmax(dim=1)
        best = found.topk(min(TOP, found.shape[1]), dim=1)
        ids.append(best.indices.cpu().numpy())
        probs.append(best.values.cpu().numpy())
        label_probs.append(found.gather(1, chunk.labels[:, None]).squeeze(1).cpu().numpy())
    top_ids = np.concatenate(ids)
    return {
        "labels": targets.labels.cpu().numpy(),
        "entropy": targets.entropy.cpu().numpy(),
        "tail": np.zeros(len(targets), np.float32),
        "top_ids": top_ids,
        "top_probs": np.concatenate(probs),
        "sampled": np.zeros(top_ids.shape, bool),
        "label_probs": np.concatenate(label_probs),
    }
