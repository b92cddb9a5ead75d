"""What a loss makes of the mass that the entries leave out.

The teacher gives K entries and a residual mass m; the student gives K+2 numbers of its V logits: the entries' logits,
the label's, and the log-sum-exp of everything else. A **tail policy** says what becomes of m.

**Unbiased: a weighted sample stands for the whole distribution.** For everything linear in p, such as the forward KL:

    sampled       the sampled entries of the cache, with their weights w. Σ w_i f(i) is Σ p_i f(i) on average.
    realized      text that the teacher itself wrote at temperature 1: where the next token is no exact entry it is a
                  draw from the tail, and gets weight 1. Costs no bytes; wrong on any other text.

**Classes: both sides are seen through K+1 classes**, exact entries first, one class for the tail last. Two
distributions that any divergence may compare; sampled entries are left out of these:

    bucket        the rest of the vocabulary is one class with teacher mass m. A lower bound of the full KL.
    renormalise   entries only, both sides rescaled to sum to one. Biased: it ignores the student's mass elsewhere.
    label         m goes to the true token: KL(p′‖q) over the whole vocabulary with p′ = entries + m·onehot(label).

Entries come from an 8-bit codebook, so they and m sum to one only nearly; the teacher side is always rescaled to
sum to exactly one, which makes every KL here non-negative and zero where student and teacher agree.

**Temperature.** A cache that was captured at T holds p at T, and a sample drawn at T is of no use at another: refused.
Exact entries of a cache captured at 1 can be tempered. At T the entries become p_i^(1/T), exactly; of the tail only the
mass is known, and `tempered_tail` says what is made of it. Against SmolLM2's own tempered softmax at K = 64 and T = 2
that is off by .007 nats of KL, where an even spread of the mass is off by .12 and one token with all of it by 1.6
(`benchmarks/results/temperature.md`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pipeline.losses.sparse_targets import TargetBatch

TailPolicy = Literal["sampled", "realized", "bucket", "renormalise", "label"]
TAIL_POLICIES: tuple[TailPolicy, ...] = get_args(TailPolicy)
UNBIASED: tuple[TailPolicy, ...] = ("sampled", "realized")


ABSENT = -1e30
"""Logit of a class that is not there. Finite, so that no gradient is ever inf − inf; its exp is exactly zero."""

TAIL_SURPRISE = 0.3
"""Where the mean −log p of a tail lies between its least and its largest: .25 to .54 measured, see `tempered_tail`."""

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


def entries_of(targets: TargetBatch, tail: TailPolicy, temperature: float) -> TargetBatch:
    """The targets as a policy sees them: with or without the sampled entries.

    Raises: ValueError if they were captured at a temperature from which there is no way to this one.
    """
    if temperature != targets.temperature and (tail in UNBIASED or targets.temperature != 1.0):
        raise ValueError(
            f"temperature {temperature} with targets captured at {targets.temperature}: "
            + ("a sample" if targets.temperature == 1.0 else "their softmax")
            + f" cannot be tempered again; use temperature={targets.temperature}, "
            "or capture at the one you want (cache-teacher --temperature)"
        )
    return targets if tail == "sampled" else targets.exact


def weights(targets: TargetBatch, tail: TailPolicy) -> tuple[Tensor, Tensor]:
    """Weights of the entries [n, K] and of the label [n] (where it is no entry) under an unbiased policy."""
    entries = targets.logprobs.exp()
    realized = torch.full_like(targets.residual_logprob, float(tail == "realized"))
    return entries, realized


def teacher_classes(targets: TargetBatch, tail: TailPolicy, temperature: float, vocab_size: int) -> Tensor:
    """Teacher log-probabilities [n, K+1] under a tail policy, normalised; the last class is the tail (or the label)."""
    temperature = temperature / targets.temperature
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
            tokens = (vocab_size - targets.valid.sum(dim=1)).clamp(min=1).to(rest.dtype)
            smallest = targets.logprobs.masked_fill(~targets.valid, 0.0).amin(dim=1)
            rest = tempered_tail(rest, smallest, tokens, temperature)
        else:
            rest = rest / temperature
    classes = torch.cat([logprobs, rest[:, None]], dim=1)
    # clamp: a position without any class (renormalise, no entries) stays all -inf instead of NaN.
    return classes - torch.logsumexp(classes, dim=1, keepdim=True).clamp(min=ABSENT)


def tempered_tail(rest: Tensor, smallest: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log M = log Σ p^s, s = 1/T, over a tail of which the mass, the number of tokens and an upper bound are known.

    log M is convex in s, log n at s = 0 and log m at s = 1, where its slope is −S with S the mean of −log p over the
    tail. S is at least −log of the smallest entry, as none in the tail is above it, and at most log(n/m), that of an
    even spread. A parabola through both points with S at `TAIL_SURPRISE` of that range is closer than one with the S
    that follows from the stored entropy, whose rounding is divided by m. For T < 1 it ends at the bounds on M.

    Args:
        rest: [n] log m. smallest: [n] log-probability of the smallest exact entry; 0 where there is none.
        tokens: [n] how many tokens the tail has.
    """
    s, log_n = 1.0 / temperature, tokens.log()
    log_m = rest.masked_fill(rest.isneginf(), 0.0)  # no tail: see the end
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
    targets: TargetBatch, student: StudentValues, tail: TailPolicy, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Teacher's and student's log-probabilities over the classes of a policy, each summing to one: [n, C].

    C is K+1, and K+2 under `label`: there the K+1 classes leave out tokens on which the student has mass and p′ none,
    which the forward KL never looks at and every other divergence does.
    """
    log_p = teacher_classes(targets, tail, temperature, vocab_size)
    log_q = student_classes(student, tail)
    if tail != "label":
        return log_p, log_q
    rest = (student.rest - student.lse)[:, None]
    return torch.cat([log_p, torch.full_like(rest, -torch.inf)], dim=1), torch.cat([log_q, rest], dim=1)
