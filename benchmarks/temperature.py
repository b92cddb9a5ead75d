"""How a temperature other than 1 should treat the tail of which only the mass is known.

A cache of exact top-K entries holds p_i for the entries and m for the sum of the rest. At temperature T the entries
become p_i^(1/T) exactly; the tail becomes M = Σ p_i^(1/T) over its n = V − K tokens, which m does not determine:

    spread      n·(m/n)^(1/T)     as if the tail were flat: the largest that M can be
    one class   m^(1/T)           as if the tail were a single token: the smallest
    curve       log M as a parabola in s = 1/T, from three things that the cache holds: log n at s = 0, log m at s = 1,
                and the slope there, which is Σ p_i·log p_i / m and follows from the stored entropy

Measured at every position of prose and code, from the teacher's full logits, without quantisation: the error of log M
in nats, the mass that the tail then has, and KL(true ‖ assumed) over the entries and the tail, as a loss sees it.

Bound: 0, the true M.

    python -m benchmarks temperature
"""

from __future__ import annotations

import numpy as np

from benchmarks.measure import Result, Settings, Table
from benchmarks.teacher import TEMPERATURES, text_targets

PERCENTILES = (5, 50, 95)
WAYS = ("spread", "one class", "curve")


def run(settings: Settings) -> Result:
    exact = text_targets(settings)
    entries, residual = exact.logprobs.astype(np.float64), exact.residual_logprob.astype(np.float64)
    some_tail = residual > -np.inf
    rows, summary = [], {}
    for temperature in TEMPERATURES:
        true_entries = exact.tempered_entries[temperature].astype(np.float64)  # [N, K]
        true_tail = exact.tempered_tail[temperature].astype(np.float64)  # [N]
        # The likeliest entry gives the normalisation that leads from the softmax at T back to p^(1/T).
        first = np.arange(len(entries)), entries.argmax(axis=1)
        true_sum = true_tail - true_entries[first] + entries[first] / temperature  # [N] log M
        tail_tokens = exact.vocab_size - entries.shape[1]
        for way, assumed in _assumed(entries, residual, exact.entropy, tail_tokens, temperature).items():
            error = (assumed - true_sum)[some_tail]
            classes = np.concatenate([entries / temperature, assumed[:, None]], axis=1)
            log_q = classes - np.logaddexp.reduce(classes, axis=1, keepdims=True)
            log_p = np.concatenate([true_entries, true_tail[:, None]], axis=1)
            kl = float((np.exp(log_p) * (log_p - log_q))[some_tail].sum(axis=1).mean())
            mean, *percentiles = error.mean(), *np.percentile(error, PERCENTILES)
            masses = [float(np.exp(x[some_tail]).mean()) for x in (true_tail, log_q[:, -1])]
            rows.append([f"T = {temperature:g}", way, float(mean), *map(float, percentiles), *masses, kl])
            summary[f"mean_log_error_t{temperature:g}_{way.replace(' ', '_')}"] = round(float(mean), 3)
    columns = ["temperature", "tail", "mean error of log M, nats", *(f"{p}th percentile" for p in PERCENTILES)]
    columns += ["true tail mass", "assumed tail mass", "KL(true ‖ assumed), nats"]
    return Result(
        name="temperature",
        question="The tail's mass at temperature T, from what a cache of exact top-64 entries holds, against the truth",
        bound="0: the true sum over the tail.",
        settings={"teacher": exact.teacher, "positions": exact.num_positions, "entries": entries.shape[1]},
        tables=[Table("Tempered tail", columns, rows)],
        summary=summary,
    )


def _assumed(
    entries: np.ndarray, residual: np.ndarray, entropy: np.ndarray, tail_tokens: int, temperature: float
) -> dict[str, np.ndarray]:
    """log M under each assumption, [N]."""
    n, s = np.log(max(tail_tokens, 1)), 1 / temperature
    mass = np.exp(np.maximum(residual, -60.0))
    surprise = (entropy + (np.exp(entries) * entries).sum(axis=1)) / mass  # mean −log p in the tail
    surprise = np.clip(surprise, -residual, n - residual)  # what a tail of n tokens and mass m can have
    curvature = n - residual - surprise
    curve = residual + surprise * (1 - s) + curvature * (1 - s) ** 2
    return dict(zip(WAYS, (n + (residual - n) * s, residual * s, curve), strict=True))
