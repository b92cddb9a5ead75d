"""One chunk of teacher logits ─▶ sparse targets: exact entries, sampled entries, the tail mass, and the entropy.

One path for all the kinds of `rules`: candidates for the exact entries, softmax, keep some of the candidates, sample
from the other tokens. Everything here runs on the teacher's device on [n, V] logits of a chunk of positions; [B, T, V]
never exists. The passes over the logits are those of `softmax`. No more than 1/τ tokens can have p ≥ τ, so the
candidates of `threshold` are the ⌊1/τ⌋ + 1 most likely tokens, or K if that is more.

**Sampling without a cumulative sum over the vocabulary.** A sample is a set of points on the line [0, mass) and the
tokens whose stretches they fall on. Block sums say in which block a point falls, and only that block is looked into.
Random draws are independent points. Systematic sampling (Madow, 1949) takes the points (u + j)·τ for one uniform u: a
token of p < τ is hit with probability p/τ exactly, never twice, and the number of hits is m/τ rounded up or down.
Several samples of a position share u and start 1/M apart, so that together they are one systematic sample of τ/M.

Shapes: n positions, V vocabulary, C candidates, J points, W = C + M·J entries of a position at most, M samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.teacher.targets.philox import uniforms
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.softmax import BLOCK, softmax_of

MassOf = Callable[[Tensor], Tensor]


class ChunkTargets(NamedTuple):
    """Targets of n positions: W places for entries, those with id -1 empty.

    ids:              [n, W] int32; exact entries first, then sample by sample, ascending within each of these
    logprobs:         [n, W] float32, natural log: of the probability over all V tokens, or of a sampled entry's weight
    exact_counts:     [n] int32
    sample_counts:    [n, M] int32, entries of each sample; M = 0 for exact targets
    residual_logprob: [n] float32, log of the tail mass; -inf where there is none
    entropy:          [n] float32, nats, of the full distribution; not finite if any logit is not
    """

    ids: Tensor
    logprobs: Tensor
    exact_counts: Tensor
    sample_counts: Tensor
    residual_logprob: Tensor
    entropy: Tensor

    @classmethod
    def cat(cls, chunks: Sequence[ChunkTargets]) -> ChunkTargets:
        return cls(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))

    def cpu(self) -> ChunkTargets:
        return ChunkTargets(*(part.cpu() for part in self))


def draws(rule: TargetRule, rows: np.ndarray, positions: np.ndarray) -> Tensor | None:
    """[n, rule.uniforms] float64, the random numbers of n places of the corpus; None for a rule without sampling."""
    if not rule.uniforms:
        return None
    return torch.from_numpy(uniforms(rule.seed or 0, rows, positions, rule.uniforms))


def sparse_targets(
    logits: Tensor, rule: TargetRule, uniforms: Tensor | None = None, scratch: Tensor | None = None
) -> ChunkTargets:
    """Targets by `rule`, fp32 whatever the logits' dtype.

    Exact entries are `log_softmax(logits.float() / T)` at their ids; residual and entropy come from the same softmax.
    Neither is a difference of nearly equal numbers: the residual sums what is outside, so it is right even at 1e-30.

    Args:
        logits: [n, V], already cut to the real vocabulary; unchanged when this returns.
        uniforms: [n, rule.uniforms] float64 in [0, 1), for rules that sample.
        scratch: [≥n, V] of `scratch_for`.
    """
    vocab_size = logits.shape[1]
    softmax = softmax_of(logits, rule.temperature, scratch)
    values, ids = softmax.top(min(rule.candidates, vocab_size))  # [n, C], most likely first
    largest = values[:, 0]
    candidates = softmax.probabilities(values, ids)
    keep = is_exact(candidates, rule)  # [n, C]
    kept = torch.where(keep, candidates, 0.0)
    # softmax divides by a plain running sum; what it is off by shows in Σp, which is summed pairwise here.
    with softmax.outside(ids, candidates, keep) as outside:
        if rule.sampled:
            blocks = outside.block_sums()  # [n, V/BLOCK]
            residual = blocks.sum(dim=1)
            sampled = sample(outside.of, vocab_size, blocks, kept.sum(dim=1), rule, uniforms)
        else:
            residual = outside.sum()
            sampled = []
        total = kept.sum(dim=1) + residual
        expected_logit = outside.expected_logit() + (kept * values).sum(dim=1)

    ids, order = torch.where(keep, ids, vocab_size).sort(dim=1)  # by id, those not kept last
    # Relative to the largest logit first: a large constant in all logits costs no digits.
    normaliser = total.log() - candidates[:, 0].log()
    logprobs = (values.gather(1, order) - largest[:, None] - normaliser[:, None]).clamp_(max=0.0)
    exact = [(torch.where(ids < vocab_size, ids, -1), logprobs)] if rule.kind != "random" else []
    ids, logprobs = (torch.cat(parts, dim=1) for parts in zip(*exact, *sampled, strict=True))
    sample_counts = [(ids >= 0).sum(dim=1) for ids, _ in sampled]
    return ChunkTargets(
        ids=ids.to(torch.int32),
        logprobs=logprobs,
        exact_counts=keep.sum(dim=1, dtype=torch.int32),
        sample_counts=torch.stack(sample_counts, dim=1).to(torch.int32) if sampled else ids[:, :0].int(),
        residual_logprob=(residual / total).log(),
        entropy=(largest + normaliser - expected_logit / total).clamp(min=0.0),
    )


def precise_dtype(device: torch.device) -> torch.dtype:
    """The widest dtype that a device computes sums and random numbers in: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def label_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """[n] float32 log-probabilities of `labels` [n] int64 by logits [n, V]."""
    scores, labels = logits.float(), labels.to(logits.device)
    return scores.gather(1, labels[:, None])[:, 0] - torch.logsumexp(scores, dim=1)


