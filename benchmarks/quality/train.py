"""The training loop of all arms and of track 2's teacher.

AdamW, linear warm-up, cosine to a tenth, gradients clipped at norm 1. Two arms differ only in the objective. (The
overhead of transformers' Trainer, which `train-student` uses, would exceed the arithmetic of these tiny students.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from benchmarks.quality.objectives import Objective
from pipeline.models.head import Head
from pipeline.student.data.dataset import LocalShuffle

WARM_UP, FINAL_RATE = 0.05, 0.1
LOGGED = 20  # points of the training curve


def train(
    head: Head,
    objective: Objective,
    order: LocalShuffle,
    *,
    epochs: int,
    batch_rows: int,
    learning_rate: float,
) -> list[float]:
    """Trains the model of the head; returns its mean training loss in each twentieth of the run."""
    model = head.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), fused=True)
    steps = epochs * -(-len(order) // batch_rows)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    losses = []
    for batch in batches(order, epochs, batch_rows):
        loss = objective(head, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    parts = min(LOGGED, steps)
    cuts = [i * steps // parts for i in range(parts + 1)]
    return [sum(losses[a:b]) / (b - a) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def rate(step: int, steps: int) -> float:
    """Factor on the learning rate at a step."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def batches(order: LocalShuffle, epochs: int, batch_rows: int) -> Iterator[Sequence[int]]:
    for epoch in range(epochs):
        order.set_epoch(epoch)
        indices = list(order)
        for start in range(0, len(indices), batch_rows):
            yield indices[start : start + batch_rows]
