"""Losses that take anything but a weighted sum of the teacher's probabilities, on targets with few exact entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cache_format as cf
from dense import random_targets
from pipeline.errors import ConfigError
from pipeline.losses import DistillLoss, sparse_kl
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.validation.loss_checks import loss_for_cache, loss_for_held_out
from pipeline.student.validation.run_checks import check_run
from pipeline.student.validation.suitability import exact_entries
from pipeline.teacher.targets.rules import TargetRule
from runs import Stop, build_cache, distance, train, weights
from sampled import random, threshold
from tiny import conversations, tiny_llama, tiny_tokenizer, write_jsonl

RULES = {
    "top-k": TargetRule(top_k=8),
    "one": TargetRule(top_k=1),
    "top-p": TargetRule(kind="top-p", top_p=0.1, max_entries=40),
    "top-p one": TargetRule(kind="top-p", top_p=0.5, max_entries=1),
    "threshold": threshold(0.04),
    "other": threshold(0.04, seed=5),
    "headless": threshold(0.1, head=0),
    "fine": threshold(0.002, head=0),  # 1/500, and some of 400 tokens has 1/400
    "coarse": threshold(0.6),
    "coarse, two": threshold(0.6, head=2),
    "random": random(12),
}


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for every rule, of the same rows."""
    folder = tmp_path_factory.mktemp("suitability")
    data = write_jsonl(folder / "chat.jsonl", conversations(10))
    for name, rule in RULES.items():
        build_cache(folder / name, teacher_dir, data, targets=rule)
    return folder


def exact_counts(cache: cf.Cache) -> np.ndarray:
    return np.concatenate([row.targets.exact_counts[row.loss_mask] for row in cache.iter_rows()])


@pytest.mark.long
@pytest.mark.parametrize("name", RULES)
def test_every_position_has_as_many_exact_entries_as_the_rule_makes_certain(folder: Path, name: str) -> None:
    cache = cf.open_cache(folder / name)
    counts, (fewest, most) = exact_counts(cache), exact_entries(cache)
    assert fewest <= counts.min() and counts.max() <= most
    if name in ("headless", "coarse", "random", "one", "top-p one"):
        assert counts.min() == fewest and (name == "headless" or counts.max() == most)


# ---- what is refused


@pytest.mark.parametrize("name", ["headless", "random"])
@pytest.mark.parametrize(
    "options", [{"divergence": "reverse-kl"}, {"divergence": "forward-kl:0.5,js"}, {"tail": "label"}]
)
def test_without_a_certain_exact_entry_only_the_sample_serves(folder: Path, name: str, options: dict[str, Any]) -> None:
    cache = cf.open_cache(folder / name)
    with pytest.raises(
        ConfigError, match=f"{name} has .* without exact entries.*, and .*Use .*(forward-kl|`tail=sampled`)"
    ):
        loss_for_cache(cache, kd_weight=0.5, **options)
    trained = loss_for_cache(cf.open_cache(folder / "top-k"), kd_weight=0.5, **options)
    if "divergence" in options:
        with pytest.raises(ConfigError, match=f"{name} has"):
            loss_for_held_out(trained, cache)
    else:
        assert loss_for_held_out(trained, cache).tail == "sampled"
    assert loss_for_cache(cache, kd_weight=0.5).tail == "sampled"


def test_the_realized_tail_needs_no_exact_entry_of_a_threshold(folder: Path) -> None:
    assert loss_for_cache(cf.open_cache(folder / "headless"), kd_weight=0.5, tail="realized").tail == "realized"


def test_a_threshold_that_the_likeliest_token_always_reaches_serves_all(folder: Path) -> None:
    assert loss_for_cache(cf.open_cache(folder / "fine"), kd_weight=0.5, divergence="pairwise").tail == "bucket"


@pytest.mark.parametrize("divergence", ["pairwise", "logit-mse"])
def test_what_compares_entries_says_nothing_of_one(divergence: str) -> None:
    targets = random_targets(20, 30, 1, sampled=0, masked=0.0)
    z = torch.randn(20, 30, dtype=torch.float64, requires_grad=True)
    loss = sparse_kl(z, targets, divergence=divergence)
    loss.backward()
    assert loss == 0.0 and not z.grad.any()


@pytest.mark.parametrize("name", ["one", "top-p one", "coarse"])
@pytest.mark.parametrize("divergence", ["pairwise", "forward-kl:0.5,logit-mse:0.5"])
def test_what_compares_entries_is_refused_where_there_are_never_two(folder: Path, name: str, divergence: str) -> None:
    cache = cf.open_cache(folder / name)
    with pytest.raises(ConfigError, match=f"{name} has at most one exact entry per position, and .* would be 0"):
        loss_for_cache(cache, kd_weight=0.5, divergence=divergence)
    loss_for_cache(cache, kd_weight=0.5, divergence="js")
    loss_for_cache(cf.open_cache(folder / "coarse, two"), kd_weight=0.5, divergence=divergence)


# ---- what is warned of


