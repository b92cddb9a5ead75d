"""One chunk of teacher logits ─▶ sparse targets: exact head, sampled tail, what the head leaves out, and the entropy.

One path for all the kinds of `rules`: candidates for the head, softmax, keep some of the candidates, sample from what
is left. Everything here runs on the teacher's device on [n, V] logits of a chunk of positions; [B, T, V] never exists.
Four passes over the logits: block maxima, softmax, (block) sums of what is left once the entries are taken out, Σp·z.

**Top-K without looking at everything twice.** The K largest of V values lie in the K blocks with the largest maxima.
So: maxima of V/b blocks, the K best blocks, and a selection among their K·b values. With b = 32 and K = 64 the
selection sees 3,600 values instead of 49,152; exact, ties included in the sense that some valid top-K is returned,
and a function of the row alone, whatever shares the chunk. No more than 1/τ tokens can have p ≥ τ, so the head of
`threshold` is a top-⌊1/τ⌋ of which some are kept.

**Sampling without a cumulative sum over the vocabulary.** A sample is a set of points on the line [0, mass) and the
tokens whose stretches they fall on. Block sums say in which block a point falls, and only that block is looked into.
Random draws are independent points. Systematic sampling (Madow, 1949) takes the points (u + j)·τ for one uniform u: a
token of p < τ is hit with probability p/τ exactly, never twice, and the number of hits is m/τ rounded up or down.
Several samples of a position share u and start 1/M apart, so that together they are one systematic sample of τ/M.

Shapes: n positions, V vocabulary, C candidates, J points, W = C + M·J entries of a position at most, M samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.teacher.targets.philox import uniforms
from pipeline.teacher.targets.rules import TargetRule

BLOCK = 32


class ChunkTargets(NamedTuple):
    """Targets of n positions: W places for entries, those with id -1 empty.

    ids:              [n, W] int32; exact entries first, then sample by sample, ascending within each of these
    logprobs:         [n, W] float32, natural log: of the probability over all V tokens, or of a sampled entry's weight
    exact_counts:     [n] int32
    sample_counts:    [n, M] int32, entries of each sample; M = 0 for exact targets
    residual_logprob: [n] float32, log of the mass outside the exact entries; -inf where there is none
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
    """[n, rule.uniforms] float64: what decides a sample at n places of the corpus; None of rules that draw none."""
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
        logits: [n, V], already cut to the real vocabulary; not changed.
        uniforms: [n, rule.uniforms] float64 in [0, 1), for rules that sample.
        scratch: [≥n, V] float32 to work in. On a CPU a fresh tensor of this size costs more in page faults than the
            softmax that fills it.
    """
    logits = logits.float()
    if rule.temperature != 1.0:
        logits = logits / rule.temperature
    n, vocab_size = logits.shape
    values, ids = top_k(logits, min(rule.candidates, vocab_size))  # [n, C], most likely first
    largest = values[:, 0]

    probs = torch.softmax(logits, dim=1, out=None if scratch is None else scratch[:n])  # [n, V]
    candidates = probs.gather(1, ids)
    keep = in_head(candidates, rule)  # [n, C]
    kept = torch.where(keep, candidates, 0.0)
    outside = probs.scatter_(1, ids, candidates - kept)
    # softmax divides by a plain running sum; what it is off by shows in Σp, which is summed pairwise here.
    if rule.sampled:
        blocks = block_sums(outside)  # [n, V/BLOCK]
        residual = blocks.sum(dim=1)
        total = kept.sum(dim=1) + residual
        sampled = sample(outside, blocks, kept.sum(dim=1), rule, uniforms)
    else:
        residual = outside.sum(dim=1)
        total = kept.sum(dim=1) + residual
        sampled = []
    # In place: the product of a `vecdot` is a fresh [n, V] tensor, whose page faults cost more than all the rest.
    expected_logit = outside.mul_(logits).sum(dim=1) + (kept * values).sum(dim=1)

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
        sample_counts=torch.stack(sample_counts, dim=1).to(torch.int32) if sampled else ids.new_zeros((n, 0)).int(),
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


def in_head(probs: Tensor, rule: TargetRule) -> Tensor:
    """[n, C] bool: which of the candidates, most likely first, are exact entries."""
    if rule.kind in ("random", "hidden"):
        return torch.zeros_like(probs, dtype=torch.bool)
    if rule.kind == "top-p":
        before = probs.cumsum(dim=1) - probs
        return before < rule.top_p
    keep = torch.arange(probs.shape[1], device=probs.device) < (rule.top_k or 0)
    return keep.expand_as(probs) if rule.tail_threshold is None else keep | (probs >= rule.tail_threshold)


def sample(
    outside: Tensor, blocks: Tensor, kept: Tensor, rule: TargetRule, uniforms: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """M pairs of ids [n, J] int64, ascending and -1 where there is no entry, and the logs of their weights [n, J].

    The weights of all M together are one estimate of the tail.
    """
    if uniforms is None or uniforms.shape != (len(outside), rule.uniforms):
        found = None if uniforms is None else tuple(uniforms.shape)
        raise ValueError(f"uniforms are {found}, expected [n, {rule.uniforms}]")
    precise = precise_dtype(outside.device)
    uniforms = uniforms.to(device=outside.device, dtype=precise)
    ends = blocks.cumsum(dim=1, dtype=precise)  # [n, V/BLOCK]
    # By the sums that the points are compared with: by any other, a draw next to 1 may fall behind the last token.
    total = kept.to(precise)[:, None] + ends[:, -1:]
    samples, count, threshold = [], rule.samples or 1, rule.tail_threshold or 0.0
    for i in range(count):
        if rule.kind == "random":
            draws = uniforms[:, i * rule.points : (i + 1) * rule.points]
            samples.append(_counted(find(outside, ends, draws * total), rule.points * count))
            continue
        start = (uniforms + i / count).frac()  # [n, 1]
        points = (start + torch.arange(rule.points, device=start.device)) * (threshold * total)
        ids = find(outside, ends, points).masked_fill_(points >= ends[:, -1:], -1)
        # Never the same token twice, not even where a block sum and the sum of its tokens differ by rounding.
        ids[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1], -1)
        weight = math.log(threshold / count)
        samples.append((ids, torch.full_like(points, weight, dtype=torch.float32)))
    return samples


def find(mass: Tensor, ends: Tensor, points: Tensor) -> Tensor:
    """[n, J] int64: the token of [n, V] `mass` on whose stretch of [0, Σmass) each point lies.

    Args:
        ends: [n, V/BLOCK] where the stretch of each block of tokens ends.
    """
    n, vocab_size = mass.shape
    block = torch.searchsorted(ends, points, right=True).clamp_(max=ends.shape[1] - 1)  # [n, J]
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    tokens = block[:, :, None] * BLOCK + torch.arange(BLOCK, device=mass.device)  # [n, J, BLOCK]
    inside = mass.gather(1, tokens.flatten(1).clamp(max=vocab_size - 1)).view_as(tokens)
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
    which = new.cumsum(dim=1) - 1  # [n, N]: of the different ids
    ids = torch.full_like(draws, -1).scatter_(1, which, draws)
    counts = torch.zeros_like(draws).scatter_add_(1, which, torch.ones_like(draws))
    return ids, (counts / n_draws).log()


def block_sums(values: Tensor) -> Tensor:
    """[n, ⌈V/BLOCK⌉] sums of consecutive columns of [n, V]."""
    whole = values.shape[1] // BLOCK * BLOCK
    sums = values[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=2)
    if whole == values.shape[1]:
        return sums
    return torch.cat([sums, values[:, whole:].sum(dim=1, keepdim=True)], dim=1)


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`values.topk(k)` over rows of [n, V], by blocks: largest first."""
    n, width = values.shape
    blocks = width // BLOCK
    if k * BLOCK * 2 >= width:
        return values.topk(k, dim=1)
    blocked = values[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    best = blocked.amax(dim=2).topk(k, dim=1, sorted=False).indices  # [n, k]
    candidates = blocked[torch.arange(n, device=values.device)[:, None], best].flatten(1)  # [n, k·BLOCK]
    candidate_ids = (best[:, :, None] * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(1)
    if blocks * BLOCK < width:  # the ragged end is always looked at
        candidates = torch.cat([candidates, values[:, blocks * BLOCK :]], dim=1)
        tail_ids = torch.arange(blocks * BLOCK, width, device=values.device).expand(n, -1)
        candidate_ids = torch.cat([candidate_ids, tail_ids], dim=1)
    top, where = candidates.topk(k, dim=1)
    return top, candidate_ids.gather(1, where)
