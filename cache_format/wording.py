"""Words that messages and views share."""

from __future__ import annotations


def quantity(count: int, one: str, many: str = "") -> str:
    """A number with its noun: 1 shard, 1,200 shards. `many` is the plural if it is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
