"""Keyword arguments of `import distill`: they become plain values of the right type before anything is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distill
from pipeline.options import build, flat
from pipeline.student.train_config import TrainStudentConfig
from pipeline.teacher.cache_config import CacheTeacherConfig
from runs import build_cache, train

SMALL: dict[str, Any] = {"seq_len": 48, "batch_size": 4, "device": "cpu", "sample_by": "line"}


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("keywords") / "cache", teacher_dir, text_file)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


STUDENT = {
    "max_steps": (np.int64(2), 2),
    "kd_weight": (np.float32(0.5), 0.5),
    "batch_size": (torch.tensor(4), 4),
    "dora": (np.bool_(False), False),
    "device": (torch.device("cpu"), "cpu"),
    "learning_rate": (1, 1),
    "training_args": (
        {"max_grad_norm": np.float32(0.5), "optim_target_modules": ("a",)},
        {"max_grad_norm": 0.5, "optim_target_modules": ["a"]},
    ),
}


@pytest.mark.parametrize("name", STUDENT)
def test_values_of_numpy_and_torch_become_plain(name: str) -> None:
    given, expected = STUDENT[name]
    found = getattr(build(TrainStudentConfig, {"cache": "c", "output": "o", name: given}), name)
    assert found == expected and type(found) is type(expected)
    json.dumps(flat(build(TrainStudentConfig, {"cache": "c", "output": "o", name: given})))


def test_a_dtype_of_torch_is_its_name() -> None:
    given = {"teacher": "t", "data": "d", "output": "o", "dtype": torch.bfloat16, "gen_stop": "~/", "generate": True}
    config = build(CacheTeacherConfig, given)
    assert config.dtype == "bfloat16" and config.generation is not None
    assert config.generation.stop == ("~/",), "text, not a path"


WRONG: list[tuple[type, dict[str, Any], str]] = [
    (CacheTeacherConfig, {"top_k": "8"}, "`top_k` '8': expected a whole number"),
    (CacheTeacherConfig, {"seq_len": 32.0}, "`seq_len` 32.0: expected a whole number"),
    (CacheTeacherConfig, {"packing": "false"}, "`packing` 'false': expected true or false"),
    (CacheTeacherConfig, {"batch_size": True}, "`batch_size` True: expected a whole number"),
    (CacheTeacherConfig, {"batch_tokens": 2.5}, "`batch_tokens` 2.5: expected a whole number or auto"),
    (CacheTeacherConfig, {"device": 0}, "`device` 0: expected a string"),
    (CacheTeacherConfig, {"keep_columns": [1]}, "`keep_columns` .*: expected a string or a list of strings"),
    (TrainStudentConfig, {"kd_weight": "0.5"}, "`kd_weight` '0.5': expected a number"),
    (TrainStudentConfig, {"overwrite": 1}, "`overwrite` 1: expected true or false"),
    (TrainStudentConfig, {"cache": np.array(["a", "b"])}, "`cache` .*: expected a string or a list of strings"),
    (TrainStudentConfig, {"training_args": {"optim": object()}}, "`training_args` .*: expected values that JSON can"),
]


@pytest.mark.parametrize("config, options, words", WRONG, ids=[next(iter(each[1])) for each in WRONG])
def test_a_value_of_another_type_is_refused(config: type, options: dict[str, Any], words: str) -> None:
    needed = {"teacher": "t", "data": "d"} if config is CacheTeacherConfig else {"cache": "c"}
    with pytest.raises(distill.ConfigError, match=words) as caught:
        build(config, {**needed, "output": "o", **options})
    assert caught.value.field == next(iter(options))


def test_nothing_is_deleted_for_a_keyword_of_the_wrong_type(
    cache: Path, teacher_dir: Path, student_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    train(tmp_path / "student", cache, student=student_dir, max_steps=1)
    before = contents(tmp_path / "student"), contents(cache)
    with pytest.raises(distill.ConfigError, match="`max_steps`"):
        distill.train_student(cache, student_dir, tmp_path / "student", overwrite=True, max_steps="2")
    with pytest.raises(distill.ConfigError, match="`top_k`"):
        distill.cache_teacher(teacher_dir, text_file, cache, overwrite=True, top_k="8", **SMALL)
    assert (contents(tmp_path / "student"), contents(cache)) == before


def test_nothing_is_deleted_if_the_record_cannot_be_written(cache: Path, student_dir: Path, tmp_path: Path) -> None:
    """A configuration that was made without `build` is not checked by type."""
    train(tmp_path / "student", cache, student=student_dir, max_steps=1)
    before = contents(tmp_path / "student")
    with pytest.raises(TypeError, match="not JSON serializable"):
        options: dict[str, Any] = {"training_args": {"max_grad_norm": np.float32(0.5)}}
        train(tmp_path / "student", cache, student=student_dir, max_steps=1, overwrite=True, **options)
    assert contents(tmp_path / "student") == before


def test_a_run_with_values_of_numpy_and_torch(
    cache: Path, teacher_dir: Path, student_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_steps": np.int64(2), "kd_weight": np.float32(0.5), "device": torch.device("cpu")}
    arguments = {"max_grad_norm": np.float32(0.5)}
    run = distill.train_student(cache, student_dir, tmp_path / "student", training_args=arguments, **options)
    recorded = json.loads((tmp_path / "student" / "distill_config.json").read_text())["config"]
    assert run.steps == 2 and recorded["kd_weight"] == 0.5 and recorded["training_args"] == {"max_grad_norm": 0.5}
    small = {**SMALL, "device": torch.device("cpu"), "seq_len": np.int32(48)}
    assert distill.cache_teacher(teacher_dir, text_file, tmp_path / "cache", max_documents=4, **small).finished


def test_a_token_is_not_recorded(cache: Path, student_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(distill.ConfigError, match="hub_token cannot be set here: a run uploads nothing"):
        distill.train_student(
            cache, student_dir, tmp_path / "student", device="cpu", training_args={"hub_token": "hf_secret"}
        )
    assert not (tmp_path / "student").exists()
    given = {"teacher": "t", "data": "d", "output": "o", "engine": "vllm", "engine_args": {"hf_token": "hf_secret"}}
    with pytest.raises(distill.ConfigError, match="`engine_args`: hf_token") as caught:
        build(CacheTeacherConfig, given).running.arguments()
    assert "hf_secret" not in str(caught.value)


def test_the_tilde_of_every_path_is_the_home_directory(
    cache: Path, student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").symlink_to(cache)
    (tmp_path / "arguments.json").write_text('{"max_grad_norm": 0.5}')
    arguments = "~/arguments.json"
    distill.train_student(
        "~/cache", student_dir, "~/student", eval_cache="~/cache", training_args=arguments, max_steps=1, device="cpu"
    )
    config = "~/student/config.json"
    distill.train_student("~/cache", output="~/random", student_config=config, max_steps=1, device="cpu")
    assert distill.evaluate("~/cache", "~/student", max_rows=2, device="cpu").tokens > 0
    distill.report("~/cache", "~/page.html", student="~/student", max_rows=2, device="cpu")
    distill.export_cache("~/cache", "~/export")
    assert distill.verify("~/cache").ok and len(distill.open_cache("~/cache")) > 0
    made = {"student", "random", "page.html", "export"}
    assert made <= {path.name for path in tmp_path.iterdir()} and not (tmp_path / "~").exists()
