"""Training on caches with a sampled tail: the supported losses, and the sample that each epoch uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import evaluate
from pipeline.losses import TAIL_POLICIES, DistillLoss, sparse_kl
from pipeline.models.head import open_head
from pipeline.student.data.dataset import CacheDataset, LocalShuffle, collate
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.forward import distillation_output
from pipeline.student.validation.loss_checks import loss_for_cache, loss_for_held_out
from pipeline.student.validation.run_checks import check_run
from pipeline.teacher.targets.rules import TargetRule
from runs import SGD, Stop, build_cache, dense_evaluation, distance, log_history, train, weights
from sampled import random, threshold
from tiny import conversations, write_jsonl

SAMPLES = 3
RULES = {
    "top-k": TargetRule(top_k=16),
    "top-p": TargetRule(kind="top-p", top_p=0.5, max_entries=40),
    "threshold": threshold(0.1),
    "several": threshold(0.1, samples=SAMPLES, seed=5),
    "twice": threshold(0.1, samples=2, seed=6),
    "random": random(12),
    "tempered": threshold(0.1, temperature=2.0),
    "tempered top-k": TargetRule(top_k=16, temperature=2.0),
    "full": TargetRule(top_k=400),
}


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of the same conversations, one per rule, with loss tokens in the answers."""
    folder = tmp_path_factory.mktemp("sampled")
    data = write_jsonl(folder / "chat.jsonl", conversations(18))
    for name, rule in RULES.items():
        build_cache(folder / name, teacher_dir, data, targets=rule)
    return folder


def opened(path: Path) -> cf.Cache:
    return cf.open_cache(path)


def several(folder: Path) -> cf.Cache:
    cache = opened(folder / "several")
    assert cache.metadata.num_samples == SAMPLES
    return cache


# -- supported losses -------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    "name, tail, temperature",
    [
        ("top-k", "bucket", 1.0),
        ("top-p", "bucket", 1.0),
        ("threshold", "sampled", 1.0),
        ("several", "sampled", 1.0),
        ("random", "sampled", 1.0),
        ("tempered", "sampled", 2.0),
        ("tempered top-k", "bucket", 2.0),
    ],
)
def test_default_tail_and_temperature_follow_the_targets(folder: Path, name: str, tail: str, temperature: float):
    found = loss_for_cache(opened(folder / name), kd_weight=0.4)
    assert found == DistillLoss(kd_weight=0.4, temperature=temperature, tail=tail)


SUPPORTED = {
    ("top-k", 1.0): set(TAIL_POLICIES) - {"sampled"},
    ("top-k", 2.0): set(TAIL_POLICIES) - {"sampled", "realized"},
    ("top-p", 4.0): set(TAIL_POLICIES) - {"sampled", "realized"},
    ("threshold", 1.0): set(TAIL_POLICIES),
    ("threshold", 2.0): set(TAIL_POLICIES) - {"sampled", "realized"},
    ("several", 1.0): set(TAIL_POLICIES),
    ("random", 1.0): {"sampled"},
    ("random", 2.0): set(),
    ("tempered", 2.0): set(TAIL_POLICIES) - {"realized"},
    ("tempered", 1.0): set(),
    ("tempered top-k", 2.0): set(TAIL_POLICIES) - {"sampled", "realized"},
    ("tempered top-k", 1.0): set(),
    ("tempered top-k", 4.0): set(),
}


