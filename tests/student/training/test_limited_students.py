"""A student that switches to other rotary embeddings at 32 tokens: loss and gradients of every document alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import cache_format as cf
from pipeline.losses import DistillLoss, sparse_kl
from pipeline.models.head import open_head
from pipeline.student.data.dataset import collate
from pipeline.student.training.forward import distillation_output
from runs import SGD, build_cache, distance, train, weights
from tiny import LONGROPE, english, tiny_phi3

LIMIT, VOCAB = LONGROPE["original_max_position_embeddings"], 400
LOSS = {"kd_weight": 0.6, "temperature": 2.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """`student`, and caches of another model with documents on both sides of the limit, `packed` and `padded`."""
    folder = tmp_path_factory.mktemp("limited")
    tiny_phi3(folder / "teacher", tokenizer, seed=1)
    tiny_phi3(folder / "student", tokenizer)
    lines = english(24).splitlines()
    (folder / "text.txt").write_text("\n".join(line if i % 2 else line[:50] for i, line in enumerate(lines)))
    for packing in (True, False):
        cache = folder / ("packed" if packing else "padded")
        build_cache(cache, folder / "teacher", folder / "text.txt", seq_len=96, packing=packing)
    return folder


def of_documents_alone(model: PreTrainedModel, rows: list[cf.CacheRow]) -> tuple[float, dict[str, Tensor]]:
    """The sum of the loss, and its gradients, by the model's own forward pass."""
    model.zero_grad()
    total = 0.0
    for row in rows:
        documents = np.split(np.asarray(row.input_ids, np.int64), np.cumsum(row.segment_lengths)[:-1])
        logits = torch.cat([model(input_ids=torch.from_numpy(d)[None]).logits[0, :, :VOCAB] for d in documents])
        loss = sparse_kl(logits, row.targets, reduction="sum", labels=torch.from_numpy(row.label_ids), **LOSS)
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
@pytest.mark.parametrize("name", ["packed", "padded"])
def test_loss_and_gradients_are_sums_over_documents_alone(folder: Path, name: str, checkpointing: bool) -> None:
    cache = cf.open_cache(folder / name)
    model = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float64).train()
    rows = sorted(cache.iter_rows(), key=lambda row: len(row.input_ids))
    rows = [*rows[:2], *rows[-2:]]
    lengths = np.concatenate([row.segment_lengths for row in rows])
    assert lengths.min() < LIMIT < lengths.max() and len(rows[0].input_ids) < len(rows[-1].input_ids)
    expected, gradients = of_documents_alone(model, rows)
    model.zero_grad()
    if checkpointing:  # computes the layers again in the backward pass
        model.gradient_checkpointing_enable()
    output = distillation_output(open_head(model, VOCAB), collate(rows), DistillLoss(**LOSS))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected, rel=1e-7)
    for parameter, gradient in zip(model.parameters(), gradients.values(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7 * gradient.abs().max().item())


def test_trained_weights_do_not_depend_on_the_batch_size(folder: Path) -> None:
    """8 documents in one micro-batch, and one at a time."""
    options = {"student": folder / "student", "max_steps": 1, "learning_rate": 1e-2, "arguments": SGD, "seed": 0}
    for size in (1, 8):
        sizes = {"batch_size": size, "gradient_accumulation_steps": 8 // size}
        train(folder / f"trained-{size}", folder / "padded", **sizes, **options)
    first, trained = weights(folder / "student"), weights(folder / "trained-1")
    moved = distance(first, trained)
    assert distance(trained, weights(folder / "trained-8")) < 1e-4 * moved
