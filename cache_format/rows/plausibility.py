"""Check that the probabilities and the entropy of each position can belong to one distribution.

All values were rounded to a codebook, so sums are not exact. `Codebook.rounded_from` gives the interval that each value
had before rounding, and with these bounds the checks never refuse a correct cache:

    mass       Σp of the exact entries + tail mass = 1
    sample     weights of N draws sum to the tail mass; of systematic sampling, within one point of it
    entropy    that of the exact entries, plus between -m·log m (one token has all the tail mass m) and
               m·log(V - n) more (the V - n other tokens share it)

A cache whose log-probabilities have another base, scale, temperature or position rarely passes. Values that conversion
has changed were rounded twice and are not checked. Shapes: N positions, E entries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache_format.manifest.metadata import CacheMetadata
from cache_format.rows.invariants import describe_position
from cache_format.rows.row_batch import RowBatch
from cache_format.rows.types import entry_groups, group_counts

SLACK = 2e-3  # of probability or nats: float32 log-softmax of a large vocabulary, twice what the codebooks admit

Bounds = tuple[NDArray[np.float64], NDArray[np.float64]]


def find_implausible(batch: RowBatch, rows: range, metadata: CacheMetadata) -> str | None:
    """The first contradiction as "where: found, expected", or None."""
    if not metadata.rounded_once:
        return None
    stored = batch.counts > 0
    exact = entry_groups(group_counts(batch)) == 0  # [E]
    position = batch.positions
    books = metadata.codebooks

    def total(entries: NDArray[np.bool_], values: NDArray[np.float64]) -> NDArray[np.float64]:
        """[N] sums over the chosen entries of each position."""
        return np.bincount(position[entries], values, batch.num_tokens).astype(np.float64)

    low, high = (np.exp(bound) for bound in books["target_logprobs"].rounded_from(batch.logprobs[exact]))
    residual = tuple(np.exp(bound) for bound in books["residual_logprob"].rounded_from(batch.residual_logprob))
    mass = total(exact, low) + residual[0], total(exact, high) + residual[1]
    if (bad := stored & ((mass[0] > 1 + SLACK) | (mass[1] < 1 - SLACK))).any():
        return _where(batch, rows, bad, "exact entries and residual sum to {:.3f} to {:.3f}, expected 1", *mass)

    weights = total(~exact, np.exp(batch.logprobs[~exact].astype(np.float64)))
    point = metadata.targets.get("tail_threshold")
    slack = SLACK if point is None else 2 * point / metadata.num_samples + SLACK
    sampled = stored if metadata.sampled else stored & (batch.counts > batch.exact_counts)
    if (bad := sampled & ((weights < residual[0] - slack) | (weights > residual[1] + slack))).any():
        text = "sampled weights sum to {:.3f}, expected about the residual, up to {:.3f}"
        return _where(batch, rows, bad, text, weights, residual[1])

    entropy = books["entropy"].rounded_from(batch.entropy)
    parts, tail = _surprise(low, high), _surprise(*residual)
    others = np.maximum(metadata.vocab_size - batch.exact_counts.astype(np.float64), 1)
    least = total(exact, parts[0]) + tail[0]
    most = total(exact, parts[1]) + tail[1] + residual[1] * np.log(others)
    if (bad := stored & ((entropy[1] < least - SLACK) | (entropy[0] > most + SLACK))).any():
        text = "entropy {:.2f} nats, its probabilities admit {:.2f} to {:.2f}"
        return _where(batch, rows, bad, text, batch.entropy, least, most)
    return None


def entropy_lower_bound(
    position: NDArray[np.integer], logprobs: NDArray[np.floating], residual_logprob: NDArray[np.floating]
) -> NDArray[np.float32]:
    """[N] -Σ p·log p over the exact entries and the tail as one outcome: the least entropy that these numbers admit.

    Args:
        position: [E] position of each exact entry. logprobs: [E]. residual_logprob: [N], may be -inf.
    """
    least = -np.bincount(position, _p_log_p(logprobs), len(residual_logprob)) - _p_log_p(residual_logprob)
    return np.maximum(least, 0.0).astype(np.float32)


def _p_log_p(logprobs: NDArray[np.floating]) -> NDArray[np.float64]:
    logs = np.where(np.isneginf(logprobs), 0.0, logprobs).astype(np.float64)
    return np.where(np.isneginf(logprobs), 0.0, np.exp(logs) * logs)


def _surprise(low: NDArray[np.float64], high: NDArray[np.float64]) -> Bounds:
    """Smallest and largest -p·log p for p between two bounds; the maximum is at 1/e."""
    low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)

    def value(p: NDArray[np.float64]) -> NDArray[np.float64]:
        return -p * np.log(np.where(p > 0, p, 1))

    ends = value(low), value(high)
    top = (low < 1 / np.e) & (high > 1 / np.e)
    return np.minimum(*ends), np.where(top, 1 / np.e, np.maximum(*ends))


def _where(batch: RowBatch, rows: range, bad: NDArray[np.bool_], text: str, *values: NDArray[np.floating]) -> str:
    index = int(bad.argmax())
    return f"{describe_position(batch, rows, index)}: " + text.format(*(float(value[index]) for value in values))
