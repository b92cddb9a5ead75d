"""The quality benchmark: the whole of it on tiny sizes, resuming, and its arithmetic against naive computations."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import cache_format as cf
from benchmarks.quality import objectives, plot, report, runs
from benchmarks.quality.__main__ import main
from benchmarks.quality.corpora import Corpus
from benchmarks.quality.dense import dense_loss
from benchmarks.quality.gradients import compare
from benchmarks.quality.metrics import Sums
from benchmarks.quality.tracks import FULL, LABELS, TRACK_2, arm, planned, quick, threshold, top_k
from benchmarks.quality.train import rate
from head_sums import fused_sums
from pipeline.losses import SparseTargetBatch
from pipeline.models.loading import load_model
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.packing import TokenRow
from runs import dense_logits
from tiny import english

pytestmark = pytest.mark.long  # every track is run once, tiny

ARMS = ("--arms", "threshold-1-8", "--arms", "bucket-top-16", "--arms", "full-perturbed")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains of 28 kB."""
    directory = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate("abz"):
        (directory / f"{name}.txt").write_text(english(400, seed=seed).replace("\n", "\n\n"), encoding="utf-8")
    return directory


def benchmark(work: Path, texts: Path, *options: str) -> None:
    common = ["--quick", "--work", str(work), "--results", str(work / "results"), "--text", str(texts)]
    found = CliRunner().invoke(main, [*common, *options], catch_exceptions=False)
    assert found.exit_code == 0, found.output


# -- the whole of it --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    work = tmp_path_factory.mktemp("quality")
    benchmark(work, texts, "--track", "2", "--seeds", "1", *ARMS)
    return work


