"""Samples one token from each of n distributions, with the usual temperature, top-k and top-p, from a given uniform.

The uniform comes from a counter-based generator (`philox`) keyed by seed, prompt, answer and place in the answer, so
that an answer is the same in any batch, in any order, and when an interrupted run is continued. `torch.multinomial`,
which transformers' own sampling uses, has one state for the whole batch: an answer depends on its neighbours.

Without truncation, a token is found by sums over blocks of the vocabulary, as in the tail sampling of `targets`; with
truncation, only among the most likely tokens: a few hundred unless the distribution is flat.

Shapes: n distributions, V vocabulary, C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.teacher.targets.selection import find
from pipeline.teacher.targets.softmax import block_sums, top_k

CANDIDATES = 256  # tried first for top-p; multiplied by eight until sufficient


def draw(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float = 1.0, most: int = 0) -> Tensor:
    """[n] int64: token i with probability softmax(logits / T)_i, renormalised over the tokens that remain.

    The `most` most likely tokens remain (0: all), and of these the fewest whose share of their mass reaches `top_p`.

    Args:
        logits: [n, V] float32.
        uniforms: [n] float64 in [0, 1), one per distribution.
        temperature: 0 takes the most likely token.
    """
    if temperature == 0.0:
        return logits.argmax(dim=1)
    probs = torch.softmax(logits / temperature, dim=1)
    precise = torch.float64 if probs.device.type != "mps" else torch.float32  # MPS has no float64
    point = uniforms.to(device=probs.device, dtype=precise)[:, None]
    if not most and top_p >= 1.0:
        ends = block_sums(probs).cumsum(dim=1, dtype=precise)
        return find(lambda ids: probs.gather(1, ids), probs.shape[1], ends, point * ends[:, -1:])[:, 0]
    values, ids = truncated(probs, top_p, most)
    ends = values.cumsum(dim=1, dtype=precise)  # [n, C]
    place = (ends <= point * ends[:, -1:]).sum(dim=1, keepdim=True)
    last = (values > 0).sum(dim=1, keepdim=True) - 1  # a point close to 1 may be rounded up to the end
    return ids.gather(1, torch.minimum(place, last))[:, 0]


def truncated(probs: Tensor, top_p: float, most: int) -> tuple[Tensor, Tensor]:
    """[n, C] probabilities, largest first and 0 for removed tokens, and their token ids."""
    vocab_size = probs.shape[1]
    width = min(most or CANDIDATES, vocab_size)
    while True:
        values, ids = top_k(probs, width)
        before = values.cumsum(dim=1, dtype=torch.float64 if probs.device.type != "mps" else None) - values
        mass = values.sum(dim=1, keepdim=True) if most else 1.0
        left_in = before < top_p * mass
        if most or width == vocab_size or not left_in[:, -1].any():
            return torch.where(left_in, values, 0.0), ids
        width = min(8 * width, vocab_size)
