"""Forward passes over about equal numbers of tokens, and that number found by trying.

Eight rows of 100 tokens underuse a GPU, eight of 32,768 do not fit its memory. A number of tokens suits both: a pass of
a teacher with N parameters reads its weights once and computes 2·N per token, so a few thousand tokens reach the speed
of many, and more take memory for nothing.

Cost of the search: three passes each over 1, 2, 4, ... rows of the longest kind, up to a record batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from pipeline.teacher.engines.interface import RowRequest

GAIN = 1.05
"""Twice the tokens must be faster by this factor."""


def batches_within(requests: Sequence[RowRequest], tokens: int, *, padded: bool) -> Iterator[list[RowRequest]]:
    """Consecutive requests whose forward pass takes at most `tokens` tokens, and at least one request.

    Args:
        requests: longest first.
        padded: whether every row takes as many as the longest one of its batch.
    """
    batch: list[RowRequest] = []
    used = 0
    for request in requests:
        takes = len((batch[0] if batch and padded else request).read.input_ids)
        if batch and used + takes > tokens:
            yield batch
            batch, used, takes = [], 0, len(request.read.input_ids)
        batch.append(request)
        used += takes
    if batch:
        yield batch


def find_budget(speed: Callable[[int], float], *, fewest: int, most: int) -> int:
    """Tokens per forward pass: doubled from `fewest` until a pass does not fit the memory, or the speed hardly rises.

    Args:
        speed: tokens per second of passes over that many tokens.

    Raises: what `speed` raises for `fewest`, and everything but lack of memory.
    """
    best, fastest = fewest, speed(fewest)
    while best < most:
        tokens = min(2 * best, most)
        found: float | None = None
        try:
            found = speed(tokens)
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
        if found is None:
            clear_device_cache(garbage_collection=True)  # only here: the traceback holds the tensors of the batch
            break
        if found < GAIN * fastest:
            break
        best, fastest = tokens, found
    return best