def warned(folder: Path, cache: Any, student: Path, **options: Any) -> list[str]:
    cache = str(folder / cache) if isinstance(cache, str) else tuple(str(folder / name) for name in cache)
    given = {"output": str(folder / "none"), "student": str(student), "device": "cpu", "max_steps": 1}
    return check_run(TrainStudentConfig(cache=cache, **{**given, **options})).warnings


def test_a_loss_that_leaves_the_sample_out_says_so_and_what_it_has_left(folder: Path, student_dir: Path) -> None:
    mean = exact_counts(cf.open_cache(folder / "threshold")).mean()
    for options, tail in (
        ({"divergence": "reverse-kl"}, "bucket"),
        ({"divergence": "forward-kl:0.5,js", "tail": "renormalise"}, "renormalise"),
        ({"divergence": "tvd", "kd_schedule": "linear:0:0.5"}, "bucket"),
    ):
        (warning,) = warned(folder, "threshold", student_dir, **options)
        assert warning.startswith(f"`divergence` {DistillLoss(divergence=options['divergence']).divergence}: ")
        assert f"threshold has {mean:.1f} exact entries per position" in warning and warning.endswith(
            f"has `tail={tail}`"
        )


def test_what_compares_entries_says_where_it_is_nothing(folder: Path, student_dir: Path) -> None:
    for name, sampled in (("threshold", True), ("top-p", False)):
        share = (exact_counts(cf.open_cache(folder / name)) < 2).mean()
        assert 0.05 < share < 0.95
        (warning,) = warned(folder, name, student_dir, divergence="pairwise,js")
        assert f"pairwise teach nothing at positions with fewer than two ({share:.0%} of all)" in warning
        assert ("sampled entries are not used" in warning) == sampled


@pytest.mark.parametrize(
    "name, options",
    [
        ("threshold", {}),
        ("threshold", {"divergence": "forward-kl:2"}),
        ("threshold", {"divergence": "reverse-kl", "kd_weight": 0.0}),
        ("top-k", {"divergence": "pairwise"}),
        ("top-p", {"divergence": "js"}),
        ("fine", {}),
    ],
)
def test_there_is_nothing_to_say_otherwise(folder: Path, student_dir: Path, name: str, options: dict[str, Any]) -> None:
    assert warned(folder, name, student_dir, **options) == []


def test_every_cache_is_spoken_of(folder: Path, student_dir: Path) -> None:
    found = warned(folder, ("threshold", "other"), student_dir, divergence="js", eval_cache=str(folder / "other"))
    assert [each.partition(" has ")[0].rpartition("/")[2] for each in found] == ["threshold", "other"]
    (held_out,) = warned(folder, "top-k", student_dir, divergence="js", eval_cache=str(folder / "other"))
    assert "other has" in held_out


def test_rows_in_another_tokenizers_tokens_are_spoken_of_and_need_exact_entries(folder: Path, tmp_path: Path) -> None:
    student = tiny_llama(tmp_path / "foreign", tiny_tokenizer(330, seed=7), layers=1, hidden=16, seed=3)
    for method in ("project", "uld"):
        (warning,) = warned(folder, "threshold", student, cross_tokenizer=method)
        assert warning.startswith(f"`cross_tokenizer` {method}: ") and warning.endswith("has `tail=bucket`")
        with pytest.raises(ConfigError, match="headless has threshold targets with `top_k` 0, without exact entries"):
            warned(folder, "headless", student, cross_tokenizer=method)


# ---- what is recorded


@pytest.mark.long
def test_what_was_left_open_is_recorded_and_a_resumed_run_is_held_to_it(
    folder: Path, student_dir: Path, tmp_path: Path
) -> None:
    options = {
        "student": student_dir,
        "divergence": "reverse-kl",
        "max_steps": 4,
        "save_steps": 1,
        "learning_rate": 1e-2,
    }
    train(tmp_path / "whole", folder / "threshold", **options)
    output, file = tmp_path / "parts", tmp_path / "parts/distill_config.json"
    with pytest.raises(KeyboardInterrupt):
        train(output, folder / "threshold", on_step=Stop(2), **options)
    record = json.loads(file.read_text())
    assert record["config"]["tail"] is None and record["config"]["temperature"] is None
    assert record["resolved"] == {"tail": "bucket", "temperature": 1.0, "kl_tail": "sampled"}
    file.write_text(json.dumps({**record, "resolved": {**record["resolved"], "tail": "renormalise"}}))
    with pytest.raises(cf.MismatchError, match="tail was resolved to 'renormalise', is 'bucket'"):
        train(output, folder / "threshold", resume=True, **options)
    del record["resolved"]
    for found in ({"kl_tail": "bucket"}, None):  # measured otherwise; by a version that did not say
        file.write_text(json.dumps(record if found is None else {**record, "resolved": found}))
        with pytest.raises(KeyboardInterrupt):
            train(output, folder / "threshold", resume=True, on_step=Stop(3), **options)
    train(output, folder / "threshold", resume=True, **options)
    assert distance(weights(tmp_path / "whole"), weights(output)) == 0.0
