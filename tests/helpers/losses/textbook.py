"""Every divergence from its published formula: numpy, fp64, explicit vectors, one position at a time.

Shares no code with what it checks. Distributions are vectors over the vocabulary or over the classes of a policy, pairs
are a double loop, and every limit is its own line.

textbook("js(0.1):0.5,tvd", logits, targets, tail="label", temperature=2.0)     # [N], times T² or T

`CASES` are the specifications that tests go through, each under every policy that it can be taken under.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dense import distributions, entries_at, kl
from head_sums import fused_sums, general_sums
from pipeline.losses import (
    IGNORE_INDEX,
    DivergenceSum,
    FullTargets,
    SparseTargetBatch,
    sparse_kl,
)

SPECS = (
    "reverse-kl",
    "js(0.1)",
    "js(0.9)",
    "skew-forward-kl(0.1)",
    "skew-reverse-kl(0.3)",
    "tvd",
    "alpha-beta(0.2,0.7)",
    "alpha-beta(1.5,1)",
    "alpha-beta(0.6,0)",
    "alpha-beta(0,0.6)",
    "alpha-beta(0,0)",
    "logit-mse",
    "pairwise",
    "forward-kl:0.7,reverse-kl:0.3",
    "js(0.5):2,tvd:0.5,pairwise:0.1",
)
CASES = [(spec, tail) for spec in SPECS for tail in DivergenceSum.parse(spec).tails]

FLOOR = 2.0**-23  # float32's epsilon, where the logarithm of a probability 0 is needed


def floored(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.where(p == 0, FLOOR, p), np.where(p == 0, np.maximum(q, FLOOR), q)


def reverse_kl(p: np.ndarray, q: np.ndarray) -> float:
    p, q = floored(p, q)
    return kl(q, p)


def js(p: np.ndarray, q: np.ndarray, beta: float = 0.5) -> float:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def skew_forward_kl(p: np.ndarray, q: np.ndarray, skew: float = 0.1) -> float:
    return kl(p, skew * p + (1 - skew) * q)


def skew_reverse_kl(p: np.ndarray, q: np.ndarray, skew: float = 0.1) -> float:
    return kl(q, skew * q + (1 - skew) * p)


def tvd(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.abs(p - q).sum() / 2)


def alpha_beta(p: np.ndarray, q: np.ndarray, a: float = 0.5, b: float = 0.5) -> float:
    p, q = floored(p, q)
    if a == b == 0:
        terms = (np.log(p) - np.log(q)) ** 2 / 2
    elif b == 0:
        terms = (p**a * np.log(p**a / q**a) - p**a + q**a) / a**2
    elif a == 0:
        terms = (q**b * np.log(q**b / p**b) - q**b + p**b) / b**2
    else:
        terms = -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)) / (a * b)
    return float(terms.sum())


def logit_mse(log_p: np.ndarray, z: np.ndarray) -> float:
    if not len(z):
        return 0.0
    return float(np.mean(((z - z.mean()) - (log_p - log_p.mean())) ** 2))


def pairwise(log_p: np.ndarray, z: np.ndarray) -> float:
    p = np.exp(log_p) / np.exp(log_p).sum()
    total = 0.0
    for i in range(len(z)):
        for j in range(i):
            total += p[i] * p[j] * ((z[i] - z[j]) - (log_p[i] - log_p[j])) ** 2
    return total


OF_DISTRIBUTIONS: dict[str, Callable[..., float]] = {
    "forward-kl": kl,
    "reverse-kl": reverse_kl,
    "js": js,
    "skew-forward-kl": skew_forward_kl,
    "skew-reverse-kl": skew_reverse_kl,
    "tvd": tvd,
    "alpha-beta": alpha_beta,
}
OF_ENTRIES: dict[str, Callable[..., float]] = {"logit-mse": logit_mse, "pairwise": pairwise}


def terms(spec: str) -> list[tuple[str, list[float], float]]:
    """(name, parameters, weight) of each."""
    found = re.findall(r"([a-z-]+)(?:\(([\d.,]*)\))?(?::([\d.]+))?(?:,|$)", spec)
    return [(name, [float(x) for x in given.split(",") if x], float(weight or 1)) for name, given, weight in found]


def textbook(
    spec: str, logits: Tensor, targets: SparseTargetBatch, *, tail: str = "bucket", temperature: float = 1.0
) -> np.ndarray:
    """[N] Σ weight·T²·D, of total variation T·D, on exact entries captured at T = 1; 0 where nothing counts."""
    losses = np.zeros(len(targets))
    for t, z in enumerate(logits.detach().double().numpy()):
        label = int(targets.labels[t])
        if label == IGNORE_INDEX:
            continue
        ids, p, m = entries_at(targets, t)
        for name, parameters, weight in terms(spec):
            if name in OF_ENTRIES:
                value = OF_ENTRIES[name](np.log(p) / temperature, z[ids] / temperature)
            else:
                sides = distributions(z / temperature, ids, p, m, label, 1 / temperature, tail)
                value = OF_DISTRIBUTIONS[name](*sides, *parameters)
            losses[t] += weight * temperature ** (1 if name == "tvd" else 2) * value
    return losses


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def check_heads(
    leaves_in: Callable[[torch.dtype], list[Tensor]],
    entries: SparseTargetBatch,
    targets: SparseTargetBatch | FullTargets,
    vocab_size: int,
    bounds: dict[torch.dtype, float],
    **options: Any,
) -> None:
    """`fused_head` of a linear head, and `general_head` of one that caps its logits, in chunks, against the definition
    on all logits in fp64: loss and gradients, each within a share of its largest value.

    Args:
        leaves_in: hidden states, weight with rows of padding, and bias, as leaves of a graph.
        entries: what the definition, `sparse_kl`, is given; `targets` are what the heads are.
    """
    for temperature, kd_weight in ((1.0, 0.3), (3.0, 1.0)):
        options |= {"temperature": temperature, "kd_weight": kd_weight}
        leaves = leaves_in(torch.float64)
        z, y = (leaves[0] @ leaves[1][:vocab_size].T + leaves[2][:vocab_size] for _ in range(2))
        plain = with_gradients(sparse_kl(z, entries, **options), leaves)
        capped = with_gradients(sparse_kl(3 * torch.tanh(y / 3), entries, **options), leaves)
        chunked = {**options, "scale": 1 / int(targets.loss_mask.sum()), "vocab_size": vocab_size, "chunk_size": 7}
        for dtype, bound in bounds.items():
            leaves = hidden, weight, bias = leaves_in(dtype)
            linear = fused_sums(hidden, weight, bias, targets, **chunked)
            own = general_sums(
                hidden, lambda h, w=weight, b=bias: 3 * torch.tanh(F.linear(h, w, b) / 3), targets, **chunked
            )
            for found, expected in ((linear, plain), (own, capped)):
                assert max(relative_errors(with_gradients(found.loss, leaves), expected)) < bound


def relative_errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Largest difference over largest value, of the loss and of each gradient."""
    return [
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()
        for a, b in zip(found, expected, strict=True)
    ]
