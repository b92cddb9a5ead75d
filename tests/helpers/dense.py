"""The truth that losses and caches are held to: fp64, full vocabulary, one position or document at a time.

Shares no code with what it checks: every distribution is an explicit vector, every tail an explicit sum, and every
document goes through the teacher alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import cache_format as cf
from pipeline.losses import IGNORE_INDEX, UNBIASED, SparseTargetBatch


def extremes(temperatures: Sequence[float]) -> Callable[[Any], Any]:
    """A test of many small problems (seed, vocab, share, scale, temperature, quantised, dtype), some of them harsh."""
    many = given(
        seed=st.integers(0, 10_000),
        vocab=st.integers(2, 24),
        share=st.floats(0.01, 1.0),
        scale=st.sampled_from([0.0, 1.0, 10.0, 200.0, 1e4]),
        temperature=st.sampled_from(temperatures),
        quantised=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )
    harsh = example(seed=0, vocab=2, share=1.0, scale=1e4, temperature=0.5, quantised=True, dtype=torch.float32)
    return lambda test: many(harsh(test))


def random_targets(
    positions: int,
    vocab: int,
    k: int,
    *,
    seed: int = 0,
    masked: float = 0.25,
    ragged: bool = True,
    sampled: int = 3,
    quantised: bool = False,
    dtype: torch.dtype = torch.float64,
) -> SparseTargetBatch:
    """Top-K targets of random teachers, with sampled entries. Of four labels two are exact entries and one is sampled.

    The weights of the sampled entries do not make the entries sum to one, and may exceed the largest probability.

    Args:
        ragged: positions keep 1 to k entries; the places left over hold id 0 and -inf.
        sampled: up to so many tokens outside the exact entries.
        quantised: through the codebooks of a cache, so that entries and residual do not sum to one.
    """
    rng = np.random.default_rng(seed)
    probs = _softmax(3.0 * rng.standard_normal((positions, vocab)))
    counts = rng.integers(1, k + 1, positions) if ragged else np.full(positions, k)
    width = max(min(k + sampled, vocab), 1)
    ids = np.zeros((positions, width), np.int64)
    logprobs = np.full((positions, width), -np.inf)
    residual = np.full(positions, -np.inf)
    labels = rng.integers(0, vocab, positions)
    for t, count in enumerate(counts):
        order = np.argsort(-probs[t])
        chosen = np.sort(order[:count])
        ids[t, :count], logprobs[t, :count] = chosen, np.log(probs[t, chosen])
        if count < vocab:
            residual[t] = np.log(np.delete(probs[t], chosen).sum())
        drawn = np.sort(rng.permutation(order[count:])[: rng.integers(min(sampled, 1), sampled + 1)])
        here = slice(count, count + len(drawn))
        ids[t, here], logprobs[t, here] = drawn, np.log(rng.uniform(0.02, 0.5, len(drawn)))
        if t % 2:
            labels[t] = rng.choice(chosen)
        elif t % 4 and len(drawn):
            labels[t] = rng.choice(drawn)
    if quantised:
        entries, rest = cf.sqrt_probability_codebook(32, smallest=1e-4), cf.residual_codebook(32, smallest=1e-4)
        present = logprobs > -np.inf
        logprobs[present] = entries.decode(entries.encode(logprobs[present]))
        residual = rest.decode(rest.encode(residual))
    labels[rng.random(positions) < masked] = IGNORE_INDEX
    return SparseTargetBatch(
        ids=torch.from_numpy(ids),
        logprobs=torch.from_numpy(logprobs).to(dtype),
        exact_counts=torch.from_numpy(counts.astype(np.int64)),
        residual_logprob=torch.from_numpy(residual).to(dtype),
        entropy=torch.from_numpy(-(probs * np.log(probs)).sum(axis=1)).to(dtype),
        labels=torch.from_numpy(labels),
    )


def captured_for(targets: SparseTargetBatch, tail: str, temperature: float) -> SparseTargetBatch:
    """The same numbers, said to be of the temperature at which a loss is to use them where it can use no others."""
    return replace(targets, temperature=temperature) if tail in UNBIASED else targets


def dense_losses(
    logits: Tensor,
    targets: SparseTargetBatch,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    tail: str = "bucket",
) -> np.ndarray:
    """[N] (1 − α)·CE + α·T²·KL of every position in fp64; 0 where it does not count."""
    losses = np.zeros(len(targets))
    for t, z in enumerate(logits.detach().double().numpy()):
        label = int(targets.labels[t])
        if label == IGNORE_INDEX:
            continue
        ids, p, m = entries_at(targets, t, with_sampled=tail == "sampled")
        more = {"entropy": float(targets.entropy[t]), "captured": targets.temperature}
        kl = dense_kl(z, ids, p, m, label, temperature, tail, **more)
        losses[t] = -(1 - kd_weight) * np.log(_softmax(z)[label]) + kd_weight * temperature**2 * kl
    return losses


def entries_at(
    targets: SparseTargetBatch, t: int, *, with_sampled: bool = False
) -> tuple[np.ndarray, np.ndarray, float]:
    """Ids and probabilities, or weights, of the entries at a position; and its tail mass."""
    present = targets.logprobs[t].numpy() > -np.inf
    if not with_sampled:
        present[int(targets.exact_counts[t]) :] = False
    p = np.exp(targets.logprobs[t].double().numpy()[present])
    return targets.ids[t].numpy()[present], p, float(np.exp(float(targets.residual_logprob[t])))


def dense_kl(
    z: np.ndarray,
    ids: np.ndarray,
    p: np.ndarray,
    m: float,
    label: int,
    temperature: float,
    tail: str,
    *,
    entropy: float = np.nan,
    captured: float = 1.0,
) -> float:
    """KL(teacher_T ‖ student_T) at one position: logits z [V], entries p at ids, residual m.

    Args:
        ids: with the sampled entries, whose p are their weights, for "sampled"; the exact ones alone for all others.
        captured: the temperature of p, m and the entropy.
    """
    if tail in ("sampled", "realized"):
        assert temperature == captured
        weights = np.zeros(len(z))
        np.add.at(weights, ids, p)  # of several samples a token may be in two
        if tail == "realized" and label not in ids:
            weights[label] = 1.0
        scaled = z / temperature
        lse = scaled.max() + np.log(np.exp(scaled - scaled.max()).sum())
        return float(lse - weights @ scaled - entropy)
    return kl(*distributions(z / temperature, ids, p, m, label, captured / temperature, tail))


def kl(p: np.ndarray, q: np.ndarray) -> float:
    there = p > 0
    return float(np.sum(p[there] * (np.log(p[there]) - np.log(q[there]))))


def distributions(
    z: np.ndarray, ids: np.ndarray, p: np.ndarray, m: float, label: int, power: float, tail: str
) -> tuple[np.ndarray, np.ndarray]:
    """Teacher and student as one position's policy shows them; of `label` over the whole vocabulary."""
    q = _softmax(z)
    if tail == "renormalise":
        teacher, student = p**power, q[ids] / q[ids].sum()
    elif tail == "label":
        teacher, student = np.zeros(len(z)), q
        teacher[ids] = p
        teacher[label] += m
        teacher = teacher**power
    else:
        outside = np.setdiff1d(np.arange(len(z)), ids)
        leading = p[ids != label] if len(ids) > 1 else p  # the label may be listed whatever its rank
        teacher = np.append(p**power, tempered_mass(m, max(1, len(outside)), leading.min(initial=1.0), power))
        student = np.append(q[ids], q[outside].sum())
        if not len(outside):  # no such class
            teacher, student = teacher[:-1], student[:-1]
    return teacher / teacher.sum(), student


