"""Calibration, acceptance and top-5 agreement against float64 distributions of both models; intervals over rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import cache_format as cf
from cli import main
from foreign_files import NESTED, import_rows, made_up_rows, nested, write_parquet
from pipeline.evaluation import intervals
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import Evaluation, evaluate
from pipeline.evaluation.intervals import COLUMN, Supported, compare, mean_with_error, metrics_of, t_quantile
from pipeline.evaluation.measures import _against_entries, _tokens_per_run
from pipeline.evaluation.metrics import compare as compare_evaluations
from pipeline.losses import DistillLoss, SparseTargetBatch
from pipeline.teacher.targets.rules import TargetRule
from runs import build_cache, dense_logits
from sampled import random, threshold

RULES = {
    "hidden": TargetRule(kind="hidden"),
    "top-k": TargetRule(top_k=16),
    "threshold": threshold(0.02),
    "random": random(20),
}
VOCAB = 400


@pytest.fixture(scope="module")
def caches(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("measures")
    return {kind: build_cache(folder / kind, teacher_dir, text_file, targets=rule) for kind, rule in RULES.items()}


@pytest.fixture(scope="module")
def found(caches: dict[str, Path], student_dir: Path) -> dict[str, Evaluation]:
    return {
        kind: evaluate(EvaluateConfig(cache=str(path), student=str(student_dir), device="cpu"))
        for kind, path in caches.items()
    }


@pytest.fixture(scope="module")
def dense(caches: dict[str, Path], teacher_dir: Path, student_dir: Path) -> dict[str, float]:
    """The metrics in plain float64, with loops."""
    models = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (teacher_dir, student_dir)]
    top5, accepted, confidence, correct, of_choice = [], [], [], [], []
    runs: dict[int, list[float]] = {k: [] for k in range(1, 9)}
    for row in cf.open_cache(caches["hidden"]).iter_rows():
        p, q = (torch.from_numpy(dense_logits(model, row, VOCAB)).double().softmax(dim=1).numpy() for model in models)
        a = np.minimum(p, q).sum(axis=1)
        documents = np.repeat(np.arange(len(row.segment_lengths)), row.segment_lengths)
        for t in np.flatnonzero(row.loss_mask):
            top5.append(p[t].argmax() in np.argsort(-q[t])[:5])
            accepted.append(a[t])
            confidence.append(q[t].max())
            correct.append(q[t].argmax() == row.input_ids[t + 1])
            of_choice.append(p[t][q[t].argmax()])
            for k in runs:
                here = slice(t, t + k)
                if t + k <= len(a) and row.loss_mask[here].all() and len(set(documents[here])) == 1:
                    runs[k].append(1 + sum(np.prod(a[t : t + j]) for j in range(1, k + 1)))
    bins = np.minimum((np.array(confidence) * 15).astype(int), 14)

    def error(truth: list[float]) -> float:
        gaps = np.array(truth, float) - confidence
        return sum(abs(gaps[bins == b].sum()) for b in range(15)) / len(gaps)

    return {
        "top5_agreement": float(np.mean(top5)),
        "acceptance": float(np.mean(accepted)),
        "ece": error(correct),
        "ece_teacher": error(of_choice),
        **{f"tokens_{k}": float(np.mean(values)) for k, values in runs.items()},
    }


@pytest.mark.long
def test_full_distributions_give_every_metric_exactly(found: dict[str, Evaluation], dense: dict[str, float]):
    metrics = found["hidden"].metrics
    for name, expected in dense.items():
        assert metrics[name].relation == "full"
        assert metrics[name].value == pytest.approx(expected, rel=2e-3, abs=1e-4), name  # states are stored in half


@pytest.mark.parametrize("kind", ["top-k", "threshold"])
def test_entries_bound_the_acceptance(kind: str, found: dict[str, Evaluation], dense: dict[str, float]):
    metrics = found[kind].metrics
    for name in ("acceptance", *(f"tokens_{k}" for k in range(1, 9))):
        low, high = metrics[name], metrics[f"{name}_high"]
        assert (low.relation, high.relation) == ("lower bound", "upper bound")
        assert low.value - 2e-3 <= dense[name] <= high.value + 2e-3 and low.value < high.value


def test_calibration_to_the_teacher_from_entries(found: dict[str, Evaluation], dense: dict[str, float]):
    metrics = found["top-k"].metrics
    assert metrics["ece_teacher"].value - 2e-3 <= dense["ece_teacher"] <= metrics["ece_teacher_high"].value + 2e-3
    estimate = found["threshold"].metrics["ece_teacher"]
    assert estimate.relation == "estimate"
    assert abs(estimate.value - dense["ece_teacher"]) < 3 * estimate.error + 2e-3


def test_all_kinds_agree_where_no_teacher_is_needed(found: dict[str, Evaluation], dense: dict[str, float]):
    for kind, evaluation in found.items():
        assert evaluation.metrics["agreement"].relation == ("full" if kind == "hidden" else "estimate")
        assert evaluation.metrics["ece"].value == pytest.approx(dense["ece"], abs=1e-4)
        for name in ("kl", "ce", "perplexity", "agreement"):
            assert evaluation.metrics[name].value == pytest.approx(getattr(evaluation, name))


def test_a_sample_ranks_nothing(
    found: dict[str, Evaluation], teacher_dir: Path, student_dir: Path, text_file: Path, tmp_path: Path
):
    """Nor does a threshold without a least number of exact entries, where no token reaches it."""
    metrics = found["random"].metrics
    assert "top5_agreement" not in metrics and "acceptance" not in metrics and "tokens_1" not in metrics
    build_cache(tmp_path / "cache", teacher_dir, text_file, targets=threshold(0.02, head=0))
    metrics = evaluate(
        EvaluateConfig(cache=str(tmp_path / "cache"), student=str(student_dir), device="cpu", max_rows=2)
    ).metrics
    assert "top5_agreement" not in metrics and metrics["agreement"].relation == "estimate"
    assert metrics["acceptance"].relation == "lower bound"


def test_a_listed_label_bounds_no_other_token():
    """The student's choice is not listed and has p = .04; the label is listed, with next to nothing."""
    logprobs = torch.full((1, 100), -20.0)
    logprobs[0, :6] = torch.tensor([0.3, 0.25, 0.2, 0.12, 0.08, 0.04]).log()
    logprobs = logprobs.log_softmax(dim=1)
    logits = torch.zeros(1, 100).index_fill(1, torch.tensor([5]), 20.0)
    ids = torch.tensor([[0, 1, 2, 3, 4, 77]])
    listed = logprobs.gather(1, ids)
    targets = SparseTargetBatch(
        ids=ids, logprobs=listed, residual_logprob=torch.log1p(-listed.exp().sum(dim=1)), labels=torch.tensor([77])
    )
    assert _against_entries(targets, logits).hidden_p.item() == pytest.approx(0.04, abs=1e-3)


