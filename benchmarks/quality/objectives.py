"""An arm's loss on a batch of rows: mean over its loss tokens, in nats.

    labels   cross-entropy with the true next token, by the fused head without a teacher
    full     KL(teacher‖student) over the full vocabulary, with the teacher's head applied to its stored states
    cache    the loss of `train-student --kd-weight 1` on a cache: read, collated, fused

The same indices mean the same rows in the same order for every arm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import cache_format as cf
from benchmarks.quality.corpora import Corpus
from benchmarks.quality.dense import dense_loss
from benchmarks.quality.states import States
from benchmarks.quality.tracks import Arm
from pipeline.losses import IGNORE_INDEX, DistillLoss, SparseTargetBatch, fused_head
from pipeline.models.head import Head
from pipeline.models.padding import pad_rows
from pipeline.student.data.dataset import CacheDataset, LocalShuffle, collate
from pipeline.student.training.forward import distillation_output
from pipeline.student.validation.loss_checks import loss_for_cache
from pipeline.teacher.text.packing import TokenRow

SHUFFLE_WINDOW = 8  # record batches

Objective = Callable[[Head, Sequence[int]], Tensor]
"""Student's head and indices from `order` → differentiable mean loss."""


def order(track_rows: int, record_batch_rows: int, seed: int, samples: int) -> LocalShuffle:
    """The sampler of `train-student` over the first rows of a corpus: indices of each epoch."""
    starts = range(0, track_rows, record_batch_rows)
    batches = [(start, min(start + record_batch_rows, track_rows)) for start in starts]
    return LocalShuffle(batches, seed=seed, window=SHUFFLE_WINDOW, samples=samples)


def labels_objective(corpus: Corpus) -> Objective:
    def loss(head: Head, indices: Sequence[int]) -> Tensor:
        hidden, labels = student_states(head, [corpus.rows[i] for i in indices])
        nothing = torch.zeros(len(labels))
        targets = SparseTargetBatch(
            ids=torch.zeros(len(labels), 1, dtype=torch.int64),
            logprobs=torch.full((len(labels), 1), -torch.inf),
            residual_logprob=nothing,
            labels=labels,
        )
        output = fused_head(
            hidden,
            head.weight,
            head.bias,
            targets,
            DistillLoss(kd_weight=0.0),
            scale=1.0 / len(labels),
            vocab_size=head.vocab_size,
        )
        return output.loss

    return loss


def full_objective(corpus: Corpus, states: States, teacher: Head) -> Objective:
    def loss(head: Head, indices: Sequence[int]) -> Tensor:
        hidden, labels = student_states(head, [corpus.rows[i] for i in indices])
        known = states.of_rows(indices)
        weight = head.weight[: head.vocab_size]
        return dense_loss(hidden, weight, lambda at: probabilities(teacher, known[at]), scale=1.0 / len(labels))

    return loss


def cache_objective(path: Path, arm: Arm) -> Objective:
    dataset, recipe = open_dataset(path, arm)

    def loss(head: Head, indices: Sequence[int]) -> Tensor:
        batch = dataset.collate(dataset.__getitems__(indices))
        loss_tokens = int((batch["labels"] != IGNORE_INDEX).sum())
        return distillation_output(head, batch, recipe, 1.0 / loss_tokens).loss

    return loss


def shift_invariant_objective(path: Path, arm: Arm) -> Objective:
    """The unbiased estimate with the factor Σw instead of 1 on lse, a variant that `pipeline.losses` does not offer."""
    dataset, _ = open_dataset(path, arm)

    def loss(head: Head, indices: Sequence[int]) -> Tensor:
        rows = dataset.__getitems__(indices)
        hidden, labels = student_states(head, rows)
        targets = collate(rows)["targets"]
        targets = targets[targets.loss_mask]

        def weights(at: slice) -> Tensor:
            here = targets[at]
            return torch.zeros(len(here), head.vocab_size).scatter_add_(1, here.ids, here.logprobs.exp())

        weight = head.weight[: head.vocab_size]
        return dense_loss(hidden, weight, weights, shift_invariant=True, scale=1.0 / len(labels))

    return loss


def open_dataset(path: Path, arm: Arm) -> tuple[CacheDataset, DistillLoss]:
    cache = cf.open_cache(path, cached_record_batches=SHUFFLE_WINDOW + 1)
    return CacheDataset(cache), loss_for_cache(cache, kd_weight=1.0, tail=arm.tail)


def student_states(head: Head, rows: Sequence[TokenRow | cf.CacheRow]) -> tuple[Tensor, Tensor]:
    """Hidden states [n, D] and labels [n] at the loss tokens, row after row."""
    input_ids, position_ids = pad_rows(rows)
    labels = np.full(input_ids.shape, IGNORE_INDEX, np.int64)
    for i, row in enumerate(rows):
        at = np.flatnonzero(row.loss_mask)
        labels[i, at] = np.asarray(row.input_ids)[at + 1]
    labels = torch.from_numpy(labels)
    in_loss = labels != IGNORE_INDEX
    return head.hidden_states(input_ids, position_ids)[in_loss], labels[in_loss]


@torch.no_grad()
def probabilities(teacher: Head, states: Tensor) -> Tensor:
    """The teacher's probabilities, [n, V] float32."""
    return torch.softmax(teacher.logits(states).float(), dim=1)
