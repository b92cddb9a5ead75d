"""Lists of the most likely tokens as targets: the same as from all logits, and whatever cannot be one is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.teacher.engines.server.http_client import UnusableAnswer
from pipeline.teacher.engines.server.top_lists import TopLists
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import sparse_targets

V = 40
RULES = [
    TargetRule(top_k=7),
    TargetRule(top_k=V),
    TargetRule(kind="top-p", top_p=0.6, max_entries=12),
    TargetRule(kind="top-p", top_p=1.0, max_entries=3),
]


@given(st.integers(0, 2**32 - 1), st.sampled_from(RULES), st.floats(0.1, 8.0))
def test_targets_are_those_of_all_logits(seed: int, rule: TargetRule, scale: float) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(5, V)) * scale)
    logprobs = logits.log_softmax(dim=1)
    top = logprobs.topk(rule.candidates, dim=1)
    lists = [list(zip(i.tolist(), p.tolist(), strict=True)) for i, p in zip(top.indices, top.values, strict=True)]
    for each in lists:
        rng.shuffle(each)
    found = TopLists.read(lists, rule.candidates, V).targets(rule, V)
    expected = sparse_targets(logits, rule)
    torch.testing.assert_close(found.ids, expected.ids)
    torch.testing.assert_close(found.exact_counts, expected.exact_counts)
    filled = found.ids >= 0
    torch.testing.assert_close(found.logprobs[filled], expected.logprobs[filled], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.residual_logprob.exp(), expected.residual_logprob.exp(), atol=1e-5, rtol=0)
    assert (found.entropy <= expected.entropy + 1e-4).all() and (found.entropy >= 0).all()


HALF = math.log(0.5)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([(1, HALF)], "found 1 log-probabilities, expected 2"),
        ([(1, HALF), (2, HALF), (3, HALF)], "found 3 log-probabilities, expected 2"),
        ([(1, HALF), (1, HALF)], "found token id 1 twice"),
        ([(1, HALF), (V, HALF)], "found token id 40, expected ids below 40"),
        ([(1, HALF), (-1, HALF)], "found token id -1"),
        ([(1, HALF), (1.5, HALF)], "found token id 1.5"),
        ([(1, HALF), (2, math.nan)], "found a log-probability of nan, expected finite"),
        ([(1, HALF), (2, None)], "found a log-probability of nan, expected finite"),
        ([(1, HALF), (2, -math.inf)], "found a log-probability of -inf"),
        ([(1, HALF), (2, -9999.0)], "found a log-probability of -9999"),
        ([(1, HALF), (2, -0.1)], "sum to 1.405, expected at most 1: these are not log-probabilities"),
        ([(1, 12.0), (2, 11.0)], "expected at most 1"),
        ([(1, HALF), ("x", HALF)], "entries that are not token ids"),
    ],
)
def test_lists_that_cannot_be(entries: list[tuple[float, float]], message: str) -> None:
    with pytest.raises(UnusableAnswer, match=message):
        TopLists.read([[(3, HALF), (4, HALF)], entries], 2, V)


def test_a_list_of_all_tokens_sums_to_one() -> None:
    with pytest.raises(UnusableAnswer, match="sum to 0.75, expected 1"):
        TopLists.read([[(0, HALF), (1, math.log(0.25))]], 2, 2)


def test_lists_of_other_positions_contradict_the_prompts_own_tokens() -> None:
    lists = TopLists.read([[(1, math.log(0.6)), (2, math.log(0.3))]], 2, V)
    for logprob, token in [(math.log(0.6), 1), (math.log(0.05), 9)]:
        lists.check_own([[logprob, token, None]])
    for own in [[math.log(0.3), 1, None], [math.log(0.5), 9, None], [None, 9, None]]:
        with pytest.raises(UnusableAnswer, match="different positions|without a log-probability"):
            lists.check_own([own])
