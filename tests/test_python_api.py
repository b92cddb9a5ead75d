"""`import distill`: what a script can do, from an empty directory, with objects, and without a word on the terminal."""

from __future__ import annotations

import inspect
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cache_format as cf
import distill
from cache_samples import shards
from pipeline.options import build, flat, options_of, read_config
from pipeline.student.train_config import TrainStudentConfig
from pipeline.teacher.cache_config import CacheTeacherConfig
from runs import distance, weights

ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {"seq_len": 48, "batch_size": 4, "device": "cpu"}


def test_importing_is_free_and_every_name_is_there() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'pyarrow', 'click', 'rich'}"
    code = f"import sys, distill; print(sorted({heavy} & set(sys.modules)), distill.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "[]"
    assert all(getattr(distill, name) is not None for name in distill.__all__)
    assert set(distill.__all__) <= set(dir(distill))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = distill.nothing


def test_signatures_name_every_option() -> None:
    for function, config in ((distill.cache_teacher, CacheTeacherConfig), (distill.train_student, TrainStudentConfig)):
        parameters = inspect.signature(function).parameters
        for each in options_of(config).values():
            assert each.name in parameters, each.name
            assert (
                each.required
                or each.name in ("student", "tokenizer")
                or (parameters[each.name].default == each.default)
            )
            assert each.name in (function.__doc__ or "")


