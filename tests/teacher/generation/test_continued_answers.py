"""Runs of `cache-teacher --generate` that are continued: the groups of answers that the first run left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import cache_format as cf
from generating import generate, token_ids
from pipeline.errors import ModelError
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.generation.answer_store import AnswerStore, Group
from pipeline.teacher.progress import GenerationProgress
from pipeline.teacher.writing.worker_config import WorkerConfig

ANSWERS = {"answers_per_prompt": 3, "max_new_tokens": 4}
PROMPTS, PER_GROUP = 8, 6
ASKED = {(document, index) for document in range(PROMPTS) for index in range(3)}
ROUNDING = WorkerConfig(allow_rounding=True)


class Killed(Exception):
    pass


def answer_two_groups(teacher: Path, data: Path, output: Path, batch_size: int) -> list[Path]:
    """A run that is killed when it has answered its second group. Returns: the files of the groups."""
    saved = 0

    def save(self: AnswerStore, number: int, group: Group) -> None:
        nonlocal saved
        save_group(self, number, group)
        saved += 1
        if saved == 2:
            raise Killed

    save_group = AnswerStore.save
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AnswerStore, "save", save)
        generate(teacher, data, output, **ANSWERS, batch_size=batch_size)
    return sorted(output.with_name(f"{output.name}.answers").glob("group-*.arrow"))


@pytest.mark.parametrize(
    "before, after, resumed",
    [(4, 9, 12), (9, 4, 18)],  # groups of 2 prompts and of 3
)
def test_with_another_batch_size_every_prompt_is_answered_once(
    before: int, after: int, resumed: int, teacher_dir: Path, data: Path, tmp_path: Path
) -> None:
    answer_two_groups(teacher_dir, data, tmp_path / "cache", batch_size=before)
    with pytest.raises(cf.MismatchError, match="batch_size"):
        generate(teacher_dir, data, tmp_path / "cache", **ANSWERS, batch_size=after)
    found: list[GenerationProgress] = []
    options = {**ANSWERS, "batch_size": after, "workers": ROUNDING}
    summary = generate(teacher_dir, data, tmp_path / "cache", **options, on_progress=found.append)
    assert (summary.answers, summary.resumed_answers) == (len(ASKED), resumed)
    assert max(progress.answers for progress in found) == len(ASKED)
    generate(teacher_dir, data, tmp_path / "whole", **ANSWERS, batch_size=before)
    assert (
        token_ids(tmp_path / "cache") == token_ids(tmp_path / "whole") and token_ids(tmp_path / "cache").keys() == ASKED
    )
    cf.verify_cache(tmp_path / "cache")


def test_a_group_with_answers_to_other_prompts_is_written_again(teacher_dir: Path, data: Path, tmp_path: Path) -> None:
    first, second = answer_two_groups(teacher_dir, data, tmp_path / "cache", batch_size=4)
    shutil.move(second, second.with_name(second.name.replace("group-00001", "group-00000")))
    first.unlink()
    summary = generate(teacher_dir, data, tmp_path / "cache", **ANSWERS, batch_size=4)
    assert summary.resumed_answers == 0 and token_ids(tmp_path / "cache").keys() == ASKED


def test_tokens_beyond_the_vocabulary_are_found_before_a_group_is_stored(
    teacher_dir: Path, data: Path, tmp_path: Path
) -> None:
    def beyond(self: TransformersEngine, *arguments: Any) -> Any:
        answers = write(self, *arguments)
        next(each for each in answers if (each.document, each.index) == (1, 2)).row.input_ids[-1] = 450
        return answers

    write = TransformersEngine.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", beyond)
        with pytest.raises(ModelError, match="row 1, answer 2: found token id 450, expected ids below 400"):
            generate(teacher_dir, data, tmp_path / "cache", **ANSWERS, batch_size=4)
    assert not list(tmp_path.glob("*/group-*"))
    assert generate(teacher_dir, data, tmp_path / "cache", **ANSWERS, batch_size=4).resumed_answers == 0
