"""Two texts with one completion: what precedes it in the teacher's, and where its positions are."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.teacher.text.encoding import Tokens
from pipeline.teacher.text.formats.teacher_prompts import behind_prompts, with_teacher_prompt
from pipeline.teacher.text.packing import pack_pieces


def tokens(ids: list[int], learned: list[int]) -> Tokens:
    return Tokens(np.array(ids, np.int32), np.array(learned, bool))


def test_prompt_of_the_teacher() -> None:
    found = with_teacher_prompt(tokens([1, 5, 6, 9], [0, 1, 1, 0]), tokens([1, 2, 3, 5, 6], [0, 0, 0, 1, 1]), "row 0")
    assert found.teacher_prompt is not None and found.teacher_prompt.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "teacher, problem",
    [
        (tokens([1, 2, 5, 7], [0, 0, 1, 1]), "2 tokens after the student's prompt, and 2 tokens, not the same"),
        (tokens([1, 2, 5, 6, 7], [0, 0, 1, 1, 1]), "and 3 tokens"),
        (tokens([1, 2, 5, 6], [0, 0, 0, 1]), "and 1 token,"),
        (tokens([5, 6], [1, 1]), "empty prompt"),
    ],
)
def test_other_completions_are_refused(teacher: Tokens, problem: str) -> None:
    with pytest.raises(DataError, match=rf"data, row 7: .*{problem}"):
        with_teacher_prompt(tokens([1, 5, 6], [0, 1, 1]), teacher, "data, row 7")


@pytest.mark.parametrize("prompt, teacher_prompt", [([1, 2], [1, 3, 4, 5]), ([1, 2, 3, 4], [1]), ([1], [1])])
def test_places_of_an_answer(prompt: list[int], teacher_prompt: list[int]) -> None:
    answer = [7, 8, 9]
    text = behind_prompts(np.array(prompt), np.array(teacher_prompt), answer)
    row = [*prompt, *answer]
    assert len(text.positions) == len(row) and text.segment_lengths.tolist() == [len(teacher_prompt) + 3]
    for t in range(len(row) - 1):
        if t < len(prompt) - 1:
            assert text.positions[t] == -1
        else:
            assert text.input_ids[text.positions[t] + 1] == row[t + 1]


def test_packing_keeps_both_lengths() -> None:
    rng = np.random.default_rng(0)
    lengths, read = rng.integers(1, 50, 400), rng.integers(1, 150, 400)
    rows = pack_pieces(lengths, 64, (read, 200))
    assert np.bincount(rows, lengths).max() <= 64 and np.bincount(rows, read).max() <= 200
    assert rows.max() + 1 < 300
    assert np.array_equal(pack_pieces(lengths, 64, (lengths, 64)), pack_pieces(lengths, 64))
