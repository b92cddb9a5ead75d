"""Variance of sampled targets at the same number of entries: `threshold` compared with `random`.

At every position, the entries give an estimate t̂ = Σ w_i·onehot(i) of p. Both kinds are unbiased, so E‖t̂ − p‖² is
variance, with a closed form:

    random, N draws     Σ p(1 − p) / N                    with Σ 1 − (1 − p)^N distinct entries
    threshold τ         Σ p(τ − p) over all p < τ         with Σ min(1, p/τ)

(Systematic sampling takes a token of p < τ with probability p/τ and weight τ; the largest p is always exact.) The
column "sampled ÷ closed form" compares it with samples from `sparse_targets`. Each random rule is compared with the τ
of the same mean number of entries, found by bisection. Truncated lists have no variance, but a bias, which does not
average out.

**Rounding.** Sampled weights are stored exactly; an exact p is stored as the level p̂ that is nearest in √p. Averaged
over samples, a stored estimate is off by Σ (p̂ − p) over exact entries, and a KL estimated with it, lse(z) − Σ ŵ·z − H,
by −Σ (p̂ − p)·z. Neither is random. Compared are levels uniform in arcsin √p (threshold targets) and in √p (lists).

Bound: 0. At a fixed mean number of entries, threshold sampling with one τ for all positions has the least variance of
all schemes that sample tokens independently (Duffield, Lund and Thorup, 2007).

    python -m benchmarks variance
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import cache_format as cf
from benchmarks.measure import Result, Settings, Table, Value
from benchmarks.teacher import ROW_TOKENS, describe, hidden_states, open_teacher
from benchmarks.text import token_rows
from pipeline.models.head import Head, open_head
from pipeline.models.tokenizers import real_vocab_size
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import draws, sparse_targets

DRAWS = (13, 25, 50, 100)
LISTS = (16, 50, 64)
THRESHOLDS = (1 / 20, 1 / 8)
SURE = 0.95
ROUNDING_FACTOR = 8  # rounding is measured at this many times more positions
SAMPLES = 32  # per position, to check the closed form
CHUNK = 128


def run(settings: Settings) -> Result:
    model, tokenizer = open_teacher(settings.teacher)
    head = open_head(model, real_vocab_size(tokenizer, model.get_output_embeddings().weight.shape[0]))
    rows, length = (4, 256) if settings.quick else (128, ROW_TOKENS)
    positions, sampled_positions = (64, 16) if settings.quick else (2048, 256)
    states = hidden_states(model, token_rows(tokenizer, rows, length))
    logits = torch.cat(list(spread_logits(head, states, positions)))
    few = logits[:: positions // sampled_positions]
    p, few_p = logits.softmax(dim=1), few.softmax(dim=1)

    samples: list[list[Value]] = []
    ratios: dict[str, Value] = {}
    for count in DRAWS:
        entries = float((1 - (1 - p) ** count).sum(dim=1).mean())
        tau = threshold_of(p, entries)
        random = TargetRule(kind="random", draws=count)
        threshold = TargetRule(kind="threshold", tail_threshold=tau)
        for name, rule in ((f"random {count}", random), (f"threshold {tau:.4f}", threshold)):
            found = sampled_error(few, few_p, rule) / variance(few_p, rule)
            samples.append([name, entries, variance(p, rule), found, variance(p, rule) / variance(p, random)])
        ratios[f"÷ random {count}"] = round(variance(p, threshold) / variance(p, random), 3)
    rounding = rounding_errors(head, states, ROUNDING_FACTOR * positions)
    lists: list[list[Value]] = [[f"renormalised top-{k}", k, renormalised_bias(p, k)] for k in LISTS]
    return Result(
        name="variance",
        question="E‖t̂ − p‖² of unbiased samples with the same mean number of entries, and ‖bias‖² of truncated lists.",
        bound="0; at a fixed mean number of entries, threshold sampling has the least variance.",
        settings={"teacher": describe(model), "positions": positions, "sampled_positions": sampled_positions}
        | {"samples_per_position": SAMPLES},
        tables=[
            Table("Variance", ["targets", "entries", "E‖t̂ − p‖²", "sampled ÷ closed form", "÷ random"], samples),
            Table("Bias", ["list", "entries", "‖E t̂ − p‖²"], lists),
            Table(
                f"Rounding, {ROUNDING_FACTOR * positions:,} positions",
                ["targets", "levels", "Σ (p̂ − p)", f"Σ (p̂ − p) where max p > {SURE}"]
                + ["estimated KL of the teacher with itself, nats", "standard error"],
                rounding,
            ),
        ],
        summary=ratios,
    )


@torch.inference_mode()
def spread_logits(head: Head, states: np.ndarray, positions: int) -> Iterator[Tensor]:
    """[at most CHUNK, V] at `positions` positions that are evenly spaced over [rows, T, D] states."""
    flat = states.reshape(-1, states.shape[-1])
    chosen = flat[np.linspace(0, len(flat) - 1, positions).astype(int)].astype(np.float32)
    for chunk in torch.from_numpy(chosen).split(CHUNK):
        yield head.logits(chunk)


def variance(p: Tensor, rule: TargetRule) -> float:
    """E‖t̂ − p‖² in closed form, mean over the n positions of [n, V] probabilities."""
    if rule.kind == "random":
        per_token = p * (1 - p) / rule.draws
    else:
        per_token = torch.where(p < rule.tail_threshold, p * (rule.tail_threshold - p), 0.0)
        per_token.scatter_(1, p.argmax(dim=1, keepdim=True), 0.0)  # always exact
    return float(per_token.sum(dim=1).mean())


def threshold_of(p: Tensor, entries: float) -> float:
    """The τ with a mean of `entries` entries."""
    largest = p.amax(dim=1)
    low, high = 1e-5, 1.0
    for _ in range(40):
        tau = (low * high) ** 0.5
        found = (p / tau).clamp_(max=1).sum(dim=1) + 1 - (largest / tau).clamp(max=1)
        low, high = (tau, high) if float(found.mean()) > entries else (low, tau)
    return tau


def sampled_error(logits: Tensor, p: Tensor, rule: TargetRule) -> float:
    """Mean of ‖t̂ − p‖² over positions and `SAMPLES` seeds, from actual samples."""
    places, total = np.arange(len(p)), 0.0
    for seed in range(SAMPLES):
        found = sparse_targets(logits, rule, draws(replace(rule, seed=seed), places, places))
        weights = torch.where(found.ids >= 0, found.logprobs.exp(), 0.0)
        estimate = torch.zeros_like(p).scatter_add_(1, found.ids.long().clamp(min=0), weights)
        total += float((estimate - p).square().sum(dim=1).mean())
    return total / SAMPLES


def rounding_errors(head: Head, states: np.ndarray, positions: int) -> list[list[Value]]:
    """For each τ and codebook: mean Σ (p̂ − p), the same where the teacher is sure, and the error of its own KL."""
    cases = {}
    for tau in THRESHOLDS:
        book, name = TargetRule(kind="threshold", tail_threshold=tau).codebook(), f"threshold 1/{1 / tau:.0f}"
        cases[name, f"arcsin √p, {len(book.values)}"] = tau, book
        cases[name, "√p, 64"] = tau, cf.sqrt_probability_codebook(64)
    found: dict[tuple[str, str], list[Tensor]] = {case: [] for case in cases}
    for logits in spread_logits(head, states, positions):
        p = logits.softmax(dim=1)
        largest = p.amax(dim=1, keepdim=True)
        for case, (tau, book) in cases.items():
            exact = (p >= tau) | (p == largest)
            stored = torch.from_numpy(book.decode(book.encode(p[exact].log().numpy()))).exp()
            change = torch.zeros_like(p).masked_scatter_(exact, stored - p[exact])  # [n, V]
            found[case].append(torch.stack([change.sum(1), -(change * logits).sum(1), largest[:, 0]], dim=1))
    rows: list[list[Value]] = []
    for case, parts in found.items():
        sums, own_kl, sure = torch.cat(parts).unbind(dim=1)
        error = float(own_kl.std()) / positions**0.5
        rows.append([*case, float(sums.mean()), float(sums[sure > SURE].mean()), float(own_kl.mean()), error])
    return rows


def renormalised_bias(p: Tensor, k: int) -> float:
    """‖E t̂ − p‖² of the k most likely tokens, rescaled to sum to one."""
    top, ids = p.topk(k, dim=1)
    listed = torch.zeros_like(p).scatter_(1, ids, top / top.sum(dim=1, keepdim=True))
    return float((listed - p).square().sum(dim=1).mean())
