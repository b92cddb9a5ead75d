"""Caches of a teacher that switches to other rotary embeddings at 32 tokens (longrope): every document as if alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, Phi3ForCausalLM, PreTrainedTokenizerFast

import cache_format as cf
from dense import check_row, document_logprobs
from generating import generate, load
from pipeline.errors import ModelError
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import evaluate
from pipeline.models.head import open_head
from pipeline.student.validation.compatibility import check_isolation
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.verification import verify_against_teacher
from pipeline.teacher.verify_config import TeacherCheckConfig
from runs import build_cache
from tiny import LONGROPE, english, tiny_phi3, write_jsonl

LIMIT, VOCAB = LONGROPE["original_max_position_embeddings"], 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """`teacher`, and caches of documents on both sides of its limit (`mixed`) and on the near side alone (`short`)."""
    folder = tmp_path_factory.mktemp("limited")
    tiny_phi3(folder / "teacher", tokenizer)
    lines = english(60).splitlines()
    short = [" ".join(line.split()[:6]) for line in lines]
    assert max(len(tokenizer(line)["input_ids"]) for line in short) < 28
    for name, texts in (("short", short), ("mixed", [*short[::2], *lines[1::2]])):
        (folder / f"{name}.txt").write_text("\n".join(texts))
        for packing in (True, False):
            cache = folder / f"{name}-{'packed' if packing else 'padded'}"
            build_cache(cache, folder / "teacher", folder / f"{name}.txt", top_k=VOCAB, seq_len=96, packing=packing)
    return folder


CACHES = [f"{text}-{rows}" for text in ("short", "mixed") for rows in ("packed", "padded")]


@pytest.mark.parametrize("name", CACHES)
def test_targets_are_those_of_the_document_alone(folder: Path, name: str) -> None:
    cache, model = cf.open_cache(folder / name), load(folder / "teacher")
    rows = list(cache.iter_rows())
    for row in rows:
        check_row(row, document_logprobs(model, row, VOCAB), cache.metadata)
    lengths = np.concatenate([row.segment_lengths for row in rows])
    assert (lengths.max() > LIMIT) == name.startswith("mixed") and lengths.min() < LIMIT
    assert max(len(row.input_ids) for row in rows) > LIMIT or name == "short-padded"


@pytest.mark.parametrize("name", CACHES)
def test_a_model_is_no_distance_from_its_own_cache_whatever_the_batch(folder: Path, name: str) -> None:
    one, eight = (
        evaluate(
            EvaluateConfig(cache=str(folder / name), student=str(folder / "teacher"), batch_size=size, device="cpu")
        )
        for size in (1, 8)
    )
    assert one.kl < 0.01 and eight.kl == pytest.approx(one.kl, abs=1e-6)


def test_verify_agrees_and_sees_no_noise(folder: Path) -> None:
    teacher = str(folder / "teacher")
    check = verify_against_teacher(
        TeacherCheckConfig(cache=str(folder / "mixed-padded"), teacher=teacher, rows=8, device="cpu")
    )
    assert check.agrees and check.repeatable and check.deviation.found < 1e-4


class Phi3OfItsOwn(Phi3ForCausalLM):
    """Code that comes with a model: its switch cannot be seen from outside."""


class UnknownRotary(nn.Module):
    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.known = [known]  # not a submodule

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.known[0](x, position_ids)


def test_a_switch_in_a_models_own_code_is_refused_unless_rows_are_alone(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = Phi3OfItsOwn.from_pretrained(folder / "teacher")
    model.model.rotary_emb = UnknownRotary(model.model.rotary_emb)

    def capture(output: Path, *, batch_size: int, packing: bool) -> None:
        data = DataConfig(data=str(folder / "mixed.txt"), sample_by="line", seq_len=96, packing=packing)
        options = {"targets": TargetRule(top_k=VOCAB), "batch_size": batch_size, "rows_per_shard": 32}
        cache_teacher(CacheTeacherConfig(teacher=model, tokenizer=tokenizer, data=data, output=str(output), **options))

    with pytest.raises(ModelError, match="depends on the length of that document"):
        capture(tmp_path / "packed", batch_size=1, packing=True)
    with pytest.raises(ModelError, match="Use `batch_size=1`"):
        capture(tmp_path / "together", batch_size=2, packing=False)
    capture(tmp_path / "alone", batch_size=1, packing=False)
    cache, known = cf.open_cache(tmp_path / "alone"), load(folder / "teacher")
    for row in cache.iter_rows():
        check_row(row, document_logprobs(known, row, VOCAB), cache.metadata)
    head = open_head(model, VOCAB)
    check_isolation(cache, head, batch_size=1)
    with pytest.raises(ModelError, match="Use `batch_size=1`"):
        check_isolation(cache, head, batch_size=2)


@pytest.fixture(scope="module")
def generated(folder: Path) -> Path:
    """Answers that pass the limit at different steps, begin behind it, and never reach it, in one batch."""
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": "a" * n} for n in (3, 20, 30, 31, 32, 33, 40)])
    options = {"temperature": 0.0, "max_new_tokens": 14, "targets": TargetRule(top_k=VOCAB)}
    generate(folder / "teacher", prompts, folder / "answers", seq_len=96, batch_size=7, **options)
    return folder / "answers"


@torch.no_grad()
def test_answers_are_those_of_generate_and_their_targets_those_of_the_whole_row(folder: Path, generated: Path) -> None:
    """transformers too computes the key-value cache of a Phi-3 again where it passes the limit."""
    cache, model = cf.open_cache(generated), load(folder / "teacher")
    lengths = []
    for answer, row in zip(cache.answers(), cache.iter_rows(), strict=True):
        prompt = torch.from_numpy(np.asarray(row.input_ids[: answer["prompt_tokens"]], np.int64))[None]
        settings = GenerationConfig(max_new_tokens=14, do_sample=False, eos_token_id=2, pad_token_id=0)
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        assert row.input_ids.tolist() == expected[0].tolist()
        check_row(row, document_logprobs(model, row, VOCAB), cache.metadata)
        lengths.append((prompt.shape[1], len(row.input_ids)))
    assert any(begin < LIMIT < end for begin, end in lengths) and any(end <= LIMIT for _, end in lengths)
    check = verify_against_teacher(TeacherCheckConfig(cache=str(generated), teacher=str(folder / "teacher"), rows=7))
    assert check.agrees and check.deviation.found < 1e-4


@torch.no_grad()
def test_recorded_log_probabilities_are_those_of_the_text_so_far(folder: Path, generated: Path) -> None:
    cache, model = cf.open_cache(generated), AutoModelForCausalLM.from_pretrained(folder / "teacher")
    for answer, row in zip(cache.answers(), cache.iter_rows(), strict=True):
        ids = torch.from_numpy(np.asarray(row.input_ids, np.int64))[None]
        for i, found in enumerate(answer["token_logprobs"], start=answer["prompt_tokens"]):
            logits = model(input_ids=ids[:, :i], use_cache=False).logits[0, -1, :VOCAB]
            assert found == pytest.approx(logits.log_softmax(0)[ids[0, i]].item(), abs=2e-5)
