"""How a temperature other than 1 should treat the tail of which only the mass is known.

A cache of exact top-K entries holds p_i for the entries and m for the sum of the rest. At temperature T the entries
become p_i^(1/T) exactly; the tail becomes M = Σ p_i^(1/T) over its n = V − K tokens, which m does not determine:

    spread      n·(m/n)^(1/T)     as if the tail were flat: the largest that M can be
    one class   m^(1/T)           as if the tail were a single token: the smallest
    entropy     log M as a parabola in s = 1/T, from three things that the cache holds: log n at s = 0, log m at s = 1,
                and the slope there, which is Σ p_i·log p_i / m and follows from the stored entropy
    prior       the same parabola with the slope at a fixed place between those of the two extremes, which is what the
                losses do: `pipeline.losses.tails.tempered_tail`

Measured at every position of prose and code, from the teacher's full logits, with entries, residual and entropy as they
are and as a cache rounds them: the error of log M in nats, the mass that the tail then has, and KL(true ‖ assumed) over
the entries and the tail, as a loss sees it.

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
WAYS = ("spread", "one class", "entropy", "prior")


def run(settings: Settings) -> Result:
    exact = text_targets(settings)
    entries = exact.logprobs.astype(np.float64)
    some_tail = exact.residual_logprob > -np.inf
    tail_tokens = exact.vocab_size - entries.shape[1]
    known = {"as they are": (exact.logprobs, exact.residual_logprob, exact.entropy), "rounded": _rounded(exact)}
    rows, summary = [], {}
    for temperature in TEMPERATURES:
        true_entries = exact.tempered_entries[temperature].astype(np.float64)  # [N, K]
        true_tail = exact.tempered_tail[temperature].astype(np.float64)  # [N]
        # The likeliest entry gives the normalisation that leads from the softmax at T back to p^(1/T).
        first = np.arange(len(entries)), entries.argmax(axis=1)
        true_sum = true_tail - true_entries[first] + entries[first] / temperature  # [N] log M
        for numbers, way in itertools.product(known, WAYS):
            held, residual, entropy = (x.astype(np.float64) for x in known[numbers])
            assumed = _assumed(way, held, residual, entropy, tail_tokens, temperature)
            error = (assumed - true_sum)[some_tail]
            classes = np.concatenate([held / temperature, assumed[:, None]], axis=1)
            log_q = classes - np.logaddexp.reduce(classes, axis=1, keepdims=True)
            log_p = np.concatenate([true_entries, true_tail[:, None]], axis=1)
            kl = float((np.exp(log_p) * (log_p - log_q))[some_tail].sum(axis=1).mean())
            mean, *percentiles = error.mean(), *np.percentile(error, PERCENTILES)
            masses = [float(np.exp(x[some_tail]).mean()) for x in (true_tail, log_q[:, -1])]
            rows.append([f"T = {temperature:g}", numbers, way, float(mean), *map(float, percentiles), *masses, kl])
            if numbers == "rounded":
                summary[f"kl_t{temperature:g}_{way.replace(' ', '_')}"] = round(kl, 4)
    columns = [
        "temperature",
        "numbers",
        "tail",
        "mean error of log M, nats",
        *(f"{p}th percentile" for p in PERCENTILES),
    ]
    columns += ["true tail mass", "assumed tail mass", "KL(true ‖ assumed), nats"]
    return Result(
        name="temperature",
        question="The tail's mass at temperature T, from what a cache of exact top-64 entries holds, against the truth",
        bound="0: the true sum over the tail.",
        settings={"teacher": exact.teacher, "positions": exact.num_positions, "entries": entries.shape[1]},
        tables=[Table("Tempered tail", columns, rows)],
        summary=summary,
    )


def _rounded(exact: TextTargets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries, residual and entropy as a top-K cache gives them back."""
    books = default_codebooks(exact.vocab_size)
    values = {
        "target_logprobs": exact.logprobs,
        "residual_logprob": exact.residual_logprob,
        "entropy": exact.entropy,
    }
    entries, residual, entropy = (books[name].decode(books[name].encode(x)) for name, x in values.items())
    return entries, residual, entropy


def _assumed(
    way: str, entries: np.ndarray, residual: np.ndarray, entropy: np.ndarray, tail_tokens: int, temperature: float
) -> np.ndarray:
    """[N] log M."""
    n, s = np.log(max(tail_tokens, 1)), 1 / temperature
    if way == "spread":
        return n + (residual - n) * s
    if way == "one class":
        return residual * s
    if way == "prior":
        rest, smallest = torch.from_numpy(residual), torch.from_numpy(entries.min(axis=1))
        return tempered_tail(rest, smallest, torch.full_like(rest, tail_tokens), temperature).numpy()
    mass = np.exp(np.maximum(residual, -60.0))
    surprise = (entropy + (np.exp(entries) * entries).sum(axis=1)) / mass  # mean −log p in the tail
    surprise = np.clip(surprise, -residual, n - residual)  # what a tail of n tokens and mass m can have
    return residual + (1 - s) * (surprise + (1 - s) * (n - residual - surprise))