def tempered_mass(m: float, tokens: int, smallest: float, power: float) -> float:
    """What a tail of mass m is taken to have at a temperature: a parabola for its logarithm, from three equations."""
    if m == 0.0:
        return 0.0
    with np.errstate(divide="ignore"):
        flat = np.log(
            tokens / m
        )  # mean −log p of an even spread; of the most uneven: one token, or as large as allowed
        steep = min(flat, max(-np.log(m), -np.log(smallest)))
    slope = -(0.7 * steep + 0.3 * flat)
    equations = [[1, 0, 0], [1, 1, 1], [0, 1, 2]]  # value at 0, value at 1, slope at 1
    parabola = np.linalg.solve(equations, [np.log(tokens), np.log(m), slope])
    even, uneven = m * np.exp((1 - power) * flat), m * np.exp((1 - power) * steep)
    return float(np.clip(np.exp(parabola @ [1, power, power**2]), min(even, uneven), max(even, uneven)))


def _softmax(z: np.ndarray) -> np.ndarray:
    exp = np.exp(z - z.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


class Deviation(NamedTuple):
    """Largest differences between a cache and its teacher, each as a share of what its codebook states."""

    logprobs: float
    residual: float
    entropy: float


ROUNDING = 1e-4  # of the teacher's own fp32 arithmetic, in the codebooks' domains of square roots


@torch.no_grad()
def document_logprobs(model: PreTrainedModel, row: cf.CacheRow, vocab: int) -> np.ndarray:
    """[T, V] the teacher's log-softmax at every position of a row, each of its documents read alone."""
    documents = np.split(np.asarray(row.input_ids, np.int64), np.cumsum(row.segment_lengths)[:-1])
    logits = [model(input_ids=torch.from_numpy(d)[None], use_cache=False).logits[0, :, :vocab] for d in documents]
    return torch.cat(logits).double().log_softmax(1).numpy()


def check_row(row: cf.CacheRow, exact: np.ndarray, metadata: cf.CacheMetadata) -> Deviation:
    """Every stored position of a row against the teacher's [T, V] log-probabilities, within the codebooks' bounds.

    The entries must be a top-K: none of the tokens left out more likely than one of them, beyond rounding.
    """
    targets, k = row.targets, metadata.targets["k"]
    assert exact.shape == (len(row.input_ids), metadata.vocab_size), "vocabulary"
    stored = np.asarray(targets.counts) > 0
    if metadata.targets["positions"] == "counted":
        assert np.array_equal(stored, row.loss_mask), "other positions than the counted ones"
    assert (targets.counts[stored] == k).all() and (targets.exact_counts[stored] == k).all()
    ids, found = (x.reshape(-1, k).astype(t) for x, t in ((targets.ids, np.int64), (targets.logprobs, np.float64)))
    exact = exact[stored]
    expected = np.take_along_axis(exact, ids, 1)
    outside = exact.copy()
    np.put_along_axis(outside, ids, -np.inf, 1)
    if k < metadata.vocab_size:
        assert (expected.min(axis=1) >= outside.max(axis=1) - ROUNDING).all(), "not a top-K"

    probs = np.exp(exact)
    shares = []
    for column, a, b in (
        ("target_logprobs", np.exp(found / 2), np.exp(expected / 2)),
        ("residual_logprob", np.exp(targets.residual_logprob[stored] / 2.0), np.sqrt(np.exp(outside).sum(1))),
        ("entropy", np.sqrt(targets.entropy[stored]), np.sqrt(-(probs * exact).sum(1))),
    ):
        bound = metadata.codebooks[column].max_error
        worst = np.abs(a - b).max()
        assert worst <= bound + ROUNDING, f"{column} off by {worst:.3g}, the codebook states {bound}"
        shares.append(float(worst / bound))
    return Deviation(*shares)