def test_renormalised_entries_bound_nothing(student_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    """Their tail mass is unknown. As 0, it would put the acceptance above its upper bound."""
    source = write_parquet(tmp_path / "rows.parquet", nested(made_up_rows(4), 6))
    found = {}
    for values in ("logprobs", "renormalised"):
        import_rows(source, tmp_path / values, tokenizer, **{**NESTED, "values": values})
        config = EvaluateConfig(cache=str(tmp_path / values), student=str(student_dir), device="cpu")
        found[values] = set(evaluate(config).metrics)
    missing = found["logprobs"] - found["renormalised"]
    assert {"acceptance", "acceptance_high", "tokens_1", "tokens_8_high", "ece_teacher", "ece_teacher_high"} <= missing
    assert found["renormalised"] == {"kl", "ce", "perplexity", "agreement", "top5_agreement", "ece"}


def rows(kl: np.ndarray) -> np.ndarray:
    table = np.zeros((len(kl), len(COLUMN)))
    table[:, COLUMN["count"]], table[:, COLUMN["kl"]] = 10.0, 10.0 * kl
    return table


def test_the_interval_is_that_of_the_mean_over_rows():
    kl = np.random.default_rng(1).normal(1.0, 0.3, 400)
    metric = metrics_of(rows(kl), Supported(kl="full"))["kl"]
    assert metric.value == pytest.approx(kl.mean())
    assert metric.error == pytest.approx(1.96 * kl.std() / 20, rel=0.1)
    assert metrics_of(rows(kl[:1]), Supported(kl="full"))["kl"].error is None


def test_comparison_is_paired_over_rows():
    generator = np.random.default_rng(2)
    hard = generator.normal(1.0, 0.5, 200)
    gain = generator.normal(0.03, 0.02, 200)
    difference = compare(rows(hard), rows(hard - gain), Supported(kl="full"))["kl"]
    assert difference.better == "b" and difference.value == pytest.approx(-gain.mean())
    assert difference.error == pytest.approx(1.96 * 0.02 / np.sqrt(200), rel=0.2)  # unpaired: 35 times as wide
    assert compare(rows(hard), rows(hard), Supported(kl="full"))["kl"].better == ""
    with pytest.raises(ValueError, match="same rows"):
        compare(rows(hard), rows(hard[:-1]), Supported(kl="full"))


@pytest.mark.parametrize("rows", [2, 3, 5, 20])
def test_the_interval_covers_the_mean_as_often_with_few_rows(rows: int, monkeypatch: pytest.MonkeyPatch):
    """The bootstrap alone covers it in 65 % of cases with 2 rows, and in 84 % with 5."""
    monkeypatch.setattr(intervals, "SAMPLES", 200)
    generator, covered = np.random.default_rng(3), []
    for _ in range(1500):
        sums = np.stack([generator.normal(size=rows), np.ones(rows)], axis=1)
        mean, error = mean_with_error(sums)
        covered.append(abs(mean) <= error)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_quantiles_of_student():
    known = {1: 12.7062, 2: 4.3027, 4: 2.7764, 5: 2.5706, 6: 2.4469, 9: 2.2622, 19: 2.0930, 60: 2.0003, 10**6: 1.95996}
    assert {n: t_quantile(n) for n in known} == pytest.approx(known, abs=5e-4)


def test_only_rows_that_a_metric_is_over_make_an_interval():
    """With one such row of three, all resamples that contain it are the same, which is not a narrow interval."""
    table = rows(np.ones(3))
    table[1:] = 0.0
    assert metrics_of(table, Supported(kl="full"))["kl"].error is None
    assert mean_with_error(table[:, [COLUMN["kl"], COLUMN["count"]]])[1] is None


def test_bounds_rank_students_only_where_their_ranges_are_apart():
    supported = Supported(kl="lower bound")
    noise = np.random.default_rng(4).normal(0.0, 0.01, 100)

    def student(kl: float, low: float, high: float) -> np.ndarray:
        table = rows(kl + noise)
        table[:, COLUMN["accepted_low"]] = 10.0 * (low + noise)
        table[:, COLUMN["accepted_high"]] = 10.0 * (high + noise)
        return table

    a = student(1.0, 0.4, 0.6)
    for low, high, better in ((0.5, 0.7, ""), (0.65, 0.8, "b"), (0.2, 0.35, "a")):
        found = compare(a, student(0.5, low, high), supported)
        assert (found["acceptance"].better, found["acceptance"].relation) == (better, "lower bound")
        # The bound of one student may be half that of the other, and its KL twice as large.
        assert found["kl"].better == "" and found["kl"].value == pytest.approx(-0.5)
        assert found["kl"].relation == "lower bound" and "acceptance_high" not in found
    assert compare(a, student(0.5, 0.5, 0.7), Supported(kl="estimate"))["kl"].better == "b"
    assert compare(a, student(0.5, 0.5, 0.7), Supported(kl="entries only"))["kl"].better == ""


def test_equal_entries_share_a_hit():
    """The teacher's choice is one of two tokens that were rounded to the same value; ties of the student are none."""
    ids, values = torch.tensor([[0, 1, 2]] * 4), torch.tensor([[0.3, 0.3, 0.2]] * 4).log()
    residual = torch.full((4,), 0.2).log()
    targets = SparseTargetBatch(ids=ids, logprobs=values, residual_logprob=residual, labels=torch.zeros(4).long())
    logits = torch.zeros(4, 12)
    logits[0, 0], logits[1, 2], logits[2, [1, 2]], logits[3, 4:] = 9.0, 9.0, 9.0, 9.0
    logits[1, 3:7] = 5.0
    sums = [targets[i : i + 1].loss_and_dlogits(logits[i : i + 1].clone(), DistillLoss(), None)[0] for i in range(4)]
    assert [float(each[3]) for each in sums] == [0.5, 0.0, 0.5, 0.0]
    assert _against_entries(targets, logits).top5[[1, 3]].tolist() == [0.0, 0.0]


def test_a_perplexity_that_says_nothing_is_left_out():
    table = rows(np.ones(20))
    table[:, COLUMN["ce"]] = 10.0 * 701
    found = metrics_of(table, Supported(kl="full"))
    assert "perplexity" not in found and "ce" in found
    table[:, COLUMN["ce"]] = 10.0
    assert "perplexity" not in metrics_of(table, Supported(kl="full", perplexity=False))
    means = Evaluation.from_sums(0.0, 1.0, 0.0, 1.0, "full")
    assert "perplexity" in means.to_json() and "perplexity" not in replace(means, metrics=found).to_json()


def test_a_student_is_named_once(tmp_path: Path):
    words = ["evaluate", "--cache", str(tmp_path), "--student", "a", "--student", "b", "--student", "a"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1 and "--student a: is named twice" in result.stderr


@pytest.mark.long
def test_the_command_compares_students(caches: dict[str, Path], teacher_dir: Path, student_dir: Path, tmp_path: Path):
    words = ["evaluate", "--cache", caches["threshold"], "--student", student_dir, "--student", teacher_dir]
    words += ["--device", "cpu", "--json", tmp_path / "out.json"]
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "student B is better than student A by" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if str(tmp_path.parent.parent) not in line)
    found = json.loads((tmp_path / "out.json").read_text())
    kl = [found["students"][str(each)]["metrics"]["kl"] for each in (student_dir, teacher_dir)]
    difference = found["compared_with_first"][str(teacher_dir)]["kl"]
    assert difference["better"] == "b" and difference["value"] == pytest.approx(kl[1]["value"] - kl[0]["value"])
    assert compare_evaluations(Evaluation.from_sums(0, 0, 0, 1, "full"), Evaluation.from_sums(0, 0, 0, 1, "full")) == {}


def test_runs_end_at_gaps_and_documents():
    accepted = torch.tensor([0.5, 0.25, 1.0, 0.5], dtype=torch.float64)
    places, positions = torch.tensor([0, 1, 3, 4]), torch.tensor([0, 1, 2, 3, 0])
    assert _tokens_per_run(accepted, places, positions, 1) == (4 + 2.25, 4)
    assert _tokens_per_run(accepted, places, positions, 2) == (1 + 0.5 + 0.5 * 0.25, 1)
    assert _tokens_per_run(accepted, places, positions, 8) == (0.0, 0)