def runs_in(results: Path) -> list[dict]:
    return [json.loads(line) for line in (results / "quality.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_run_leaves_a_file_and_the_report_says_how_many_there_are(finished: Path):
    names = {file.name for file in (finished / "quick/track2/runs").iterdir()}
    assert {"full-seed0.json", "labels-seed0.json", "bucket-top-16-seed0.json"} < names
    assert "threshold-1-8-x4-resample-seed0.json" in names and len(names) == 10
    data = json.loads((finished / "results/quality.json").read_text())
    assert (
        data["summary"]["track2_runs"]
        == data["summary"]["track2_runs_wanted"]
        == len(runs_in(finished / "results"))
        == 10
    )
    text = (finished / "results/quality.md").read_text()
    assert "| threshold 1/8 |" in text and "track2 runs 10 of 10" in text


def test_the_control_arm_is_the_full_one_but_for_rounding(finished: Path):
    full, perturbed = (
        json.loads((finished / f"quick/track2/runs/{name}-seed0.json").read_text())["held_out"]["in-domain"]["kl"]
        for name in ("full", "full-perturbed")
    )
    assert full != perturbed == pytest.approx(full, rel=1e-4)


def test_arms_of_several_epochs_have_whole_record_batches_of_the_first_rows(finished: Path):
    (whole,), (quarter,) = (
        [cf.open_cache(path) for path in (finished / "quick/track2/caches").glob(f"*/{name}")]
        for name in ("threshold-8", "threshold-8-samples-4")
    )
    assert whole.num_rows == 4 * quarter.num_rows and quarter.record_batches() == whole.record_batches()[: 80 // 16]
    assert quarter[7].targets.num_samples == 4
    for a, b in zip(whole, quarter, strict=False):
        assert np.array_equal(a.input_ids, b.input_ids)


def test_the_report_shows_the_runs_that_are_there_when_others_are_missing(finished: Path, texts: Path):
    benchmark(finished, texts, "--track", "2", "--seeds", "3", "--report-only", "--results", str(finished / "partial"))
    data = json.loads((finished / "partial/quality.json").read_text())
    assert data["summary"]["track2_runs"] == 10
    assert data["summary"]["track2_runs_wanted"] == len(planned(TRACK_2.arms, range(3)))


def test_the_first_track_takes_a_given_teacher(tmp_path: Path, texts: Path, teacher_dir: Path):
    benchmark(
        tmp_path,
        texts,
        *("--track", "1", "--seeds", "1", "--teacher", str(teacher_dir)),
        *("--arms", "tail-to-label", "--arms", "full-1-row"),
    )
    by_arm = {run["arm"]: run for run in runs_in(tmp_path / "results")}
    smaller, full, run = (by_arm[name] for name in ("full-1-row-per-step", "full", "tail-to-label-top-16"))
    assert full["steps"] == -(-smaller["steps"] // 4)
    assert smaller["learning_rate"] == full["learning_rate"] / 2
    assert "labels-1-row-per-step" in by_arm  # its reference
    assert run["cache"]["entries_per_token"] == 16
    assert run["held_out"].keys() == {"in-domain", "a", "b", "z"}
    for point in ("start", "end"):
        assert 0 < run["gradients"][point]["loss"]["angle"] < 180


def test_finished_runs_are_not_repeated_and_interrupted_ones_are(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
):
    started = []
    one_run = runs.one_run

    def counting(prepared: runs.Prepared, arm: runs.Arm, seed: int, rate: float) -> runs.Run:
        started.append((arm.name, seed))
        if len(started) == 3:
            raise KeyboardInterrupt
        return one_run(prepared, arm, seed, rate)

    monkeypatch.setattr(runs, "one_run", counting)
    options = ["--track", "2", "--seeds", "1", "--arms", "random-13"]
    found = CliRunner().invoke(main, ["--quick", "--work", str(tmp_path), "--text", str(texts), *options])
    assert found.exit_code == 1 and started == [("full", 0), ("labels", 0), ("random-13-draws", 0)]
    benchmark(tmp_path, texts, *options)
    assert started[3:] == [("random-13-draws", 0)]
    benchmark(tmp_path, texts, *options)
    assert len(started) == 4

    (tmp_path / "quick/track2/runs/labels-seed0.json").unlink()
    benchmark(tmp_path, texts, *options)
    assert started[4:] == [("labels", 0)]


def test_a_run_with_other_settings_counts_as_missing(finished: Path):
    track, directory = quick(TRACK_2), finished / "quick/track2"
    other = threshold(8)
    assert len(list(runs.finished(directory, track, [FULL, LABELS, other], [0, 1]))) == 3
    assert len(list(runs.finished(directory, track, [FULL, replace(other, tail="bucket")], [0]))) == 1
    assert not list(runs.finished(directory, replace(track, search_share=0.7), [FULL, LABELS], [0]))
    assert not list(runs.finished(directory, replace(track, search_rates=(1e-3, 1e-2, 1e-1)), [FULL], [0]))


def test_the_learning_rate_is_the_best_for_labels_and_full_together(finished: Path):
    track, directory = quick(TRACK_2), finished / "quick/track2"
    losses = {}
    for file in (directory / "search").iterdir():
        run = json.loads(file.read_text())
        losses.setdefault(run["learning_rate"], []).append(run["held_out"]["in-domain"]["ce"])
    assert len(losses) == 2 and all(len(pair) == 2 for pair in losses.values())
    digest = json.loads((directory / "prepared.json").read_text())["digest"]
    assert runs.chosen_rate(directory, track, digest) == min(losses, key=lambda rate: sum(losses[rate]))
    assert runs.chosen_rate(directory, replace(track, search_rates=(0.5,)), digest) is None


def test_the_caches_hold_what_the_teacher_says(finished: Path):
    directory = finished / "quick/track2"
    (path,) = (directory / "caches").glob("*/top-k-16")
    cache, model = cf.open_cache(path), load_model(str(directory / "teacher"))
    logits = dense_logits(model, cache[5], 300)
    rounding = cache.metadata.codebooks["target_logprobs"].max_error + 1e-3  # of √p; of the states to float16
    for t in np.flatnonzero(cache[5].loss_mask):
        ids, logprobs = cache[5].targets.at(t)
        expected = np.exp(logits[t] - logits[t].max())
        expected /= expected.sum()
        assert np.sqrt(np.exp(logprobs)) == pytest.approx(np.sqrt(expected[ids]), abs=rounding)
        assert len(ids) == 16 and expected[ids].min() >= np.sort(expected)[-16] - 1e-5


def test_the_caches_are_those_of_cache_teacher_samples_included(finished: Path, tmp_path: Path):
    directory, teacher = finished / "quick/track2", tmp_path / "teacher"
    shutil.copytree(directory / "teacher", teacher)
    shutil.copytree(directory / "tokenizer", teacher, dirs_exist_ok=True)
    data = DataConfig(data=str(directory / "text/train.jsonl"), seq_len=quick(TRACK_2).window)
    rule = threshold(8).rule
    cache_teacher(CacheTeacherConfig(teacher=str(teacher), data=data, output=str(tmp_path / "cache"), targets=rule))
    (path,) = (directory / "caches").glob("*/threshold-8")
    found, expected = cf.open_cache(path), cf.open_cache(tmp_path / "cache")
    same = []
    for a, b in zip(found, expected, strict=False):
        assert np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.loss_mask, b.loss_mask)
        same += [np.array_equal(a.targets.at(t)[0], b.targets.at(t)[0]) for t in range(len(a.input_ids))]
    # All of them but for a point of a sample that falls on the border of a token, the states being float16.
    assert len(same) > 1000 and np.mean(same) > 0.98
    for name in ("target_logprobs", "residual_logprob", "entropy"):
        assert found.metadata.codebooks[name].to_json() == expected.metadata.codebooks[name].to_json()


# -- arithmetic -------------------------------------------------------------------------------------


def some_distributions(n: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Teacher's p [n, V], student's hidden states [n, 6] and weight [V, 6], labels [n]."""
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(2 * torch.randn(n, vocab, generator=generator), dim=1)
    hidden, weight = torch.randn(n, 6, generator=generator), torch.randn(vocab, 6, generator=generator)
    return p, hidden, weight, torch.randint(vocab, (n,), generator=generator)


def gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, tensors)


def test_the_dense_loss_is_the_fused_one_with_the_whole_vocabulary_as_entries():
    p, hidden, weight, labels = some_distributions(150, 40)
    hidden.requires_grad_(), weight.requires_grad_()
    dense = dense_loss(hidden, weight, lambda at: p[at], scale=0.1)
    targets = SparseTargetBatch(
        ids=torch.arange(40).expand(150, -1),
        logprobs=p.log(),
        residual_logprob=torch.full((150,), -torch.inf),
        labels=labels,
    )
    fused = fused_sums(hidden, weight, None, targets, tail="bucket", scale=0.1).loss
    torch.testing.assert_close(dense, fused)
    for found, expected in zip(gradients(dense, hidden, weight), gradients(fused, hidden, weight), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shift_invariant", [False, True])
def test_the_dense_loss_of_a_sample_is_the_naive_expression(shift_invariant: bool):
    p, hidden, weight, _ = some_distributions(7, 40)
    w = p * (torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.3) * 2.5
    hidden, weight, w = hidden.double().requires_grad_(), weight.double().requires_grad_(), w.double()
    found = dense_loss(hidden, weight, lambda at: w[at], shift_invariant=shift_invariant)
    z = hidden @ weight.T
    coefficient = w.sum(dim=1) if shift_invariant else 1.0
    expected = (coefficient * z.logsumexp(dim=1)).sum() - (w * z).sum() + torch.xlogy(w, w).sum()
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(a, b)


def test_the_metrics_are_those_of_a_naive_loop():
    p, hidden, weight, labels = some_distributions(90, 12)
    labels[::2] = (hidden @ weight.T).argmax(dim=1)[::2]  # so that some are right
    logq = torch.log_softmax(hidden @ weight.T, dim=1)
    one, other = Sums(), Sums()
    one.add(p[:40], logq[:40], labels[:40])
    other.add(p[40:], logq[40:], labels[40:])
    found = (one + other).means()

    ce = kl = agreement = acceptance = 0.0
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for t in range(90):
        pt, qt = p[t].double().numpy(), np.exp(logq[t].double().numpy())
        ce += -math.log(qt[labels[t]]) / 90
        kl += sum(a * math.log(a / b) for a, b in zip(pt, qt, strict=True)) / 90
        agreement += (np.argmax(pt) == np.argmax(qt)) / 90
        acceptance += sum(min(a, b) for a, b in zip(pt, qt, strict=True)) / 90
        bins[min(int(qt.max() * 15), 14)].append((qt.max(), np.argmax(qt) == int(labels[t])))
    ece = sum(abs(np.mean([c for c, _ in b]) - np.mean([r for _, r in b])) * len(b) / 90 for b in bins if b)
    expected = {"tokens": 90, "ce": ce, "kl": kl, "agreement": agreement, "acceptance": acceptance, "ece": ece}
    assert found == pytest.approx(expected, rel=1e-4)
    assert ece > 0.05 and 0.05 < agreement < 0.95


def test_angle_and_norm_ratio_are_those_of_plane_geometry():
    found = compare(torch.tensor([0.0, 3.0, 3.0]), torch.tensor([0.0, 2.0, 0.0]))
    assert found == pytest.approx({"angle": 45.0, "norm_ratio": 3 / math.sqrt(2)})
    small = compare(torch.tensor([1.0, 1e-5]), torch.tensor([1.0, 0.0]))
    assert small["angle"] == pytest.approx(math.degrees(1e-5), rel=1e-3)
    assert compare(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.0]))["angle"] == pytest.approx(180.0)


def fake_run(arm: runs.Arm, seed: int, ce: float, kl: float, bytes_per_token: float | None = None) -> runs.Run:
    means = {"tokens": 10, "ce": ce, "kl": kl, "agreement": 0.5, "ece": 0.02, "acceptance": 0.7}
    cache = {"bytes_per_token": bytes_per_token, "entries_per_token": 5.0} if bytes_per_token else None
    return {"arm": arm.name, "seed": seed, "held_out": {"in-domain": means}, "gradients": {}, "cache": cache}


def test_shares_of_the_gain_are_paired_by_seed():
    rule = threshold(8)
    found = report.arm_lines(
        [FULL, LABELS, rule],
        [
            *(fake_run(FULL, 0, 4.0, 1.0), fake_run(FULL, 1, 4.2, 1.1)),
            *(fake_run(LABELS, 0, 5.0, 2.0), fake_run(LABELS, 1, 5.2, 2.1)),
            *(fake_run(rule, 0, 4.1, 1.2, 9.0), fake_run(rule, 1, 4.2, 1.2, 9.0)),
            fake_run(rule, 2, 9.0, 9.0, 9.0),  # a seed without references
        ],
    )
    line = found[2]
    assert line.shares("in-domain", "ce") == pytest.approx([0.9, 1.0])  # (5 − 4.1)/1, (5.2 − 4.2)/1
    assert line.shares("in-domain", "kl") == pytest.approx([0.8, 0.9])
    assert line.differences("in-domain", "kl") == pytest.approx([0.2, 0.1])
    # of .9 and 1: mean .95, standard deviation .1/√2
    assert report.spread(line.shares("in-domain", "ce"), 1, 100) == "95.0 ± 7.1"
    facts = {"teacher_held_out": {"in-domain": {"ce": 3.5, "ece": 0.01}}}
    row = report.held_out_table("", found, "in-domain", facts).rows[2]
    assert row[:4] == ["threshold 1/8", "9.0", "5.0", 3] and row[6] == "95.0 ± 7.1"
    assert report.choices("t", found) == {
        "t_smallest_keeping_95%_of_ce_gain": "threshold 1/8 (9.0 bytes/token)",
        "t_smallest_keeping_97%_of_ce_gain": "none",
        "t_smallest_keeping_95%_of_kl_gain": "none",
        "t_smallest_keeping_97%_of_kl_gain": "none",
    }


@pytest.mark.parametrize(
    "titles",
    [
        ("labels ×4", "full ×4", "threshold 1/8 ×4, resample"),
        ("labels, 4 rows per step", "full, 4 rows per step", "threshold 1/20, 4 rows per step"),
        tuple(f"{name}, 1/8 of the text, 4 rows per step" for name in ("labels", "full", "threshold 1/20")),
    ],
)
def test_arms_are_compared_with_references_that_are_trained_as_they_are(titles: tuple[str, ...]):
    labels, full, trained = (next(a for a in TRACK_2.arms if a.title == title) for title in titles)
    values = [(FULL, 1.0), (LABELS, 9.0), (full, 2.0), (labels, 4.0), (trained, 3.0)]
    found = report.arm_lines([a for a, _ in values], [fake_run(a, 0, ce, ce) for a, ce in values])
    assert found[4].shares("in-domain", "ce") == [0.5]


def test_the_plot_is_drawn_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bucket = top_k(16, "bucket")[0]
    found = report.arm_lines(
        [FULL, LABELS, bucket],
        [fake_run(FULL, 0, 1.0, 1.0), fake_run(LABELS, 0, 2.0, 2.0), fake_run(bucket, 0, 1.5, 1.5, 25.0)],
    )
    if plot.draw({"track2": found}, tmp_path / "quality.svg"):
        assert "bucket" in (tmp_path / "quality.svg").read_text()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert not plot.draw({"track2": found}, tmp_path / "none.svg")


def test_the_learning_rate_rises_and_falls():
    rates = [rate(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[-1] == pytest.approx(0.1, abs=0.001) and max(rates) == 1.0


# -- data -------------------------------------------------------------------------------------------


def test_all_arms_see_the_same_rows_in_the_same_order():
    one, four = (objectives.order(64, 8, seed=3, samples=samples) for samples in (1, 4))
    for epoch in range(4):
        one.set_epoch(epoch), four.set_epoch(epoch)
        assert sorted(one) == list(range(64))
        assert [index % 64 for index in four] == list(one)
        assert {index // 128 for index in four} == {epoch + 1}


def test_student_states_and_labels_belong_to_the_loss_tokens():
    rows = [
        TokenRow(np.array([5, 6, 7, 8]), np.array([True, False, True, False]), np.array([2, 2])),
        TokenRow(np.array([9, 10, 11]), np.array([True, True, False]), np.array([3])),
    ]

    class Echo:
        def hidden_states(self, input_ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return input_ids[:, :, None].float()

    hidden, labels = objectives.student_states(Echo(), rows)  # type: ignore[arg-type]
    assert hidden[:, 0].tolist() == [5, 7, 9, 10] and labels.tolist() == [6, 8, 10, 11]
    assert Corpus("x", True, rows, "").loss_tokens.tolist() == [2, 2]


def test_names_of_arms_are_names_of_files():
    names = [a.name for a in TRACK_2.arms]
    assert len(set(names)) == len(names) and all("/" not in name and " " not in name for name in names)
    assert arm("threshold 1/8 ×4, one sample").name == "threshold-1-8-x4-one-sample"


def test_arms_of_fewer_seeds_are_planned_that_often():
    main_arm, beside = arm("a", source="full"), arm("b", source="full", seeds=1)
    assert planned([main_arm, beside], range(2)) == [(main_arm, 0), (beside, 0), (main_arm, 1)]
