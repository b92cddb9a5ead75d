"""The real SmolLM2-135M: what its cache says is what it says. `make test-real`; a few minutes on two cores.

See `real_teacher` in conftest.py for where the model comes from.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import cache_format as cf
from benchmarks.variance import sampled_error, threshold_of, variance
from dense import Deviation, captured_for, check_row, document_logprobs
from head_sums import fused_sums
from pipeline.losses import TAIL_POLICIES, sparse_kl
from pipeline.models.head import open_head
from pipeline.models.isolation.causality import check_causal
from pipeline.models.isolation.shared_rows import check_packing, check_padding
from pipeline.student.data.dataset import CacheDataset, LocalShuffle, collate
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.generation.generate import generate_cache
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from tiny import conversations, english, write_jsonl

pytestmark = pytest.mark.real

VOCAB, WINDOW = 49_152, 256
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def teacher_dir(real_teacher: Path) -> Path:
    return real_teacher


@pytest.fixture(scope="module")
def model(teacher_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32).eval()


def test_it_may_be_packed_in_16_bits_too(teacher_dir: Path) -> None:
    """One token of the probe amplifies rounding errors, to 12 in a state whose largest value is 46."""
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.bfloat16).eval()
    head = open_head(model, VOCAB)
    check_causal(head)
    check_packing(model, head)
    check_padding(model, head)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The README as prose and code, short documents, and conversations."""
    folder = tmp_path_factory.mktemp("texts")
    prose = folder / "prose.txt"
    prose.write_text(README.read_text(encoding="utf-8") + english(60), encoding="utf-8")
    return {"prose": prose, "chat": write_jsonl(folder / "chat.jsonl", conversations(24))}


def settings(teacher: Path, data: DataConfig, output: Path, **options: Any) -> CacheTeacherConfig:
    """Lists of the 64 likeliest tokens, each of which can be compared with the model's own."""
    given = {"targets": TargetRule(top_k=64), "device": "cpu", **options}
    return CacheTeacherConfig(teacher=str(teacher), data=data, output=str(output), **given)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("text", ["prose", "chat"])
