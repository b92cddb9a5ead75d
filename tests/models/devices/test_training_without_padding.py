"""The attention that training takes on CUDA is tried before the first step, with its gradient."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.errors import ConfigError
from pipeline.models.head import Head, open_head
from pipeline.models.isolation import document_attention
from pipeline.models.isolation.padding_free import or_padded, padding_free
from pipeline.student.training import run_parts
from runs import build_cache, train
from tiny import english

attend = document_attention._document


def in_16_bits_only(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The attention of a document with a fault that float32 does not show."""
    return lambda query, *args, **options: (change if query.dtype == torch.bfloat16 else lambda found: found)(
        attend(query, *args, **options)
    )


def fails(found: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available for execution on the device")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.flip(1)


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "no kernel": (fails, "RuntimeError: no kernel image"),
    "other states": (lambda found: found.flip(1), "hidden states differ by"),
    "other gradient": (WrongGradient.apply, "a gradient differs by"),
}


@pytest.fixture
def head(teacher_dir: Path) -> Head:
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32)
    found = padding_free(open_head(model, model.config.vocab_size), 32)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
def test_a_good_model_keeps_its_head(head: Head, dtype: torch.dtype | None, trained: bool) -> None:
    head.model.requires_grad_(trained).train()
    assert or_padded(head, wanted=None, dtype=dtype) is head
    assert head.model.training
    assert all(each.grad is None for each in head.model.parameters())


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_only_training_shows(
    fault: str, head: Head, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change, message = FAULTS[fault]
    monkeypatch.setattr(document_attention, "_document", in_16_bits_only(change))
    assert or_padded(head, wanted=None, dtype=None) is head
    with pytest.raises(ConfigError, match=f"`padding_free`: .*{message}.*Leave it out"):
        or_padded(head, wanted=True, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="distill"):
        assert not or_padded(head, wanted=None, dtype=torch.bfloat16).padding_free
    assert message in caplog.text and "Batches are padded instead" in caplog.text
    assert head.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("good", [True, False])
def test_a_run_on_cuda_tries_it_and_goes_on(
    good: bool,
    teacher_dir: Path,
    student_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "text.txt").write_text(english(12))
    cache = build_cache(tmp_path / "cache", teacher_dir, tmp_path / "text.txt")
    monkeypatch.setattr(run_parts, "_stays_whole_on_cuda", lambda arguments: True)
    if not good:
        monkeypatch.setattr(document_attention, "_document", in_16_bits_only(fails))
    seen = []
    plain = Head.hidden_states
    monkeypatch.setattr(
        Head, "hidden_states", lambda self, *args, **kw: seen.append(self.padding_free) or plain(self, *args, **kw)
    )
    monkeypatch.setattr(run_parts, "without_padding", lambda head, longest, **_: padding_free(head, longest))
    train(tmp_path / "student", cache, student=student_dir, max_steps=2, batch_size=2, bf16=True)
    assert seen[-1] is good
    assert ("Batches are padded instead" in caplog.text) is not good
