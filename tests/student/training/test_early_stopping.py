"""Early stopping: given curves, the estimate of noise, invalid conditions, and real runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, TrainerState
from transformers.trainer_callback import TrainerControl

import cache_format as cf
from cli import main
from pipeline.errors import ConfigError
from pipeline.losses import DistillLoss
from pipeline.models.head import open_head
from pipeline.student.data.dataset import collate
from pipeline.student.training.early_stopping import (
    Condition,
    EarlyStopping,
    paired_noise,
    parse_conditions,
    too_few_evaluations,
)
from pipeline.student.training.forward import distillation_output
from runs import SGD, Stop, build_cache, distance, log_history, train, weights
from tiny import english


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("stopping") / "cache", teacher_dir, text_file)


@pytest.fixture(scope="module")
def held_out(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    (folder / "text.txt").write_text(english(24, seed=5))
    return build_cache(folder / "cache", teacher_dir, folder / "text.txt")


def stops_at(
    conditions: list[str], *, mode: Any = "all", rows: list[dict[str, np.ndarray]] | None = None, **curves: list[float]
) -> int | None:
    """The evaluation (from 1) at which a run with these held-out curves stops; None if it does not."""
    callback = EarlyStopping(conditions, mode)
    length = len(next(iter(curves.values())))
    for i in range(length):
        callback.rows = None if rows is None else rows[i]
        state, control = SimpleNamespace(global_step=i + 1, max_steps=10**6), TrainerControl()
        callback.on_evaluate(None, state, control, {f"eval_{name}": values[i] for name, values in curves.items()})
        if control.should_training_stop:
            assert control.should_save and callback.stopped["step"] == i + 1
            return i + 1
    return None


# -- the rule ---------------------------------------------------------------------------------------------------------


def test_stops_after_patience_evaluations_without_a_gain():
    assert stops_at(["kl:0:2"], kl=[3.0, 2.0, 2.0, 2.1, 2.0]) == 4
    assert stops_at(["kl:0:3"], kl=[3.0, 2.0, 2.0, 2.1, 1.9]) is None
    assert stops_at(["kl:0.1:2"], kl=[3.0, 2.95, 2.92, 2.5]) == 3


def test_small_gains_add_up():
    # One gain is below 0.05, two are above.
    falling = [3.0 - 0.03 * i for i in range(12)]
    assert stops_at(["kl:0.05:2"], kl=falling) is None
    assert stops_at(["kl:0.05:1"], kl=falling) == 2


def test_percentage_is_relative_to_the_reference():
    assert stops_at(["kl:1%:1"], kl=[100.0, 98.9, 97.95]) == 3  # 1.1 %, then 0.96 %
    assert stops_at(["kl:1%:1"], kl=[1.0, 0.989, 0.9795]) == 3
    assert stops_at(["kl:1%:1"], kl=[1.0, 0.989, 0.979]) is None


def test_higher_agreement_is_better():
    assert stops_at(["agreement:0.01:1"], agreement=[0.3, 0.4, 0.5]) is None
    assert stops_at(["agreement:0.01:1"], agreement=[0.3, 0.4, 0.4]) == 3
    assert stops_at(["agreement:0.01:2"], agreement=[0.5, 0.4, 0.3]) == 3


@pytest.mark.parametrize("mode, expected", [("all", 5), ("any", 3)])
def test_modes_all_and_any(mode: str, expected: int):
    kl, ce = [2.0, 1.0, 1.0, 1.0, 1.0], [5.0, 4.0, 3.0, 2.0, 2.0]
    assert stops_at(["kl:0:1", "ce:0:1"], mode=mode, kl=kl, ce=ce) == expected


def test_mode_all_needs_all_conditions_at_one_evaluation():
    # Each metric has a plateau, but not at the same time.
    kl, ce = [2.0, 2.0, 1.0, 1.0, 0.5], [5.0, 4.0, 4.0, 3.0, 3.0]
    assert stops_at(["kl:0:1", "ce:0:1"], kl=kl, ce=ce) is None


def test_nan_is_not_a_gain():
    nan = float("nan")
    assert stops_at(["kl:0:2"], kl=[1.0, nan, nan]) == 3
    assert stops_at(["kl:0:2"], kl=[nan, nan]) == 2
    assert stops_at(["kl:0:2"], kl=[nan, 1.0, 0.5]) is None


def test_last_step_is_not_an_early_stop():
    callback = EarlyStopping(["kl:0:1"])
    for step in (1, 2):
        control = TrainerControl()
        callback.on_evaluate(None, SimpleNamespace(global_step=step, max_steps=2), control, {"eval_kl": 1.0})
    assert callback.stopped is None and not control.should_training_stop


# -- noise ------------------------------------------------------------------------------------------------------------


def test_noise_equals_the_spread_over_fresh_rows():
    """The mean estimate from one set of rows, against the spread of means over many sets."""
    rng = np.random.default_rng(0)

    def draw(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counts = rng.integers(5, 60, rows)
        hard = rng.gamma(2.0, 1.5, rows)  # the loss that both students have on a row
        gain = 0.02 + 0.1 * rng.standard_normal(rows)
        return (hard - gain) * counts, hard * counts, counts

    means, estimates, unpaired = [], [], []
    for _ in range(2000):
        now, before, counts = draw(80)
        means.append((now - before).sum() / counts.sum())
        estimates.append(paired_noise(now, before, counts))
        unpaired.append(np.std(now / counts) / np.sqrt(80))
    assert np.mean(estimates) == pytest.approx(np.std(means), rel=0.05)
    assert np.mean(unpaired) > 10 * np.std(means)  # the estimate without pairing


def test_noise_of_simple_cases():
    counts = np.array([4.0, 6.0, 0.0])
    before = np.array([4.0, 6.0, 0.0])
    assert paired_noise(before - 0.5 * counts, before, counts) == 0.0  # every row gained the same per token
    assert paired_noise(before[:1], before[:1], counts[:1]) == np.inf
    # Differences 2 and 0, mean 0.2, residuals 1.2 and -1.2: sqrt(2/1 · 2.88) / 10.
    assert paired_noise(before + [2.0, 0.0, 0.0], before, counts) == pytest.approx(np.sqrt(2 * 2.88) / 10)


def test_gain_within_noise_stops_a_run():
    rng = np.random.default_rng(1)
    counts = np.full(50, 20.0)
    first = rng.gamma(2.0, 1.0, 50)
    wobble = [0.1 * rng.standard_normal(50) for _ in range(4)]

    def curve(gain: float) -> tuple[list[dict[str, np.ndarray]], list[float]]:
        rows = [{"ce": (first - gain * i + wobble[i]) * counts, "count": counts} for i in range(4)]
        return rows, [float(row["ce"].sum() / counts.sum()) for row in rows]

    rows, ce = curve(0.2)  # standard error of a difference: 0.1·√2/√50 = 0.02
    assert stops_at(["ce:noise:3"], rows=rows, ce=ce) is None
    rows, ce = curve(0.004)
    assert stops_at(["ce:noise:3"], rows=rows, ce=ce) == 4


def test_default_waits_while_cross_entropy_improves():
    rng = np.random.default_rng(2)
    counts, first = np.full(40, 10.0), rng.gamma(2.0, 1.0, 40)

    def run(ce_of: Any) -> int | None:
        rows = [{"ce": (first + ce_of(i) + 0.01 * rng.standard_normal(40)) * counts, "count": counts} for i in range(9)]
        ce = [float(row["ce"].sum() / counts.sum()) for row in rows]
        kl = [3.0, 2.0, *[2.0 - 0.001 * i for i in range(7)]]  # gains of 0.05 %: a plateau from the second on
        names = [str(each) for each in parse_conditions(["default"])]
        return stops_at(names, rows=rows, kl=kl, ce=ce)

    assert run(lambda i: 0.0) == 5
    assert run(lambda i: 0.05 * i) == 5  # gets worse
    assert run(lambda i: -0.05 * min(i, 5)) == 9  # improves until the sixth evaluation


def test_sums_by_row_equal_those_of_single_rows(cache: Path, student_dir: Path):
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32).eval()
    head, recipe, rows = open_head(model, 400), DistillLoss(kd_weight=0.7), cf.open_cache(cache)[:5]
    with torch.no_grad():
        by_row = distillation_output(head, collate(rows), recipe, by_row=True)
        together = distillation_output(head, collate(rows), recipe)
        for i, row in enumerate(rows):
            alone = distillation_output(head, collate([row]), recipe)
            for name, value, single in zip(by_row._fields, by_row, alone, strict=True):
                assert float(value[i]) == pytest.approx(float(single), rel=1e-5), name
    assert [float(v.sum()) for v in by_row] == pytest.approx([float(v) for v in together], rel=1e-5)


# -- parsing and checks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["kl:0.5%:3", "ce:noise:3", "agreement:0.001:5", "loss:0:1", "kl:12.5%:2"])
def test_conditions_print_as_given(text: str):
    assert str(Condition.parse(text)) == text
    assert str(Condition.parse(f"eval_{text}")) == text


def test_default_is_replaced_by_its_conditions():
    assert [str(each) for each in parse_conditions(["auto"])] == ["kl:0.5%:3", "ce:noise:3"]
    assert len(parse_conditions(["default", "agreement:0:9"])) == 3


@pytest.mark.parametrize(
    "text, expected",
    [
        ("kl", "expected METRIC:MIN_DELTA:PATIENCE"),
        ("kl:0.1", "expected METRIC:MIN_DELTA:PATIENCE"),
        ("kl:much:3", "expected METRIC:MIN_DELTA:PATIENCE"),
        (":0.1:3", "expected METRIC:MIN_DELTA:PATIENCE"),
        ("kl:0.1:0", "patience '0', "),
        ("kl:0.1:2.5", "patience '2.5', "),
        ("kl:-1:3", "min_delta -1, "),
        ("kl:nan:3", "min_delta nan, "),
        ("perplexity:noise:3", "loss, kl, ce, agreement, not for perplexity"),
        ("bleu:0.1:3", "report loss, kl, ce, perplexity, agreement, not bleu"),
        ("soft:0.1:3", "not soft"),
    ],
)
def test_invalid_conditions_are_refused(
    tmp_path: Path, cache: Path, held_out: Path, student_dir: Path, text: str, expected: str
):
    with pytest.raises(ConfigError) as caught:
        train(tmp_path / "s", cache, student=student_dir, eval_cache=str(held_out), early_stopping=(text,))
    message = str(caught.value)
    assert message.startswith(f"`early_stopping` {text}: ") and expected in message and "\n" not in message
    assert not (tmp_path / "s").exists()


def test_early_stopping_needs_a_held_out_cache(tmp_path: Path, cache: Path, student_dir: Path):
    with pytest.raises(ConfigError, match="`early_stopping` default: found no `eval_cache`"):
        train(tmp_path / "s", cache, student=student_dir, early_stopping=("default",))


def test_noise_needs_two_rows(tmp_path: Path, cache: Path, teacher_dir: Path, student_dir: Path):
    (tmp_path / "text.txt").write_text(english(1))
    one = build_cache(tmp_path / "one", teacher_dir, tmp_path / "text.txt")
    with pytest.raises(ConfigError, match="`early_stopping` ce:noise:3: the held-out cache has 1 row"):
        train(tmp_path / "s", cache, student=student_dir, eval_cache=str(one), early_stopping=("default",))


def test_soft_loss_of_another_divergence_is_a_metric(tmp_path: Path, cache: Path, held_out: Path, student_dir: Path):
    options = {"divergence": "reverse-kl", "early_stopping": ("soft:1000:1",), "eval_steps": 1, "max_steps": 6}
    summary = train(tmp_path / "s", cache, student=student_dir, eval_cache=str(held_out), **options)
    assert summary.stopped["step"] == 2 and "soft" in summary.stopped["reasons"][0]


def test_run_too_short_to_stop_gives_a_warning(tmp_path: Path, cache: Path, held_out: Path, student_dir: Path):
    options = {"eval_cache": str(held_out), "eval_steps": 2, "max_steps": 8, "early_stopping": ("kl:0:3",)}
    summary = train(tmp_path / "s", cache, student=student_dir, **options)
    assert any(
        "`early_stopping`" in each and "3 evaluations before the last of 8 steps" in each for each in summary.warnings
    )
    both = parse_conditions(["kl:0:3", "ce:0:1"])
    assert too_few_evaluations(both, "all", steps=9, every=2) is None
    assert too_few_evaluations(both, "any", steps=5, every=2) is None
    assert too_few_evaluations(both, "any", steps=4, every=2) is not None
    assert too_few_evaluations(both, "all", steps=100, every=0.25) is not None


# -- real runs --------------------------------------------------------------------------------------------------------

# The step is far too large: the seventh evaluation is the best.
OPTIONS: dict[str, Any] = {
    "max_steps": 40,
    "eval_steps": 1,
    "save_steps": 4,
    "batch_size": 8,
    "kd_weight": 1.0,
    "arguments": {**SGD, "learning_rate": 24.0, "max_grad_norm": 1.0},
}


def test_stopped_run_saves_its_best_checkpoint(tmp_path: Path, cache: Path, held_out: Path, student_dir: Path):
    output, logs = tmp_path / "s", []
    summary = train(
        output,
        cache,
        student=student_dir,
        eval_cache=str(held_out),
        early_stopping=("eval_kl:0.5%:3",),
        on_log=logs.append,
        **OPTIONS,
    )
    curve = {entry["step"]: entry["eval_kl"] for entry in log_history(output) if "eval_kl" in entry}
    by_hand = stops_at(["kl:0.5%:3"], kl=[curve[step] for step in sorted(curve)])
    assert summary.stopped["step"] == summary.steps == by_hand == max(curve) < 40 == summary.planned_steps
    assert logs[-1] == {"stopped": summary.stopped["reasons"], "step": summary.steps}
    (reason,) = summary.stopped["reasons"]
    assert reason.startswith(f"kl:0.5%:3: kl {curve[summary.steps]:.4f} against ") and "3 evaluations" in reason

    best = min(curve, key=curve.__getitem__)
    assert best % 4 and best < summary.steps  # not at a multiple of save_steps, and not the last
    assert summary.best_step == best and summary.eval["kl"] == curve[best]
    assert distance(weights(output), weights(output / f"checkpoint-{best}")) == 0.0
    assert distance(weights(output), weights(output / f"checkpoint-{summary.steps}")) > 0.0
    assert [e["step"] for e in summary.evaluations] == sorted(curve)


def test_stopped_run_counts_as_finished(tmp_path: Path, cache: Path, held_out: Path, student_dir: Path):
    options = {"student": student_dir, "eval_cache": str(held_out), "early_stopping": ("default",), **OPTIONS}
    summary = train(tmp_path / "s", cache, **options)
    expected, steps = weights(tmp_path / "s"), summary.steps
    assert steps < 40 and len(summary.stopped["reasons"]) == 2
    with pytest.raises(ConfigError, match=f"stopped early at step {steps} of 40 .*kl:0.5%:3.*nothing to resume"):
        train(tmp_path / "s", cache, resume=True, **options)
    with pytest.raises(ConfigError, match="found a finished run"):
        train(tmp_path / "s", cache, **options)

    # Killed between the stop and saving the student: resume saves it without another step.
    for name in ("model.safetensors", "trainer_state.json"):
        (tmp_path / "s" / name).unlink()
    again = train(tmp_path / "s", cache, resume=True, **options)
    assert again.steps == steps and again.train_loss is None and again.stopped == summary.stopped
    assert again.best_step == summary.best_step and again.eval == summary.eval
    assert distance(weights(tmp_path / "s"), expected) == 0.0


@pytest.mark.long
@pytest.mark.parametrize("restored_by_trainer", [False, True])
def test_resumed_run_continues_to_count(
    tmp_path: Path, cache: Path, held_out: Path, student_dir: Path, restored_by_trainer: bool
):
    arguments = {**OPTIONS["arguments"], "restore_callback_states_from_checkpoint": restored_by_trainer}
    options = {
        **OPTIONS,
        "student": student_dir,
        "eval_cache": str(held_out),
        "early_stopping": ("kl:0.5%:4", "ce:noise:3"),
        "arguments": arguments,
    }
    whole = train(tmp_path / "whole", cache, **options)
    # The last checkpoint before the stop, whose counters are not 0.
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", cache, on_step=Stop(whole.steps - 1), **options)
    checkpoints = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "parts").glob("checkpoint-*"))
    state = TrainerState.load_from_json(str(tmp_path / "parts" / f"checkpoint-{checkpoints[-1]}/trainer_state.json"))
    counters = state.stateful_callbacks["EarlyStopping"]["attributes"]["progress"]
    assert any(progress["waited"] > 0 for progress in counters)
    parts = train(tmp_path / "parts", cache, resume=True, **options)
    assert parts.steps == whole.steps < 40
    assert parts.stopped == whole.stopped and parts.best_step == whole.best_step
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0.0


def test_command_line_shows_the_reason_and_both_curves(tmp_path: Path, cache: Path, held_out: Path, student_dir: Path):
    (tmp_path / "args.json").write_text(json.dumps(OPTIONS["arguments"]))
    words = ["train-student", "--cache", cache, "--eval-cache", held_out, "--student", student_dir, "--device", "cpu"]
    words += [
        "--output",
        tmp_path / "s",
        "--eval-steps",
        1,
        "--max-steps",
        40,
        "--training-args",
        tmp_path / "args.json",
    ]
    words += ["--early-stopping", "kl:1%:2", "--early-stopping", "ce:1%:2", "--early-stopping-mode", "any"]
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0
    line = next(line for line in result.stderr.splitlines() if "stopped early" in line)
    step = int(line.split()[1])
    assert "without a gain above" in line and f"{step} of 40, stopped early, in" in result.stdout
    rows = [line.split() for line in result.stdout.partition("KL to teacher")[2].splitlines()[1:]]
    assert [int(row[0]) for row in rows] == list(range(1, step + 1))
    assert [row[0] for row in rows if "stop" in row] == [str(step)]
    assert len([row for row in rows if "saved" in row]) == 1
    for entry, row in zip((e for e in log_history(tmp_path / "s") if "eval_kl" in e), rows, strict=True):
        assert row[1] == f"{entry['eval_kl']:.4f}" and f"{entry['eval_ce']:.4f}" in row


def test_best_checkpoint_by_agreement_has_the_highest(tmp_path: Path, cache: Path, held_out: Path, student_dir: Path):
    arguments = {**OPTIONS["arguments"], "metric_for_best_model": "agreement"}
    options = {**OPTIONS, "max_steps": 8, "arguments": arguments, "eval_cache": str(held_out)}
    summary = train(tmp_path / "s", cache, student=student_dir, **options)
    curve = [each["agreement"] for each in summary.evaluations]
    assert min(curve) < max(curve) == summary.eval["agreement"]
    arguments["greater_is_better"] = (
        None  # Trainer's own choice would be the highest value of every metric but the loss
    )
    options["arguments"] = {**arguments, "metric_for_best_model": "kl"}
    summary = train(tmp_path / "kl", cache, student=student_dir, **options)
    assert summary.eval["kl"] == min(each["kl"] for each in summary.evaluations)


def test_unknown_metric_for_the_best_checkpoint_is_refused_before_training(
    tmp_path: Path, cache: Path, held_out: Path, student_dir: Path
):
    options = {"student": student_dir, "eval_cache": str(held_out), "arguments": {"metric_for_best_model": "agrement"}}
    with pytest.raises(ConfigError, match="metric_for_best_model agrement: .* report loss, kl, ce, .*agreement"):
        train(tmp_path / "s", cache, **options)
    assert not (tmp_path / "s").exists()
