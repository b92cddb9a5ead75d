"""Estimates of the tail mass at a temperature other than 1, when only its mass at T = 1 is known.

A cache of exact top-K entries holds p_i for the entries and m for the sum of the rest. At temperature T the entries
become p_i^(1/T) exactly. The tail becomes M = Σ p_i^(1/T) over its n = V − K tokens, which m does not determine:

    uniform         n·(m/n)^(1/T)    as if all tail tokens were equally likely: the largest possible M
    one token       m^(1/T)          as if the tail were a single token: the smallest possible M
    stored entropy  log M as a parabola in s = 1/T through log n at s = 0 and log m at s = 1, with the slope
                    Σ p_i·log p_i / m at s = 1, which follows from the stored entropy
    interpolated    the same parabola with a slope at a fixed place between those of the first two; the losses use this:
                    `pipeline.losses.tails.tempered_tail`

Measured at every position of prose and code, from the teacher's full logits, with entries, tail mass and entropy exact
and rounded as in a cache: the error of log M in nats, the resulting tail mass, and KL(true ‖ assumed) over the entries
and the tail, as a loss sees it.

Bound: 0, the true M.

    python -m benchmarks temperature
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from benchmarks.measure import Result, Settings, Table
from benchmarks.teacher import TEMPERATURES, TextTargets, text_targets
from cache_format.manifest.metadata import default_codebooks
from pipeline.losses.tails import tempered_tail

PERCENTILES = (5, 50, 95)
ESTIMATES = ("uniform", "one token", "stored entropy", "interpolated")


def run(settings: Settings) -> Result:
    exact = text_targets(settings)
    entries = exact.logprobs.astype(np.float64)
    some_tail = exact.residual_logprob > -np.inf
    tail_tokens = exact.vocab_size - entries.shape[1]
    known = {"exact": (exact.logprobs, exact.residual_logprob, exact.entropy), "rounded": _rounded(exact)}
    rows, summary = [], {}
    for temperature in TEMPERATURES:
        true_entries = exact.tempered_entries[temperature].astype(np.float64)  # [N, K]
        true_tail = exact.tempered_tail[temperature].astype(np.float64)  # [N]
        # The most likely entry gives the factor between the softmax at T and p^(1/T).
        first = np.arange(len(entries)), entries.argmax(axis=1)
        true_sum = true_tail - true_entries[first] + entries[first] / temperature  # [N] log M
        for values, estimate in itertools.product(known, ESTIMATES):
            held, residual, entropy = (x.astype(np.float64) for x in known[values])
            assumed = _assumed(estimate, held, residual, entropy, tail_tokens, temperature)
            error = (assumed - true_sum)[some_tail]
            classes = np.concatenate([held / temperature, assumed[:, None]], axis=1)
            log_q = classes - np.logaddexp.reduce(classes, axis=1, keepdims=True)
            log_p = np.concatenate([true_entries, true_tail[:, None]], axis=1)
            kl = float((np.exp(log_p) * (log_p - log_q))[some_tail].sum(axis=1).mean())
            mean, *percentiles = error.mean(), *np.percentile(error, PERCENTILES)
            masses = [float(np.exp(x[some_tail]).mean()) for x in (true_tail, log_q[:, -1])]
            rows.append([f"T = {temperature:g}", values, estimate, float(mean), *map(float, percentiles), *masses, kl])
            if values == "rounded":
                summary[f"kl_t{temperature:g}_{estimate.replace(' ', '_')}"] = round(kl, 4)
    columns = [
        "temperature",
        "stored values",
        "assumed tail",
        "mean error of log M, nats",
        *(f"{p}th percentile" for p in PERCENTILES),
    ]
    columns += ["true tail mass", "assumed tail mass", "KL(true ‖ assumed), nats"]
    return Result(
        name="temperature",
        question="The tail mass at temperature T, estimated from a cache of exact top-64 entries, and the true one.",
        bound="0, the true sum over the tail.",
        settings={"teacher": exact.teacher, "positions": exact.num_positions, "entries": entries.shape[1]},
        tables=[Table("Tempered tail", columns, rows)],
        summary=summary,
    )


def _rounded(exact: TextTargets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries, tail mass and entropy as read from a top-K cache."""
    books = default_codebooks(exact.vocab_size)
    values = {
        "target_logprobs": exact.logprobs,
        "residual_logprob": exact.residual_logprob,
        "entropy": exact.entropy,
    }
    entries, residual, entropy = (books[name].decode(books[name].encode(x)) for name, x in values.items())
    return entries, residual, entropy


def _assumed(
    estimate: str, entries: np.ndarray, residual: np.ndarray, entropy: np.ndarray, tail_tokens: int, temperature: float
) -> np.ndarray:
    """[N] log M."""
    n, s = np.log(max(tail_tokens, 1)), 1 / temperature
    if estimate == "uniform":
        return n + (residual - n) * s
    if estimate == "one token":
        return residual * s
    if estimate == "interpolated":
        rest, smallest = torch.from_numpy(residual), torch.from_numpy(entries.min(axis=1))
        return tempered_tail(rest, smallest, torch.full_like(rest, tail_tokens), temperature).numpy()
    mass = np.exp(np.maximum(residual, -60.0))
    surprise = (entropy + (np.exp(entries) * entries).sum(axis=1)) / mass  # mean −log p over the tail
    surprise = np.clip(surprise, -residual, n - residual)  # limits for a tail of n tokens and mass m
    return residual + (1 - s) * (surprise + (1 - s) * (n - residual - surprise))
