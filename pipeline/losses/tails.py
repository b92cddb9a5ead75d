"""Tail policies: how a loss treats the teacher's probability outside the exact entries.

The teacher gives K entries and the tail mass m; the student gives K+2 numbers from its V logits (`StudentValues`).

Unbiased policies estimate anything linear in p, such as the forward KL, with weighted tokens of the tail:

    sampled       the cache's sampled entries with their weights w: E[Σ w_i f(i)] = Σ p_i f(i).
    realized      for text that the teacher wrote at temperature 1: uses the observed token as a one-draw sample of the
                  tail, with weight 1, if it is not an exact entry. Costs no bytes; wrong on any other text.

The others compare two distributions over K+1 classes, the exact entries and the tail, and ignore sampled entries:

    bucket        the rest of the vocabulary is one class with teacher mass m. A lower bound of the full KL.
    renormalise   exact entries only, both sides rescaled to sum to one. Biased: ignores the student's mass elsewhere.
    label         m goes to the true token: KL(p′‖q) over the vocabulary with p′ = entries + m·onehot(label).

Entries are stored in 8 bits, so the teacher's side is rescaled to sum to one: KL ≥ 0, and 0 where both agree. Exact
entries captured at temperature 1 can be tempered (`tempered_tail`); samples, and entries captured at T ≠ 1, cannot.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pipeline.losses.entries import Entries, TargetEntries

TailPolicy = Literal["sampled", "realized", "bucket", "renormalise", "label"]
TAIL_POLICIES: tuple[TailPolicy, ...] = get_args(TailPolicy)
UNBIASED: tuple[TailPolicy, ...] = ("sampled", "realized")

ABSENT = -1e30
"""Logit of a class that does not exist. Finite, so no gradient is ever inf − inf; its exp is exactly zero."""

TAIL_SURPRISE = 0.3
"""Where the mean −log p of a tail lies between its bounds: 0.25 to 0.54 measured, see `tempered_tail`."""

UNDERFLOW_NATS = 69.0
"""How far `StudentValues.rest` may fall below the largest logit: exp(-69) = 1e-30 is still a divisor in float32."""


class StudentValues(NamedTuple):
    """What a sparse loss reads of the student's V logits at n positions, at one temperature (logits divided by T).

    entries: [n, K] logits at the target ids; `ABSENT` where padded.
    label:   [n] logit of the label if it is not an entry, else `ABSENT`.
    rest:    [n] log-sum-exp over all other tokens, at least the largest logit − `UNDERFLOW_NATS`.

    The parts are disjoint, so the tail's log-probability is `rest − lse`, never log(1 − Σq), which loses every digit,
    and its gradient, as the student becomes certain.
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


def entries_of(targets: Entries, tail: TailPolicy, temperature: float) -> Entries:
    """The entries that a policy reads: with or without the sampled ones.

    Raises: ValueError if they were captured at another temperature and cannot be tempered to this one.
    """
    if temperature != targets.temperature and (tail in UNBIASED or targets.temperature != 1.0):
        what = "a sample" if targets.temperature == 1.0 else "truncated targets"
        raise ValueError(
            f"`temperature` {temperature}: the targets were captured at temperature {targets.temperature}, and {what} "
            f"cannot be converted to another one. Use `temperature={targets.temperature}`, or cache with "
            f"`temperature={temperature}`."
        )
    return targets if tail == "sampled" else targets.exact


def weights(targets: TargetEntries, tail: TailPolicy) -> tuple[Tensor, Tensor]:
    """Weights of the entries [n, K], and of the label [n] where it is not an entry, under an unbiased policy."""
    label = torch.full_like(targets.residual_logprob, float(tail == "realized"))
    return targets.logprobs.exp(), label


