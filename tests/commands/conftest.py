"""A user's directory with everything that commands read, for tests of what goes wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from runs import build_cache, train
from tiny import tiny_llama, tiny_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def prepared(
    teacher_dir: Path,
    student_dir: Path,
    text_file: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A user's directory: models, data, a cache of several shards, a trained student and an interrupted run."""
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copytree(teacher_dir, folder / "teacher")
    shutil.copytree(student_dir, folder / "student")
    shutil.copy(text_file, folder / "text.txt")
    write_jsonl(folder / "records.jsonl", [{"body": "Some text."}, {"body": "Some more."}])
    tiny_llama(folder / "stranger", tiny_tokenizer(seed=1), hidden=16)
    build_cache(folder / "cache", teacher_dir, text_file, rows_per_shard=8)
    train(folder / "trained", folder / "cache", student=student_dir, max_steps=2)

    def stop(step: int, total: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        options = {"max_steps": 3, "save_steps": 1, "on_step": stop}
        train(folder / "stopped", folder / "cache", student=student_dir, **options)
    return folder


@pytest.fixture()
def here(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(shutil.copytree(prepared, tmp_path / "here"))
    monkeypatch.chdir(folder)
    return folder
