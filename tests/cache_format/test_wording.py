"""Nouns agree with their numbers."""

from __future__ import annotations

from cache_format.wording import quantity


def test_nouns_agree_with_their_numbers():
    assert [quantity(n, "shard") for n in (0, 1, 2, 1200)] == ["0 shards", "1 shard", "2 shards", "1,200 shards"]
    assert [quantity(n, "entry", "entries") for n in (1, 2)] == ["1 entry", "2 entries"]
