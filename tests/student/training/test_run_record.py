"""The record of a training run: a damaged one is an error that names it, and a run is resumed only with its inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.options import CONFIG_FILE
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.run_record import check_student_unchanged, record_seen
from runs import Stop, build_cache, train
from tiny import english, tiny_llama


@pytest.mark.parametrize("contents", ["", '{"config": {', "[]"])
def test_damaged_records_are_named(contents: str, tmp_path: Path):
    (tmp_path / CONFIG_FILE).write_text(contents)
    config = TrainStudentConfig(cache=("cache",), student="student", output=str(tmp_path))
    for use in (lambda: check_student_unchanged(config, "0123", None), lambda: record_seen(config, [])):
        with pytest.raises(ConfigError, match=f"{CONFIG_FILE}: .*expected the record of a training run.*`overwrite"):
            use()


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("record") / "cache", teacher_dir, text_file)


def interrupted(output: Path, cache: Path, **options: Any) -> dict[str, Any]:
    """Stops a run after its third step; returns the options to resume it."""
    options = {"max_steps": 5, "batch_size": 4, "save_steps": 1, **options}
    with pytest.raises(KeyboardInterrupt):
        train(output, cache, on_step=Stop(3), **options)
    return {**options, "resume": True}


def forget(output: Path, *names: str) -> None:
    """The record as an earlier version wrote it."""
    record = json.loads((output / CONFIG_FILE).read_text())
    (output / CONFIG_FILE).write_text(json.dumps({name: record[name] for name in record.keys() - {*names}}))


def test_held_out_cache_is_the_same_when_resumed(tmp_path: Path, cache: Path, teacher_dir: Path, student_dir: Path):
    """Otherwise the best checkpoint would be chosen from evaluations of two texts."""
    (tmp_path / "text.txt").write_text(english(30, seed=6))
    held_out = build_cache(tmp_path / "held-out", teacher_dir, tmp_path / "text.txt")
    moved = Path(shutil.copytree(held_out, tmp_path / "moved"))
    options = interrupted(tmp_path / "s", cache, student=student_dir, eval_cache=str(held_out), eval_steps=1)
    for other in (str(cache), None):
        with pytest.raises(cf.MismatchError, match=f"eval_cache {other} is not the held-out cache {held_out}"):
            train(tmp_path / "s", cache, **{**options, "eval_cache": other})
    early = Path(shutil.copytree(tmp_path / "s", tmp_path / "early"))
    forget(early, "eval_cache", "student_fingerprint")
    for output in (tmp_path / "s", early):
        assert len(train(output, cache, **{**options, "eval_cache": str(moved)}).evaluations) == 5


def test_student_has_the_same_configuration_when_resumed(
    tmp_path: Path, cache: Path, student_dir: Path, tokenizer: PreTrainedTokenizerFast
):
    deeper = tiny_llama(tmp_path / "deeper", tokenizer, layers=2, hidden=16)
    same_shapes = Path(shutil.copytree(student_dir, tmp_path / "relu"))
    config = json.loads((same_shapes / "config.json").read_text())
    (same_shapes / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    moved = Path(shutil.copytree(student_dir, tmp_path / "moved"))
    options = interrupted(tmp_path / "s", cache, student=student_dir)
    for other in (deeper, same_shapes):
        with pytest.raises(cf.MismatchError, match=f"`student` {other}: found another configuration"):
            train(tmp_path / "s", cache, **{**options, "student": other})
    assert train(tmp_path / "s", cache, **{**options, "student": moved}).steps == 5


def test_a_loaded_student_may_be_given_again(tmp_path: Path, cache: Path, student_dir: Path):
    """Trainer sets the ids of special tokens in its configuration."""
    model = AutoModelForCausalLM.from_pretrained(student_dir)
    model.config.eos_token_id = model.config.pad_token_id = 7
    options = interrupted(tmp_path / "s", cache, student=model, gradient_checkpointing=True)
    assert model.config.eos_token_id != 7
    assert train(tmp_path / "s", cache, **options).steps == 5