@pytest.fixture(scope="module")
def made(teacher_dir: Path, student_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    seen: list[distill.Progress] = []
    options = {**SMALL, "sample_by": "line", "top_k": 8}
    summary = distill.cache_teacher(teacher_dir, text_file, folder / "cache", on_progress=seen.append, **options)
    assert summary.rows == len(distill.open_cache(str(folder / "cache"))) and summary.finished
    assert seen[-1].done == seen[-1].total == summary.rows and seen[-1].values["tokens_per_s"] > 0
    assert [progress.stage for progress in seen if not progress.total][0] == "reading and tokenising the text"
    return folder


def test_nothing_is_printed(
    made: Path, teacher_dir: Path, student_dir: Path, text_file: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    distill.cache_teacher(teacher_dir, text_file, tmp_path / "cache", max_documents=4, sample_by="line", **SMALL)
    distill.train_student(made / "cache", student_dir, tmp_path / "student", max_steps=2, device="cpu")
    distill.evaluate(made / "cache", tmp_path / "student", max_rows=2, device="cpu")
    distill.verify(made / "cache", deep=True)
    assert capfd.readouterr() == ("", "")


def test_a_loaded_teacher_writes_the_same_shards(
    made: Path, teacher_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    teacher.train()
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    distill.cache_teacher(
        teacher, text_file, tmp_path / "cache", tokenizer=tokenizer, sample_by="line", top_k=8, **SMALL
    )
    assert shards(tmp_path / "cache") == shards(made / "cache")
    assert teacher.training, "its mode is as before"
    recorded = cf.open_cache(tmp_path / "cache").metadata.teacher
    assert recorded["weights_fingerprint"] == cf.open_cache(made / "cache").metadata.teacher["weights_fingerprint"]
    with pytest.raises(distill.ConfigError, match="`tokenizer`"):
        distill.cache_teacher(teacher, text_file, tmp_path / "other", **SMALL)


def test_data_in_memory_writes_the_same_shards(made: Path, teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    rows = [{"text": line} for line in text_file.read_text().splitlines()]
    for name, data in (("list", rows), ("dataset", datasets.Dataset.from_list(rows)), ("generator", iter(rows))):
        distill.cache_teacher(teacher_dir, data, tmp_path / name, top_k=8, **SMALL)
        assert shards(tmp_path / name) == shards(made / "cache"), name
    with pytest.raises(distill.DataError):
        distill.cache_teacher(teacher_dir, [], tmp_path / "empty", **SMALL)


@pytest.mark.long
def test_a_loaded_student_is_trained_in_place(made: Path, student_dir: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-2, "batch_size": 4, "device": "cpu"}
    distill.train_student(made / "cache", student_dir, tmp_path / "path", **options)
    student = AutoModelForCausalLM.from_pretrained(student_dir)
    distill.train_student(made / "cache", student, tmp_path / "object", **options)
    assert distance(weights(tmp_path / "path"), weights(tmp_path / "object")) == 0.0
    with pytest.warns(distill.DistillWarning, match="loaded model without `tokenizer`"):
        found = distill.evaluate(made / "cache", student, device="cpu")
    assert found == distill.evaluate(made / "cache", tmp_path / "path", device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 3, "learning_rate": 1e-2},
        {"max_steps": 3, "training_args": {"learning_rate": 1e-2, "weight_decay": 0.5}},
        {"max_steps": 3, "training_args": {"learning_rate": 1e-2, "weight_decay": 0.5}, "learning_rate": 3e-4},
        {"max_steps": 3, "kd_schedule": "linear:1:0"},
        {"max_tokens": 1500},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_saved_configuration_repeats_the_run(
    options: dict[str, Any], made: Path, student_dir: Path, tmp_path: Path
) -> None:
    """Options that were left at their default do not take part, as in the run itself."""
    distill.train_student(made / "cache", student_dir, tmp_path / "first", batch_size=4, device="cpu", **options)
    distill.train_student(config=tmp_path / "first", output=tmp_path / "again")
    assert distance(weights(tmp_path / "first"), weights(tmp_path / "again")) == 0.0
    first, again = (json.loads((tmp_path / name / "distill_config.json").read_text()) for name in ("first", "again"))
    same = first["config"].keys() - {"output", "cache"}
    assert first["given"] == again["given"] and all(first["config"][name] == again["config"][name] for name in same)


def test_a_saved_configuration_repeats_a_cache(made: Path, tmp_path: Path) -> None:
    distill.cache_teacher(config=made / "cache", output=tmp_path / "cache")
    assert shards(tmp_path / "cache") == shards(made / "cache")


def test_what_a_saved_configuration_does_not_repeat(
    made: Path, student_dir: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """It deletes nothing, and runs no code that the caller has not named."""
    options: dict[str, Any] = {"max_steps": 1, "batch_size": 4, "device": "cpu", "trust_remote_code": True}
    distill.train_student(made / "cache", student_dir, tmp_path / "student", overwrite=True, **options)
    (tmp_path / "student" / "notes.txt").write_text("mine")
    with pytest.raises(distill.ConfigError, match="finished"):
        distill.train_student(config=tmp_path / "student")
    assert (tmp_path / "student" / "notes.txt").read_text() == "mine"
    assert not {"overwrite", "trust_remote_code"} & read_config(str(tmp_path / "student"), TrainStudentConfig).keys()

    (tmp_path / "checks.py").write_text("def even(example, answer):\n    return example['n'] % 2 == 0\n")
    prompts = [{"prompt": f"The cat {n}", "n": n} for n in range(6)]
    chosen = {"gen_keep_if": f"{tmp_path / 'checks.py'}:even"}
    generated = distill.cache_teacher(
        teacher_dir, prompts, tmp_path / "even", generate=True, gen_max_new_tokens=4, **chosen, **SMALL
    )
    again = {"config": tmp_path / "even", "data": prompts, "output": tmp_path / "again"}
    with pytest.raises(distill.ConfigError, match="its answers were chosen by .*even, .* Give `gen_keep_if` again"):
        distill.cache_teacher(**again)
    assert not (tmp_path / "again").exists()
    assert distill.cache_teacher(**again, **chosen).rows == generated.rows == 3


def test_objects_leave_a_configuration_that_can_be_read(made: Path, teacher_dir: Path, tmp_path: Path) -> None:
    rows = ({"text": "The cat sat on the mat."}, {"text": "A dog ran."})
    distill.cache_teacher(teacher_dir, rows, tmp_path / "rows", **SMALL)
    assert "data" not in read_config(str(tmp_path / "rows"), CacheTeacherConfig)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("The cat sat on the mat.")
    distill.cache_teacher(teacher_dir, (tmp_path / "a.txt", tmp_path / "b.txt"), tmp_path / "paths", **SMALL)
    found = read_config(str(tmp_path / "paths"), CacheTeacherConfig)
    assert found["data"] == (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    values = {"teacher": "t", "data": "d", "output": "o", "engine": "vllm", "engine_args": {"max_num_seqs": 2}}
    (tmp_path / "run.json").write_text(json.dumps({"config": flat(build(CacheTeacherConfig, values))}))
    assert values.items() <= read_config(str(tmp_path / "run.json"), CacheTeacherConfig).items()


def test_plan_and_verify(made: Path, teacher_dir: Path, student_dir: Path, text_file: Path, tmp_path: Path) -> None:
    plan = distill.plan(teacher_dir, text_file, tmp_path / "c", rows=4, top_k=8, sample_by="line", **SMALL)
    assert plan.chosen.targets["kind"] == "top-k" and not (tmp_path / "c").exists()
    found = distill.verify(made / "cache", against_teacher=teacher_dir, rows=2, device="cpu")
    assert found.ok and found.teacher is not None and found.cache.rows == len(cf.open_cache(made / "cache"))
    with pytest.raises(distill.ConfigError, match="`rows`: only with `against_teacher`"):
        distill.verify(made / "cache", rows=2)
    (tmp_path / "check.toml").write_text(f'against_teacher = "{teacher_dir}"\nrows = 3\ndevice = "cpu"\n')
    found = distill.verify(made / "cache", config=tmp_path / "check.toml", rows=1)
    assert found.ok and found.teacher is not None and found.teacher.rows == 1


def test_plan_takes_the_output_of_a_file(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("pipeline.teacher.plan._free_bytes", asked.append)
    options = {"rows": 2, "top_k": 8, "sample_by": "line", **SMALL}
    (tmp_path / "run.toml").write_text(f'teacher = "{teacher_dir}"\ndata = "{text_file}"\noutput = "there"\n')
    distill.plan(config=tmp_path / "run.toml", **options)
    distill.plan(config=tmp_path / "run.toml", output="elsewhere", **options)
    distill.plan(teacher_dir, text_file, **options)
    assert asked == ["there", "elsewhere", "."]


def test_random_generators_go_on_as_if_nothing_had_run(made: Path, student_dir: Path, tmp_path: Path) -> None:
    def draws() -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    seed()
    expected = [draws(), draws()]
    seed()
    found = [draws()]
    options: dict[str, Any] = {"max_steps": 1, "device": "cpu", "student_random": True}
    distill.train_student(made / "cache", student_dir, tmp_path / "student", **options)
    distill.evaluate(made / "cache", tmp_path / "student", max_rows=2, device="cpu")
    assert [*found, draws()] == expected
    with pytest.raises(distill.ConfigError):
        distill.train_student(made / "cache", student_dir, tmp_path / "student", **options)


def test_a_tied_head_is_not_reported_as_missing(
    made: Path, tmp_path: Path, teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("transformers.trainer.logger.warning", said.append)
    student = AutoModelForCausalLM.from_pretrained(teacher_dir)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    options: dict[str, Any] = {"max_steps": 2, "eval_steps": 1, "device": "cpu", "eval_cache": made / "cache"}
    run = distill.train_student(made / "cache", student, tmp_path / "student", **options)
    assert run.best_step is not None and said == []


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"rowz": 2}, distill.ConfigError, "`rowz`: no such option. Did you mean `rows`"),
        ({"config": "none.toml"}, distill.ConfigError, "none.toml: No such file"),
        ({"against_teacher": "./nowhere"}, distill.ModelError, "nowhere: no such directory"),
        ({"against_teacher": "t", "tokenizer": "./nowhere"}, distill.ModelError, "nowhere: no such directory"),
    ],
)
def test_options_of_verify_are_checked_before_the_cache_is_read(
    options: dict[str, Any], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cf, "verify_cache", lambda *_, **__: pytest.fail("read the cache"))
    with pytest.raises(error, match=words):
        distill.verify("cache", **options)


def test_errors_and_warnings(made: Path, teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    distill.cache_teacher(teacher_dir, text_file, made / "threshold", max_documents=20, sample_by="line", **SMALL)
    with pytest.raises(distill.ConfigError) as caught:
        distill.cache_teacher(teacher_dir, text_file, tmp_path / "c", top_k=-1)
    assert caught.value.field == "top_k" and "--" not in str(caught.value)
    with pytest.raises(distill.ConfigError, match="`topk`: no such option. Did you mean `top_k`"):
        distill.cache_teacher(teacher_dir, text_file, tmp_path / "c", topk=1)
    with pytest.raises(distill.ConfigError, match="`data`: missing"):
        distill.cache_teacher(teacher_dir, output=tmp_path / "c")
    with pytest.raises(distill.CacheError):
        distill.open_cache(str(tmp_path / "nothing"))
    with pytest.warns(distill.DistillWarning, match="exact"):
        distill.train_student(
            made / "threshold", teacher_dir, tmp_path / "s", divergence="js", max_steps=1, device="cpu"
        )