@pytest.mark.parametrize("name, temperature", SUPPORTED)
def test_supported_losses_can_be_computed_and_others_are_refused(folder: Path, name: str, temperature: float):
    """The losses have the same limits, except for random targets, and for `realized` on a tempered cache."""
    cache = opened(folder / name)
    targets = collate(cache[:2], temperature=cache.metadata.targets["temperature"])["targets"]
    z = torch.randn(len(targets), 400, generator=torch.Generator().manual_seed(0))
    for tail in TAIL_POLICIES:
        options: dict[str, Any] = {"tail": tail, "temperature": temperature}
        if tail in SUPPORTED[name, temperature]:
            recipe = loss_for_cache(cache, kd_weight=1.0, **options)
            assert (recipe.tail, recipe.temperature) == (tail, temperature)
            assert sparse_kl(z, targets, **options).isfinite()
        else:
            with pytest.raises(ConfigError, match=r"\.$"):
                loss_for_cache(cache, kd_weight=1.0, **options)
            exact_only = tail == "sampled" and not cache.metadata.sampled
            # The text was generated at temperature 1, which the loss cannot know.
            other_text = tail == "realized" and temperature == cache.metadata.targets["temperature"]
            if name != "random" and not exact_only and not other_text:
                with pytest.raises(ValueError, match="cannot be converted"):
                    sparse_kl(z, targets, **options)


@pytest.mark.parametrize(
    "name, options, reason",
    [
        ("top-k", {"tail": "sampled"}, r"tail.? ?sampled.*top-k has top-k targets"),
        ("top-p", {"tail": "sampled"}, r"tail.? ?sampled.* has top-p targets.*tail.bucket.*targets.threshold"),
        ("random", {"tail": "bucket"}, r"tail.? ?bucket.* has random targets.*tail.sampled"),
        ("random", {"tail": "realized"}, r"tail.? ?realized.*tail.sampled"),
        (
            "threshold",
            {"temperature": 2.0},
            "temperature.? 2.0: .*temperature 1.0.*sample.*temperature.? ?1.0.*temperature.? ?2.0",
        ),
        ("top-k", {"tail": "realized", "temperature": 2.0}, "temperature.? 2.0: .*sample"),
        ("tempered top-k", {"temperature": 1.0}, "temperature.? 1.0: .*truncated targets"),
        ("threshold", {"tail": "buckets"}, "tail.? buckets: expected one of sampled, realized, bucket"),
    ],
)
def test_refusals_name_the_cache_and_a_next_step(folder: Path, name: str, options: dict[str, Any], reason: str):
    with pytest.raises(ConfigError, match=reason):
        loss_for_cache(opened(folder / name), kd_weight=0.9, **options)


@pytest.mark.parametrize(
    "trained, tail, held_out, expected",
    [
        ("threshold", None, "threshold", "sampled"),
        ("threshold", None, "top-k", "bucket"),
        ("threshold", None, "random", "sampled"),
        ("several", None, "threshold", "sampled"),
        ("top-k", None, "threshold", "bucket"),
        ("top-k", None, "random", "sampled"),
        ("top-k", "label", "top-p", "label"),
        ("top-k", "label", "random", "sampled"),
        ("threshold", "renormalise", "top-k", "renormalise"),
        ("tempered", None, "tempered top-k", "bucket"),
    ],
)
def test_held_out_loss_keeps_the_tail_policy_if_it_can(
    folder: Path, trained: str, tail: str | None, held_out: str, expected: str
):
    """Otherwise it uses the default policy of the held-out targets."""
    recipe = loss_for_cache(opened(folder / trained), kd_weight=0.3, tail=tail)
    found = loss_for_held_out(recipe, opened(folder / held_out))
    kl_tail = "sampled" if opened(folder / held_out).metadata.sampled else "bucket"
    assert found == replace(recipe, tail=expected, kl_tail=kl_tail)


def test_held_out_targets_with_another_temperature_are_refused_first(tmp_path: Path, folder: Path, student_dir: Path):
    output = tmp_path / "student"
    for overwrite in (False, True):
        if overwrite:
            train(output, folder / "top-k", student=student_dir, max_steps=1)
        before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        with pytest.raises(ConfigError, match=r"temperature.? 1.0: .*tempered .*temperature 2.0"):
            held_out = str(folder / "tempered")
            train(output, folder / "threshold", student=student_dir, eval_cache=held_out, overwrite=overwrite)
        assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
        assert output.exists() == overwrite


# -- samples ----------------------------------------------------------------------------------------------------------