def teacher_classes(targets: TargetEntries, tail: TailPolicy, temperature: float, vocab_size: int) -> Tensor:
    """Teacher log-probabilities [n, K+1] under a tail policy, normalised; the last class is the tail (or the label)."""
    temperature = temperature / targets.temperature
    logprobs, rest = targets.logprobs, targets.residual_logprob
    if tail == "renormalise":
        rest = torch.full_like(rest, -torch.inf)
    elif tail == "label":
        # m is added to the label's entry if it has one; otherwise it is the last class.
        is_label = (targets.ids == targets.labels[:, None]) & targets.valid
        logprobs = torch.where(is_label, torch.logaddexp(logprobs, rest[:, None]), logprobs)
        rest = rest.masked_fill(is_label.any(dim=1), -torch.inf)
    if temperature != 1.0:
        logprobs = logprobs / temperature
        if tail == "bucket":
            tokens = (vocab_size - targets.valid.sum(dim=1)).clamp(min=1).to(rest.dtype)
            smallest = targets.logprobs.masked_fill(~targets.leading, 0.0).amin(dim=1)
            rest = tempered_tail(rest, smallest, tokens, temperature)
        else:
            rest = rest / temperature
    classes = torch.cat([logprobs, rest[:, None]], dim=1)
    # clamp: at a position without classes (renormalise, no entries) all stay -inf instead of NaN.
    return classes - torch.logsumexp(classes, dim=1, keepdim=True).clamp(min=ABSENT)


def tempered_tail(rest: Tensor, smallest: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """[n] estimate of log M = log Σ p^s, s = 1/T, over the tail, whose probabilities are not stored.

    log M is convex in s; it is log n at s = 0 and log m at s = 1, where its slope is −S, S the mean of −log p over the
    tail. S is at least −log of the smallest entry, since no token of the tail is above it, and at most log(n/m), that
    of an even spread. The estimate is a parabola through both points with S at `TAIL_SURPRISE` of that range, clamped
    to the bounds on M. An S derived from the stored entropy is worse: the entropy's rounding error is divided by m.

    Error against SmolLM2's own tempered softmax at K = 64, T = 2: 0.007 nats of KL; an even spread has 0.12, a single
    token with all of m has 1.6 (`benchmarks/results/temperature.md`).

    Args:
        rest: [n] log m. smallest: [n] log-probability that no token of the tail exceeds: that of the smallest exact
            entry, 0 if there is none.
        tokens: [n] number of tokens in the tail.
    """
    s, log_n = 1.0 / temperature, tokens.log()
    log_m = rest.masked_fill(rest.isneginf(), 0.0)  # an empty tail: see the last line
    most = log_n - log_m
    least = torch.minimum(torch.maximum(-log_m, -smallest), most)
    surprise = least + TAIL_SURPRISE * (most - least)
    parabola = log_m + (1.0 - s) * (surprise + (1.0 - s) * (most - surprise))
    one, other = log_m + (1.0 - s) * least, log_m + (1.0 - s) * most
    bounded = parabola.clamp(min=torch.minimum(one, other), max=torch.maximum(one, other))
    return torch.where(rest.isneginf(), rest, bounded)


def student_classes(student: StudentValues, tail: TailPolicy) -> Tensor:
    """Student log-probabilities [n, K+1] over the same classes as `teacher_classes`."""
    if tail == "renormalise":
        lse = torch.logsumexp(student.entries, dim=1, keepdim=True)
        return torch.cat([student.entries - lse, torch.full_like(lse, ABSENT)], dim=1)
    last = student.outside if tail == "bucket" else student.label
    return torch.cat([student.entries, last[:, None]], dim=1) - student.lse[:, None]


def distributions(
    targets: TargetEntries, student: StudentValues, tail: TailPolicy, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Teacher's and student's log-probabilities over the classes of a policy: two distributions [n, C].

    C is K+1, and K+2 under `label`, whose last class holds the tokens on which the student has mass and p′ has none.
    The forward KL does not depend on it, every other divergence does.
    """
    log_p = teacher_classes(targets, tail, temperature, vocab_size)
    log_q = student_classes(student, tail)
    if tail != "label":
        return log_p, log_q
    rest = (student.rest - student.lse)[:, None]
    return torch.cat([log_p, torch.full_like(rest, -torch.inf)], dim=1), torch.cat([log_q, rest], dim=1)
