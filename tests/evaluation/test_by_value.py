"""`evaluate --by`: the numbers of each value against both models' full distributions, document by document."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.groups import FEW_ROWS, FEW_TOKENS, groups_of
from pipeline.evaluation.held_out import evaluate
from pipeline.evaluation.intervals import COLUMN, Supported, metrics_of
from pipeline.evaluation.metrics import Evaluation, compare_by_value
from runs import command, dense_logits
from tiny import sentence, tiny_llama, tiny_tokenizer, write_jsonl

VOCAB = 400


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """text -> domain; documents are packed, and those of the longest are cut."""
    rng = random.Random(1)
    lengths = [1] * 30 + [9]
    return {
        f"{i}: {' '.join(sentence(rng) for _ in range(length))}": ("long" if length > 1 else ("web", "code")[i % 3 > 0])
        for i, length in enumerate(lengths)
    }


@pytest.fixture(scope="module")
def cache(texts: dict[str, str], teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("by")
    data = write_jsonl(folder / "data.jsonl", [{"text": text, "domain": domain} for text, domain in texts.items()])
    words = ["cache-teacher", "--teacher", teacher_dir, "--data", data, "--output", folder / "cache"]
    command(*words, "--seq-len", 64, "--keep-columns", "domain", "--device", "cpu", "--targets", "hidden")
    return folder / "cache"


def run(cache: Path, student: Path, **options: Any) -> Evaluation:
    return evaluate(EvaluateConfig(cache=str(cache), student=str(student), device="cpu", **options))


def test_numbers_of_each_value(
    cache: Path, texts: dict[str, str], teacher_dir: Path, student_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    models = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (teacher_dir, student_dir)]
    sums: dict[str, list[float]] = {}
    mixed = 0
    for row in cf.open_cache(cache).iter_rows():
        p, q = (
            torch.from_numpy(dense_logits(model, row, VOCAB)).double().log_softmax(dim=1).numpy() for model in models
        )
        ends = np.cumsum(row.segment_lengths)
        domains = []
        for start, stop in zip(ends - row.segment_lengths, ends, strict=True):
            piece = tokenizer.decode(row.input_ids[start:stop], skip_special_tokens=True)
            (domain,) = {domain for text, domain in texts.items() if piece in text}
            domains.append(domain)
            found = sums.setdefault(domain, [0.0] * 4)
            for t in np.flatnonzero(row.loss_mask[start:stop]) + start:
                kl, label = (np.exp(p[t]) * (p[t] - q[t])).sum(), row.input_ids[t + 1]
                for i, value in enumerate((1, kl, -q[t, label], p[t].argmax() == q[t].argmax())):
                    found[i] += float(value)
        mixed += len(set(domains)) > 1
    assert mixed > 2 and set(sums) == {"web", "code", "long"}
    by, whole = run(cache, student_dir, by="domain"), run(cache, student_dir)
    for domain, (count, *expected) in sums.items():
        group = by.groups[domain]
        assert group.tokens == count
        for name, total in zip(("kl", "ce", "agreement"), expected, strict=True):
            assert group.metrics[name].value == pytest.approx(total / count, rel=1e-4)
    assert list(by.groups) == sorted(sums, key=lambda domain: -sums[domain][0])
    # The whole is what it is without groups, acceptance along documents included.
    for name, metric in whole.metrics.items():
        assert by.metrics[name].value == pytest.approx(metric.value, rel=1e-6)
        assert by.metrics[name].error == pytest.approx(metric.error, rel=1e-4)
    assert by.tokens == whole.tokens == sum(count for count, *_ in sums.values()) and whole.groups == {}
    # Neither the batches nor rows that are left out mix up whose values they are.
    again = run(cache, student_dir, by="domain", batch_size=3)
    assert again.groups["code"].metrics["kl"].value == pytest.approx(by.groups["code"].metrics["kl"].value, rel=1e-6)
    first = run(cache, student_dir, by="domain", max_rows=1)
    assert sum(group.tokens for group in first.groups.values()) == first.tokens < by.tokens


def test_intervals_come_from_the_rows_of_a_value() -> None:
    rng = np.random.default_rng(0)
    table, codes = np.zeros((60, len(COLUMN))), np.arange(60) % 3
    table[:, COLUMN["count"]] = np.where(codes == 0, 200, 20)
    table[:, COLUMN["kl"]] = table[:, COLUMN["count"]] * (codes + rng.random(60))
    supported = Supported(kl="full")
    groups = groups_of(table, codes, ("a", "b", "c"), supported)
    assert list(groups)[0] == "a" and groups["a"].tokens == 20 * 200 and groups["a"].rows == 20
    assert groups["b"].metrics == metrics_of(table[codes == 1], supported)
    assert groups["b"].metrics["kl"].value == pytest.approx(1.5, abs=0.2)
    assert not groups["a"].few and groups["b"].few and groups["b"].tokens < FEW_TOKENS
    assert groups_of(table[: 3 * FEW_ROWS - 3], codes[: 3 * FEW_ROWS - 3], ("a", "b", "c"), supported)["a"].few


def test_a_student_with_another_tokenizer(cache: Path, teacher_dir: Path, tmp_path: Path) -> None:
    data = cache.parent / "data.jsonl"
    words = ["cache-teacher", "--teacher", teacher_dir, "--data", data, "--output", tmp_path / "c", "--seq-len", 64]
    command(*words, "--keep-columns", "domain", "--device", "cpu", "--targets", "top-k", "--top-k", 16)
    student = tiny_llama(tmp_path / "student", tiny_tokenizer(300, seed=1), layers=1, hidden=16)
    found = run(tmp_path / "c", student, by="domain", cross_tokenizer="project", batch_size=4)
    assert set(found.groups) == {"web", "code", "long"}
    assert sum(group.tokens for group in found.groups.values()) == found.tokens
    total = sum(group.tokens * group.metrics["ce"].value for group in found.groups.values())
    assert total / found.tokens == pytest.approx(found.ce, rel=1e-6)


def test_the_command_shows_the_values(cache: Path, student_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    words = ["evaluate", "--cache", cache, "--by", "domain", "--device", "cpu"]
    result = command(*words, "--student", student_dir, "--student", teacher_dir, "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["by"] == "domain" and list(found["students"]) == [str(student_dir), str(teacher_dir)]
    group = found["students"][str(student_dir)]["groups"]["long"]
    assert group["few"] and group["metrics"]["kl"]["relation"] == "full" and group["rows"] > 1
    better = found["groups_compared_with_first"][str(teacher_dir)]["web"]["kl"]
    assert better["better"] == "b" and better["value"] < 0
    result = command(*words, "--student", student_dir)
    (line,) = [line for line in result.stdout.splitlines() if line.strip().startswith("long")]
    assert f"*{group['tokens']}" in line.replace(",", "") and f"{group['metrics']['kl']['value']:.4f}" in line
    assert "*: fewer than 1,000 loss tokens or 10 rows" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if "±" in line)


def test_paired_differences(cache: Path, student_dir: Path, teacher_dir: Path) -> None:
    student, teacher = (run(cache, path, by="domain") for path in (student_dir, teacher_dir))
    differences = compare_by_value(student, teacher)
    for domain, group in student.groups.items():
        difference = teacher.groups[domain].metrics["kl"].value - group.metrics["kl"].value
        assert differences[domain]["kl"]["value"] == pytest.approx(difference)


def test_a_column_that_is_not_kept(cache: Path, student_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"`by` language: .* found domain\. .*`keep_columns=language`"):
        run(cache, student_dir, by="language")


def test_the_report_has_the_same_numbers(cache: Path, student_dir: Path, tmp_path: Path) -> None:
    command("report", cache, "--student", student_dir, "--by", "domain", "--output", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert ">By domain</h3>" in page
    for domain, group in run(cache, student_dir, by="domain").groups.items():
        kl = group.metrics["kl"]
        cells = [f"{'*' if group.few else ''}{group.tokens:,}", f"{group.rows:,}", f"{kl.value:.4f} ± {kl.error:.4f}"]
        assert f'<th scope="row">{domain}</th>' + "".join(f'<td class="n">{cell}</td>' for cell in cells) in page
    command("report", cache, "--by", "domain", "--output", tmp_path / "teacher.html")
    assert "teacher entropy</th>" in (tmp_path / "teacher.html").read_text(encoding="utf-8")
    result = command("report", cache, "--by", "other", "--output", tmp_path / "r.html", status=1)
    assert "--by other" in result.stderr and "found domain" in result.stderr
