"""The teacher's cross-entropy by position, and the warning about windows that it predicts badly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cli import main
from pipeline.teacher import plan as plan_module
from pipeline.teacher.position_loss import BEGINNING, MeanLoss, PositionLoss, WindowLoss
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.packing import build_corpus
from runs import dense_logits
from tiny import english, tiny_llama, tiny_tokenizer, write_jsonl

SEQ_LEN = 48


@pytest.fixture(autouse=True)
def _one_kind_of_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "OTHERS", ())


def plan(*given: Any) -> Result:
    result = CliRunner().invoke(main, ["plan", *map(str, given), "--device", "cpu", "--output", "never"])
    assert result.exit_code == 0, result.output
    return result


def measured(*given: Any) -> dict[str, Any]:
    return json.loads(plan(*given, "--json").stdout)["position_loss"]


def test_losses_are_those_of_full_logits(teacher_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"prompt": line[:40], "completion": line[40:]} for line in english(12).splitlines()]
    text = write_jsonl(tmp_path / "text.jsonl", rows)
    options = ["--teacher", teacher_dir, "--data", text, "--seq-len", SEQ_LEN, "--overlap", 3]
    found = measured(*options, "--all-positions")
    config = DataConfig(data=str(text), seq_len=SEQ_LEN, overlap=3)
    corpus, model = build_corpus(config, tokenizer), AutoModelForCausalLM.from_pretrained(teacher_dir).eval()
    expected: dict[tuple[str, str], list[float]] = {}
    for index, row in enumerate(corpus):
        logits = torch.from_numpy(dense_logits(model, row, len(tokenizer))).log_softmax(1).numpy()
        begins = np.repeat(np.cumsum(row.segment_lengths) - row.segment_lengths, row.segment_lengths)
        later = np.repeat(corpus.continues(index), row.segment_lengths)
        for t in np.flatnonzero(row.loss_mask):
            key = "later" if later[t] else "first", "beginning" if t - begins[t] < BEGINNING else "rest"
            expected.setdefault(key, []).append(-logits[t, row.input_ids[t + 1]])
    assert len(expected) == 4
    for (windows, part), losses in expected.items():
        assert found[windows][part]["tokens"] == len(losses)
        assert found[windows][part]["nats"] == pytest.approx(np.mean(losses), abs=1e-4)
        assert found[windows][part]["standard_error"] == pytest.approx(np.std(losses, ddof=1) / len(losses) ** 0.5)


def test_later_windows_that_are_worse_are_warned_about(tmp_path: Path) -> None:
    """With small tied embeddings, a random teacher predicts that the last token is repeated."""
    tokenizer = tiny_tokenizer(add_bos=True)
    teacher = tiny_llama(tmp_path / "teacher", tokenizer, tie=True, hidden=64, scale=0.05)
    options = ["--teacher", teacher, "--seq-len", SEQ_LEN]
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": " the" * 50 + english(6).replace("\n", " ")}])
    result = plan(*options, "--data", long)
    assert "the teacher predicts later windows of long documents worse" in result.stderr
    assert "--seq-len or --overlap" in result.stderr
    assert "first windows" in result.stdout and "later windows" in result.stdout
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": " the"} for _ in range(8)])
    result = plan(*options, "--data", short)
    assert "first windows" in result.stdout and "later windows" not in result.stdout + result.stderr


def mean(nats: float, tokens: int, deviation: float = 2.0) -> MeanLoss:
    return MeanLoss(nats=nats, standard_error=deviation / tokens**0.5, tokens=tokens)


@pytest.mark.parametrize(
    "first, later, worse",
    [
        (mean(3.0, 10**6), mean(3.05, 10**6), False),  # certain, but a trifle
        (mean(3.0, 10**6), mean(3.2, 10**6), True),
        (mean(3.0, 100), mean(3.5, 100), False),  # may be chance
        (mean(3.0, 100), mean(4.0, 100), True),
        (mean(4.0, 100), mean(3.0, 100), False),
        (None, mean(4.0, 100), False),
        (mean(3.0, 100), None, False),
    ],
)
@pytest.mark.parametrize("part", ["beginning", "rest"])
def test_what_counts_as_worse(first: MeanLoss | None, later: MeanLoss | None, worse: bool, part: str) -> None:
    def windows(loss: MeanLoss | None) -> WindowLoss:
        return WindowLoss(**{"beginning": None, "rest": None, part: loss})

    found = PositionLoss(boundary=BEGINNING, first=windows(first), later=windows(later)).worse
    assert found == ((first, later) if worse else None)
