"""One chunk of teacher logits ─▶ sparse targets: exact top-K, what they leave out, and the entropy.

Everything here runs on the teacher's device on [n, V] logits of a chunk of positions; [B, T, V] never exists. Four
passes over the logits: block maxima, softmax, Σp·z, Σ of what is left once the entries are taken out.

**Top-K without looking at everything twice.** The K largest of V values lie in the K blocks with the largest maxima.
So: maxima of V/b blocks, the K best blocks, and a selection among their K·b values. With b = 32 and K = 64 the
selection sees 3,600 values instead of 49,152; exact, ties included in the sense that some valid top-K is returned,
and a function of the row alone, whatever shares the chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32


class ChunkTargets(NamedTuple):
    """Targets of n positions; ids ascend within a position.

    ids:              [n, K] int64
    logprobs:         [n, K] float32, natural log, normalised over all V tokens
    residual_logprob: [n] float32, log of the mass outside the entries; -inf where K = V
    entropy:          [n] float32, nats, of the full distribution; not finite if any logit is not
    """

    ids: Tensor
    logprobs: Tensor
    residual_logprob: Tensor
    entropy: Tensor


def top_k_targets(logits: Tensor, k: int, scratch: Tensor | None = None) -> ChunkTargets:
    """The K most likely tokens and their exact log-softmax, fp32 whatever the logits' dtype.

    `log_softmax(logits.float()).topk(k)`, sorted by id, with residual and entropy from the same softmax. Neither is a
    difference of nearly equal numbers: the residual sums what is outside, so it is right even at 1e-30.

    Args:
        logits: [n, V], already cut to the real vocabulary; not changed.
        scratch: [≥n, V] float32 to work in. On a CPU a fresh tensor of this size costs more in page faults than the
            softmax that fills it.
    """
    logits = logits.float()
    n = len(logits)
    k = min(k, logits.shape[1])
    values, ids = top_k(logits, k)
    ids, order = ids.sort(dim=1)
    values = values.gather(1, order)  # [n, k]
    largest = values.amax(dim=1)

    probs = torch.softmax(logits, dim=1, out=None if scratch is None else scratch[:n])  # [n, V]
    entries = probs.gather(1, ids)
    outside = probs.scatter_(1, ids, 0.0)
    residual = outside.sum(dim=1)
    # In place: the product of a `vecdot` is a fresh [n, V] tensor, whose page faults cost more than all the rest.
    expected_logit = outside.mul_(logits).sum(dim=1) + (entries * values).sum(dim=1)
    # softmax divides by a plain running sum; what it is off by shows in Σp, which is summed pairwise here.
    total = entries.sum(dim=1) + residual
    lse = largest - entries.amax(dim=1).log() + total.log()
    return ChunkTargets(
        ids=ids,
        logprobs=(values - lse[:, None]).clamp_(max=0.0),
        residual_logprob=(residual / total).log(),
        entropy=(lse - expected_logit / total).clamp(min=0.0),
    )


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`values.topk(k, sorted=False)` over rows of [n, V], by blocks."""
    n, width = values.shape
    blocks = width // BLOCK
    if k * BLOCK * 2 >= width:
        return values.topk(k, dim=1, sorted=False)
    blocked = values[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    best = blocked.amax(dim=2).topk(k, dim=1, sorted=False).indices  # [n, k]
    candidates = blocked[torch.arange(n, device=values.device)[:, None], best].flatten(1)  # [n, k·BLOCK]
    candidate_ids = (best[:, :, None] * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(1)
    if blocks * BLOCK < width:  # the ragged end is always looked at
        candidates = torch.cat([candidates, values[:, blocks * BLOCK :]], dim=1)
        tail_ids = torch.arange(blocks * BLOCK, width, device=values.device).expand(n, -1)
        candidate_ids = torch.cat([candidate_ids, tail_ids], dim=1)
    top, where = candidates.topk(k, dim=1, sorted=False)
    return top, candidate_ids.gather(1, where)