def is_exact(probs: Tensor, rule: TargetRule) -> Tensor:
    """[n, C] bool: which of the candidates, most likely first, are exact entries."""
    if rule.kind in ("random", "hidden"):
        return torch.zeros_like(probs, dtype=torch.bool)
    if rule.kind == "top-p":
        before = probs.cumsum(dim=1) - probs
        return before < rule.top_p
    keep = torch.arange(probs.shape[1], device=probs.device) < (rule.top_k or 0)
    return keep.expand_as(probs) if rule.tail_threshold is None else keep | (probs >= rule.tail_threshold)


def sample(
    outside: MassOf, vocab_size: int, blocks: Tensor, kept: Tensor, rule: TargetRule, uniforms: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """M pairs of ids [n, J] int64, ascending and -1 where there is no entry, and the logs of their weights [n, J].

    The weights of all M together are one estimate of the tail.
    """
    if uniforms is None or uniforms.shape != (len(blocks), rule.uniforms):
        found = None if uniforms is None else tuple(uniforms.shape)
        raise ValueError(f"uniforms are {found}, expected [n, {rule.uniforms}]")
    precise = precise_dtype(blocks.device)
    uniforms = uniforms.to(device=blocks.device, dtype=precise)
    ends = blocks.cumsum(dim=1, dtype=precise)  # [n, V/BLOCK]
    # By the sums that the points are compared with: by any other, a draw next to 1 may fall behind the last token.
    total = kept.to(precise)[:, None] + ends[:, -1:]
    samples, count, threshold = [], rule.samples or 1, rule.tail_threshold or 0.0
    for i in range(count):
        if rule.kind == "random":
            draws = uniforms[:, i * rule.points : (i + 1) * rule.points]
            samples.append(_counted(find(outside, vocab_size, ends, draws * total), rule.points * count))
            continue
        start = (uniforms + i / count).frac()  # [n, 1]
        points = (start + torch.arange(rule.points, device=start.device)) * (threshold * total)
        ids = find(outside, vocab_size, ends, points).masked_fill_(points >= ends[:, -1:], -1)
        # Never the same token twice, not even where a block sum and the sum of its tokens differ by rounding.
        ids[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1], -1)
        weight = math.log(threshold / count)
        samples.append((ids, torch.full_like(points, weight, dtype=torch.float32)))
    return samples


def find(mass_of: MassOf, vocab_size: int, ends: Tensor, points: Tensor) -> Tensor:
    """[n, J] int64: the token on whose stretch of [0, Σmass) each point [n, J] lies.

    Args:
        mass_of: the mass [n, k] of tokens [n, k].
        ends: [n, V/BLOCK] where the stretch of each block of tokens ends.
    """
    block = torch.searchsorted(ends, points, right=True).clamp_(max=ends.shape[1] - 1)  # [n, J]
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    tokens = block[:, :, None] * BLOCK + torch.arange(BLOCK, device=ends.device)  # [n, J, BLOCK]
    inside = mass_of(tokens.flatten(1).clamp(max=vocab_size - 1)).view_as(tokens)
    inside = inside.masked_fill(tokens >= vocab_size, 0.0).cumsum(dim=2, dtype=ends.dtype)
    # Just below the sum of the block at most, so that the token found is one that has mass.
    last = torch.nextafter(inside[:, :, -1], torch.zeros_like(points))
    offset = torch.minimum(points - start, last)[:, :, None]
    return block * BLOCK + (inside <= offset).sum(dim=2).clamp_(max=BLOCK - 1)


def _counted(draws: Tensor, n_draws: int) -> tuple[Tensor, Tensor]:
    """Different ids of [n, N] draws, ascending, then -1; and log(count/n_draws)."""
    draws = draws.sort(dim=1).values
    new = torch.ones_like(draws, dtype=torch.bool)
    torch.ne(draws[:, 1:], draws[:, :-1], out=new[:, 1:])
    which = new.cumsum(dim=1) - 1  # [n, N], each draw's place among the different ids
    ids = torch.full_like(draws, -1).scatter_(1, which, draws)
    counts = torch.zeros_like(draws).scatter_add_(1, which, torch.ones_like(draws))
    return ids, (counts / n_draws).log()
