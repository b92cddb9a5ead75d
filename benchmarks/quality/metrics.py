"""A student compared with its teacher on held-out text, from the full distributions of both at every position.

    ce          −log q(next token), nats
    kl          KL(p‖q) = Σ p·(log p − log q), nats
    agreement   share of positions where both have the same most likely token
    acceptance  Σ min(p, q): probability that speculative decoding accepts the student's token
    ece         expected calibration error: |accuracy − confidence| of the most likely token, averaged over 15 bins of
                confidence

All but ece are means over positions, so sums over domains can be added; the bins of ece can be added too.

Shapes: n positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.corpora import Corpus
from benchmarks.quality.objectives import probabilities, student_states
from benchmarks.quality.states import States
from pipeline.models.head import Head, evaluating

BINS = 15
BATCH_ROWS = 8
CHUNK_POSITIONS = 128


@dataclass
class Sums:
    """Sums over positions; `bins` [BINS, 3]: positions, sum of confidences, correct positions."""

    tokens: int = 0
    ce: float = 0.0
    kl: float = 0.0
    agreement: float = 0.0
    acceptance: float = 0.0
    bins: np.ndarray = field(default_factory=lambda: np.zeros((BINS, 3)))

    def add(self, p: Tensor, logq: Tensor, labels: Tensor) -> None:
        """Adds n positions: p [n, V] of the teacher, log-probabilities logq [n, V] of the student, labels [n]."""
        q = logq.exp()
        confidence, choice = q.max(dim=1)
        right = (choice == labels).double().numpy()
        self.tokens += len(labels)
        self.ce -= float(logq.gather(1, labels[:, None]).sum(dtype=torch.float64))
        self.kl += float((torch.xlogy(p, p) - p * logq).sum(dim=1).double().sum())
        self.agreement += float((choice == p.argmax(dim=1)).sum())
        self.acceptance += float(torch.minimum(p, q).sum(dim=1).double().sum())
        which = np.clip(np.ceil(confidence.double().numpy() * BINS).astype(int) - 1, 0, BINS - 1)
        for column, values in enumerate((np.ones(len(right)), confidence.double().numpy(), right)):
            self.bins[:, column] += np.bincount(which, values, minlength=BINS)

    def __add__(self, other: Sums) -> Sums:
        return Sums(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def means(self) -> dict[str, float]:
        names = ("ce", "kl", "agreement", "acceptance")
        gaps = np.abs(self.bins[:, 1] - self.bins[:, 2])  # per bin: positions · |confidence − accuracy|
        return {
            "tokens": self.tokens,
            **{name: getattr(self, name) / self.tokens for name in names},
            "ece": float(gaps.sum() / self.tokens),
        }


Held = list[tuple[Corpus, States]]


def evaluate(student: Head | None, teacher: Head, held_out: Held) -> dict[str, dict[str, float]]:
    """Means by domain, and over all training domains ("in-domain"). Without a student, those of the teacher itself."""
    sums = {corpus.name: _sums(student, teacher, corpus, states) for corpus, states in held_out}
    trained_on = [sums[corpus.name] for corpus, _ in held_out if corpus.trained_on]
    found = {name: domain.means() for name, domain in sums.items()}
    return {"in-domain": sum(trained_on, start=Sums()).means(), **found}


@torch.inference_mode()
def _sums(student: Head | None, teacher: Head, corpus: Corpus, states: States) -> Sums:
    sums = Sums()
    for start in range(0, len(corpus.rows), BATCH_ROWS):
        rows = range(start, min(start + BATCH_ROWS, len(corpus.rows)))
        batch = [corpus.rows[i] for i in rows]
        known = states.of_rows(rows)
        labels = torch.cat([torch.from_numpy(row.input_ids[1:][row.loss_mask[:-1]]) for row in batch]).long()
        hidden = known
        if student is not None:
            with evaluating(student.model):
                hidden, _ = student_states(student, batch)
        for first in range(0, len(labels), CHUNK_POSITIONS):
            here = slice(first, first + CHUNK_POSITIONS)
            logits = (student or teacher).logits(hidden[here]).float()
            sums.add(probabilities(teacher, known[here]), torch.log_softmax(logits, dim=1), labels[here])
    return sums
