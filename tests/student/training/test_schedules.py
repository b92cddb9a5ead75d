"""Schedules of kd_weight and temperature: values, parsing, checks against a cache, and runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import cache_format as cf
from cli import main
from pipeline.errors import ConfigError
from pipeline.losses import DistillLoss
from pipeline.student.training.schedules import Schedule
from pipeline.student.validation.loss_checks import loss_for_cache, loss_for_held_out
from pipeline.teacher.targets.rules import TargetRule
from runs import SGD, Stop, build_cache, distance, log_history, train, weights
from sampled import threshold
from tiny import conversations, write_jsonl

# ---- the numbers


@pytest.mark.parametrize(
    "text, steps, expected",
    [
        ("constant:0.9", 5, [0.9] * 5),
        ("linear:0.9:0.5", 5, [0.9, 0.8, 0.7, 0.6, 0.5]),
        ("linear:0:1", 2, [0.0, 1.0]),
        ("linear:0:1", 1, [1.0]),  # a run of one step is its last
        ("wsd:0:1:0.5:0.25:0.5", 9, [0.0, 0.5, 1.0, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5]),
        ("wsd:0:1:0", 11, [0.0] + [1.0] * 9 + [0.0]),  # a tenth each
        ("wsd:0:1:0:0:0", 4, [1.0] * 4),  # neither warm-up nor decay
        ("wsd:0:1:0.5:0:0.5", 5, [1.0, 1.0, 1.0, 0.75, 0.5]),
        ("wsd:0.2:1:0:0.5:0", 5, [0.2, 0.6, 1.0, 1.0, 1.0]),
        ("wsd:0:1:0:0.5:0.5", 5, [0.0, 0.5, 1.0, 0.5, 0.0]),  # no stable part
        ("wsd:4:1:2:0.1:0.9", 11, [4.0] + [1.0 + i / 9 for i in range(10)]),
    ],
)
def test_values_at_every_step(text: str, steps: int, expected: list[float]) -> None:
    schedule = Schedule.parse(text, "`kd_schedule`")
    assert [schedule.at(step, steps) for step in range(steps)] == pytest.approx(expected, abs=1e-12)
    assert (schedule.at(0, steps), schedule.at(steps - 1, steps)) == (expected[0], expected[-1])  # exactly
    assert schedule.at(steps, steps) == schedule.at(10 * steps, steps) == expected[-1]
    assert Schedule.parse(str(schedule), "") == schedule


fractions = st.floats(0, 1)


@given(fractions, fractions, fractions, fractions, fractions, st.integers(1, 50))
def test_wsd_values_rise_stay_and_fall(a: float, b: float, c: float, w: float, d: float, n: int) -> None:
    w, d = w / 2, d / 2
    values = [Schedule.parse(f"wsd:{a!r}:{b!r}:{c!r}:{w!r}:{d!r}", "").at(i, n) for i in range(n)]
    assert all(min(a, b, c) - 1e-12 <= value <= max(a, b, c) + 1e-12 for value in values)
    for i, value in enumerate(values):
        if n > 1 and w <= i / (n - 1) < 1 - d:
            assert value == b
    rising = [value for i, value in enumerate(values) if n > 1 and i / (n - 1) < w]
    assert rising == sorted(rising, reverse=b < a)


@pytest.mark.parametrize(
    "text",
    ["", "0.9", "linear", "linear:0.9", "linear:1:2:3", "linear:a:b", "linear:0.9:nan", "linear:0:inf", "cosine:1:0"]
    + ["wsd:0:1", "wsd:0:1:0:0.5", "constant", "constant:1:2"],
)
def test_invalid_schedules_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^`kd_schedule` .*: expected constant:V, linear:FROM:TO or wsd:"):
        Schedule.parse(text, "`kd_schedule`")


@pytest.mark.parametrize("text", ["wsd:0:1:0:0.6:0.5", "wsd:0:1:0:-0.1:0.5", "wsd:0:1:0:0.5:-0.5"])
def test_warmup_and_decay_add_up_to_at_most_one(text: str) -> None:
    with pytest.raises(ConfigError, match="^`kd_schedule` .*: WARMUP .* DECAY .*at most 1"):
        Schedule.parse(text, "`kd_schedule`")


# ---- checks against a cache


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schedules")
    data = write_jsonl(folder / "chat.jsonl", conversations(14))
    for name, rule in {
        "top-k": TargetRule(top_k=16),
        "sampled": threshold(0.1),
        "tempered": TargetRule(top_k=16, temperature=2.0),
    }.items():
        build_cache(folder / name, teacher_dir, data, targets=rule)
    return folder


def recipe_of(path: Path, **options: Any) -> DistillLoss:
    return loss_for_cache(cf.open_cache(path), **{"kd_weight": 0.9, **options})


def test_loss_of_a_step_has_its_values_and_the_held_out_loss_the_last(folder: Path) -> None:
    options = {"kd_schedule": "linear:0.8:0.4", "temperature_schedule": "linear:4:1", "divergence": "js(0.1)"}
    recipe = recipe_of(folder / "top-k", position_weighting="teacher-entropy", **options)
    plain = recipe_of(folder / "top-k", kd_weight=0.4, divergence="js(0.1)", position_weighting="teacher-entropy")
    for step, kd_weight, temperature in ((0, 0.8, 4.0), (2, 0.6, 2.5), (4, 0.4, 1.0)):
        found = recipe.at(step, 5)
        assert (found.kd_weight, found.temperature) == pytest.approx((kd_weight, temperature))
        assert replace(found, kd_weight=0.4, temperature=1.0) == plain
        assert found.at(3, 5) is found
    held_out = loss_for_held_out(recipe, cf.open_cache(folder / "top-k"))
    assert held_out == replace(plain, position_weighting="uniform")
    assert plain.at(3, 5) is plain


@pytest.mark.parametrize(
    "name, options, reason",
    [
        ("top-k", {"kd_schedule": "linear:0.9:1.5"}, "kd.schedule.? linear:0.9:1.5: expected numbers from 0"),
        ("top-k", {"kd_schedule": "linear:-0.1:0.5"}, "kd.schedule.? linear:-0.1:0.5: expected numbers from 0"),
        (
            "top-k",
            {"temperature_schedule": "linear:4:0"},
            "temperature.schedule.? linear:4:0: expected positive numbers",
        ),
        (
            "top-k",
            {"temperature_schedule": "linear:4:1", "temperature": 2.0},
            "temperature.schedule.? linear:4:1: found .*temperature.? 2.0",
        ),
        (
            "sampled",
            {"temperature_schedule": "linear:4:1"},
            "temperature.schedule.? linear:4:1: .*sampled .*temperature 1.0.*sample",
        ),
        ("tempered", {"temperature_schedule": "linear:4:2"}, "temperature.schedule.? linear:4:2: .*truncated targets"),
        ("top-k", {"temperature": float("inf")}, "temperature.? inf: expected a positive number"),
        ("top-k", {"temperature": float("nan")}, "temperature.? nan: expected a positive number"),
        ("top-k", {"position_weighting": "entropy"}, "position.weighting.? entropy: expected one of uniform, teacher"),
    ],
)
def test_unsupported_schedules_are_refused(folder: Path, name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as found:
        recipe_of(folder / name, **options)
    assert str(found.value).endswith(".")


def test_schedule_constant_at_the_captured_temperature_is_accepted(folder: Path) -> None:
    assert recipe_of(folder / "tempered", temperature_schedule="constant:2").temperature == 2.0
    assert recipe_of(folder / "sampled", temperature_schedule="linear:1:1").tail == "sampled"


# ---- runs


OPTIONS: dict[str, Any] = {
    "kd_schedule": "wsd:0.2:0.8:0.5:0.5:0.25",
    "temperature_schedule": "linear:3:1",
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "logging_steps": 1,
    "arguments": {**SGD, "learning_rate": 0.5},
}


@pytest.fixture(scope="module")
def whole(folder: Path, student_dir: Path) -> Path:
    output = folder / "whole"
    train(
        output,
        folder / "top-k",
        student=student_dir,
        eval_cache=str(folder / "sampled"),
        eval_steps=2,
        **without_temperature(OPTIONS),
    )
    return output


def without_temperature(options: dict[str, Any]) -> dict[str, Any]:
    """Without a temperature schedule, which the sampled held-out targets do not support."""
    return {name: value for name, value in options.items() if name != "temperature_schedule"}


ALPHAS = [0.2, 0.5, 0.8, 0.8, 0.5]


def test_each_step_uses_and_logs_its_value(whole: Path) -> None:
    steps = [entry for entry in log_history(whole) if "kl" in entry]
    assert [entry["kd_weight"] for entry in steps] == pytest.approx(ALPHAS)
    assert all("temperature" not in entry and "soft" not in entry for entry in steps)
    for entry, kd_weight in zip(steps, ALPHAS, strict=True):
        assert entry["loss"] == pytest.approx((1 - kd_weight) * entry["ce"] + kd_weight * entry["kl"], rel=1e-5)


def test_held_out_losses_use_the_last_value(whole: Path) -> None:
    evaluations = [entry for entry in log_history(whole) if "eval_kl" in entry]
    assert len(evaluations) >= 2
    for entry in evaluations:  # the loss uses the trained tail policy, kl the sampled tail
        assert entry["eval_loss"] == pytest.approx(0.5 * entry["eval_ce"] + 0.5 * entry["eval_soft"], rel=1e-5)
        assert entry["eval_kl"] > 1.1 * entry["eval_soft"]


def test_distill_config_records_the_schedules(whole: Path) -> None:
    record = json.loads((whole / "distill_config.json").read_text())["config"]
    assert record["kd_schedule"] == OPTIONS["kd_schedule"] and record["temperature_schedule"] is None
    assert record["divergence"] == "forward-kl" and record["position_weighting"] == "uniform"


def test_constant_schedule_equals_the_constant(tmp_path: Path, folder: Path, student_dir: Path) -> None:
    for name, options in (
        ("scheduled", {"kd_schedule": "constant:0.6", "temperature_schedule": "linear:2:2"}),
        ("constant", {"kd_weight": 0.6, "temperature": 2.0}),
        ("other", {"kd_schedule": "constant:0.6", "temperature_schedule": "linear:2:2.5"}),
    ):
        arguments = {**SGD, "learning_rate": 0.5}
        train(tmp_path / name, folder / "top-k", student=student_dir, max_steps=3, arguments=arguments, **options)
    scheduled = weights(tmp_path / "scheduled")
    assert distance(scheduled, weights(tmp_path / "constant")) == 0.0
    assert distance(scheduled, weights(tmp_path / "other")) > 1e-5


def test_resumed_run_uses_the_values_of_an_uninterrupted_one(tmp_path: Path, folder: Path, student_dir: Path) -> None:
    options = {**OPTIONS, "save_steps": 2, "student": student_dir, "divergence": "js(0.1)"}
    train(tmp_path / "whole", folder / "top-k", **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", folder / "top-k", on_step=Stop(3), **options)
    with pytest.raises(cf.MismatchError, match="kd_schedule was .*, is 'linear:0.9:0.5'"):
        train(tmp_path / "parts", folder / "top-k", resume=True, **{**options, "kd_schedule": "linear:0.9:0.5"})
    with pytest.raises(cf.MismatchError, match=r"divergence was 'js\(0.1\)', is 'tvd'"):
        train(tmp_path / "parts", folder / "top-k", resume=True, **{**options, "divergence": "tvd"})
    train(tmp_path / "parts", folder / "top-k", resume=True, **options)
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0.0
    histories = [
        [(e["kd_weight"], e["temperature"], e["loss"], e["soft"]) for e in log_history(tmp_path / name) if "kl" in e]
        for name in ("whole", "parts")
    ]
    assert histories[0] == histories[1]
    assert [entry[0] for entry in histories[0]] == pytest.approx(ALPHAS)
    assert [entry[1] for entry in histories[0]] == pytest.approx([3.0, 2.5, 2.0, 1.5, 1.0])


def test_command_line_refuses_both_schedule_and_weight(folder: Path) -> None:
    words = ["train-student", "--cache", str(folder / "top-k"), "--student", "none", "--output", str(folder / "never")]
    for kd_weight in ("0.9", "0.5"):
        result = CliRunner().invoke(main, [*words, "--kd-schedule", "linear:0.9:0.5", "--kd-weight", kd_weight])
        assert result.exit_code == 1
        assert "--kd-schedule" in result.stderr and "--kd-weight" in result.stderr
    assert not (folder / "never").exists()
