"""A training step never waits for the GPU: the operations of a step, counted on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from transformers import AutoModelForCausalLM

import cache_format as cf
from full_runs import build_full
from pipeline.losses import DistillLoss, HeadOutput
from pipeline.models.head import open_head
from pipeline.models.teacher_head import TeacherHead
from pipeline.student.data.dataset import CacheDataset
from pipeline.student.model.hidden_state_matching import HiddenStateMatching
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.trainer import DistillTrainer
from pipeline.student.training.training_arguments import training_arguments
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.targets.rules import TargetRule
from runs import build_cache
from step_counts import Synchronisations, meta_as_a_gpu
from tiny import english

VOCAB = 400

# transformers asks once per kind of mask whether a row holds several documents.
IN_TRANSFORMERS = {"aten._local_scalar_dense.default at masking_utils.py:find_packed_sequence_indices"}


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step")
    (folder / "text.txt").write_text(english(12))
    build_cache(
        folder / "sparse", teacher_dir, folder / "text.txt", hidden=HiddenRule(layers="1,2"), targets=TargetRule()
    )
    build_full(teacher_dir, folder / "text.txt", folder / "full")
    return folder


def synchronisations(
    cache: cf.Cache, student_dir: Path, output: Path, loss: DistillLoss, **options: object
) -> set[str]:
    """Those of the second of two steps: from the batch on the host to clipped gradients."""
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    head, dataset = open_head(model, VOCAB), CacheDataset(cache)
    config = TrainStudentConfig(cache="c", output=str(output), device="cpu", batch_size=4)
    trainer = DistillTrainer(head=head, loss=loss, args=training_arguments(config), train_dataset=dataset, **options)
    batch = dataset.collate([dataset[i] for i in range(4)])
    model.to("meta")
    for name in ("_sums", "_features", "_loss_sum", "_soft"):
        setattr(trainer, name, getattr(trainer, name).to("meta"))
    for _ in range(2):  # a teacher's head is loaded in the first
        with meta_as_a_gpu(), Synchronisations() as counted:
            on_device = send_to_device(batch, "meta", non_blocking=True)
            count = trainer._get_num_items_in_batch([on_device], torch.device("meta"))
            trainer.compute_loss(model, on_device, num_items_in_batch=count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return set(counted.found)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"tail": "sampled", "kd_weight": 0.9},
        {"tail": "bucket", "temperature": 2.0, "divergence": "js"},
        {"tail": "bucket", "position_weighting": "student-entropy"},
    ],
)
def test_sparse_targets(folder: Path, student_dir: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    loss = DistillLoss(**options)
    assert synchronisations(cf.open_cache(folder / "sparse"), student_dir, tmp_path, loss) <= IN_TRANSFORMERS


@pytest.mark.parametrize("everywhere", [False, True])
def test_hidden_state_matching(folder: Path, student_dir: Path, tmp_path: Path, everywhere: bool) -> None:
    matching = HiddenStateMatching("cosine", 1.0, ((0, 1), (1, 2)), (16, 32), everywhere=everywhere)
    cache = cf.open_cache(folder / "sparse")
    assert synchronisations(cache, student_dir, tmp_path, DistillLoss(), matching=matching) <= IN_TRANSFORMERS


def test_full_targets(folder: Path, student_dir: Path, tmp_path: Path) -> None:
    cache = cf.open_cache(folder / "full").with_states()
    loss = DistillLoss(teacher_head=TeacherHead(cache))
    assert synchronisations(cache, student_dir, tmp_path, loss) <= IN_TRANSFORMERS


def test_a_value_that_is_read_is_found(folder: Path, student_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(HeadOutput, "__new__", _reading(HeadOutput.__new__))
    found = synchronisations(cf.open_cache(folder / "sparse"), student_dir, tmp_path, DistillLoss())
    assert any("_local_scalar_dense" in each for each in found - IN_TRANSFORMERS)


def _reading(new: Any) -> Any:
    def reading(cls: Any, loss: Any, *rest: Any) -> Any:
        float(loss)
        return new(cls, loss, *rest)

    return reading
