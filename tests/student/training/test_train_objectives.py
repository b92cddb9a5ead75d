"""Other divergences through the command line: weights after two steps, logged metrics, the record, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

import cache_format as cf
from cli import main
from pipeline.losses import sparse_kl
from pipeline.student.data.dataset import collate
from pipeline.teacher.targets.rules import TargetRule
from runs import SGD, build_cache, dense_evaluation, dense_logits, distance, log_history, weights
from textbook import textbook
from tiny import conversations, write_jsonl

OBJECTIVES = {
    "reverse-kl": {"divergence": "reverse-kl", "tail": "bucket", "temperature": 2.0},
    "mixture": {"divergence": "js(0.1):2,forward-kl:0.5", "tail": "label", "temperature": 1.0},
    "logit-mse": {"divergence": "logit-mse:0.1", "tail": "bucket", "temperature": 1.0},
}
KD_WEIGHT = 0.7


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cache`, and for each objective a student after two steps over all rows."""
    folder = tmp_path_factory.mktemp("objectives")
    data = write_jsonl(folder / "chat.jsonl", conversations(14))
    rows = len(cf.open_cache(build_cache(folder / "cache", teacher_dir, data, targets=TargetRule(top_k=16))))
    (folder / "arguments.json").write_text(json.dumps({**SGD, "learning_rate": 0.2}))
    for name, objective in OBJECTIVES.items():
        words = {"cache": folder / "cache", "eval-cache": folder / "cache", "student": student_dir}
        words |= {
            "output": folder / name,
            "kd-weight": KD_WEIGHT,
            "training-args": folder / "arguments.json",
            **objective,
        }
        words |= {"batch-size": rows, "max-steps": 2, "logging-steps": 1, "eval-steps": 1, "device": "cpu"}
        run("train-student", *(str(word) for key, value in words.items() for word in (f"--{key}", value)))
    return folder


def run(*words: str, status: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == status, (result.output, result.exc_info)
    return result


every_objective = pytest.mark.parametrize("name", OBJECTIVES)


@pytest.mark.long
@every_objective
def test_steps_equal_those_of_the_plain_loss_on_full_logits(folder: Path, student_dir: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    batch = collate(list(cf.open_cache(folder / "cache").iter_rows()))
    for _ in range(2):
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        loss = sparse_kl(logits[:, :, :400], batch["targets"], kd_weight=KD_WEIGHT, **OBJECTIVES[name])
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.2 * parameter.grad
    by_hand, trained = model.state_dict(), weights(folder / name)
    assert distance(trained, weights(student_dir)) > 1e-3
    assert distance(trained, {key: by_hand[key] for key in trained}) < 5e-6


@pytest.mark.long
@every_objective
def test_logged_metrics_equal_the_textbook_divergence_and_forward_kl(
    folder: Path, student_dir: Path, name: str
) -> None:
    objective = OBJECTIVES[name]
    rows = list(cf.open_cache(folder / "cache").iter_rows())
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    options: dict[str, Any] = {"tail": objective["tail"], "temperature": objective["temperature"]}
    soft: list[float] = []
    kl: list[float] = []
    for row in rows:
        logits = torch.from_numpy(dense_logits(model, row, 400))
        targets = collate([row])["targets"]
        counted = targets.loss_mask.numpy()
        soft.extend(textbook(objective["divergence"], logits, targets, **options)[counted])
        measured = textbook("forward-kl", logits, targets, **{**options, "tail": "bucket"})
        kl.extend(measured[counted] / objective["temperature"] ** 2)
    ce = dense_evaluation(model, rows, 400)["ce"]
    first = log_history(folder / name)[0]
    assert first["soft"] == pytest.approx(np.mean(soft), rel=1e-4)
    assert first["kl"] == pytest.approx(np.mean(kl), rel=1e-5)
    assert first["loss"] == pytest.approx(0.3 * ce + 0.7 * np.mean(soft), rel=1e-5)
    evaluated = next(entry for entry in log_history(folder / name) if "eval_kl" in entry)
    assert evaluated["eval_loss"] == pytest.approx(0.3 * evaluated["eval_ce"] + 0.7 * evaluated["eval_soft"], rel=1e-6)
    assert evaluated["eval_soft"] < first["soft"]


@every_objective
def test_record_has_the_objective_and_the_student_can_be_evaluated(folder: Path, name: str) -> None:
    config = json.loads((folder / name / "distill_config.json").read_text())["config"]
    assert {key: config[key] for key in OBJECTIVES[name]} == OBJECTIVES[name]
    shown = run("evaluate", "--cache", folder / "cache", "--student", folder / name, "--device", "cpu", "--json").stdout
    (found,) = json.loads(shown)["students"].values()
    assert 0 < found["kl"] < 20  # always the forward KL


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--divergence", "kl"], "Error: --divergence kl: "),
        (["--divergence", "js(2)"], "Error: --divergence js(2): "),
        (["--divergence", "mine.f"], "Error: --divergence mine.f: "),
        (["--divergence", "reverse-kl", "--tail", "label"], "Error: --tail label"),
        (["--divergence", "tvd", "--tail", "realized"], "Error: --tail realized"),
        (["--kd-schedule", "linear:1"], "Error: --kd-schedule linear:1: "),
        (["--temperature-schedule", "linear:1:-1"], "Error: --temperature-schedule linear:1:-1: "),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    folder: Path, student_dir: Path, words: list[str], expected: str
) -> None:
    output = folder / "never"
    given = ["--cache", str(folder / "cache"), "--student", str(student_dir), "--output", str(output)]
    result = run("train-student", *given, *words, status=1)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(expected) and lines[0].endswith(".")
    assert not output.exists() and result.stdout == ""