def test_index_encodes_row_sample_and_filler(folder: Path):
    cache = several(folder)
    dataset, rows = CacheDataset(cache), len(cache)
    row = cache[4]
    assert dataset[4].targets.sample_counts is not None  # all samples
    for sample in range(SAMPLES):
        for filler in (0, 1):
            found = dataset[2 * rows * (sample + 1) + rows * filler + 4]
            assert found.row == 4 and np.array_equal(found.input_ids, row.input_ids)
            assert np.array_equal(found.loss_mask, row.loss_mask if not filler else np.zeros_like(row.loss_mask))
            expected = row.targets.sample(sample)
            for name in ("counts", "ids", "logprobs", "exact_counts", "residual_logprob", "entropy"):
                assert np.array_equal(getattr(found.targets, name), getattr(expected, name)), name
            assert found.targets.sample_counts is None
    assert not dataset[rows + 4].loss_mask.any() and dataset[rows + 4].targets.sample_counts is not None
    for outside in (2 * rows * (SAMPLES + 1), -1 - rows):
        with pytest.raises(IndexError):
            dataset[outside]


record_batches = st.lists(st.integers(1, 5), min_size=1, max_size=20).map(
    lambda sizes: [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
)


@given(record_batches, st.integers(1, 6), st.integers(0, 20), st.integers(1, 7))
def test_each_epoch_uses_the_next_sample_of_the_same_rows(batches, samples: int, epoch: int, multiple: int):
    plain, resampled = (LocalShuffle(batches, seed=1, samples=m, multiple_of=multiple) for m in (1, samples))
    for sampler in (plain, resampled):
        sampler.set_epoch(epoch)
    rows = batches[-1][1]
    assert len(plain) == len(resampled) == len(list(resampled))
    sample, place = np.divmod(list(resampled), 2 * rows)
    assert place.tolist() == list(plain)
    assert set(sample.tolist()) == ({1 + epoch % samples} if samples > 1 else {0})


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_the_sample_of_the_epoch(folder: Path, workers: int):
    cache = several(folder)
    sampler = LocalShuffle(cache.record_batches(), seed=2, samples=SAMPLES, multiple_of=4)
    loader = DataLoader(CacheDataset(cache), 4, sampler=sampler, collate_fn=collate, num_workers=workers)
    for epoch in (0, 1, 2, 3):
        sampler.set_epoch(epoch)
        plain = LocalShuffle(cache.record_batches(), seed=2)
        plain.set_epoch(epoch)
        order = list(plain)
        rows = cache.rows(order)
        for i, batch in enumerate(loader):
            chosen = [replace(r, targets=r.targets.sample(epoch % SAMPLES)) for r in rows[4 * i : 4 * i + 4]]
            last = chosen[-1]
            while len(chosen) < 4:
                chosen.append(replace(last, loss_mask=np.zeros_like(last.loss_mask)))
            expected = collate(chosen)
            for one, other in ((batch, expected), (vars(batch["targets"]), vars(expected["targets"]))):
                for name, value in one.items():
                    assert not isinstance(value, torch.Tensor) or torch.equal(value, other[name]), name


def record_indices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the indices at which training datasets are read."""
    seen: list[int] = []
    getitem = CacheDataset.__getitem__
    monkeypatch.setattr(CacheDataset, "__getitem__", lambda self, index: seen.append(index) or getitem(self, index))
    return seen


def test_epochs_of_a_run_use_the_samples_in_turn(
    tmp_path: Path, folder: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = len(several(folder))
    for resample, expected in ((True, [1, 2, 3, 1]), (False, [0, 0, 0, 0])):
        seen = record_indices(monkeypatch)
        train(tmp_path / str(resample), folder / "several", student=student_dir, epochs=4, resample=resample)
        assert len(seen) == 4 * rows
        for epoch, sample in enumerate(expected):
            here = np.array(seen[epoch * rows : (epoch + 1) * rows])
            assert set(here // (2 * rows)) == {sample}
            assert sorted(here % (2 * rows)) == list(range(rows))
        monkeypatch.undo()
    assert distance(weights(tmp_path / "True"), weights(tmp_path / "False")) > 1e-5


def test_resampled_run_equals_steps_on_each_sample_in_turn(tmp_path: Path, folder: Path, student_dir: Path):
    """Two epochs of one step each, against plain SGD steps on the loss of full logits."""
    cache = several(folder)
    options = {"batch_size": len(cache), "epochs": 2, "kd_weight": 0.8}
    arguments = {**SGD, "learning_rate": 0.5}
    train(tmp_path / "run", folder / "several", student=student_dir, arguments=arguments, resample=True, **options)
    trained = weights(tmp_path / "run")

    def by_hand(samples: list[int]) -> float:
        model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
        head = open_head(model, 400)
        for sample in samples:
            batch = collate([replace(row, targets=row.targets.sample(sample)) for row in cache.iter_rows()])
            hidden = head.hidden_states(batch["input_ids"], batch["position_ids"])
            loss = sparse_kl(model.lm_head(hidden), batch["targets"], kd_weight=0.8, tail="sampled")
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.5 * parameter.grad
        state = model.state_dict()
        return distance(trained, {name: state[name] for name in trained})

    assert distance(trained, weights(student_dir)) > 0.05
    assert by_hand([0, 1]) < 2e-6
    assert min(by_hand([0, 0]), by_hand([1, 0])) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_inside_an_epoch_uses_its_sample(tmp_path: Path, folder: Path, student_dir: Path, workers: int):
    rows = len(several(folder))
    options = {
        "student": student_dir,
        "resample": True,
        "batch_size": 4,
        "epochs": 3,
        "save_steps": 5,
        "learning_rate": 1e-2,
        "dataloader_num_workers": workers,
    }
    steps = -(-rows // 4)
    whole = train(tmp_path / "whole", folder / "several", **options)
    # The last checkpoint before the stop is inside the second epoch.
    assert whole.steps == 3 * steps and 2 * steps - 1 > 5 * (steps // 5 + 1)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", folder / "several", on_step=Stop(2 * steps - 1), **options)
    with pytest.raises(cf.MismatchError, match="resample was True, is False"):
        train(tmp_path / "parts", folder / "several", resume=True, **{**options, "resample": False})
    train(tmp_path / "parts", folder / "several", resume=True, **options)
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0.0


@pytest.mark.parametrize("name", ["threshold", "top-k"])
def test_resample_needs_several_samples(tmp_path: Path, folder: Path, student_dir: Path, name: str):
    with pytest.raises(ConfigError, match=r"^.?.?resample.*one tail sample.*samples"):
        train(tmp_path / "student", folder / name, student=student_dir, resample=True)
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"tail": "bucket"}, r"resample.*tail.? ?bucket.*tail.sampled"),
        ({"tail": "label"}, r"resample.*tail.? ?label"),
        ({"tail": "realized"}, r"resample.*tail.? ?realized"),
        ({"divergence": "reverse-kl"}, r"resample.*tail.? ?bucket"),
        ({"kd_weight": 0.0}, r"resample.*kd.weight.? ?0"),
        ({"kd_schedule": "linear:0:0"}, r"resample.*kd.weight.? ?0"),
    ],
)
def test_resample_is_refused_if_the_loss_uses_no_sample(
    tmp_path: Path, folder: Path, student_dir: Path, options: dict[str, Any], reason: str
):
    with pytest.raises(ConfigError, match=reason):
        train(tmp_path / "student", folder / "several", student=student_dir, resample=True, **options)
    assert not (tmp_path / "student").exists()


def test_run_that_skips_samples_gives_a_warning(tmp_path: Path, folder: Path, student_dir: Path):
    def warned(name: str, **options: Any) -> list[str]:
        given = {"student": str(student_dir), "device": "cpu", "resample": True, "cache": str(folder / "several")}
        return check_run(TrainStudentConfig(output=str(tmp_path / name), **{**given, **options})).warnings

    (once,) = warned("once")
    assert "resample" in once and "several" in once and "3 samples" in once
    assert warned("often", epochs=3.0) == [] == warned("alpha", epochs=3.0, kd_schedule="linear:0:1")
    half = (f"{folder / 'several'}:1", f"{folder / 'twice'}:3")
    (mixed,) = warned("mixed", cache=half, epochs=3.0)
    assert "several" in mixed and "1.5 passes" in mixed and "3 samples" in mixed


# -- end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", ["threshold", "several", "random", "tempered"])
def test_evaluation_equals_that_of_full_logits(folder: Path, student_dir: Path, name: str):
    cache = opened(folder / name)
    temperature = cache.metadata.targets["temperature"]
    found = evaluate(EvaluateConfig(cache=str(folder / name), student=str(student_dir), device="cpu", batch_size=5))
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    expected = dense_evaluation(model, list(cache.iter_rows()), 400, tail="sampled", temperature=temperature)
    for number, value in expected.items():
        if number != "agreement" or name != "random":  # equal counts tie
            assert getattr(found, number) == pytest.approx(value, rel=1e-5), number
    assert found.tokens == cache.num_loss_tokens


@pytest.mark.long
@pytest.mark.parametrize("name, allowed", [("threshold", 0.04), ("several", 0.025), ("random", 0.12)])
def test_sampled_cache_estimates_the_full_divergence(folder: Path, student_dir: Path, name: str, allowed: float):
    """Within about three standard errors; the KL of truncated targets with as many entries is far lower."""
    found, full, truncated = (
        evaluate(EvaluateConfig(cache=str(folder / each), student=str(student_dir), device="cpu")).kl
        for each in (name, "full", "top-k")
    )
    assert abs(found - full) < allowed < (full - truncated) / 2


@pytest.mark.long
def test_two_epochs_on_two_samples(tmp_path: Path, folder: Path, teacher_dir: Path, student_dir: Path, chat_file: Path):
    held_out = build_cache(tmp_path / "held-out", teacher_dir, chat_file, targets=RULES["full"])
    cache = build_cache(tmp_path / "cache", teacher_dir, folder / "chat.jsonl", targets=threshold(0.05, samples=2))
    options = {
        "eval_cache": str(held_out),
        "epochs": 2,
        "eval_steps": 1,
        "learning_rate": 1e-2,
        "kd_weight": 1,
    }
    summary = train(tmp_path / "student", cache, student=student_dir, resample=True, **options)
    evaluations = [entry["eval_kl"] for entry in log_history(tmp_path / "student") if "eval_kl" in entry]
    assert len(evaluations) == summary.steps
    assert summary.eval["kl"] == min(evaluations) < 0.95 * evaluations[0]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    expected = dense_evaluation(trained, list(opened(held_out).iter_rows()), 400)
    assert summary.eval["kl"] == pytest.approx(expected["kl"], rel=1e-4)


def test_logged_kl_is_that_of_all_samples(tmp_path: Path, folder: Path, student_dir: Path):
    """The first step sees all rows, with the initial weights."""
    cache, logs = several(folder), []
    options = {"batch_size": len(cache), "max_steps": 1, "logging_steps": 1, "kd_weight": 0.7}
    train(tmp_path / "student", folder / "several", student=student_dir, on_log=logs.append, **options)
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    expected = dense_evaluation(model, list(cache.iter_rows()), 400, tail="sampled")
    for number, value in expected.items():
        assert logs[0][number] == pytest.approx(value, rel=1e-5), number
    assert logs[0]["loss"] == pytest.approx(0.3 * expected["ce"] + 0.7 * expected["kl"], rel=1e-5)


def test_loss_uses_the_temperature_of_the_cache(folder: Path, student_dir: Path):
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    head = open_head(model, 400)
    for name in ("tempered", "tempered top-k"):
        cache = opened(folder / name)
        recipe = loss_for_cache(cache, kd_weight=1.0)
        with torch.no_grad():
            sums = distillation_output(head, CacheDataset(cache).collate(cache[:5]), recipe)
        expected = dense_evaluation(model, cache[:5], 400, tail=recipe.tail, temperature=2.0)
        assert float(sums.kl / sums.count) == pytest.approx(expected["kl"], rel=1e-5)
        assert float(sums.loss / sums.count) == pytest.approx(4 * expected["kl"], rel=1e-5)
