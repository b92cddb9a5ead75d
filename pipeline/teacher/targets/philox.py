"""Random numbers that are a function of where they are used: Philox4x32-10, keyed by (seed, row, position).

With a stateful generator, the numbers of a position depend on everything drawn before it: samples would change with
the batch size, the number of processes and every resume. A counter-based one has no state: the same three numbers give
the same draws, on any machine, in any order.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The same
generator is behind torch.cuda and TensorFlow; the constants and the test vectors are theirs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Four words of 32 random bits from four of counter [..., 4] and two of key [2], each word in a uint64."""
    c0, c1, c2, c3 = np.moveaxis(counter, -1, 0)
    for i in range(ROUNDS):
        k0, k1 = (key + np.uint64(i) * KEY_STEPS) & LOW
        product0, product1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (product1 >> HALF) ^ c1 ^ k0, product1 & LOW, (product0 >> HALF) ^ c3 ^ k1, product0 & LOW
    return np.stack([c0, c1, c2, c3], axis=-1)


def uniforms(
    seed: int, rows: NDArray[np.integer], positions: NDArray[np.integer], draws: int, *, stream: int = 0
) -> NDArray[np.float64]:
    """[n, draws] numbers in [0, 1) with 53 random bits, for n places (row, position) of the corpus.

    Draw j of a place does not depend on how many draws are asked for. Each purpose has its own stream (0 to 255):
    streams are independent, even at the same seed, row and position.
    """
    blocks = -(-draws // 2)
    counter = np.empty((len(rows), blocks, 4), np.uint64)
    place = np.asarray(rows, np.uint64)[:, None]
    counter[..., 0] = np.arange(blocks, dtype=np.uint64) + np.uint64(stream << 24)  # 2^24 blocks are enough
    counter[..., 1] = np.asarray(positions, np.uint64)[:, None]
    counter[..., 2] = place & LOW
    counter[..., 3] = place >> HALF
    key = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], np.uint64)
    words = philox(counter, key).reshape(len(rows), blocks * 2, 2)
    bits = ((words[..., 0] << HALF) | words[..., 1]) >> np.uint64(11)
    return (bits * 2.0**-53)[:, :draws]
