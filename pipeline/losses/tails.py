"""From K entries to a pair of distributions: what happens to the mass the entries leave out.

A divergence needs two distributions over the same classes. The teacher gives K entries and a residual mass m; the
student gives K+2 numbers of its V logits: the entries' logits, the label's, and the log-sum-exp of everything else.
A **tail policy** says which K+1 classes both are seen through (entries first, one class for the tail last):

    bucket        the rest of the vocabulary is one class with teacher mass m. A lower bound of the full KL.
    renormalise   entries only, both sides rescaled to sum to one. Biased: it ignores the student's mass elsewhere.
    label         m goes to the true token: KL(p′‖q) over the whole vocabulary with p′ = entries + m·onehot(label).

Entries come from an 8-bit codebook, so they and m sum to one only nearly; the teacher side is always rescaled to
sum to exactly one, which makes every KL here non-negative and zero where student and teacher agree.

**Temperature.** The cache holds p at temperature 1. At T the entries become p_i^(1/T), exactly; of the tail only the
mass is known, and it is spread evenly over its n = V − K tokens: n·(m/n)^(1/T). By concavity that is the largest the
tempered tail can be. Against SmolLM2's own tempered softmax at K = 64 and T = 2 that is off by .12 nats of KL, where
m^(1/T), the residual tempered as if it were one token, is off by 1.6 (`benchmarks/results/temperature.md`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pipeline.losses.targets import TargetBatch

TailPolicy = Literal["bucket", "renormalise", "label"]
TAIL_POLICIES: tuple[TailPolicy, ...] = get_args(TailPolicy)


ABSENT = -1e30
"""Logit of a class that is not there. Finite, so that no gradient is ever inf − inf; its exp is exactly zero."""

UNDERFLOW_NATS = 69.0
"""How far below the largest logit `StudentValues.rest` may fall: exp(-69) = 1e-30 is still a divisor in float32."""


class StudentValues(NamedTuple):
    """All a sparse loss needs of the student's V logits at n positions, at one temperature (logits divided by T).

    entries: [n, K] logits at the target ids; `ABSENT` where padded.
    label:   [n] logit of the label if it is not among the entries, else `ABSENT`.
    rest:    [n] log-sum-exp over all tokens that are neither, at least the largest logit − `UNDERFLOW_NATS`.

    Three disjoint parts, so the tail's log-probability is `rest − lse`, never log(1 − Σq): as the student becomes
    sure of itself the subtraction would lose every digit, and its gradient with it.
    """

    entries: Tensor
    label: Tensor
    rest: Tensor

    @property
    def outside(self) -> Tensor:
        """[n] log-sum-exp over everything outside the entries."""
        return torch.logaddexp(self.label, self.rest)

    @property
    def lse(self) -> Tensor:
        """[n] log-sum-exp over the vocabulary."""
        return torch.logsumexp(torch.cat([self.entries, self.label[:, None], self.rest[:, None]], dim=1), dim=1)


def teacher_classes(targets: TargetBatch, tail: TailPolicy, temperature: float, vocab_size: int) -> Tensor:
    """Teacher log-probabilities [n, K+1] under a tail policy, normalised; the last class is the tail (or the label)."""
    logprobs, rest = targets.logprobs, targets.residual_logprob
    if tail == "renormalise":
        rest = torch.full_like(rest, -torch.inf)
    elif tail == "label":
        # m joins the label's own entry where it has one; otherwise it is the last class.
        is_label = (targets.ids == targets.labels[:, None]) & targets.valid
        logprobs = torch.where(is_label, torch.logaddexp(logprobs, rest[:, None]), logprobs)
        rest = rest.masked_fill(is_label.any(dim=1), -torch.inf)
    if temperature != 1.0:
        logprobs = logprobs / temperature
        if tail == "bucket":
            tokens = (vocab_size - targets.valid.sum(dim=1)).clamp(min=1).to(rest.dtype).log()
            rest = tokens + (rest - tokens) / temperature
        else:
            rest = rest / temperature
    classes = torch.cat([logprobs, rest[:, None]], dim=1)
    # clamp: a position without any class (renormalise, no entries) stays all -inf instead of NaN.
    return classes - torch.logsumexp(classes, dim=1, keepdim=True).clamp(min=ABSENT)


def student_classes(student: StudentValues, tail: TailPolicy) -> Tensor:
    """Student log-probabilities [n, K+1] over the same classes as `teacher_classes`."""
    if tail == "renormalise":
        lse = torch.logsumexp(student.entries, dim=1, keepdim=True)
        return torch.cat([student.entries - lse, torch.full_like(lse, ABSENT)], dim=1)
    last = student.outside if tail == "bucket" else student.label
    return torch.cat([student.entries, last[:, None]], dim=1) - student.lse[:, None]