def test_cached_targets_equal_the_teachers_log_softmax(
    text: str, packing: bool, teacher_dir: Path, model: PreTrainedModel, texts: dict[str, Path], tmp_path: Path
) -> None:
    data = DataConfig(data=str(texts[text]), seq_len=WINDOW, packing=packing, sample_by="paragraph", max_documents=40)
    cache_teacher(settings(teacher_dir, data, tmp_path / "cache", batch_size=4))
    cache = cf.open_cache(tmp_path / "cache")
    assert cache.metadata.vocab_size == VOCAB and cache.metadata.capture["head"] == "linear"
    assert (max(len(row.segment_lengths) for row in cache.iter_rows()) > 1) == packing

    deviations, positions = [], 0
    for row in cache.rows(range(0, len(cache), max(1, len(cache) // 12))):
        deviations.append(check_row(row, document_logprobs(model, row, VOCAB), cache.metadata))
        positions += int(row.loss_mask.sum())
    worst = Deviation(*(max(column) for column in zip(*deviations, strict=True)))
    print(json.dumps({"text": text, "packing": packing, "positions": positions, "share_of_bound": worst._asdict()}))
    assert positions > 300


def test_shuffled_batches_carry_their_own_targets_and_cost_what_the_codebook_costs(
    teacher_dir: Path, model: PreTrainedModel, texts: dict[str, Path], tmp_path: Path
) -> None:
    """The teacher as its own student: quantisation costs .0012 nats of KL, a wrong pairing whole ones."""
    data = DataConfig(data=str(texts["prose"]), seq_len=WINDOW, sample_by="paragraph", max_documents=40)
    cache_teacher(settings(teacher_dir, data, tmp_path / "cache"))
    cache = cf.open_cache(tmp_path / "cache")
    head = open_head(model, VOCAB)
    check_packing(model, head)
    loader = DataLoader(
        CacheDataset(cache), batch_size=3, sampler=LocalShuffle(cache.record_batches(), seed=0), collate_fn=collate
    )
    sums = np.zeros(5)
    for batch in loader:
        with torch.no_grad():
            hidden = head.hidden_states(batch["input_ids"], batch["position_ids"])
            output = fused_sums(hidden, head.weight, head.bias, batch["targets"], vocab_size=VOCAB)
            sums += [value.item() for value in output]
    _, kl, _, agreement, count = sums
    assert count == cache.num_loss_tokens
    assert 0 <= kl / count < 2e-3
    assert agreement / count > 0.995


@pytest.mark.parametrize("tail", TAIL_POLICIES)
def test_fused_equals_the_reference_on_the_real_head(
    tail: str, teacher_dir: Path, model: PreTrainedModel, texts: dict[str, Path], tmp_path: Path
) -> None:
    """At its real size, V = 49,152, with the states of a student that is not the teacher."""
    data = DataConfig(data=str(texts["chat"]), seq_len=WINDOW, max_documents=4, loss_on="assistant")
    cache_teacher(settings(teacher_dir, data, tmp_path / "cache"))
    batch = collate(cf.open_cache(tmp_path / "cache").rows([0]))
    targets = captured_for(batch["targets"], tail, 2.0)
    head = open_head(model, VOCAB)
    with torch.no_grad():
        states = head.hidden_states(batch["input_ids"], batch["position_ids"]).flatten(0, 1)
        states += 0.5 * states.std() * torch.randn_like(states)
        weight = head.weight.clone()
    options = {"tail": tail, "temperature": 2.0, "kd_weight": 0.6}

    def loss_and_gradients(dtype: torch.dtype, fused: bool) -> list[torch.Tensor]:
        hidden, matrix = (x.detach().to(dtype).requires_grad_() for x in (states, weight))
        if fused:
            count = int(targets.loss_mask.sum())
            loss = fused_sums(hidden, matrix, None, targets, scale=1 / count, chunk_size=50, **options).loss
        else:
            loss = sparse_kl(hidden @ matrix.T, targets, **options)
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, matrix])]

    for a, b in zip(loss_and_gradients(torch.float32, True), loss_and_gradients(torch.float64, False), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_answers_have_the_log_probabilities_of_a_second_plain_pass(
    teacher_dir: Path, model: PreTrainedModel, texts: dict[str, Path], tmp_path: Path
) -> None:
    data = DataConfig(data=str(texts["chat"]), seq_len=WINDOW, max_documents=8)
    config = settings(teacher_dir, data, tmp_path / "cache")
    generation = GenerationConfig(temperature=0.7, top_p=0.9, answers_per_prompt=2, max_new_tokens=24)
    generate_cache(replace(config, generation=generation))
    cache = cf.open_cache(tmp_path / "cache")
    assert len(cache) == 16
    for line, row in zip(cache.answers(), cache.iter_rows(), strict=True):
        expected = document_logprobs(model, row, VOCAB)
        check_row(row, expected, cache.metadata)
        positions = np.flatnonzero(row.loss_mask)
        of_tokens = expected[positions, row.input_ids[positions + 1]]
        np.testing.assert_allclose(line["token_logprobs"], of_tokens, rtol=0, atol=1e-4)


def test_threshold_has_less_variance_than_random_at_as_many_entries(model: PreTrainedModel) -> None:
    """By the closed form, and by what is drawn."""
    head = open_head(model, VOCAB)
    tokens = AutoTokenizer.from_pretrained(model.name_or_path)(README.read_text(encoding="utf-8"))["input_ids"][:WINDOW]
    with torch.no_grad():
        states = head.hidden_states(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0]
        logits = head.logits(states)
    p = logits.softmax(dim=1)
    for draws in (13, 50):
        random = TargetRule(kind="random", draws=draws)
        entries = float((1 - (1 - p) ** draws).sum(dim=1).mean())
        threshold = TargetRule(kind="threshold", tail_threshold=threshold_of(p, entries))
        assert variance(p, threshold) < 0.7 * variance(p, random)
        few = logits[::8]
        for rule in (random, threshold):
            assert sampled_error(few, p[::8], rule) == pytest.approx(variance(p[::8], rule), rel=0.15)
