"""Architectures with special heads through both stages: Gemma 2 and 3, Cohere, Granite, Phi.

The cache holds the model's own log-softmax, and the student's loss is computed from its own logits. `test_heads.py`
tests the heads alone, `test_masked_models.py` masked models.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_heads import LINEAR, OWN
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import cache_format as cf
from dense import check_row, document_logprobs
from pipeline.losses import DistillLoss, sparse_kl
from pipeline.models.head import open_head
from pipeline.student.data.dataset import collate
from pipeline.student.training.forward import install_distillation_forward
from runs import build_cache

NAMES = [
    *("gemma2, soft-capping", "gemma3, no capping", "cohere, logit_scale"),
    *("granite, logits_scaling", "phi, bias"),
]
VOCAB = 400


@pytest.fixture(scope="module", params=NAMES)
def cached(
    request: pytest.FixtureRequest, tmp_path_factory, tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> Path:
    """A teacher whose embedding matrix has padding rows, and its cache."""
    folder = tmp_path_factory.mktemp("architecture")
    given = {**LINEAR, **OWN}[request.param]
    config = type(given)(**{**given.to_dict(), "vocab_size": VOCAB + 8, "max_position_embeddings": 64})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (bias := model.get_output_embeddings().bias) is not None:
        torch.nn.init.normal_(bias)
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    build_cache(folder / "cache", folder / "teacher", text_file)
    return folder


@pytest.mark.long
def test_cached_targets_equal_the_models_own_log_softmax(cached: Path) -> None:
    cache = cf.open_cache(cached / "cache")
    model = AutoModelForCausalLM.from_pretrained(cached / "teacher", dtype=torch.float64).eval()
    rows = cache.rows(range(0, len(cache), 4))
    assert max(len(row.segment_lengths) for row in rows) > 1
    for row in rows:
        check_row(row, document_logprobs(model, row, VOCAB), cache.metadata)
    with pytest.raises(AssertionError):
        check_row(rows[0], np.roll(document_logprobs(model, rows[0], VOCAB), 1, axis=0), cache.metadata)


def test_the_students_loss_is_that_of_its_own_logits(cached: Path) -> None:
    """Value and every gradient, against each document alone: fused for a linear head, general for the others."""
    cache = cf.open_cache(cached / "cache")
    model = AutoModelForCausalLM.from_pretrained(cached / "teacher", dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a student that is not its teacher
            parameter += 0.05 * torch.randn_like(parameter)
    rows = [cache[i] for i in (0, 5, 9)]
    total, count = torch.zeros((), dtype=torch.float64), sum(int(row.loss_mask.sum()) for row in rows)
    for row in rows:
        documents = np.split(np.asarray(row.input_ids, np.int64), np.cumsum(row.segment_lengths)[:-1])
        logits = torch.cat([model(input_ids=torch.from_numpy(d)[None]).logits[0, :, :VOCAB] for d in documents])
        options = {"kd_weight": 0.6, "temperature": 2.0, "labels": torch.from_numpy(row.label_ids)}
        total = total + sparse_kl(logits, row.targets, reduction="sum", **options)
    (total / count).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    head = open_head(model, VOCAB)
    install_distillation_forward(model, head, DistillLoss(kd_weight=0.6, temperature=2.0))
    output = model(scale=1 / count, **collate(rows))
    output.loss.backward()
    assert output.count == count and output.loss.item() == pytest.approx((total / count).item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        largest = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6 * largest, msg=name)
