"""Tasks of lm-eval: scores equal those of its own command; names and files that are not tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import distill
from pipeline.errors import ConfigError
from pipeline.evaluation import held_out, tasks
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import evaluate
from pipeline.evaluation.tasks import TaskScore
from runs import build_cache, command

YAML = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""

QUESTIONS = [
    ("The capital of France is", ["Paris", "London", "Rome"], 0),
    ("The capital of Italy is", ["Madrid", "Rome", "Paris"], 1),
    ("Two plus two is", ["five", "three", "four"], 2),
    ("The opposite of hot is", ["cold", "warm", "red"], 0),
    ("Cows give", ["wool", "milk", "honey"], 1),
    ("The sun rises in the", ["west", "north", "east"], 2),
    ("Ice is frozen", ["water", "sand", "air"], 0),
    ("A week has this many days:", ["six", "seven", "nine"], 1),
]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    records = [dict(zip(("question", "choices", "answer"), each, strict=True)) for each in QUESTIONS]
    (folder / "capitals.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    (folder / "capitals.yaml").write_text(YAML.format(file=folder / "capitals.jsonl"))
    return folder / "capitals.yaml"


def lm_eval_command(model: Path, task: Path, folder: Path) -> dict[str, float]:
    """What lm-eval's own command reports."""
    words = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--tasks", "capitals"]
    words += ["--include_path", task.parent, "--device", "cpu", "--batch_size", "8", "--output_path", folder]
    command = [sys.executable, "-m", "lm_eval", "run", *map(str, words)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())["results"]["capitals"]


def check_scores(model: Path, task: Path, cache: Path, folder: Path) -> None:
    config = EvaluateConfig(
        cache=str(cache), student=str(model), teacher=str(model), tasks=(str(task),), device="cpu", max_rows=1
    )
    evaluation, expected = evaluate(config), lm_eval_command(model, task, folder)
    for metric in ("acc", "acc_norm"):
        score = evaluation.tasks[f"capitals {metric}"]
        assert (score.value, score.error) == (expected[f"{metric},none"], expected[f"{metric}_stderr,none"])
        assert score.samples == len(QUESTIONS)
    assert evaluation.teacher_tasks == evaluation.tasks


@pytest.mark.slow
def test_scores_equal_those_of_lm_eval(task: Path, teacher_dir: Path, text_file: Path, tmp_path: Path):
    pytest.importorskip("lm_eval")
    cache = build_cache(tmp_path / "cache", teacher_dir, text_file)
    check_scores(teacher_dir, task, cache, tmp_path / "lm-eval")


def test_a_missing_package_is_one_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'distill\[tasks\]'"):
        tasks.check_tasks(["arc_easy"])
    tasks.check_tasks([])


def test_files_that_define_no_task(tmp_path: Path):
    (tmp_path / "broken.yaml").write_text("task: [")
    (tmp_path / "nameless.yaml").write_text("output_type: multiple_choice\nfunction: !function utils.load\n")
    for file, why in (("broken.yaml", "cannot be read"), ("missing.yaml", "cannot be read"), ("nameless.yaml", "name")):
        with pytest.raises(ConfigError, match=why):
            tasks._name_in(str(tmp_path / file))


@pytest.mark.slow
def test_an_unknown_name():
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match="no task of this name"):
        tasks.check_tasks(["no_such_task_at_all"])


def test_a_teacher_without_tasks():
    with pytest.raises(ConfigError, match="only with `tasks`"):
        EvaluateConfig(cache="c", student="s", teacher="t")


@pytest.mark.parametrize("loaded", [False, True])
def test_python_scores_the_teacher(
    loaded: bool, teacher_dir: Path, student_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also a loaded one, with the tokenizer of the cache, whose mode is restored. lm-eval is replaced."""

    def scores(model: Any, tokenizer: Any, tasks: Any, **_: Any) -> dict[str, TaskScore]:
        assert not model.training and len(tokenizer) == 400 and tasks == ("capitals",)
        return {"capitals acc": TaskScore(value=model.config.num_hidden_layers, error=None, samples=8)}

    monkeypatch.setattr(held_out, "check_tasks", lambda tasks: None)
    monkeypatch.setattr(held_out, "task_scores", scores)
    cache = build_cache(tmp_path / "cache", teacher_dir, text_file)
    teacher: Any = AutoModelForCausalLM.from_pretrained(teacher_dir).train() if loaded else teacher_dir
    options: dict[str, Any] = {"tasks": ["capitals"], "device": "cpu", "max_rows": 1}
    found = distill.evaluate(cache, student_dir, teacher=teacher, **options)
    assert found.tasks["capitals acc"].value == 1 and found.teacher_tasks["capitals acc"].value == 2
    assert found.to_json()["teacher_tasks"]["capitals acc"]["value"] == 2
    assert not loaded or teacher.training
    command_line = ["--cache", cache, "--student", student_dir, "--student", teacher_dir, "--teacher", teacher_dir]
    shown = command("evaluate", *command_line, "--tasks", "capitals", "--max-rows", 1, "--device", "cpu", "--json")
    results = json.loads(shown.stdout)
    assert results["teacher_tasks"]["capitals acc"]["value"] == 2
    assert all("teacher_tasks" not in values for values in results["students"].values())
