"""Tasks of lm-eval: scores equal those of its own command; names and files that are not tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.evaluation import tasks
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import evaluate, teacher_scores
from runs import build_cache

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
    found, expected = evaluate(config).tasks, lm_eval_command(model, task, folder)
    for metric in ("acc", "acc_norm"):
        score = found[f"capitals {metric}"]
        assert (score.value, score.error) == (expected[f"{metric},none"], expected[f"{metric}_stderr,none"])
        assert score.samples == len(QUESTIONS)
    assert teacher_scores(config) == found


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
